#!/bin/sh
# torch 2.13.0 on CPUs: normal_ on a tensor of the meta device, which has no storage.
#
# Nothing is drawn, so one would expect it to cost nothing. The first call imports torch._dynamo and
# with it torch's compiler, 1 to 2 seconds: building a model on meta to count its parameters, with
# its usual initialisation, takes longer than counting. zero_ does not.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$place/meta.py" <<'PYTHON'
import sys

import torch

empty = torch.empty(2, device="meta")
print("torch._dynamo" in sys.modules, end=" ")
empty.zero_()
print("torch._dynamo" in sys.modules, end=" ")
empty.normal_()
print("torch._dynamo" in sys.modules)
PYTHON
said=$("$place/venv/bin/python" "$place/meta.py")
echo "torch._dynamo is imported after: torch, zero_, normal_: $said"
[ "$said" = "False False True" ]
