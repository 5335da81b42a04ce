#!/bin/sh
# DeepSpeed 0.19.8 on a CPU, torch 2.13.0: a step whose gradients are NaN, in float32, with gradient
# clipping, at ZeRO stages 0 and 1.
#
# The stage says how states are divided among ranks, and with one rank there is nothing to divide, so
# one would expect the same step. Stage 1 reports the norm of the gradients, skips the step and counts
# it as skipped. Stage 0 clips, but `get_global_grad_norm()` is None, and the step is taken: every
# weight is NaN afterwards.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    setuptools==80.9.0 wheel==0.45.1 numpy==2.4.6 torch==2.13.0
DS_BUILD_OPS=0 "$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    --no-build-isolation deepspeed==0.19.8
cat > "$place/steps.py" <<'PYTHON'
import deepspeed
import torch
from torch import nn

deepspeed.init_distributed("gloo", verbose=False)
for stage in (0, 1):
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    norms = []
    for factor in (1.0, float("nan")):
        engine.backward(engine(torch.ones(1, 4)).sum() * factor)
        engine.step()
        norm = engine.get_global_grad_norm()
        norms.append(norm if norm is None else round(float(norm), 2))
    lost = any(weights.isnan().any().item() for weights in model.parameters())
    print(f"found stage {stage}: norms {norms}, skipped {engine.skipped_steps}, NaN weights {lost}")
PYTHON
cd "$place"
said=$(DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --standalone \
    --nproc-per-node=1 steps.py 2> errors | grep '^found' || { cat errors; exit 1; })
echo "$said"
seen="found stage 0: norms [None, None], skipped 0, NaN weights True
found stage 1: norms [4.47, inf], skipped 1, NaN weights False"
[ "$said" = "$seen" ]
