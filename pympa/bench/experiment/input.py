"""The input of an experiment: the bytes of a text, one token for each byte."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from pympa.bench.experiment.description import Size
from pympa.model.random_weights import philox_bits
from pympa.text.files import read_file


def check_input(path: str | None) -> None:
    """Check that an input file can be read, before anything is computed.

    Raises:
        OSError: the file cannot be read, or is not a regular file; the message names it.
    """
    if path is not None:
        _read_input(path, 1)


def load_ids(path: str | None, size: Size) -> Sequence[NDArray[np.int32]]:
    """Return the token ids of a batch, from a text file or from the packaged text.

    Raises:
        ValueError: the file is empty, or its bytes exceed the model's vocabulary.
        OSError: the file cannot be read.
    """
    tokens = sum(size.lengths)
    if path is None:
        text = (resources.files("pympa") / "bench" / "experiments" / "input.txt").read_bytes()
    else:
        text = _read_input(path, tokens)  # a token is a byte
    ids = input_ids(text, tokens)
    if ids.max() >= size.model.vocabulary:
        raise ValueError(
            f"input: expected byte values below the vocabulary {size.model.vocabulary}; "
            f"got {ids.max()}"
        )
    return np.split(ids, np.cumsum(size.lengths)[:-1])


def _read_input(path: str, most_bytes: int) -> bytes:
    try:
        return read_file(path, most_bytes, start=True)
    except OSError as error:
        raise OSError(f"--input {path}: {error.strerror}") from None


def input_ids(text: bytes, tokens: int) -> NDArray[np.int32]:
    """Return `tokens` byte values of a text; each repetition of the text is permuted.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("input: expected at least one byte of text; got an empty file")
    once = np.frombuffer(text, np.uint8).astype(np.int32)
    parts = [once]
    for repeat in range(1, -(-tokens // len(once))):
        order = np.argsort(philox_bits(f"input/{repeat}", 0, len(once)), kind="stable")
        parts.append(once[order])
    return np.concatenate(parts)[:tokens]
