"""Measured seconds of kernels over a grid of sizes: the cost model of a calibrated device.

Between grid points the seconds are interpolated linearly in each size. That is right within a few
percent as long as a kernel does the same work for each row, column or byte. Above the grid the line
through its last two points continues; below it the seconds of the first point are used.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence

import msgspec

from pympa.spec import SpecError


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The seconds of one kernel in one dtype, while `ranks` ranks of a node compute.

    Attributes:
        kernel: the name of the kernel.
        dtype: the dtype of its arrays; "" for a kernel without arrays.
        ranks: the number of ranks that computed at once.
        sizes: the grid of each size, ascending; `pympa.costs.device_costs` explains the sizes.
        seconds: the seconds at each point of the grid; the last size varies fastest.
        error: the median relative error of points that are left out, see `left_out`.
        worst: the largest such error.
    """

    kernel: str
    dtype: str
    ranks: int
    sizes: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    error: float = 0.0
    worst: float = 0.0

    def __post_init__(self) -> None:
        for grid in self.sizes:
            if not grid or any(a >= b for a, b in itertools.pairwise(grid)):
                raise SpecError(
                    f"curve {self.kernel}: sizes: expected ascending numbers; got {[*grid]}"
                )
        points = math.prod(map(len, self.sizes))
        if len(self.seconds) != points or not all(0 <= value < math.inf for value in self.seconds):
            raise SpecError(
                f"curve {self.kernel}: seconds: expected {points} finite numbers of at least 0, "
                f"one for each point of the grid; got {len(self.seconds)}"
            )

    def at(self, *sizes: float) -> float:
        """Return the seconds at a point, on the grid or between its points."""
        return self._within(0, 0, sizes)

    def _within(self, axis: int, first: int, sizes: Sequence[float]) -> float:
        """Interpolate along `axis` and the later axes, from row `first` of the table on."""
        if axis == len(self.sizes):
            return self.seconds[first]
        grid = self.sizes[axis]
        start = first * len(grid)
        if len(grid) == 1 or sizes[axis] <= grid[0]:
            return self._within(axis + 1, start, sizes)
        upper = min(bisect.bisect_left(grid, sizes[axis]), len(grid) - 1)
        low = self._within(axis + 1, start + upper - 1, sizes)
        high = self._within(axis + 1, start + upper, sizes)
        share = (sizes[axis] - grid[upper - 1]) / (grid[upper] - grid[upper - 1])
        # Noise can make a curve fall; above the grid it must not fall below zero.
        return low + share * (high - low) if share <= 1 or high > low else high

    def left_out(self) -> list[float]:
        """Return the relative error of each point when its grid line is left out.

        Each point between two others of an axis is interpolated from the line before and the line
        after it along that axis. That gap is twice the gap in use, so the error is no less than the
        error of sizes between grid points.
        """
        errors = []
        for axis, grid in enumerate(self.sizes):
            after = math.prod(len(other) for other in self.sizes[axis + 1 :])
            for line in range(1, len(grid) - 1):
                share = (grid[line] - grid[line - 1]) / (grid[line + 1] - grid[line - 1])
                for start, end in itertools.product(
                    range(0, len(self.seconds), after * len(grid)), range(after)
                ):
                    at = start + line * after + end
                    low, known, high = self.seconds[at - after : at + after + 1 : after]
                    if known > 0:
                        errors.append(abs(low + share * (high - low) - known) / known)
        return errors

    def judged(self) -> Curve:
        """Return this curve with the errors of points that are left out."""
        errors = self.left_out()
        if not errors:
            return self
        return msgspec.structs.replace(
            self, error=round(statistics.median(errors), 4), worst=round(max(errors), 4)
        )
