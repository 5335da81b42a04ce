"""Planted duplicates are found, unrelated texts are kept, and the first of each group stays."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashDedupSignature

from data_prep.config import DuplicatesConfig
from data_prep.pipeline import duplicates, ngrams
from data_prep.pipeline.duplicates import Signature
from tools.promises import power

WANTED = DuplicatesConfig(near=True)


def word(source: random.Random) -> str:
    return "".join(source.choices("abcdefghij", k=5))


def text(source: random.Random, length: int = 300) -> list[str]:
    return [word(source) for _ in range(length)]


def changed(original: list[str], source: random.Random, share: float) -> list[str]:
    """The words with a share of them, at random places, replaced."""
    copy = list(original)
    for place in source.sample(range(len(copy)), round(share * len(copy))):
        copy[place] = word(source)
    return copy


def sign(texts: Iterable[str], unit: int, directory: Path, config: DuplicatesConfig) -> list[bytes]:
    """Write the signatures of a unit; returns the fingerprints."""
    marks = []

    def signed() -> Iterator[Signature]:
        for whole in texts:
            signature = signer.document()
            signature.add(whole)
            marks.append(signature.fingerprint)
            yield signature

    signer = duplicates.Signer(directory, config)
    signer.write(signed(), unit)
    return marks


def found_in(units: list[list[str]], directory: Path, config: DuplicatesConfig) -> dict[int, int]:
    marks = [
        mark for unit, texts in enumerate(units) for mark in sign(texts, unit, directory, config)
    ]
    for bucket in range(config.buckets):
        duplicates.match(bucket, directory, config)
    return left_out(marks, [len(unit) for unit in units], directory)


def left_out(marks: list[bytes], sizes: list[int], directory: Path) -> dict[int, int]:
    """What is found, by number, of units of these sizes."""
    prints = np.frombuffer(b"".join(marks), ">u8").reshape(-1, 2)
    found = duplicates.find(prints, np.cumsum([0, *sizes]), directory)
    return {number: kind for number, kind in enumerate(found.tolist()) if kind}


def test_five_percent_of_words_changed_is_found_and_unrelated_texts_are_kept(
    tmp_path: Path,
) -> None:
    source = random.Random(3)
    originals = [text(source) for _ in range(200)]
    planted = [changed(original, source, 0.05) for original in originals[:100]]
    units = [[" ".join(t) for t in part] for part in (originals[:120], originals[120:] + planted)]
    found = found_in(units, tmp_path, WANTED)
    assert set(found.values()) == {duplicates.NEAR}
    assert min(found) >= 200  # nothing but planted ones: precision 1
    # At 5 % of the words some 0.95^5 = 0.77 of the 5-grams stay: s = 0.63, a recall of 0.88.
    assert 78 <= len(found) <= 97


def test_fewer_buckets_of_more_rows_ask_for_more_likeness(tmp_path: Path) -> None:
    source = random.Random(4)
    originals = [text(source) for _ in range(100)]
    planted = [changed(original, source, 0.05) for original in originals]
    fineweb = DuplicatesConfig(near=True, buckets=14, rows=8)
    found = found_in([[" ".join(t) for t in originals + planted]], tmp_path, fineweb)
    assert min(found) >= 100 and 15 <= len(found) <= 45  # 1 - (1 - 0.63^8)^14 = 0.29


def test_of_equal_and_similar_texts_the_first_stays(tmp_path: Path) -> None:
    source = random.Random(5)
    original = text(source)
    near = [*original[:-1], "other"]
    equal, similar, alone = " ".join(original), " ".join(near), " ".join(text(source))
    units = [[alone, similar], [equal, "short"], [equal, similar, "short", "short one"]]
    found = found_in(units, tmp_path, WANTED)
    # 0 alone, 1 similar (the first of its cluster), 2 equal, 3 short, 4 equal, 5 similar, 6 short
    exact, near_ = duplicates.EXACT, duplicates.NEAR
    assert found == {2: near_, 4: exact, 5: exact, 6: exact}


def test_exact_duplicates_alone_need_no_signatures(tmp_path: Path) -> None:
    marks = sign(["a", "b", "a"], 0, tmp_path, DuplicatesConfig(exact=True))
    assert len(marks) == 3 and not list(tmp_path.iterdir())
    assert left_out(marks, [3], tmp_path) == {2: duplicates.EXACT}


@pytest.mark.parametrize("read_at_once", [3, 1 << 18])
def test_documents_that_match_by_others_are_one_cluster(
    read_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_PAIRS", read_at_once)
    source = random.Random(read_at_once)
    sizes = [40, 0, 160, 100]
    starts = np.cumsum([0, *sizes])
    chain = list(range(20, 60))
    source.shuffle(chain)
    pairs = [*itertools.pairwise(chain)]
    pairs += [(source.randrange(60, 300), source.randrange(60, 300)) for _ in range(110)]
    (tmp_path / "pairs").mkdir()
    for bucket in range(4):
        with (tmp_path / "pairs" / f"{bucket:05d}_00.dups").open("wb") as file:
            for pair in pairs[bucket::4]:
                for number in sorted(pair):
                    unit = int(np.searchsorted(starts, number, "right")) - 1
                    file.write(struct.pack("<2I", unit, number - starts[unit]))
    clusters = {number: {number} for number in range(300)}
    for one, other in pairs:
        for number in (joined := clusters[one] | clusters[other]):
            clusters[number] = joined
    found = duplicates._first_of_clusters(starts, tmp_path / "pairs")
    assert found.tolist() == [min(clusters[number]) for number in range(300)]
    assert set(found[20:60].tolist()) == {20}


@pytest.mark.parametrize("shingles", [700, 1 << 20])
def test_a_signature_is_datatroves_of_the_whole_text_however_it_comes(
    shingles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_SHINGLES", shingles)
    monkeypatch.setattr(ngrams, "_SIMPLIFIED", 900)
    words_of = text(random.Random(6), 5000)
    peer = MinhashDedupSignature("memory://peer", config=duplicates._minhash(WANTED))
    grams = [" ".join(words_of[first : first + 5]) for first in range(len(words_of) - 4)]
    hashes = np.array([peer._hash_func(gram) for gram in grams], np.uint64).reshape(-1, 1)
    whole, parts = (duplicates.Signer(Path("/none"), WANTED).document() for _ in range(2))
    whole.add(" ".join(words_of))
    for first in range(0, len(words_of), 3):
        parts.add(" ".join(words_of[first : first + 3]) + ("\n" if first % 2 else " "))
    assert whole.least.tolist() == parts.least.tolist() == peer.get_signature(hashes)
    assert whole.least.shape == (20, 5)


def test_signatures_and_pairs_survive_a_power_loss(tmp_path: Path) -> None:
    work, after = tmp_path / "work", tmp_path / "after"
    work.mkdir()
    source = random.Random(4)
    originals = [" ".join(text(source)) for _ in range(5)]
    with power.observed(work, lambda disk, call, arguments: None) as disk:
        found_in([originals, originals], work, WANTED)
        disk.after_power_loss(after, lambda: False)
    written = [path for path in work.rglob("*") if path.is_file()]
    assert len(written) == 3 * WANTED.buckets
    for path in written:
        assert (after / path.relative_to(work)).read_bytes() == path.read_bytes() != b""
