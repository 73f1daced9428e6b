"""How far a run may be from the oracle, and what chance alone gives.

Error = ‖run - oracle‖ / ‖oracle‖, of a whole output and of each row. After layer l (from 1) the
whole may be off by tolerance·√l, a row by 8 times that. A distributed run must also stay near the
error of one rank, the whole and each row: within a factor, or within a quarter of what is allowed.

Both errors come from rounding, so their ratio is random. If each is the mean square of n
independent errors, its square follows the F distribution with n and n degrees of freedom; the
factor is the root of its quantile, and at least 1.2. Of the whole, n counts rows: as many equal
ones as vary like these (Satterthwaite 1946), since errors inside a row hang together. Of a row, n
is half the narrowest width that its errors have passed through: they are not equally large. A row
is held against the same row of one rank, and the chance is shared out over the rows (Bonferroni).

Deep or narrow models amplify rounding by more than √l. What emulations of rounding alone do to the
oracle of this very model is therefore allowed as well, one rank or many, with factors up to 8: of
several draws the worst counts. Of a row, n is at most the fewest heads of a layer there, for an
error of a score moves the whole of its head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.spec import ModelSpec

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
WORST_ROW_FACTOR = 8.0
DISTRIBUTED_FACTOR = 1.2
DISTRIBUTED_SHARE = 0.25
CHANCE = 1e-4  # that a right run is refused, shared out over its outputs
MOST_FACTOR = 8.0  # over the error of rounding alone, however few the rows
MOST_ERROR = 0.9  # a lost row is off by its own size, and no rounding may excuse that

F64 = NDArray[np.float64]


class Limit(NamedTuple):
    """An error that is allowed, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class RowErrors:
    """How far the rows of one output are from the oracle.

    Attributes:
        difference: ‖run - oracle‖ of each row. size: ‖oracle‖ of each row.
    """

    difference: F64
    size: F64

    @staticmethod
    def of(run: NDArray[np.generic], truth: F64) -> RowErrors:
        """Return the errors of an output `[rows, width]`."""
        difference = np.linalg.norm(run.astype(np.float64) - truth, axis=1)
        return RowErrors(difference, np.linalg.norm(truth, axis=1))

    @cached_property
    def whole(self) -> float:
        """Relative error of the whole output."""
        return float(_ratio(np.linalg.norm(self.difference), np.linalg.norm(self.size)))

    @cached_property
    def by_row(self) -> F64:
        """Relative error of each row."""
        by_row: F64 = _ratio(self.difference, self.size)
        return by_row

    @cached_property
    def worst_row(self) -> float:
        """Largest relative error of a row; NaN if some row has NaN."""
        return float(self.by_row.max(initial=0.0))

    @cached_property
    def independent(self) -> float:
        """Rows of equal error whose mean square would vary as that of these does."""
        squares = self.difference**2
        return float(squares.sum() ** 2 / max((squares**2).sum(), np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Yardstick:
    """Errors of other runs of the same model; the errors of a run are compared with them.

    Attributes:
        draws: errors of each; the worst of them counts.
        freedom: independent errors in a row.
        what: their name. chance: of a right output that is beyond the limits.
        most: the largest factor that chance may give.
    """

    draws: tuple[RowErrors, ...]
    freedom: float
    what: str
    chance: float = CHANCE
    most: float = math.inf

    @staticmethod
    def of_one_rank(errors: RowErrors, spec: ModelSpec, chance: float = CHANCE) -> Yardstick:
        """Return a yardstick from the errors of one rank."""
        return Yardstick((errors,), narrowest(spec) / 2, "one rank", chance)

    @staticmethod
    def of_rounding(
        draws: Sequence[RowErrors], spec: ModelSpec, chance: float = CHANCE
    ) -> Yardstick:
        """Return a yardstick from the errors of emulations of rounding alone."""
        freedom = min(narrowest(spec) / 2, *(layer.heads for layer in spec.blocks))
        return Yardstick(tuple(draws), freedom, "rounding alone", chance, MOST_FACTOR)

    def whole(self) -> Limit:
        """Return what chance allows the whole output beside these."""
        worst = max(self.draws, key=lambda errors: errors.whole)
        return self._limit(chance_factor(worst.independent, self.chance), worst.whole)

    def row(self, row: int, size: float, tolerance: float) -> Limit:
        """Return what chance allows a row beside these.

        Args:
            row: its index.
            size: of the row in the run's oracle. Oracles that differ by more than the tolerance
                took different experts, and such a row is held against the worst one here.
            tolerance: relative.
        """
        own = float(self.draws[0].size[row])
        same = abs(size - own) <= tolerance * own
        return self._limit(self.row_factor, float(self._by_row[row]) if same else self._worst_row)

    def deviations(self, values: int) -> F64:
        """Return what chance gives each of a row's values at most, by row; for absolute errors.

        Args:
            values: of a row, equally large.
        """
        differences = np.max([errors.difference for errors in self.draws], axis=0)
        deviations: F64 = min(self.row_factor, self.most) * differences / math.sqrt(values)
        return deviations

    @cached_property
    def row_factor(self) -> float:
        """What chance gives a row at most, beside the same of these."""
        return chance_factor(self.freedom, self.chance / max(len(self._by_row), 1))

    @cached_property
    def _by_row(self) -> F64:
        by_row: F64 = np.max([errors.by_row for errors in self.draws], axis=0)
        return by_row

    @cached_property
    def _worst_row(self) -> float:
        return float(self._by_row.max(initial=0.0))

    def _limit(self, factor: float, error: float) -> Limit:
        factor = min(factor, self.most)
        text = f"{factor:.3g} × that of {self.what}, {error:.2e}"
        return Limit(factor * error if error else 0.0, text)


def chance_factor(freedom: float, chance: float) -> float:
    """Return what the ratio of two equal errors passes with some chance, and at least 1.2.

    The root of the F distribution's quantile by Paulson's approximation (1942), which is never
    below it; infinite where that has no answer, for few degrees of freedom.

    Args:
        freedom: degrees of freedom of either mean square.
        chance: of a ratio beyond the result.
    """
    z, spread = NormalDist().inv_cdf(1.0 - chance), 2.0 / (9.0 * max(freedom, 1.0))
    centre = (1.0 - spread) ** 2
    denominator = centre - z * z * spread
    if denominator <= 0.0:
        return math.inf
    cube_root = (centre + math.sqrt(centre**2 - denominator**2)) / denominator
    return max(DISTRIBUTED_FACTOR, math.pow(cube_root, 1.5))


def narrowest(spec: ModelSpec) -> int:
    """Return the narrowest width of a model that errors of its rows pass through."""
    widths = (min(b.heads * b.value_dim, b.mlp_hidden) for b in spec.blocks)
    return min(spec.d_model, *widths)


def growth(name: str, spec: ModelSpec) -> float:
    """Return √(layers that an output has passed through), by its name."""
    parts = name.split(".")
    return math.sqrt(int(parts[1]) + 1 if parts[0] == "layers" else len(spec.blocks))


def broken_limits(
    errors: RowErrors,
    tolerance: float,
    one_rank: Yardstick | None = None,
    rounding: Yardstick | None = None,
) -> list[str]:
    """Return a sentence for each limit that an output breaks: its error, the limit, the source.

    Args:
        errors: of the run.
        tolerance: of the whole; that of a row is `WORST_ROW_FACTOR` times it.
        one_rank: a run on one rank, for the distributed part of the contract.
        rounding: emulations of rounding alone; what they are off by is allowed, even past the
            tolerance.
    """
    broken = []
    limit = whole_limit(tolerance, rounding, one_rank)
    if not errors.whole <= limit.value:  # NaN is within nothing
        broken.append(f"off by {errors.whole:.2e}, over {limit.value:.2e}, {limit.source}")
    found, of_a_row = errors.by_row, Limit(WORST_ROW_FACTOR * tolerance, "the tolerance of a row")
    worst, how = 1.0, None
    for row in map(int, np.nonzero(~(found <= DISTRIBUTED_SHARE * of_a_row.value))[0]):
        size = float(errors.size[row])
        of_row = [
            None if other is None else other.row(row, size, tolerance)
            for other in (rounding, one_rank)
        ]
        limit = _limit(of_a_row, *of_row)
        share = found[row] / limit.value
        if not (share <= worst or math.isnan(worst)):
            worst = share
            how = f"row {row} off by {found[row]:.2e}, over {limit.value:.2e}, {limit.source}"
    return broken if how is None else [*broken, how]


def whole_limit(
    tolerance: float, rounding: Yardstick | None = None, one_rank: Yardstick | None = None
) -> Limit:
    """Return what the whole of an output is allowed; see `broken_limits`."""
    others = [None if other is None else other.whole() for other in (rounding, one_rank)]
    return _limit(Limit(tolerance, "the tolerance"), *others)


def _limit(tolerance: Limit, rounding: Limit | None, one_rank: Limit | None) -> Limit:
    """Return what is allowed in the end."""
    allowed = max(tolerance, rounding or tolerance)
    if allowed.value > MOST_ERROR:
        allowed = Limit(
            MOST_ERROR, f"nearly its own size, for {allowed.source}: too coarse a dtype to judge by"
        )
    if one_rank is None:
        return allowed
    share = Limit(DISTRIBUTED_SHARE * allowed.value, f"a quarter of {allowed.source}")
    return min(allowed, max(one_rank, share, rounding or share))


def _ratio(difference: Any, size: Any) -> Any:
    """Return difference / size, 0 where there is no difference."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(difference == 0, 0.0, difference / size)
