"""A case of the kernel benchmark, and the workbench that makes its arrays, weights and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.kernels.rig import Rig
from pympa.runtime.arena import Array
from pympa.spec import DTYPES
from pympa.verify.reference import F64

CHECKED_ROWS = 16


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, ready to run.

    Attributes:
        kernel: the name of the kernel.
        shape: the sizes, joined by "x".
        tokens: the number of result rows.
        flops: the number of flops of one run, by the formulas of `pympa.bench.kernels.cases`.
        bytes: the number of bytes of one run, by the formulas of `pympa.bench.kernels.cases`.
        run: a function that runs the kernel once.
        out: the array that receives the result.
        error: a function that returns the relative error of some rows, after the first run.
        checked_rows: the number of rows that `error` compares.
        peer: a function that runs torch's counterpart once and returns its result, or None.
        head_dim: the dimension of each head; None for a kernel without heads.
        causal: whether the mask is causal; None for a kernel without a mask.
    """

    kernel: str
    shape: str
    tokens: int
    flops: int
    bytes: int
    run: Callable[[], None]
    out: Array
    error: Callable[[], float]
    checked_rows: int
    peer: Callable[[], Any] | None
    head_dim: int | None = None
    causal: bool | None = None


class Workbench(Rig):
    """A rig on the CPU with a peer to compare with.

    Args:
        dtype: the name of the dtype of a case.
        isa: the instruction set.
        threads: the number of threads of each kernel.
        torch: the module to compare with, or None.
    """

    def __init__(self, dtype: str, isa: str, threads: int, torch: Any = None) -> None:
        super().__init__(DTYPES[dtype], isa=isa, threads=threads)
        self._torch = torch

    def peer(self, prepare: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any] | None:
        """Return the result of `prepare` for torch, or None without torch."""
        return None if self._torch is None else prepare(self._torch)

    def tensor(self, array: Array) -> Any:
        """Return a torch tensor that shares the memory of an array."""
        bits = array.view(f"i{array.itemsize}")  # torch does not accept NumPy's bfloat16
        return self._torch.from_numpy(bits).view(getattr(self._torch, array.dtype.name))


def sample_rows(rows: int) -> NDArray[np.int64]:
    """Return row indices: the first, the last and some evenly spaced; all if there are few."""
    return np.unique(np.linspace(0, rows - 1, CHECKED_ROWS).astype(np.int64))


def wide(array: Array) -> F64:
    """Return the array in float64."""
    return array.astype(np.float64)


def relative_error(got: Array, want: F64) -> float:
    """Return the norm of the error over the norm of the expected result."""
    return float(np.linalg.norm(wide(got) - want) / np.linalg.norm(want))
