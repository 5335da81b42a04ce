"""The contract between data_prep and pretrain: shards, and the manifest that makes them a data set.

A shard is an uncompressed tar that stock webdataset reads. A document is two members, `KEY.json`
(id, source, bytes, tokens, and, for a document of a prompt and an answer, prompt: how many of its
first tokens are the prompt's; for one of several, also turns: the tokens before its second prompt,
before the answer to that, and so on) and `KEY.tokens.npy`, with KEY its zero-padded number in the
shard.

webdataset reads the tars, but ends a shard without an exception where a tar is cut or a
header is damaged, and passes flipped bits on. So sizes, counts and sha256 are recorded and checked
here. They find damage, not malice: whoever can change a shard can change the manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.dataset import durable, settings
from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted

# webdataset reads this once, at its import: no shell commands as URLs, no pickles. It imports
# torch, so it is imported where a shard is opened and not with this module.
os.environ["WDS_SECURE"] = "1"

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# What a checkpoint of pretrain's has beside its manifest.json, and a run's directory.
_OF_A_CHECKPOINT, _OF_A_RUN = "manifest.sha256", "checkpoints"

# The manifest's first key, and its value while the sha256 is computed.
_SEAL, _NO_DIGEST = "checksum", "0" * 64
_SEALED = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')
# With one byte of the above changed.
_DIGEST_AT_THE_START = re.compile(rb".{0,54}[0-9a-f]{31}", re.DOTALL)

_UINT16_IDS = 1 << 16
_OWNER = "data-prep"
# What reading the members of a damaged document raises; NumPy the last ones, for an array's head.
_UNREADABLE = KeyError, TypeError, AttributeError, ValueError
# As NumPy writes it before an array of tokens (its format, version 1.0): type and length.
_ARRAY_HEAD = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<]u[1248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)
_BUFFER_BYTES = 1 << 20
# Above, a member's size takes a block of its own.
_PLAIN_SIZE = 8**11 - 1
_REMEDY = "copy it again or prepare the data set again; `data-prep verify` lists every problem"


class DataError(ValueError):
    """A data set that cannot be used; the message names the file."""


@dataclass(frozen=True, eq=False)
class Document:
    """One document; `bytes` counts its text in UTF-8, `tokens` [n] holds neither BOS nor EOS.

    `turns` counts the tokens before its first answer, before the prompt after that, and so on to
    the last answer; empty: a plain text.
    """

    id: str
    source: str
    bytes: int
    tokens: np.ndarray
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredDocument:
    """A document that is too large to be held: `blocks` are its `tokens` ids, in their order.

    Its turns are those of Document.
    """

    id: str
    source: str
    bytes: int
    tokens: int
    blocks: Iterator[np.ndarray]
    turns: tuple[int, ...] = ()


def prompt_tokens(turns: Sequence[int]) -> int:
    """How many tokens of a document with these turns belong to its prompts."""
    return sum(turns[::2]) - sum(turns[1::2])


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard: its name and size, and what it holds."""

    name: str
    bytes: int
    sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class InputInfo:
    """An input file that the data set was made of; no sha256: not all of it was read (`limit`)."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer in the data set's directory; an id is None where the model has none."""

    file: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None


@dataclass(frozen=True)
class Manifest:
    """A whole data set. `dtype` is of the stored ids; `text_bytes` are UTF-8 bytes of all texts.

    `rejected` records could not be used; cleaning dropped the `dropped` documents, and
    `duplicates` are documents of which another copy was kept. `prompt_tokens` of the tokens belong
    to prompts; the file omits it where there are none. `reports` has the sha256, by
    name, of the files that say what became of the records; data sets of earlier versions, and of
    other programs, have none.
    """

    format_version: int
    tokenizer: TokenizerInfo
    dtype: str
    configuration: dict[str, Any]
    inputs: list[InputInfo]
    shards: list[ShardInfo]
    documents: int
    tokens: int
    text_bytes: int
    rejected: int
    dropped: int
    duplicates: int
    prompt_tokens: int = 0
    reports: dict[str, str] = field(default_factory=dict)


def dtype_of(vocab_size: int) -> str:
    """The dtype of stored ids: uint16 up to a vocabulary of 65,536, else uint32."""
    return "uint16" if vocab_size <= _UINT16_IDS else "uint32"


def shard_name(index: int) -> str:
    """The file name of the shard with this number."""
    return f"shard-{index:05d}.tar"


def write_shard(
    path: Path, documents: Iterable[Document | StoredDocument], dtype: str
) -> ShardInfo:
    """Write a shard durably; equal documents give equal bytes on any machine.

    Raises DataError for an id that `dtype` cannot hold.
    """
    with durable.replacing(path) as file:
        tar = _Tar(file)
        for document in documents:
            tar.add(document, dtype, path)
        tar.close()
    return tar.info(path)


def write_part(
    path: Path, documents: Iterable[Document | StoredDocument], dtype: str, first: int
) -> ShardInfo:
    """Write documents `first` and following of a shard durably, for `join_parts`.

    Raises as `write_shard` does.
    """
    with durable.replacing(path) as file:
        tar = _Tar(file, first)
        for document in documents:
            tar.add(document, dtype, path)
    return tar.info(path)


def join_parts(path: Path, parts: Sequence[Path], infos: Sequence[ShardInfo]) -> ShardInfo:
    """Write the shard of these parts durably: the bytes are those of `write_shard`."""
    with durable.replacing(path) as file:
        tar = _Tar(file)
        for part, info in zip(parts, infos, strict=True):
            with part.open("rb") as source:
                shutil.copyfileobj(source, tar, _BUFFER_BYTES)
            tar.documents += info.documents
            tar.tokens += info.tokens
        tar.close()
    return tar.info(path)


def read_shard(path: Path, info: ShardInfo, skip: int = 0) -> Iterator[Document]:
    """The documents of a shard in order, after the first `skip`, which are not decoded.

    Lazy: no more than one document is in memory. Call `check_shard` first: here only the documents
    and, at the end, the counts are checked. Raises DataError.
    """
    number = tokens = 0
    for key, members in _samples(path):
        if key != _key(number):
            raise DataError(f"{path}: expected document {_key(number)}, found {key}; {_REMEDY}")
        number += 1
        if number > skip:
            document = _document(path, key, members)
            tokens += len(document.tokens)
            yield document
    if number != info.documents:
        raise DataError(
            f"{path}: holds {counted(number, 'document')}, the manifest says {info.documents}; "
            f"{_REMEDY}"
        )
    if skip == 0 and tokens != info.tokens:
        raise DataError(
            f"{path}: holds {counted(tokens, 'token')}, the manifest says {info.tokens}; {_REMEDY}"
        )


def read_documents(directory: Path, manifest: Manifest) -> Iterator[Document]:
    """All documents of a data set in order, one at a time. Checks each shard; raises DataError."""
    for info in manifest.shards:
        check_shard(directory / info.name, info)
        yield from read_shard(directory / info.name, info)


def check_shard(path: Path, info: ShardInfo) -> None:
    """Raise DataError, naming the shard, unless its size and sha256 are the manifest's."""
    check_file(path, info.sha256, info.bytes)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Make the directory a data set: the manifest is written last.

    Its first key is the sha256 of its own bytes, with zeros in the place of that sha256.
    """
    plain = dataclasses.asdict(manifest)
    for key in ("prompt_tokens", "reports"):
        if not plain[key]:
            del plain[key]
    data = durable.json_bytes({_SEAL: _NO_DIGEST, **plain})
    digest = hashlib.sha256(data).hexdigest()
    durable.write_bytes(directory / MANIFEST, data.replace(_NO_DIGEST.encode(), digest.encode(), 1))


def no_data_set(directory: Path) -> str:
    """Why this is not the directory of a finished data set; empty: it has a manifest."""
    expected = "expected the directory of a data set, which `data-prep run` writes"
    if reason := no_directory(directory):
        return f"{reason}; {expected}"
    if (directory / _OF_A_CHECKPOINT).exists():
        return f"{directory}: is a checkpoint of a model; {expected}"
    if (directory / MANIFEST).exists():
        return ""
    if (directory / _OF_A_RUN).is_dir():
        return f"{directory}: is the directory of a training run; {expected}"
    return (
        f"{directory}: no {MANIFEST}: not a data set, or its preparation has not finished; "
        "run `data-prep run`"
    )


def no_directory(path: Path) -> str:
    """Why no directory can be read at this path; empty: one can."""
    try:
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            return ""
        if not path.exists():
            url = durable.url_of(path)
            missing = "is a URL; copy what is there to this machine"
            return f"{url}: {missing}" if url else f"{path}: there is no such directory"
        return f"{path}: {'is not readable' if path.is_dir() else 'is not a directory'}"
    except PermissionError:
        return f"{path}: lies in a directory that is not readable"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a data set. Raises DataError where there is none or it is not ours."""
    return parsed_manifest(str(directory / MANIFEST), manifest_bytes(directory))


def manifest_bytes(directory: Path) -> bytes:
    """The manifest's file. Raises DataError where the directory is no data set."""
    if reason := no_data_set(directory):
        raise DataError(reason)
    path = directory / MANIFEST
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def parsed_manifest(path: str, data: bytes) -> Manifest:
    """The manifest in `data`, the bytes of the file at `path`. Raises DataError."""
    _check_seal(path, data)
    try:
        plain = json_value(data)
    except ValueError:
        raise DataError(f"{path}: is not JSON; prepare the data set again") from None
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; "
            "prepare the data set with this version of data-prep"
        )
    try:
        plain.pop(_SEAL, None)
        manifest = settings.from_plain(Manifest, plain)
    except SettingsError as error:
        raise DataError(f"{path}: {error.problems[0]}; prepare the data set again") from None
    _check_manifest(path, manifest)
    return manifest


def verify(directory: Path) -> list[str]:
    """The problems of manifest, tokenizer and shards; reads all of them. Empty: they are whole.

    One sentence per file; of a shard the first problem, since it is prepared again as a whole.
    `accounts.verify` also reads what became of the records.
    """
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return [str(error)]
    problems = []
    try:
        check_file(directory / manifest.tokenizer.file, manifest.tokenizer.sha256)
    except DataError as error:
        problems.append(str(error))
    text_bytes = prompts = 0
    for info in manifest.shards:
        path = directory / info.name
        try:
            check_shard(path, info)
            for document in read_shard(path, info):
                _check_ids(path, document, manifest)
                text_bytes += document.bytes
                prompts += prompt_tokens(document.turns)
        except DataError as error:
            problems.append(str(error))
    for what, stated, found in (
        ("bytes of text", manifest.text_bytes, text_bytes),
        ("tokens of prompts", manifest.prompt_tokens, prompts),
    ):
        if not problems and stated != found:
            path = directory / MANIFEST
            problems.append(f"{path}: says {stated} {what}, the shards say {found}")
    listed = {info.name for info in manifest.shards}
    others = [path for path in sorted(directory.glob("*.tar")) if path.name not in listed]
    return problems + [f"{path}: is not in the manifest; remove it" for path in others]


class _Tar:
    """Writes documents to a tar, and hashes it meanwhile, so that it need not be read again.

    tarfile keeps an object for each member that it writes, and takes most of the time of a small
    document; the bytes are its own.
    """

    def __init__(self, file: BinaryIO, first: int = 0) -> None:
        self._file, self._first = file, first
        self._digest = hashlib.sha256()
        self.bytes = self.documents = self.tokens = 0

    def write(self, data: bytes) -> int:
        """Append bytes that are in the form of a tar."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def add(self, document: Document | StoredDocument, dtype: str, path: Path) -> None:
        """Append the members of a document. Raises DataError, which names `path`."""
        if isinstance(document, Document):
            count, blocks = len(document.tokens), iter([document.tokens])
        else:
            count, blocks = document.tokens, document.blocks
        meta: dict[str, str | int | list[int]] = {"id": document.id, "source": document.source}
        meta |= {"bytes": document.bytes, "tokens": count}
        if document.turns:
            meta["prompt"], *further = document.turns
            if further:
                meta["turns"] = further
        data = json.dumps(meta, sort_keys=True).encode()
        key = _key(self._first + self.documents)
        self.write(_member_head(f"{key}.json", len(data)) + data + _padding(len(data)))
        head = _array_head(dtype, count)
        size = len(head) + count * np.dtype(dtype).itemsize
        self.write(_member_head(f"{key}.tokens.npy", size))
        where, end = f"{path}: document {document.id!r}", self.bytes + size
        self.write(head)
        for block in blocks:
            self.write(_stored(where, block, dtype).tobytes())
        assert self.bytes == end, f"{where} has not the tokens that it should have"
        self.write(_padding(size))
        self.documents += 1
        self.tokens += count

    def close(self) -> None:
        """Append the tar's end."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self.write(bytes(-self.bytes % tarfile.RECORDSIZE))

    def info(self, path: Path) -> ShardInfo:
        """What was written."""
        digest = self._digest.hexdigest()
        return ShardInfo(path.name, self.bytes, digest, self.documents, self.tokens)


def _key(number: int) -> str:
    return f"{number:08d}"


def _member_head(name: str, size: int) -> bytes:
    """The block before a member of a tar, as tarfile makes it in four times the time.

    Owner and time are the same on every machine.
    """
    if size > _PLAIN_SIZE:
        return _slow_head(name, size)
    head = bytearray(_slow_head("", 0))
    head[: len(name)] = name.encode()
    head[124:135] = b"%011o" % size
    # The sum of the block, with spaces in its own place.
    head[148:156] = b" " * 8
    head[148:155] = b"%06o\0" % sum(head)
    return bytes(head)


@functools.lru_cache(maxsize=1)
def _slow_head(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, _OWNER, _OWNER
    return member.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    """What fills the last block of a member."""
    return bytes(-size % tarfile.BLOCKSIZE)


@functools.lru_cache(maxsize=1 << 12)
def _array_head(dtype: str, count: int) -> bytes:
    """What NumPy writes before an array of tokens."""
    head = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    shape = {"descr": descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(head, shape)
    return head.getvalue()


def _stored(where: str, tokens: np.ndarray, dtype: str) -> np.ndarray:
    """Tokens as they are stored in a shard."""
    top = np.iinfo(dtype).max
    if len(tokens) and (tokens.min() < 0 or tokens.max() > top):
        raise DataError(f"{where} has token ids outside 0 to {top} ({dtype})")
    return tokens.astype(np.dtype(dtype).newbyteorder("<"))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members by suffix) of each document of the tar."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with path.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                yield sample["__key__"], sample
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(
            f"{path}: is not a readable shard ({type(error).__name__}); {_REMEDY}"
        ) from error


def _document(path: Path, key: str, members: dict[str, bytes]) -> Document:
    try:
        meta = json_value(members["json"])
        tokens = _array(members["tokens.npy"])
        turns = _turns(meta, len(tokens))
        document = Document(meta["id"], meta["source"], meta["bytes"], tokens, turns)
        sound = meta["tokens"] == len(tokens)
    except _UNREADABLE:
        sound = False
    if not sound:
        raise DataError(f"{path}: document {key} is incomplete or not of this format; {_REMEDY}")
    return document


def _turns(meta: dict[str, Any], tokens: int) -> tuple[int, ...]:
    """The turns of a document of so many tokens. Raises ValueError where they are none."""
    if not {"prompt", "turns"} & meta.keys():
        return ()
    turns = (meta["prompt"], *meta.get("turns", ()))
    ascending = all(a <= b for a, b in itertools.pairwise((0, *turns, tokens)))
    if not (ascending and len(turns) % 2 and all(type(turn) is int for turn in turns)):
        raise ValueError(f"no turns of a document of {tokens} tokens: {turns}")
    return turns


def _array(data: bytes) -> np.ndarray:
    """The tokens of an array file, read-only. Raises ValueError where it is none of ours.

    Not by np.load, which gives the head to `ast.literal_eval`: where threads, such as a loader's,
    call that at once, it may raise SystemError (seen with Python 3.11.2, NumPy 2.4.6; reported for
    threads in python/cpython#106906).
    """
    head = _ARRAY_HEAD.match(data)
    if head is None:
        raise ValueError("not an array of tokens")
    tokens = np.frombuffer(data, head[1].decode(), offset=head.end())
    if len(tokens) != int(head[2]):
        raise ValueError(f"{len(tokens)} tokens where the head says {int(head[2])}")
    return tokens


def check_file(path: Path, sha256: str, size: int | None = None) -> None:
    """Raise DataError, naming the file, unless it has this sha256, and this size if any."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            state = "is empty" if found == 0 else "is cut" if found < size else "is too long"
            raise DataError(f"{path}: {state}: {found} of {size} bytes; {_REMEDY}")
        if durable.sha256_of(path) != sha256:
            raise DataError(
                f"{path}: sha256 differs from the manifest's: damaged or of another "
                f"data set; {_REMEDY}"
            )
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; {_REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None


def _check_seal(path: str, data: bytes) -> None:
    """Raise DataError where a byte of the manifest differs from those that were written.

    Manifests of earlier versions have no checksum.
    """
    if found := _SEALED.match(data):
        start, stop = found.span(1)
        if hashlib.sha256(
            data[:start] + _NO_DIGEST.encode() + data[stop:]
        ).digest() == bytes.fromhex(found[1].decode()):
            return
    elif not _DIGEST_AT_THE_START.match(data):
        return
    raise DataError(f"{path}: differs from its own checksum: damaged or edited; {_REMEDY}")


def _check_manifest(path: str, manifest: Manifest) -> None:
    names = [manifest.tokenizer.file, *(info.name for info in manifest.shards), *manifest.reports]
    for name in names:
        if name != Path(name).name:
            raise DataError(f"{path}: {name!r} is not a plain file name")
    if len(set(names)) != len(names):
        raise DataError(f"{path}: lists a file twice")
    if manifest.dtype != dtype_of(manifest.tokenizer.vocab_size):
        raise DataError(
            f"{path}: dtype {manifest.dtype!r} does not fit a vocabulary of "
            f"{manifest.tokenizer.vocab_size}: expected {dtype_of(manifest.tokenizer.vocab_size)}"
        )
    for name in ("documents", "tokens"):
        total, stated = sum(getattr(s, name) for s in manifest.shards), getattr(manifest, name)
        if total != stated:
            raise DataError(f"{path}: says {stated} {name}, its shards add up to {total}")


def _check_ids(path: Path, document: Document, manifest: Manifest) -> None:
    tokens, vocab_size = document.tokens, manifest.tokenizer.vocab_size
    if tokens.dtype != np.dtype(manifest.dtype):
        raise DataError(
            f"{path}: document {document.id!r} is stored as {tokens.dtype}, "
            f"the manifest says {manifest.dtype}; prepare the data set again"
        )
    if len(tokens) and tokens.max() >= vocab_size:
        raise DataError(
            f"{path}: document {document.id!r} has the token id {tokens.max()}, "
            f"the vocabulary has {vocab_size}; prepare the data set again"
        )
