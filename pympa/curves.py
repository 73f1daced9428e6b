"""Seconds of kernels over a grid of sizes, as measured: what a calibrated device computes by.

Between grid points seconds are taken to be affine in each size, which they are to a few percent as
long as a kernel does the same work for each row, column or byte. Above the grid they go on as
between its last two points; below it they stay what they are at its first.
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
    """One kernel in one dtype, while so many ranks of a node compute.

    Attributes:
        kernel: its name. dtype: of its arrays; "" where there is none.
        ranks: that were at work at once.
        sizes: grid of each size, ascending; what a size is belongs to the kernel (`pympa.costs`).
        seconds: at each point of the grid, the last size fastest.
        error, worst: median and largest relative error of leaving a point out, see `left_out`.
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
        """Return the seconds at a point, on the grid or off it."""
        return self._within(0, 0, sizes)

    def _within(self, axis: int, first: int, sizes: Sequence[float]) -> float:
        """Interpolate along `axis` and those after it, from row `first` of the table on."""
        if axis == len(self.sizes):
            return self.seconds[first]
        grid = self.sizes[axis]
        here = first * len(grid)
        if len(grid) == 1 or sizes[axis] <= grid[0]:
            return self._within(axis + 1, here, sizes)
        upper = min(bisect.bisect_left(grid, sizes[axis]), len(grid) - 1)
        low = self._within(axis + 1, here + upper - 1, sizes)
        high = self._within(axis + 1, here + upper, sizes)
        share = (sizes[axis] - grid[upper - 1]) / (grid[upper] - grid[upper - 1])
        # Noise can make a curve fall; beyond the grid it may not fall on below nothing.
        return low + share * (high - low) if share <= 1 or high > low else high

    def left_out(self) -> list[float]:
        """Return the relative error of each point when one grid line through it is left out.

        That is each point between others of an axis, told from the line before and the line after
        it along that axis: the gap is then twice what it is in use, so this is no less than the
        error that sizes between the points have.
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
        """Return this curve with the errors of leaving points out filled in."""
        errors = self.left_out()
        if not errors:
            return self
        return msgspec.structs.replace(
            self, error=round(statistics.median(errors), 4), worst=round(max(errors), 4)
        )
