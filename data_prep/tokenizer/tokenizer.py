"""Loading, finding and writing the tokenizer of a data set or a run.

SentencePiece models and Hugging Face's tokenizer.json are read; the file's content says which.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.dataset import durable
from data_prep.dataset.parsing import pointer
from data_prep.tokenizer.contract import FILES, Tokenizer, TokenizerError
from data_prep.tokenizer.hugging_face import HuggingFace
from data_prep.tokenizer.sentencepiece import SentencePiece


def load(path: Path, eos_token: str = "") -> Tokenizer:
    """The tokenizer in a file of either kind; `eos_token`: in place of its own.

    Raises TokenizerError.
    """
    return of_bytes(path, read(path), eos_token)


def read(path: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises TokenizerError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
    if said := pointer(data):
        raise TokenizerError(f"{path}: {said}")
    return data


def of_bytes(path: Path, data: bytes, eos_token: str = "") -> Tokenizer:
    """The tokenizer in what a file at `path` holds. Raises TokenizerError."""
    kind = HuggingFace if data.startswith(b"{") else SentencePiece
    return kind(path, data, eos_token)


def find(directory: Path) -> Path:
    """The tokenizer's file in a data set's or a run's directory. Raises TokenizerError."""
    there = [directory / name for name in FILES if (directory / name).is_file()]
    if len(there) != 1:
        raise TokenizerError(
            f"{directory}: holds {'both' if there else 'none'} of {' and '.join(FILES)}, expected "
            "exactly one: keep, or restore, the one that was made with it"
        )
    return there[0]


def standalone(path: Path, eos_token: str = "") -> tuple[str, bytes]:
    """Name and bytes of a copy of the tokenizer that needs no file beside it, with this EOS.

    Copies of copies are equal. Raises TokenizerError.
    """
    model = load(path, eos_token)
    if isinstance(model, HuggingFace):
        return FILES[1], model.standalone
    return FILES[0], path.read_bytes()


def write(directory: Path, name: str, data: bytes) -> None:
    """Write a tokenizer into a directory, durably and in place of any other."""
    clear(directory)
    durable.write_bytes(directory / name, data)


def clear(directory: Path) -> None:
    """Remove tokenizers of either kind, which a killed run may have left."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
