#!/bin/sh
# tokenizers 0.23.3 beside sentencepiece 0.2.3: the text of byte pieces of which the last character
# is cut off, as where a generation has reached its last token in the middle of an emoji.
#
# The decoder ByteFallback is what converted SentencePiece models get, and one would expect the
# same text from both: what is whole, and U+FFFD for the rest. SentencePiece does so. tokenizers
# takes adjacent byte pieces as one: whole characters that touch the broken one become a U+FFFD
# for each of their bytes, too, letters included.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    sentencepiece==0.2.3 tokenizers==0.23.3
cat > "$place/decode.py" <<'PYTHON'
import io

import sentencepiece
from tokenizers import decoders

written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["to be or not to be"] * 20), model_writer=written, vocab_size=270,
    byte_fallback=True, hard_vocab_limit=False, add_dummy_prefix=False, minloglevel=2,
)
model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
pieces = model.encode("\u20acX\U0001f642", out_type=str)  # a euro sign, X and a face
assert len(pieces) == 8
for count in (8, 7):
    cut = pieces[:count]
    print(count, ascii(model.decode(cut)), ascii(decoders.ByteFallback().decode(cut)))
PYTHON
said=$("$place/venv/bin/python" "$place/decode.py")
echo "$said"
seen="8 '\\u20acX\\U0001f642' '\\u20acX\\U0001f642'
7 '\\u20acX\\ufffd\\ufffd\\ufffd' '\\ufffd\\ufffd\\ufffd\\ufffd\\ufffd\\ufffd\\ufffd'"
[ "$said" = "$seen" ]
