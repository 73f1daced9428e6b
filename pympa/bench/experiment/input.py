"""The input of an experiment: a text, whose bytes are tokens unless the model has a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


Encode = Callable[[str], Sequence[int]]
"""A function from a text to token ids."""

_LONGEST_TOKEN = 64  # bytes of a text that may become one token, with room to spare


def load_ids(
    path: str | None, size: Size, encode: Encode | None = None
) -> Sequence[NDArray[np.int32]]:
    """Return the token ids of a batch, from a text file or from the packaged text.

    Args:
        path: the path of the text file; None means the packaged text.
        size: the batch and the model.
        encode: the model's tokenizer; None means that a byte is a token.

    Raises:
        ValueError: the file is empty, or its tokens exceed the model's vocabulary.
        OSError: the file cannot be read.
    """
    tokens = sum(size.lengths)
    if path is None:
        text = (resources.files("pympa") / "bench" / "experiments" / "input.txt").read_bytes()
    else:
        text = _read_input(path, tokens if encode is None else _LONGEST_TOKEN * tokens)
    once = np.frombuffer(text, np.uint8).astype(np.int32)
    if encode is not None:
        once = np.array(encode(text.decode(errors="replace")), np.int32)
    ids = repeated(once, tokens)
    if ids.max() >= size.model.vocabulary:
        raise ValueError(
            f"input: expected tokens below the vocabulary {size.model.vocabulary}; got {ids.max()}"
        )
    return np.split(ids, np.cumsum(size.lengths)[:-1])


def _read_input(path: str, most_bytes: int) -> bytes:
    try:
        return read_file(path, most_bytes, start=True)
    except OSError as error:
        raise OSError(f"--input {path}: {error.strerror}") from None


def input_ids(text: bytes, tokens: int) -> NDArray[np.int32]:
    """Return `tokens` byte values of a text; see `repeated`."""
    return repeated(np.frombuffer(text, np.uint8).astype(np.int32), tokens)


def repeated(once: NDArray[np.int32], tokens: int) -> NDArray[np.int32]:
    """Return the first `tokens` ids of a text; each repetition of the text is permuted.

    Raises:
        ValueError: the text is empty.
    """
    if not once.size:
        raise ValueError("input: expected at least one byte of text; got an empty file")
    parts = [once]
    for repeat in range(1, -(-tokens // len(once))):
        order = np.argsort(philox_bits(f"input/{repeat}", 0, len(once)), kind="stable")
        parts.append(once[order])
    return np.concatenate(parts)[:tokens]
