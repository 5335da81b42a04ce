"""`python -m pretrain.cli` is `pretrain`: torchrun and srun launch ranks with it."""

import os
import sys


def _leave_working_directory() -> None:
    """Import nothing from the working directory, which `python -m` has put first.

    Where the program itself was found there, further processes find it by PYTHONPATH.
    """
    if sys.flags.safe_path:
        return
    root = os.path.realpath(__file__).rsplit(os.sep, 3)[0]  # without pathlib: it may be a user's
    if os.path.realpath(sys.path[0]) == root:
        rest = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *([rest] if rest else [])])
    else:
        del sys.path[0]


if __name__ == "__main__":
    _leave_working_directory()
    from pretrain.cli.main import main

    main()
