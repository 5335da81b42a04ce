#!/bin/sh
# spaCy 3.8.18: the English tokenizer's words of a run of characters without white space, alone and
# before another run.
#
# spaCy's documentation says that a text is first split at white space and each part is then split by
# itself, prefixes, suffixes and exceptions ("Linguistic features: how spaCy's tokenizer works"). So
# one would expect to be able to keep the words of a part and look them up wherever it comes back.
# "so:)" has the two words "so" and ":)"; where ")" follows after a space, it has three.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check spacy==3.8.18
cat > "$place/words.py" <<'PYTHON'
import spacy

split = spacy.blank("en")
for text in ("so:)", "so:) b", "so:) )"):
    print([word.text for word in split(text)])
PYTHON
said=$("$place/venv/bin/python" "$place/words.py")
echo "$said"
seen="['so', ':)']
['so', ':)', 'b']
['so', ':', ')', ')']"
[ "$said" = "$seen" ]
