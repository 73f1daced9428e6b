"""What a case of the kernel benchmark is, and what makes its arrays, weights and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pympa.arena import Arena, Array
from pympa.kernels import PackedWeight
from pympa.kernels.cpu import CpuKernels
from pympa.reference import F64
from pympa.spec import DTYPES
from pympa.trace import Trace

CHECKED_ROWS = 16


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, ready to run.

    Attributes:
        kernel: its name. shape: sizes joined by "x". tokens: rows that come out.
        head_dim: None where there are no heads. causal: None where there is no mask.
        flops, bytes: of one run, by the formulas above.
        run: runs the kernel once. out: where it leaves its result.
        error: after the first run: relative error of some rows. checked_rows: how many.
        peer: runs torch's counterpart once and returns its result, or None.
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


class Workbench:
    """Makes what one case needs, in an arena as in a real run.

    Args:
        dtype: element type of the case.
        isa: instruction set.
        threads: of each kernel.
        torch: the module to compare with, or None.
    """

    def __init__(self, dtype: str, isa: str, threads: int, torch: Any = None) -> None:
        self.dtype = DTYPES[dtype]
        self.arena = Arena()
        self.kernels = CpuKernels(isa=isa, threads=threads, arena=self.arena, trace=Trace())
        self._torch = torch
        self._rng = np.random.default_rng(0)

    def empty(self, *shape: int) -> Array:
        """Return an uninitialised array of the dtype."""
        return self.arena.empty(shape, self.dtype)

    def normal(self, *shape: int) -> Array:
        """Return standard normal numbers, rounded to the dtype."""
        array = self.empty(*shape)
        array[...] = self._rng.standard_normal(shape, np.float32)
        return array

    def weight(self, n: int, k: int) -> tuple[Array, PackedWeight]:
        """Return a weight `[n, k]` that keeps the variance of its input, and its packed copy."""
        weight = self.normal(n, k)
        weight *= self.dtype.type(k**-0.5)
        return weight, self.kernels.pack((n, k), self.dtype, partial(_fill, weight))

    def weights(self, count: int, n: int, k: int) -> tuple[Array, PackedWeight]:
        """Return a group of such weights `[count, n, k]`, and its packed copy."""
        weights = self.normal(count, n, k)
        weights *= self.dtype.type(k**-0.5)

        def fill(index: int, target: Array) -> None:
            target[...] = weights[index]

        return weights, self.kernels.pack_group(count, (n, k), self.dtype, fill)

    def peer(self, prepare: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any] | None:
        """Return what `prepare` makes of torch, or None without torch."""
        return None if self._torch is None else prepare(self._torch)

    def tensor(self, array: Array) -> Any:
        """Return a tensor on the memory of an array of the dtype."""
        bits = array.view(f"i{array.itemsize}")  # torch takes no bfloat16 of NumPy
        return self._torch.from_numpy(bits).view(getattr(self._torch, array.dtype.name))


def _fill(source: Array, target: Array) -> None:
    target[...] = source


def sample_rows(rows: int) -> NDArray[np.int64]:
    """Return some row indices: the first, the last and evenly between, all if there are few."""
    return np.unique(np.linspace(0, rows - 1, CHECKED_ROWS).astype(np.int64))


def wide(array: Array) -> F64:
    """Return the array in float64."""
    return array.astype(np.float64)


def relative_error(got: Array, want: F64) -> float:
    """Return the norm of the error over the norm of what is wanted."""
    return float(np.linalg.norm(wide(got) - want) / np.linalg.norm(want))
