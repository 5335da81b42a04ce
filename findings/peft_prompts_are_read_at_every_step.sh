#!/bin/sh
# peft 0.21.2, transformers 5.24.0, torch 2.13.0: `generate` of a model with prompt tuning.
#
# One would expect the learned vectors to be read once, before the text. They are laid before every
# new token, too, and stay in the cache: the continuation is not the one that the adapter's own
# forwards give. peft looks for `past_key_values`, which transformers 5.24 call `cache`. Other
# adapters (LoRA, IA3) lay no vectors and are not concerned.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cat > "$place/prompted.py" <<'PYTHON'
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.3}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
llama = LlamaForCausalLM(LlamaConfig(**shape, **heads))
tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
model = get_peft_model(llama, tuned).eval()
text = torch.randint(3, 512, (1, 10))
expected = text
with torch.no_grad():
    for _ in range(6):
        following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), dim=1)
lengths = []
llama.model.layers[0].register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
found = model.generate(input_ids=text, **options)
print(lengths[:3], torch.equal(found, expected))
PYTHON
said=$("$place/venv/bin/python" "$place/prompted.py" 2> "$place/errors") ||
    { cat "$place/errors"; exit 1; }
echo "5 vectors and 10 tokens: vectors and tokens of the first steps, as the forwards say: $said"
[ "$said" = "[15, 6, 6] False" ]
