#!/bin/sh
# transformers 5.24.0, torch 2.13.0: a key "is_causal": false in the config.json of a Llama.
#
# LlamaConfig has no such setting, and unknown keys of a config are kept and not used, so one would
# expect it to change nothing. The attention mask obeys it: the decoder attends to later tokens, and
# AutoModelForCausalLM loads it without a warning.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$place/causal.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

directory = Path(sys.argv[1])
torch.manual_seed(0)
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(directory)
path = directory / "config.json"


def earlier_logits_change() -> bool:
    """Whether the last token has an influence on the logits before it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.arange(8)[None]
    others = tokens.clone()
    others[0, -1] = 9
    with torch.no_grad():
        return not torch.equal(model(tokens).logits[:, :7], model(others).logits[:, :7])


plain = earlier_logits_change()
path.write_text(json.dumps({**json.loads(path.read_text()), "is_causal": False}))
print(plain, earlier_logits_change())
PYTHON
said=$("$place/venv/bin/python" "$place/causal.py" "$place/model" 2> "$place/errors") ||
    { cat "$place/errors"; exit 1; }
echo "a later token changes earlier logits: without the key, with it: $said"
[ "$said" = "False True" ]
