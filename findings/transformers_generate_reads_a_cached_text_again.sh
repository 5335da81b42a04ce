#!/bin/sh
# transformers 5.24.0, torch 2.13.0: `generate` with a cache that holds all tokens of the text.
#
# One would expect the continuation that it has without a cache, or an error, since a cache has no
# logits. Of the tokens that the cache lacks `generate` takes the last 0, as input_ids[:, -0:], which
# are all: the text is read a second time behind itself, without a warning.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$place/cached.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.3}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()
text = torch.randint(3, 512, (1, 60))
options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
expected = model.generate(text, **options)
for held in (59, 60):
    with torch.no_grad():
        cache = model(text[:, :held], use_cache=True).cache
    found = model.generate(text, cache=cache, **options)
    print(held, torch.equal(found, expected), cache.get_seq_length())
PYTHON
said=$("$place/venv/bin/python" "$place/cached.py" 2> "$place/errors") ||
    { cat "$place/errors"; exit 1; }
echo "tokens held of 60, continued as without a cache, tokens held after 9 more:"
echo "$said"
[ "$said" = "59 True 69
60 False 129" ]
