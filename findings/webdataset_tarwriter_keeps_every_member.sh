#!/bin/sh
# webdataset 1.0.2: memory of TarWriter while it writes a stream.
#
# The writer passes samples on to a stream that it cannot seek in, so one would expect its memory not
# to depend on how many it has written. Python's tarfile, beneath it, keeps a TarInfo of every member
# until the archive is closed: some 350 bytes a file, one or more files a sample. A single archive of
# 100 million small samples, written to a pipe, takes 35 GB.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2
cat > "$place/write.py" <<'PYTHON'
import io
import tracemalloc

import webdataset


class Sink(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        return len(data)


writer = webdataset.TarWriter(Sink(), encoder=False)
tracemalloc.start()
held = []
for number in range(1, 40_001):
    writer.write({"__key__": f"{number:08d}", "txt": b"x" * 50})
    if number % 20_000 == 0:
        held.append(tracemalloc.get_traced_memory()[0])
each = (held[1] - held[0]) / 20_000
print(f"{len(writer.tarstream.members)} members kept, {each:.0f} bytes each")
assert 250 < each < 600, each
PYTHON
said=$("$place/venv/bin/python" "$place/write.py")
echo "$said"
case $said in "40000 members kept, "*) ;; *) exit 1 ;; esac
