#!/bin/sh
# DeepSpeed 0.19.8, ZeRO stage 3, two gloo ranks on CPUs, torch 2.13.0.
#
# Four blocks are called in turn, 16 times each in a forward, as a model that loops over segments
# calls its layers. With live parameters and reuse distance at their least, the forward gathers a
# block at each of its 64 calls, and one would expect the backward, which visits the same calls in
# reverse, to do the same. It gathers 7 times: a block stays gathered while backward passes of its
# other calls are still to come. So twice the forward's count overstates the traffic, and the
# memory of all blocks is held through the backward, whatever stage3_max_live_parameters says.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    setuptools==80.9.0 wheel==0.45.1 numpy==2.4.6 torch==2.13.0
DS_BUILD_OPS=0 "$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    --no-build-isolation deepspeed==0.19.8
cat > "$place/count.py" <<'PYTHON'
import os

import deepspeed
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BLOCKS, CALLS = 4, 16


class Gathers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in function.name():
            self.count += 1
        return function(*args, **(kwargs or {}))


class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(BLOCKS))

    def forward(self, x):
        for _ in range(CALLS):
            for block in self.blocks:
                x = torch.tanh(block(x))
        return x.sum()


zero = {
    "stage": 3,
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 1,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
deepspeed.init_distributed("gloo", verbose=False)
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = Looped()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
settings["zero_allow_untested_optimizer"] = True
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
for _ in range(3):
    with Gathers() as forward:
        loss = engine(torch.randn(4, 512))
    with Gathers() as backward:
        engine.backward(loss)
    engine.step()
if os.environ["RANK"] == "0":
    print(f"gathers of {BLOCKS} blocks, each called {CALLS} times:", end=" ")
    print(f"{forward.count} in the forward, {backward.count} in the backward", flush=True)
PYTHON
cd "$place"
said=$(DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --standalone \
    --nproc-per-node=2 count.py 2> errors | grep '^gathers') || { cat errors; exit 1; }
echo "$said"
seen="gathers of 4 blocks, each called 16 times: 64 in the forward, 7 in the backward"
[ "$said" = "$seen" ]
