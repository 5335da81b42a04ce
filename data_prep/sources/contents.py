"""What a file's name and first bytes say of its format, where it is not read as it seems."""

from __future__ import annotations

import codecs
import re
from typing import Any

from data_prep.dataset import parsing
from data_prep.dataset.parsing import json_value

HEAD_BYTES = 1 << 16
"""Bytes at the beginning of a file, after decompression, by which it is judged."""

LFS_POINTER = "a Git LFS pointer"
PAGE = "it is an HTML page; extract its text (trafilatura), or store pages as WARC"
# How files of formats that are no text begin. Those of letters alone have more than a word of them.
_BINARY = (
    (rb"\x1f\x8b\x08", "gzip data"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd data"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data"),
    (rb"\xfd7zXZ\0", "xz data"),
    (rb"\x04\x22\x4d\x18", "lz4 data"),
    (rb"\x1f[\x9d\xa0]", "data of compress"),
    (rb"\xff\x06\0\0sNaPpY", "snappy data"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive or office document"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a rar archive"),
    (rb".{257}ustar", "a tar archive"),
    (rb"PAR[1E](?=.{0,60}[\0-\x08])", "a parquet table"),
    (rb"ARROW1\0|FEA1\0", "an Arrow table"),
    (rb"ORC(?=.{0,60}[\0-\x08])", "an ORC table"),
    (rb"Obj\x01", "an Avro table"),
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"\x89HDF\r\n", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x80[\x02-\x05][\x8a\x95}\]]", "a pickle"),
    (rb"%PDF-\d", "a PDF document"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document"),
    (rb"WARC/\d\.\d+\r?\n", "a WARC archive"),
    (rb"filedesc://", "an ARC archive"),
    (parsing.LFS_POINTER, LFS_POINTER),
    (rb"\{\\rtf\d", "an RTF document"),
    (rb"%!PS", "a PostScript document"),
    # ASCII up to where it goes to Japanese; letters between which there are NULs.
    (rb"[\t-\r -~]*+\x1b\$[@B]", "text in ISO-2022-JP"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16"),
    (rb"(?:[^\0]\0{3}){8}|(?:[^\0]\0{3}){2,7}\Z", "text in UTF-32-LE"),
    (rb"(?:\0{3}[^\0]){8}|(?:\0{3}[^\0]){2,7}\Z", "text in UTF-32-BE"),
    (rb"(?:[^\0]\0){16}|(?:[^\0]\0){2,15}\Z", "text in UTF-16-LE"),
    (rb"(?:\0[^\0]){16}|(?:\0[^\0]){2,15}\Z", "text in UTF-16-BE"),
)
# Behind a byte order mark, an XML declaration and a comment, if there are any.
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,4000}?-->\s*)?<(?:!doctype\s+)?html\b",
    re.IGNORECASE | re.DOTALL,
)
_OBJECT = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*+"\s*:')
# Lines of JSON that are looked into.
_FEW = 4
_KINDS = [(re.compile(pattern, re.DOTALL), name) for pattern, name in _BINARY]

_UNPACK, _CONVERT = "unpack", "convert the texts to jsonl or parquet"
_COMPRESS = "decompress, or compress anew as .gz or .zst"
REFUSED = {
    **dict.fromkeys((".bz2", ".xz", ".lzma", ".lz4", ".lz", ".br", ".z", ".sz"), _COMPRESS),
    **dict.fromkeys((".snappy", ".lzo"), _COMPRESS),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".jar"), _UNPACK),
    ".arc": "convert them to WARC (warcio recompress)",
}
"""What to do with files of these suffixes, which are read in no format."""
TABLES = {
    **dict.fromkeys((".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro"), _CONVERT),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".sqlite", ".db", ".h5", ".hdf5"), _CONVERT),
    **dict.fromkeys((".npy", ".npz", ".pkl", ".pickle", ".pt", ".safetensors"), _CONVERT),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".djvu"), _CONVERT),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".rtf", ".ps", ".eps", ".ipynb"), _CONVERT),
}
"""The same, of suffixes that are no plain text, unless a configuration says that they are."""


def binary(head: bytes) -> str:
    """The format that is no text, by its first bytes; empty where none is known."""
    return next((name for pattern, name in _KINDS if pattern.match(head)), "")


def remedy(found: str, other: str) -> str:
    """What to do with a file that holds what `binary` found; `other`: where it is no pointer."""
    if found == LFS_POINTER:
        return parsing.FETCH
    return other


def is_text(head: bytes) -> bool:
    """Whether the beginning of a file is text in UTF-8, as far as it goes; no text has NULs."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


def is_json_lines(head: bytes) -> bool:
    """Whether the beginning of a file is JSON objects, one a line, or a single one."""
    first, *rest = _lines(head) or [b""]
    if not rest:
        # Whole, or as far as the head reaches.
        return bool(_OBJECT.match(first))
    # The last line may be cut.
    whole = [first, *rest[: max(len(rest) - 1, 1)]][:_FEW] if len(rest) > 1 else [first]
    return all(isinstance(_value(line), dict) for line in whole) and rest[0].lstrip()[:1] == b"{"


def is_page(head: bytes) -> bool:
    """Whether a text begins as an HTML page."""
    return bool(_PAGE.match(head))


def objects(head: bytes, most: int) -> list[dict[str, Any]]:
    """The objects among the first lines of JSON lines, `most` of them, that are whole."""
    values = map(_value, _lines(head)[:most])
    return [value for value in values if isinstance(value, dict)]


def keys(head: bytes, most: int = _FEW) -> list[str]:
    """The keys of the objects that are whole among the first few lines; none where none is."""
    return [*dict.fromkeys(key for found in objects(head, most) for key in found)]


def _lines(head: bytes) -> list[bytes]:
    return [line for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]


def _value(line: bytes) -> object:
    try:
        return json_value(line)
    except ValueError:
        return None
