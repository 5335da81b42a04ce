#!/bin/sh
# DeepSpeed 0.19.8, ZeRO stage 3, torch 2.13.0 on a CPU.
#
# `deepspeed.zero.Init` is a context in which a model's parameters are partitioned as they are made.
# It also puts a torch.autograd.Function of its own in the place of torch.nn.functional.linear, and
# leaves it there: every nn.Linear of the process, those of models that are not DeepSpeed's too, goes
# through it from then on. Forward-mode differentiation of such a model (torch.func.jvp), which
# worked before, raises NotImplementedError.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    setuptools==80.9.0 wheel==0.45.1 numpy==2.4.6 torch==2.13.0
DS_BUILD_OPS=0 "$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    --no-build-isolation deepspeed==0.19.8
cat > "$place/linear.py" <<'PYTHON'
import deepspeed
import torch
from torch import nn

deepspeed.init_distributed("gloo", verbose=False)
apart = nn.Linear(4, 4)
x = torch.randn(2, 4)


def differentiated() -> str:
    try:
        torch.func.jvp(apart, (x,), (torch.ones_like(x),))
    except NotImplementedError:
        return "NotImplementedError"
    return "works"


linear = nn.functional.linear
print("said before: jvp", differentiated())
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=settings):
    nn.Linear(4, 4)
same = nn.functional.linear is linear
print("said after the context: jvp", differentiated(), "| linear is torch's:", same, flush=True)
PYTHON
cd "$place"
said=$(DS_ACCELERATOR=cpu LOCAL_SIZE=1 OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --standalone \
    --nproc-per-node=1 linear.py 2> errors | sed -n 's/^said //p') || { cat errors; exit 1; }
echo "$said"
[ "$said" = "before: jvp works
after the context: jvp NotImplementedError | linear is torch's: False" ]
