"""The limits of a run's error against the oracle, and the part that chance explains.

Error = ‖run - oracle‖ / ‖oracle‖, of a whole output and of each row. After layer l (from 1) the
error of the whole output may be tolerance·√l, and that of a row 8 times as large. A distributed run
must also stay near the error of one rank, in the whole and in each row: within a factor, or within
a quarter of the limit.

Both errors come from rounding, so their ratio is random. If each is the mean square of n
independent errors, its square follows the F distribution with n and n degrees of freedom; the
factor is the square root of its quantile, and at least 1.2. For the whole, n counts rows: the
number of equal rows with the same variance (Satterthwaite 1946), because errors inside a row depend
on each other. For a row, n is half the narrowest width that its errors have passed through, because
they are not equally large. A row is compared with the same row of one rank, and the chance is
divided by the number of rows (Bonferroni).

Deep or narrow models amplify rounding by more than √l. So the error of emulated rounding in the
oracle of the same model is allowed as well, for one rank or many, with factors up to 8; the worst
of several draws counts. For a row, n is then at most the fewest heads of a layer, because an error
of a score changes its whole head.
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
CHANCE = 1e-4  # of refusing a right run, divided by its number of outputs
MOST_FACTOR = 8.0  # over the error of rounding alone, however few rows there are
MOST_ERROR = 0.9  # a lost row has an error of 1, which rounding must never excuse

F64 = NDArray[np.float64]


class Limit(NamedTuple):
    """The largest allowed error, and its source in words."""

    value: float
    source: str


@dataclass(frozen=True)
class RowErrors:
    """The errors of the rows of one output.

    Attributes:
        difference: the norm ‖run - oracle‖ of each row.
        size: the norm ‖oracle‖ of each row.
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
        """The relative error of the whole output."""
        return float(_ratio(np.linalg.norm(self.difference), np.linalg.norm(self.size)))

    @cached_property
    def by_row(self) -> F64:
        """The relative error of each row."""
        by_row: F64 = _ratio(self.difference, self.size)
        return by_row

    @cached_property
    def worst_row(self) -> float:
        """The largest relative error of a row; NaN if some row has NaN."""
        return float(self.by_row.max(initial=0.0))

    @cached_property
    def independent(self) -> float:
        """The number of rows of equal error whose mean square has the same variance."""
        squares = self.difference**2
        return float(squares.sum() ** 2 / max((squares**2).sum(), np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class ReferenceErrors:
    """Errors of other runs of the same model, with which a run's errors are compared.

    Attributes:
        draws: the errors of each run; limits follow from the largest ones.
        freedom: the number of independent errors in a row.
        what: the name of these runs.
        chance: the chance that a right output exceeds the limits.
        most: the largest factor that chance may give.
    """

    draws: tuple[RowErrors, ...]
    freedom: float
    what: str
    chance: float = CHANCE
    most: float = math.inf

    @staticmethod
    def of_one_rank(errors: RowErrors, spec: ModelSpec, chance: float = CHANCE) -> ReferenceErrors:
        """Return the reference errors of one rank."""
        return ReferenceErrors((errors,), narrowest(spec) / 2, "one rank", chance)

    @staticmethod
    def of_rounding(
        draws: Sequence[RowErrors], spec: ModelSpec, chance: float = CHANCE
    ) -> ReferenceErrors:
        """Return the reference errors of emulations of rounding alone."""
        freedom = min(narrowest(spec) / 2, *(layer.heads for layer in spec.blocks))
        return ReferenceErrors(tuple(draws), freedom, "rounding alone", chance, MOST_FACTOR)

    def whole(self) -> Limit:
        """Return the limit for the whole output."""
        worst = max(self.draws, key=lambda errors: errors.whole)
        return self._limit(chance_factor(worst.independent, self.chance), worst.whole)

    def row(self, row: int, size: float, tolerance: float) -> Limit:
        """Return the limit for a row.

        Args:
            row: the index of the row.
            size: the norm of the row in the run's oracle. If the oracles' norms differ by more than
                the tolerance, they took different experts, and the row is compared with the worst
                row here.
            tolerance: the relative tolerance.
        """
        own = float(self.draws[0].size[row])
        same = abs(size - own) <= tolerance * own
        return self._limit(self.row_factor, float(self._by_row[row]) if same else self._worst_row)

    def deviations(self, values: int) -> F64:
        """Return the limit for each of a row's values, by row, as an absolute error.

        Args:
            values: the number of values of a row, assumed equally large.
        """
        differences = np.max([errors.difference for errors in self.draws], axis=0)
        deviations: F64 = min(self.row_factor, self.most) * differences / math.sqrt(values)
        return deviations

    @cached_property
    def row_factor(self) -> float:
        """The largest ratio of a row's error to this one that chance explains."""
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
        text = f"{factor:.3g} × the error of {self.what}, {error:.2e}"
        return Limit(factor * error if error else 0.0, text)


def chance_factor(freedom: float, chance: float) -> float:
    """Return the ratio of two equal errors that is exceeded with some chance, and at least 1.2.

    The root of the F distribution's quantile by Paulson's approximation (1942), which is never
    below it; infinite where the approximation has no solution, for few degrees of freedom.

    Args:
        freedom: the number of degrees of freedom of each mean square.
        chance: the chance of a larger ratio.
    """
    z, spread = NormalDist().inv_cdf(1.0 - chance), 2.0 / (9.0 * max(freedom, 1.0))
    centre = (1.0 - spread) ** 2
    denominator = centre - z * z * spread
    if denominator <= 0.0:
        return math.inf
    cube_root = (centre + math.sqrt(centre**2 - denominator**2)) / denominator
    return max(DISTRIBUTED_FACTOR, math.pow(cube_root, 1.5))


def narrowest(spec: ModelSpec) -> int:
    """Return the narrowest width of a model that the errors of a row pass through."""
    widths = [min(b.heads * b.value_dim, b.mlp_hidden) for b in spec.blocks]
    widths += [b.latent.kv_rank for b in spec.blocks if b.latent is not None]
    widths += [b.latent.q_rank for b in spec.blocks if b.latent is not None and b.latent.q_rank]
    return min(spec.d_model, *widths)


def growth(name: str, spec: ModelSpec) -> float:
    """Return √(number of layers that an output has passed through), by its name."""
    parts = name.split(".")
    return math.sqrt(int(parts[1]) + 1 if parts[0] == "layers" else len(spec.blocks))


def broken_limits(
    errors: RowErrors,
    tolerance: float,
    one_rank: ReferenceErrors | None = None,
    rounding: ReferenceErrors | None = None,
) -> list[str]:
    """Return a sentence for each limit that an output breaks: its error, the limit, the source.

    Args:
        errors: the errors of the run.
        tolerance: the tolerance of the whole; that of a row is `WORST_ROW_FACTOR` times it.
        one_rank: the errors of one rank, for the distributed part of the contract.
        rounding: the errors of emulated rounding, which are allowed even above the tolerance.
    """
    broken = []
    limit = whole_limit(tolerance, rounding, one_rank)
    if not errors.whole <= limit.value:  # true for NaN, too
        broken.append(f"error {errors.whole:.2e} exceeds {limit.value:.2e} ({limit.source})")
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
            how = f"error {found[row]:.2e} of row {row} exceeds {limit.value:.2e} ({limit.source})"
    return broken if how is None else [*broken, how]


def whole_limit(
    tolerance: float,
    rounding: ReferenceErrors | None = None,
    one_rank: ReferenceErrors | None = None,
) -> Limit:
    """Return the limit for the whole of an output; see `broken_limits`."""
    others = [None if other is None else other.whole() for other in (rounding, one_rank)]
    return _limit(Limit(tolerance, "the tolerance"), *others)


def _limit(tolerance: Limit, rounding: Limit | None, one_rank: Limit | None) -> Limit:
    """Return the limit that follows from the three."""
    allowed = max(tolerance, rounding or tolerance)
    if allowed.value > MOST_ERROR:
        allowed = Limit(
            MOST_ERROR,
            f"the largest limit of all, in place of {allowed.source}; the dtype is too coarse for "
            "this model",
        )
    if one_rank is None:
        return allowed
    share = Limit(DISTRIBUTED_SHARE * allowed.value, f"a quarter of {allowed.source}")
    return min(allowed, max(one_rank, share, rounding or share))


def _ratio(difference: Any, size: Any) -> Any:
    """Return difference / size, or 0 where the difference is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(difference == 0, 0.0, difference / size)
