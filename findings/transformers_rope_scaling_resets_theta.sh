#!/bin/sh
# transformers 5.24.0, torch 2.13.0: a Llama saved with rope_parameters (theta 500,000), to whose
# config.json somebody adds the rope_scaling of former versions, {"rope_type": "linear", "factor": 2}.
#
# One would expect the two to be merged, or an error. rope_scaling takes the place of rope_parameters
# as a whole, without a word: theta falls back to 10,000, and the model's logits are others.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$place/both.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import AutoConfig, LlamaConfig

directory = Path(sys.argv[1])
rope = {"rope_type": "default", "rope_theta": 500000.0}
LlamaConfig(rope_parameters=rope).save_pretrained(directory)
path = directory / "config.json"
written = json.loads(path.read_text())
written["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
path.write_text(json.dumps(written))
found = AutoConfig.from_pretrained(directory).rope_parameters
print(json.dumps(found, sort_keys=True))
PYTHON
said=$("$place/venv/bin/python" "$place/both.py" "$place/model" 2> "$place/errors") ||
    { cat "$place/errors"; exit 1; }
echo "rope_parameters of both: $said"
[ "$said" = '{"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}' ]
