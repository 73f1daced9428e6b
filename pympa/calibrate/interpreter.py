"""What Python takes between kernels and around messages, told from steps of small models."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from pympa.backend import build_rank
from pympa.mesh import Plan
from pympa.model import Model
from pympa.rank import Rank
from pympa.spec import LayerSpec, ModelSpec, numpy_dtype
from pympa.step import Step
from pympa.team import Team
from pympa.transport import NullEndpoint

SMALL_BYTES, LARGE_BYTES = 64 << 10, 1 << 20
"""What kernels of the two models move at most, and at least."""
_SMALL, _LARGE = (16, 64), (1024, 512)  # rows and width
_SMALL_STEPS, _LARGE_STEPS = 61, 5
_HEAD_DIM = 16


def between_kernels(team: Team, dtype: str, *, large: bool) -> float:
    """Return this rank's seconds of a step outside of kernels, for each kernel. Collective.

    Args:
        team: each of its ranks runs a model of its own.
        dtype: of the model.
        large: kernels empty the nearest caches, which Python then finds cold.
    """
    rank = build_rank(NullEndpoint(0, 1), Plan(), isa=team.isa)
    rows, width = _LARGE if large else _SMALL
    steps = _LARGE_STEPS if large else _SMALL_STEPS

    def of_kernel(step: Step) -> float:
        return _outside(step) / _kernels(step)

    return _typical(team, rank, dtype, rows, width, steps, of_kernel)


def around_messages(team: Team, dtype: str, *, large: bool) -> float:
    """Return this rank's own seconds for each start of messages. Collective.

    That is what a step of `tp` takes outside of kernels and waits, but for Python between kernels.

    Args:
        team: runs one model.
        dtype: of the model.
        large: see `between_kernels`.
    """
    between = between_kernels(team, dtype, large=large)
    rank = team.on(Plan(tp=team.size))
    rows, width = _LARGE if large else _SMALL
    steps = _LARGE_STEPS if large else _SMALL_STEPS

    def of_start(step: Step) -> float:
        starts = sum(span.kind == "wait" for span in step.spans)
        return max(0.0, _outside(step) - between * _kernels(step)) / starts

    return _typical(team, rank, dtype, rows, width, steps, of_start)


def _typical(
    team: Team,
    rank: Rank,
    dtype: str,
    rows: int,
    width: int,
    steps: int,
    what: Callable[[Step], float],
) -> float:
    """Return the median of something over steps of a model."""
    layer = LayerSpec(repeat=2, heads=width // _HEAD_DIM, head_dim=_HEAD_DIM, mlp_hidden=2 * width)
    spec = ModelSpec(d_model=width, vocabulary=256, layers=(layer,))
    model = Model(spec, rank, numpy_dtype(dtype))
    prepared = model.prepare([np.zeros(rows, np.int32)])
    model.forward(prepared)
    found = []
    for _ in range(steps):
        team.barrier()
        model.forward(prepared)
        found.append(what(rank.trace.last))
    rank.arena.close()
    return statistics.median(found)


def _kernels(step: Step) -> int:
    return sum(span.kind == "compute" for span in step.spans)


def _outside(step: Step) -> float:
    """Return the seconds of a step in neither a kernel nor a wait."""
    return step.stop - step.start - sum(span.stop - span.start for span in step.spans)
