"""Arrays that users bring: NumPy, CuPy, torch, or any other with DLPack.

DLPack (the exchange protocol of the array API standard) moves no bytes. NumPy's reader does not
know bfloat16, so torch's is passed as 16-bit integers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pympa.errors import RefusedError

_CPU = 1  # the code of host memory in DLPack


def host_array(value: Any, what: str) -> NDArray[Any]:
    """Return an array in the memory of the host; it shares memory with the given one if it can.

    Args:
        value: an array of NumPy, CuPy or torch, or another one with DLPack.
        what: the name of the array, for the message.

    Raises:
        RefusedError: it is none of these.
    """
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        try:
            value = value.detach().cpu()
        except NotImplementedError:  # of torch's meta device
            raise RefusedError(f"{what}: expected a tensor with memory; got none") from None
        if value.dtype == torch.bfloat16:
            found: NDArray[Any] = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return found
        return np.asarray(value.numpy())
    if hasattr(value, "__cuda_array_interface__") and hasattr(value, "get"):
        return np.asarray(value.get())  # CuPy
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        if value.__dlpack_device__()[0] == _CPU:
            return np.asarray(np.from_dlpack(value))
        raise RefusedError(f"{what}: expected an array in host memory, or a CuPy array; move it")
    kind = type(value)
    raise RefusedError(
        f"{what}: expected an array of NumPy, CuPy or torch; got {kind.__module__}."
        f"{kind.__qualname__}"
    )


def token_ids(sequence: Any, what: str, vocabulary: int) -> NDArray[np.int32]:
    """Return the token ids of a sequence, int32 `[tokens]`.

    Args:
        sequence: a list of whole numbers, or an array of them.
        what: the name of the sequence, for the message.
        vocabulary: the number of tokens that the model knows.

    Raises:
        RefusedError: it is empty, not of whole numbers, or an id is not in the vocabulary.
    """
    if isinstance(sequence, Sequence) and not isinstance(sequence, (str, bytes)):
        if not all(isinstance(n, (int, np.integer)) and type(n) is not bool for n in sequence):
            raise RefusedError(f"{what}: expected whole numbers; got {sequence!r:.60}")
        wrong = [n for n in sequence if not 0 <= n < vocabulary]
        if wrong:
            raise _out_of_range(what, wrong[0], vocabulary)
        ids: NDArray[Any] = np.array([int(n) for n in sequence], np.int64)
    elif isinstance(sequence, (str, bytes)):
        raise RefusedError(f"{what}: expected token ids; got a text: encode it with a tokenizer")
    else:
        ids = host_array(sequence, what)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise RefusedError(
            f"{what}: expected whole numbers [tokens]; got {ids.dtype} {list(ids.shape)}"
        )
    if not ids.size:
        raise RefusedError(f"{what}: expected at least one token; got none")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise _out_of_range(what, low if low < 0 else high, vocabulary)
    return ids.astype(np.int32)


def _out_of_range(what: str, found: int, vocabulary: int) -> RefusedError:
    return RefusedError(f"{what}: expected token ids in 0..{vocabulary - 1}; got {found!s:.40}")
