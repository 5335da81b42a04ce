#!/bin/sh
# datatrove 0.10.1: PIIFormatter on the same text three times.
#
# A formatter takes a text and returns a text, so one would expect the same text each time. Its
# replacements are taken in turn, from one text to the next: the default ones for addresses are two
# for e-mail and six for IP. What stands in a document depends on how many addresses the process
# has seen before it, that is on the number of tasks and on where one of them was resumed; and
# documents that were equal before are no longer, so that exact duplicates are not found after it.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    datatrove==0.10.1 regex==2026.11.19
cat > "$place/mask.py" <<'PYTHON'
from datatrove.pipeline.formatters import PIIFormatter

text = "Write to someone@some-company.com."
default = PIIFormatter()
for _ in range(3):
    print(default.format(text))
one = PIIFormatter(email_replacement="email@example.com")
print(len({one.format(text) for _ in range(3)}), "text with a single replacement")
PYTHON
said=$("$place/venv/bin/python" "$place/mask.py")
echo "$said"
seen="Write to email@example.com.
Write to firstname.lastname@example.org.
Write to email@example.com.
1 text with a single replacement"
[ "$said" = "$seen" ]
