#!/bin/sh
# SentencePiece 0.2.3, Python 3.11 on Linux.
#
# ParallelEncode divides a long text among threads. Asked for one thread, one would expect it to work
# in the caller's, and a text shorter than a chunk to cost what Encode costs. It starts a thread and
# waits for it each time: a short sentence takes 30 times as long, and longer where others want
# the cores.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3 numpy==2.4.6
cat > "$place/measure.py" <<'PYTHON'
import io
import resource
import time

import sentencepiece

words = "one two three four five six seven eight nine ten".split()
texts = [f"{a} and {b} make {c}." for a in words for b in words for c in words]
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=30, minloglevel=2
)
encoder = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
text, calls = texts[123], 2000


def waits_and_seconds(encode):
    """How often a call waited for another thread, and how long it took."""
    encode()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.perf_counter()
    for _ in range(calls):
        encode()
    seconds = time.perf_counter() - begun
    return (resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before) / calls, seconds / calls


alone, short = waits_and_seconds(lambda: encoder.Encode(text))
threaded, long = waits_and_seconds(
    lambda: encoder.ParallelEncode(text, chunk_len=1024, num_threads=1)
)
assert encoder.Encode(text) == encoder.ParallelEncode(text, chunk_len=1024, num_threads=1)
print(f"{text!r}, waits per call: Encode {alone:.2f}, ParallelEncode with one thread {threaded:.2f}")
print(f"microseconds per call: {short * 1e6:.1f} and {long * 1e6:.1f}, {long / short:.0f} times")
assert alone < 0.1 and threaded > 0.9 and long > 5 * short
PYTHON
"$place/venv/bin/python" "$place/measure.py"
