"""Small data sets of random tokens, written without the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.dataset import shards
from data_prep.dataset.shards import Document, Manifest, TokenizerInfo

VOCABULARY = 48


def small(directory: Path, seed: int, documents: int = 80, count: int = 8) -> Manifest:
    """A data set of so many documents of 1 to 149 tokens in `count` shards."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 150, size=documents)
    tokens = [rng.integers(3, VOCABULARY, size=int(size)) for size in sizes]
    given = [Document(f"document-{n}", "test", len(t), t) for n, t in enumerate(tokens)]
    directory.mkdir(parents=True, exist_ok=True)
    model = directory / "tokenizer.model"
    model.write_bytes(b"stand-in")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    info = TokenizerInfo(model.name, digest, VOCABULARY, bos_id=1, eos_id=2, pad_id=None, unk_id=0)
    return write(directory, given, count, info)


def write(
    directory: Path, documents: Sequence[Document], count: int, tokenizer: TokenizerInfo
) -> Manifest:
    """Write the documents, in order, in `count` shards as equal as can be, and the manifest."""
    dtype = shards.dtype_of(tokenizer.vocab_size)
    edges = [len(documents) * index // count for index in range(count + 1)]
    infos = [
        shards.write_shard(
            directory / shards.shard_name(index),
            documents[edges[index] : edges[index + 1]],
            dtype,
        )
        for index in range(count)
    ]
    manifest = Manifest(
        format_version=shards.FORMAT_VERSION,
        tokenizer=tokenizer,
        dtype=dtype,
        configuration={},
        inputs=[],
        shards=infos,
        documents=len(documents),
        tokens=sum(info.tokens for info in infos),
        text_bytes=sum(document.bytes for document in documents),
        rejected=0,
        dropped=0,
        duplicates=0,
        prompt_tokens=sum(shards.prompt_tokens(document.turns) for document in documents),
    )
    shards.write_manifest(directory, manifest)
    return manifest
