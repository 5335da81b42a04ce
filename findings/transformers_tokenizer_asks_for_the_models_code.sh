#!/bin/sh
# transformers 5.24.0: AutoTokenizer on a directory whose tokenizer is transformers' own and whose
# model has code of its own.
#
# tokenizer_config.json names a class of transformers ("TokenizersBackend") and no code; only
# config.json has an auto_map, for the model. One would expect the tokenizer to load without a
# question, since none of that code has to do with it. AutoTokenizer loads the model's configuration
# first, which asks whether the model's code may run and waits 15 seconds for an answer; without one
# it goes on and loads the tokenizer. PreTrainedTokenizerFast loads the same directory and asks
# nothing.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
cat > "$place/load.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

model = Path(sys.argv[1])
words = Tokenizer(models.WordLevel({"[UNK]": 0, "book": 1}, unk_token="[UNK]"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(model)
named = json.loads((model / "tokenizer_config.json").read_text())
assert named["tokenizer_class"] == "TokenizersBackend" and "auto_map" not in named
auto = {"AutoConfig": "configuring.Shape", "AutoModelForCausalLM": "modeling.Net"}
(model / "config.json").write_text(json.dumps({"model_type": "own_net", "auto_map": auto}))
(model / "configuring.py").write_text(
    "from transformers import PretrainedConfig\n\n\n"
    "class Shape(PretrainedConfig):\n    model_type = 'own_net'\n"
)
loader = {"class": PreTrainedTokenizerFast, "auto": AutoTokenizer}[sys.argv[2]]
print("ids:", loader.from_pretrained(model)("book").input_ids)
PYTHON
for way in class auto; do
  said=$("$place/venv/bin/python" "$place/load.py" "$place/$way" "$way" 2>/dev/null < /dev/null)
  echo "$way: $said"
  case $said in *"ids: [1]") ;; *) exit 1 ;; esac
  case $way,$said in
    class,*"run the custom code?"*) exit 1 ;;
    auto,*"run the custom code?"*) ;;
    auto,*) exit 1 ;;
  esac
done
