"""Seconds of Python between kernels and around messages, measured in steps of small models."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from pympa.model.model import Model
from pympa.model.resources import RankResources
from pympa.plan.mesh import Plan
from pympa.runtime.step import Step
from pympa.session.resources import build_resources
from pympa.session.team import Team
from pympa.spec import LayerSpec, ModelSpec, numpy_dtype
from pympa.transport.endpoint import NullEndpoint

SMALL_BYTES, LARGE_BYTES = 64 << 10, 1 << 20
"""The most bytes that a kernel of the small model moves, and the least of the large model."""
_SMALL, _LARGE = (16, 64), (1024, 512)  # rows and width
_SMALL_STEPS, _LARGE_STEPS = 61, 5
_HEAD_DIM = 16


def between_kernels(team: Team, dtype: str, *, large: bool) -> float:
    """Return this rank's seconds outside of kernels in a step, for each kernel. Collective.

    Args:
        team: the team; each of its ranks runs its own model.
        dtype: the dtype of the model.
        large: whether kernels are large enough to evict Python's data from the nearest caches.
    """
    resources = build_resources(NullEndpoint(0, 1), Plan(), isa=team.isa)
    rows, width = _LARGE if large else _SMALL
    steps = _LARGE_STEPS if large else _SMALL_STEPS

    def of_kernel(step: Step) -> float:
        return _outside(step) / _kernels(step)

    return _typical(team, resources, dtype, rows, width, steps, of_kernel)


def around_messages(team: Team, dtype: str, *, large: bool) -> float:
    """Return this rank's own seconds for each call that posts messages. Collective.

    These are the seconds of a `tp` step outside of kernels, waits and Python between kernels.

    Args:
        team: the team, which runs one model.
        dtype: the dtype of the model.
        large: see `between_kernels`.
    """
    between = between_kernels(team, dtype, large=large)
    resources = team.resources(Plan(tp=team.size))
    rows, width = _LARGE if large else _SMALL
    steps = _LARGE_STEPS if large else _SMALL_STEPS

    def of_start(step: Step) -> float:
        starts = sum(span.kind == "wait" for span in step.spans)
        return max(0.0, _outside(step) - between * _kernels(step)) / starts

    return _typical(team, resources, dtype, rows, width, steps, of_start)


def _typical(
    team: Team,
    resources: RankResources,
    dtype: str,
    rows: int,
    width: int,
    steps: int,
    what: Callable[[Step], float],
) -> float:
    """Return the median of a quantity over the steps of a model."""
    layer = LayerSpec(repeat=2, heads=width // _HEAD_DIM, head_dim=_HEAD_DIM, mlp_hidden=2 * width)
    spec = ModelSpec(d_model=width, vocabulary=256, layers=(layer,))
    model = Model(spec, resources, numpy_dtype(dtype))
    prepared = model.prepare([np.zeros(rows, np.int32)])
    model.forward(prepared)
    found = []
    for _ in range(steps):
        team.barrier()
        model.forward(prepared)
        found.append(what(resources.trace.last))
    resources.arena.close()
    return statistics.median(found)


def _kernels(step: Step) -> int:
    return sum(span.kind == "compute" for span in step.spans)


def _outside(step: Step) -> float:
    """Return the seconds of a step outside of kernels and waits."""
    return step.stop - step.start - sum(span.stop - span.start for span in step.spans)
