import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset import durable, shards
from data_prep.dataset.shards import DataError, Document, ShardInfo, StoredDocument


def a_document(number: int, tokens: Any) -> Document:
    return Document(f"id-{number}", "a source", 7 * number, np.asarray(tokens, np.int32))


# Of a shard that holds DOCUMENTS; it changes with FORMAT_VERSION alone.
GOLDEN_SHA256 = "6db335ccc276de31b758508a85db5cc10e7fc440327306cf2f4f8fa2fa62359c"
DOCUMENTS = [
    a_document(0, [5, 6, 7]),
    a_document(1, []),
    a_document(2, [65535]),
    a_document(3, [0]),
]


def fields(document: Document) -> tuple[str, str, int, list[int]]:
    return document.id, document.source, document.bytes, document.tokens.tolist()


def info_of(path: Path, documents: int, tokens: int) -> ShardInfo:
    """What a manifest would say of a shard that our writer did not write."""
    return ShardInfo(path.name, path.stat().st_size, durable.sha256_of(path), documents, tokens)


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def meta(tokens: int) -> bytes:
    return json.dumps({"id": "a", "source": "b", "bytes": 1, "tokens": tokens}).encode()


def test_documents_come_back_from_a_shard_as_they_went_in(tmp_path: Path) -> None:
    odd = Document("ü/\udcff.txt\n", "", 0, np.array([1], np.uint32))  # as the OS gives bad names
    info = shards.write_shard(tmp_path / "shard-00000.tar", [*DOCUMENTS, odd], "uint16")
    assert (info.name, info.documents, info.tokens) == ("shard-00000.tar", 5, 6)
    shards.check_shard(tmp_path / info.name, info)
    found = list(shards.read_shard(tmp_path / info.name, info))
    assert [fields(d) for d in found] == [fields(d) for d in [*DOCUMENTS, odd]]
    assert {d.tokens.dtype for d in found} == {np.dtype("uint16")}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_document_in_blocks_is_written_as_a_whole_one(dtype: str, tmp_path: Path) -> None:
    long = np.random.default_rng(1).integers(0, 65536, 300_001).astype(np.int32)
    whole = [*DOCUMENTS, a_document(7, long), a_document(1, [])]
    in_blocks = [
        StoredDocument(d.id, d.source, d.bytes, len(d.tokens), iter(np.array_split(d.tokens, 9)))
        for d in whole
    ]
    ours = shards.write_shard(tmp_path / "a.tar", in_blocks, dtype)
    theirs = shards.write_shard(tmp_path / "b.tar", whole, dtype)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert replace(ours, name="b.tar") == theirs


def test_a_shard_joined_from_parts_is_the_one_written_as_a_whole(tmp_path: Path) -> None:
    whole = shards.write_shard(tmp_path / "a.tar", DOCUMENTS, "uint16")
    paths = [tmp_path / name for name in ("1.part", "2.part", "3.part")]
    infos = [
        shards.write_part(path, DOCUMENTS[first:stop], "uint16", first)
        for path, (first, stop) in zip(paths, [(0, 2), (2, 3), (3, 4)], strict=True)
    ]
    joined = shards.join_parts(tmp_path / "b.tar", paths, infos)
    assert joined == replace(whole, name="b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 511, 12_345_678, 8**11 - 1, 8**11, 1 << 40])
@pytest.mark.parametrize("name", ["00000000.json", "12345678.tokens.npy", "123456789.json"])
def test_the_head_of_a_member_is_what_tarfile_writes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "data-prep", "data-prep"
    assert shards._member_head(name, size) == member.tobuf(tarfile.PAX_FORMAT)


def test_writing_holds_no_object_for_each_document(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        shards.write_shard(tmp_path / "a.tar", (DOCUMENTS[0] for _ in range(count)), "uint16")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(2000) - peak(200) < 20 * 1800


def test_shards_hold_nothing_of_the_time_and_machine_that_wrote_them(tmp_path: Path) -> None:
    infos = [shards.write_shard(tmp_path / name, DOCUMENTS, "uint16") for name in "ab"]
    assert infos[0].sha256 == infos[1].sha256
    with tarfile.open(tmp_path / "a") as tar:
        for member in tar:
            owner = (member.uid, member.gid, member.uname, member.gname)
            assert (member.mtime, *owner) == (0, 0, 0, "data-prep", "data-prep")
    assert infos[0].sha256 == GOLDEN_SHA256
    assert not list(tmp_path.glob("*.tmp"))


def test_stock_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    info = shards.write_shard(tmp_path / "shard-00000.tar", DOCUMENTS, "uint16")
    found = list(webdataset.WebDataset(str(tmp_path / info.name), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == [f"{n:08d}" for n in range(4)]
    for sample, document in zip(found, DOCUMENTS, strict=True):
        assert sample["tokens.npy"].tolist() == document.tokens.tolist()
        assert sample["json"] == {
            "id": document.id,
            "source": document.source,
            "bytes": document.bytes,
            "tokens": len(document.tokens),
        }


def test_the_contract_needs_neither_torch_nor_webdataset() -> None:
    program = (
        "import sys; from data_prep.dataset import shards\n"
        "assert not {'torch', 'webdataset'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_ids_are_stored_in_16_bits_up_to_a_vocabulary_of_65536(tmp_path: Path) -> None:
    assert [shards.dtype_of(size) for size in (1, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    wide = [a_document(0, [65536, 2**31 - 1])]
    info = shards.write_shard(tmp_path / "wide.tar", wide, "uint32")
    (found,) = shards.read_shard(tmp_path / "wide.tar", info)
    assert found.tokens.dtype == np.uint32 and found.tokens.tolist() == [65536, 2**31 - 1]


@pytest.mark.parametrize("bad", [-1, 65536])
def test_an_id_that_does_not_fit_is_refused_and_leaves_no_shard(tmp_path: Path, bad: int) -> None:
    with pytest.raises(
        DataError, match=r"a\.tar: document 'id-9' has token ids outside 0 to 65535"
    ):
        shards.write_shard(tmp_path / "a.tar", [a_document(9, [1, bad])], "uint16")
    stored = StoredDocument("id-9", "", 0, 2, iter([np.array([1, bad])]))
    with pytest.raises(DataError, match=r"a\.tar: document 'id-9' has token ids outside 0"):
        shards.write_shard(tmp_path / "a.tar", [stored], "uint16")
    assert not (tmp_path / "a.tar").exists()


def test_skipped_documents_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.tar"
    bad = [("00000000.json", b"{"), ("00000000.tokens.npy", b"no array")]
    good = [("00000001.json", meta(2)), ("00000001.tokens.npy", npy(np.array([8, 9], "u2")))]
    write_members(path, bad + good)
    info = info_of(path, 2, 2)
    (found,) = shards.read_shard(path, info, skip=1)
    assert found.tokens.tolist() == [8, 9]
    assert list(shards.read_shard(path, info, skip=2)) == []
    with pytest.raises(DataError, match=r"shard-00000\.tar: document 00000000 is incomplete"):
        next(shards.read_shard(path, info))


def test_reading_holds_a_document_and_not_the_shard(tmp_path: Path) -> None:
    each = 1 << 16
    many = (a_document(n, np.full(each, n)) for n in range(100))
    info = shards.write_shard(tmp_path / "big.tar", many, "uint16")
    list(zip(range(2), shards.read_shard(tmp_path / "big.tar", info), strict=False))  # imports
    for skip in (0, 99):
        tracemalloc.start()
        for _ in shards.read_shard(tmp_path / "big.tar", info, skip):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 2 * each < info.bytes / 10


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("count", [0, 1, 77, 100_000])
def test_an_array_of_tokens_is_read_as_numpy_reads_it(dtype: str, count: int) -> None:
    data = npy(np.arange(count).astype(f"<{dtype}"))
    found, theirs = shards._array(data), np.load(io.BytesIO(data))
    assert found.dtype == theirs.dtype and found.tolist() == theirs.tolist()
    for damaged in (data[:-1], data + b"0", data.replace(b"NUMPY", b"NUMPA"), data[:40]):
        with pytest.raises(ValueError):
            shards._array(damaged)


def test_threads_that_read_shards_never_parse_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(text: str) -> None:
        """As ast may, with Python 3.11.2, if two threads call it at once."""
        raise SystemError("AST constructor recursion depth mismatch")

    write_members(tmp_path / "a.tar", DOCUMENT_0)
    monkeypatch.setattr("ast.literal_eval", fails)
    (document,) = shards.read_shard(tmp_path / "a.tar", ShardInfo("a.tar", 0, "", 1, 1))
    assert document.tokens.tolist() == [1]


DOCUMENT_0 = [("00000000.json", meta(1)), ("00000000.tokens.npy", npy(np.array([1], "u2")))]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (DOCUMENT_0, "holds 1 document, the manifest says 2"),
        (DOCUMENT_0[:1], "00000000 is incomplete"),
        (DOCUMENT_0[1:], "00000000 is incomplete"),
        ([("00000001.json", meta(1))], "expected document 00000000, found 00000001"),
        ([DOCUMENT_0[0], DOCUMENT_0[0]], "is not a readable shard"),
        ([("00000000.json", b"[]"), DOCUMENT_0[1]], "00000000 is incomplete"),
        ([("00000000.json", meta(2)), DOCUMENT_0[1]], "00000000 is incomplete"),
        ([DOCUMENT_0[0], ("00000000.tokens.npy", npy([[1]]))], "00000000 is incomplete"),
        ([DOCUMENT_0[0], ("00000000.tokens.npy", npy([1.0]))], "00000000 is incomplete"),
        ([DOCUMENT_0[0], ("00000000.tokens.npy", npy([1])[:-1])], "00000000 is incomplete"),
    ],
)
def test_a_shard_whose_checksum_holds_must_still_hold_whole_documents(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = tmp_path / "shard-00000.tar"
    write_members(path, members)
    info = info_of(path, 2, 2)
    shards.check_shard(path, info)
    with pytest.raises(DataError, match=message) as raised:
        list(shards.read_shard(path, info))
    assert str(path) in str(raised.value)


def test_a_pickle_in_a_shard_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    pickled = npy(np.array([Malicious()], object))
    write_members(tmp_path / "a.tar", [DOCUMENT_0[0], ("00000000.tokens.npy", pickled)])
    with pytest.raises(DataError, match=r"a\.tar: document 00000000 is incomplete"):
        list(shards.read_shard(tmp_path / "a.tar", info_of(tmp_path / "a.tar", 1, 1)))
    assert not trace.exists()


def test_a_tar_cut_anywhere_never_reads_as_a_shorter_shard(tmp_path: Path) -> None:
    # Without size and sha256: the second line of defence, where webdataset itself is silent.
    path = tmp_path / "shard-00000.tar"
    info = shards.write_shard(path, DOCUMENTS, "uint16")
    whole = path.read_bytes()
    last = 8 * 2 * tarfile.BLOCKSIZE  # four documents of two members: a header and a block each
    for size in range(0, last, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=str(path)):
            list(shards.read_shard(path, info))


def test_all_documents_are_read_in_order_from_checked_shards(
    tmp_path: Path, write_data_set: Any
) -> None:
    manifest = write_data_set(tmp_path, DOCUMENTS, 2, 65536)
    found = list(shards.read_documents(tmp_path, manifest))
    assert [fields(d) for d in found] == [fields(d) for d in DOCUMENTS]
    path = tmp_path / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[data.rindex(b"7")] ^= 1
    path.write_bytes(data)
    reading = shards.read_documents(tmp_path, manifest)
    assert [next(reading).id, next(reading).id] == ["id-0", "id-1"]
    with pytest.raises(DataError, match=r"shard-00001\.tar: sha256 differs"):
        next(reading)


def test_a_token_count_that_differs_from_the_manifest_is_an_error(tmp_path: Path) -> None:
    info = shards.write_shard(tmp_path / "a.tar", DOCUMENTS, "uint16")
    with pytest.raises(DataError, match=r"a\.tar: holds 5 tokens, the manifest says 6"):
        list(shards.read_shard(tmp_path / "a.tar", dataclasses.replace(info, tokens=6)))


def test_what_is_wrong_with_a_shard_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = shards.write_shard(path, DOCUMENTS, "uint16")
    whole = path.read_bytes()

    def complaint(data: bytes | None) -> str:
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(DataError) as raised:
            shards.check_shard(path, info)
        assert "\n" not in str(raised.value) and str(raised.value).startswith(f"{path}: ")
        return str(raised.value)

    assert "is missing" in complaint(None)
    assert "is empty: 0 of 10240 bytes" in complaint(b"")
    assert "is cut: 10239 of 10240 bytes" in complaint(whole[:-1])
    assert "is too long: 10241 of 10240 bytes" in complaint(whole + b"\0")
    assert "sha256 differs" in complaint(b"\1" + whole[1:])
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"a\.tar: "):
        shards.check_shard(path, info)


def test_a_manifest_comes_back_and_a_whole_data_set_has_no_problems(
    tmp_path: Path, write_data_set: Any
) -> None:
    manifest = write_data_set(tmp_path, DOCUMENTS, 3, 65536, eos_id=None)
    assert shards.read_manifest(tmp_path) == manifest
    assert manifest.tokenizer.eos_id is None and manifest.dtype == "uint16"
    assert (manifest.documents, manifest.tokens, manifest.text_bytes) == (4, 5, 42)
    assert shards.verify(tmp_path) == []


def test_a_directory_without_a_manifest_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json: not a data set.*data-prep run"):
        shards.read_manifest(tmp_path)
    assert len(shards.verify(tmp_path)) == 1


def test_a_url_in_place_of_a_directory_is_said_to_be_one(tmp_path: Path) -> None:
    for url in ("s3://corpora/novels", "https://host/novels"):
        with pytest.raises(DataError, match=rf"^{url}: is a URL; copy what is there to this mach"):
            shards.read_manifest(Path(url))
    assert shards.no_directory(tmp_path / "s3:/a").endswith("there is no such directory")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2, this program reads 1"),
        ({"documents": 5}, "says 5 documents, its shards add up to 4"),
        ({"tokens": "5"}, "tokens: expected a whole number, found '5'"),
        ({"tokens": True}, "tokens: expected a whole number, found True"),
        ({"shards": {}}, "shards: expected a list"),
        ({"shards": [1]}, r"shards\[0\]: expected keys, found 1"),
        ({"dtype": "uint32"}, "does not fit a vocabulary of 65536"),
        ({"shards": [{}]}, r"shards\[0\]\.name: missing"),
        ({"surprise": 1}, "surprise: unknown key"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_with_its_key(
    tmp_path: Path, write_data_set: Any, change: dict[str, Any], message: str
) -> None:
    write_data_set(tmp_path, DOCUMENTS, 2, 65536)
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["checksum"]
    path.write_text(json.dumps(plain | change))
    with pytest.raises(DataError, match=message) as raised:
        shards.read_manifest(tmp_path)
    assert str(raised.value).startswith(str(path))


def test_a_manifest_with_any_byte_changed_is_refused_before_it_is_parsed(
    tmp_path: Path, write_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data_set(tmp_path, DOCUMENTS, 2, 65536)
    whole = (tmp_path / "manifest.json").read_bytes()
    zeros = whole.replace(json.loads(whole)["checksum"].encode(), b"0" * 64)
    assert json.loads(whole)["checksum"] == hashlib.sha256(zeros).hexdigest()
    assert shards.parsed_manifest("m", whole) == shards.read_manifest(tmp_path)
    monkeypatch.setattr(shards.json, "loads", None)
    for place in range(len(whole)):
        for change in (1, 0x20, 0x80):
            changed = bytearray(whole)
            changed[place] ^= change
            with pytest.raises(DataError, match="m: differs from its own checksum: damaged or"):
                shards.parsed_manifest("m", bytes(changed))


def test_a_manifest_of_a_version_without_checksums_is_read(
    tmp_path: Path, write_data_set: Any
) -> None:
    manifest = write_data_set(tmp_path, DOCUMENTS, 2, 65536)
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["checksum"]
    path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    assert shards.read_manifest(tmp_path) == manifest


@pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: (is not JSON|has format version None)"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../shard-00000.tar", "/etc/passwd", "shard-00001.tar"])
def test_a_manifest_lists_plain_names_and_each_once(
    tmp_path: Path, write_data_set: Any, name: str
) -> None:
    manifest = write_data_set(tmp_path, DOCUMENTS, 2, 65536)
    renamed = dataclasses.replace(manifest.shards[0], name=name)
    shards.write_manifest(
        tmp_path, dataclasses.replace(manifest, shards=[renamed, manifest.shards[1]])
    )
    with pytest.raises(DataError, match=r"plain file name|lists a file twice"):
        shards.read_manifest(tmp_path)


def test_verify_lists_every_problem_at_once(tmp_path: Path, write_data_set: Any) -> None:
    documents = [a_document(n, [n]) for n in range(12)]
    write_data_set(tmp_path, documents, 6, 100)
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    (tmp_path / "shard-00001.tar").unlink()
    with (tmp_path / "shard-00003.tar").open("r+b") as file:
        file.write(b"\xff")
    (tmp_path / "shard-00004.tar").write_bytes(b"")
    (tmp_path / "shard-00006.tar").write_bytes(b"")
    names = ["tokenizer.model", *(f"shard-{n:05d}.tar" for n in (1, 3, 4, 6))]
    problems = shards.verify(tmp_path)
    assert [Path(problem.partition(":")[0]).name for problem in problems] == names
    assert "is not in the manifest" in problems[-1]


def test_verify_reads_ids_types_and_sizes_and_not_only_checksums(
    tmp_path: Path, write_data_set: Any
) -> None:
    manifest = write_data_set(tmp_path, [a_document(1, [1, 99]), a_document(2, [3])], 2, 100)
    small = dataclasses.replace(manifest.tokenizer, vocab_size=99)
    shards.write_manifest(tmp_path, dataclasses.replace(manifest, tokenizer=small))
    (problem,) = shards.verify(tmp_path)
    assert "shard-00000.tar: document 'id-1' has the token id 99, the vocabulary has 99" in problem
    large = dataclasses.replace(manifest.tokenizer, vocab_size=70000)
    wide = dataclasses.replace(manifest, tokenizer=large, dtype="uint32")
    shards.write_manifest(tmp_path, wide)
    assert ["stored as uint16" in problem for problem in shards.verify(tmp_path)] == [True, True]
    shards.write_manifest(tmp_path, dataclasses.replace(manifest, text_bytes=1))
    (problem,) = shards.verify(tmp_path)
    assert "says 1 bytes of text, the shards say 21" in problem


def test_a_shard_says_where_prompts_end_and_answers(tmp_path: Path) -> None:
    block = [np.arange(3, dtype=np.int32)]
    pairs = [
        replace(a_document(0, [5, 6, 7]), turns=(2,)),
        a_document(1, [8]),
        StoredDocument("id-2", "a source", 0, 3, iter(block), turns=(1,)),
        replace(a_document(3, [5, 6, 7, 8]), turns=(1, 2, 3)),
    ]
    path = tmp_path / "shard.tar"
    info = shards.write_shard(path, pairs, "uint16")
    found = [document.turns for document in shards.read_shard(path, info)]
    assert found == [(2,), (), (1,), (1, 2, 3)]
    with tarfile.open(path) as tar:
        metas = [json.load(tar.extractfile(f"{n:08d}.json")) for n in range(4)]  # type: ignore[arg-type]
    assert [one.get("prompt") for one in metas] == [2, None, 1, 1]
    assert [one.get("turns") for one in metas] == [None, None, None, [2, 3]]


@pytest.mark.parametrize(
    "turns",
    [
        *({"prompt": prompt} for prompt in (-1, 4, "1")),
        {"turns": [1, 2]},
        *({"prompt": 1, "turns": further} for further in ([2], [3, 2], [2, 4], [2, 2.5], "23", 2)),
    ],
)
def test_turns_that_do_not_divide_their_document_are_refused(tmp_path: Path, turns: Any) -> None:
    path = tmp_path / "shard.tar"
    plain = {**json.loads(meta(3)), **turns}
    write_members(
        path,
        [
            ("00000000.json", json.dumps(plain).encode()),
            ("00000000.tokens.npy", npy(np.array([1, 2, 3], np.uint16))),
        ],
    )
    with pytest.raises(DataError, match="document 00000000 is incomplete or not of this format"):
        list(shards.read_shard(path, info_of(path, 1, 3)))


def test_the_manifest_counts_tokens_of_prompts_where_there_are_any(
    tmp_path: Path, write_data_set: Any
) -> None:
    plain, pairs = tmp_path / "plain", tmp_path / "pairs"
    write_data_set(plain, [[5, 6, 7]], 1, 100)
    assert "prompt_tokens" not in json.loads((plain / shards.MANIFEST).read_bytes())
    assert shards.read_manifest(plain).prompt_tokens == 0
    two, several = a_document(0, [5, 6, 7]), a_document(1, [5, 6, 7, 8, 9, 10])
    documents = [replace(two, turns=(2,)), replace(several, turns=(1, 3, 5))]
    manifest = write_data_set(pairs, documents, 1, 100)
    assert shards.read_manifest(pairs).prompt_tokens == 2 + (1 + 2)
    assert shards.verify(pairs) == []
    shards.write_manifest(pairs, replace(manifest, prompt_tokens=1))
    assert shards.verify(pairs) == [
        f"{pairs / shards.MANIFEST}: says 1 tokens of prompts, the shards say 5"
    ]
