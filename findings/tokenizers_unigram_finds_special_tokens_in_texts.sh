#!/bin/sh
# tokenizers 0.23.3, Python 3.11 on Linux.
#
# With encode_special_tokens = True a text that reads like a special token is to be text. Of a
# Unigram model special tokens are pieces, too (UnigramTrainer puts them there), and their score is
# 0, above that of every other piece: the model itself finds them in the text, and gives their ids.
# SentencePiece, from which such files are converted, does not.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$place/encode.py" <<'PYTHON'
from tokenizers import Tokenizer, models, trainers

special = ["<unk>", "<s>", "</s>"]
alphabet = list("ab</s>")
model = Tokenizer(models.Unigram())
trainer = trainers.UnigramTrainer(
    vocab_size=20, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet,
    show_progress=False,
)
model.train_from_iterator(["abab aabb"] * 9, trainer)
model.encode_special_tokens = True
found = model.encode("a<s>b</s>")
print(found.tokens, found.ids)
assert {1, 2} <= set(found.ids)
PYTHON
"$place/venv/bin/python" "$place/encode.py"
