"""What the process of which ranks are forked imports; it starts no thread, which would be lost."""

from __future__ import annotations

import torch._dynamo  # noqa: F401  # by the first optimizer at the latest

import pretrain.training.trainer  # noqa: F401
from pretrain.training.engine import build_ops

build_ops()
