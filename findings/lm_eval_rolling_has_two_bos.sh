#!/bin/sh
# lm_eval 0.4.13, transformers 5.24.0: loglikelihood_rolling (word and byte perplexity, as of WikiText)
# of a model whose tokenizer begins every text with BOS, as Llama's does.
#
# A text's likelihood is that of its tokens after one BOS. lm_eval puts BOS before what the tokenizer
# gives, which has it already: the model reads two, and the second one is scored as a token of the
# text, at whatever a model that has never seen BOS predicted makes of it. The model argument
# add_bos_token=False mends it.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 \
    lm_eval==0.4.13 transformers==5.24.0 accelerate==1.14.0 datasets==5.2.0 numpy==2.4.6
cat > "$place/score.py" <<'PYTHON'
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = {"<s>": 0, "<unk>": 1, "to": 2, "be": 3, "or": 4, "not": 5}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
torch.manual_seed(0)
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
config = LlamaConfig(vocab_size=6, num_attention_heads=2, max_position_embeddings=32, **shape)
model = LlamaForCausalLM(config).eval()
for weights in model.parameters():
    weights.data.mul_(5)
text = "to be or not to be"
tokens = torch.tensor(tokenizer(text).input_ids)
print("the tokenizer's tokens", tokens.tolist())


def nats(tokens):
    with torch.no_grad():
        scores = model(tokens[None, :-1]).logits[0].log_softmax(-1)
    return scores.gather(1, tokens[1:, None]).sum().item()


def rolling(**options):
    scored = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    return scored.loglikelihood_rolling([request], disable_tqdm=True)[0]


once, twice = nats(tokens), nats(torch.cat([tokens[:1], tokens]))
found, mended = rolling(), rolling(add_bos_token=False)
print(f"after one BOS {once:.3f} nats, after two, the second one scored, {twice:.3f}")
print(f"lm_eval: {found:.3f}, with add_bos_token=False {mended:.3f}")
assert abs(once - twice) > 0.5 and abs(found - twice) < 1e-2 and abs(mended - once) < 1e-2
PYTHON
HF_HOME="$place/home" HF_HUB_OFFLINE=1 \
    "$place/venv/bin/python" "$place/score.py" 2> "$place/errors" || { cat "$place/errors"; exit 1; }
