"""The number of micro-batches: the numbers to try, and when to stop.

More micro-batches fill a pipeline better, until they are too small for efficient kernels. So plans
are tried from the fewest micro-batches on, doubling, until one is clearly slower than the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from pympa.plan.mesh import Plan
from pympa.spec import ModelSpec

MOST_MICRO_BATCHES = 128
CLEARLY_SLOWER = 0.95
"""A plan is clearly slower if its speed is below this share of the best one's."""

T = TypeVar("T")


def doublings(plan: Plan, spec: ModelSpec, lengths: Sequence[int], fewest: int = 1) -> list[Plan]:
    """Return the plan with `fewest` micro-batches, twice as many, and so on.

    The number is at most `MOST_MICRO_BATCHES`, or `fewest` if that is more, and at most the number
    of tokens, or of sequences if the model is not causal.

    Args:
        plan: the plan; its own number of micro-batches is not used.
        spec: the model.
        lengths: the number of tokens of each sequence.
        fewest: the first number.
    """
    parts = sum(lengths) if spec.causal else len(lengths)
    most = max(min(MOST_MICRO_BATCHES, parts), fewest)
    counts = [fewest << power for power in range((most // fewest).bit_length())]
    return [msgspec.structs.replace(plan, micro_batches=count) for count in counts]


def try_until_slower(
    plans: Iterable[Plan], attempt: Callable[[Plan], T | None], seconds: Callable[[T], float]
) -> list[T]:
    """Try plans in order until one is clearly slower than the best, and return the results.

    Args:
        plans: the plans in ascending order of micro-batches.
        attempt: a function that returns the result of a plan, or None if it cannot run.
        seconds: a function that returns the seconds of a result.
    """
    results: list[T] = []
    for plan in plans:
        result = attempt(plan)
        if result is None:
            continue
        results.append(result)
        if seconds(result) * CLEARLY_SLOWER > min(map(seconds, results)):
            break
    return results
