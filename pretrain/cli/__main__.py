"""`python -m pretrain.cli` is `pretrain`: torchrun and srun start ranks by it."""

from pretrain.cli.main import main

if __name__ == "__main__":
    main()
