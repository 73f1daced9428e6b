"""The two lanes of the suite.

`python -m pytest` is the fast lane: it runs MPI on 4 ranks, every family of plans, and every
kernel in each dtype on the best instruction set. `--full` adds what is here marked: other
instruction sets and numbers of ranks, larger samples of plans, slow jobs. What the fast lane leaves
out is deselected, so that the last line of a run tells how much it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

FULL = pytest.mark.full
"""Marks a test, or a set of parameters, that only `--full` runs."""


def full(*sets: Any) -> list[Any]:
    """Return sets of parameters that only `--full` runs; a tuple is a set of several."""
    return [pytest.param(*(s if isinstance(s, tuple) else (s,)), marks=FULL) for s in sets]


def lanes(sets: Iterable[Any], fast: Iterable[int]) -> list[Any]:
    """Return sets of parameters in their order, of which the fast lane runs only some.

    Args:
        sets: all of them.
        fast: the places of those of the fast lane, chosen so that each kind of case is there.

    Raises:
        IndexError: there is no such place.
    """
    sets, places = list(sets), set(fast)
    if beyond := [place for place in places if place not in range(len(sets))]:
        raise IndexError(f"fast: expected places in {len(sets)} sets; got {beyond}")
    return [one if place in places else full(one)[0] for place, one in enumerate(sets)]
