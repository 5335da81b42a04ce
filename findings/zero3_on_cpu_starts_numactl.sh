#!/bin/sh
# DeepSpeed 0.19.8, ZeRO stage 3 on a CPU, torch 2.13.0.
#
# A step of training computes and communicates; one would not expect it to start programs. Each
# time gradients are averaged, ZeRO-3 asks how many devices the machine has, and DeepSpeed's CPU
# accelerator counts NUMA nodes with `numactl --hardware`, anew each time, whether or not numactl is
# installed. The answer is for hierarchical communication, which is off. With LOCAL_SIZE in the
# environment, which DeepSpeed's own launcher sets and torchrun does not, nothing is started.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    setuptools==80.9.0 wheel==0.45.1 numpy==2.4.6 torch==2.13.0
DS_BUILD_OPS=0 "$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    --no-build-isolation deepspeed==0.19.8
mkdir "$place/bin"
cat > "$place/bin/numactl" <<'SHELL'
#!/bin/sh
echo "numactl $*" >> "$CALLS"
echo "available: 1 nodes (0)"
echo "node 0 cpus: 0 1"
SHELL
chmod +x "$place/bin/numactl"
cat > "$place/count.py" <<'PYTHON'
import os
from pathlib import Path

import deepspeed
import torch
from torch import nn

calls = Path(os.environ["CALLS"])
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
deepspeed.init_distributed("gloo", verbose=False)
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
for _ in range(4):
    calls.write_text("")
    engine.backward(engine(torch.randn(1, 64)).sum())
    engine.step()
print(f"started in the fourth step: {calls.read_text().splitlines()}", flush=True)
PYTHON
cd "$place"
step() {
  PATH="$place/bin:$PATH" CALLS="$place/calls" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 env "$@" \
      "$place/venv/bin/torchrun" --standalone --nproc-per-node=1 count.py 2> errors |
      grep '^started' || { cat errors; exit 1; }
}
said=$(step)
echo "$said"
[ "$said" = "started in the fourth step: ['numactl --hardware']" ]
with=$(step LOCAL_SIZE=1)
echo "with LOCAL_SIZE=1, $with"
[ "$with" = "started in the fourth step: []" ]
