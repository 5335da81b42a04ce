"""`python -m pretrain.cli` is `pretrain`: torchrun and srun launch ranks with it."""

from pretrain.cli.main import main

if __name__ == "__main__":
    main()
