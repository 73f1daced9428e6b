"""The bytes that a layer's step uses for a chunk of rows, and the largest chunk that fits a cache.

The working set of a layer is what must stay in the cache while one chunk of rows goes through it:
the tile of a weight that a kernel reads (512 outputs, applied to all rows of the chunk before the
next tile), the chunk of the residual stream, the kernel's workspace, and the arrays between two
kernels: normed rows, q, k, v, the running softmax, hidden rows, messages. Keys and values of
earlier chunks do not count: they are read once for each chunk, in tiles in the workspace.

Each part counts at its maximum, so a cache of the total size is always large enough. All parts but
the tile are found by running the layer on shapes, so they follow the strategies' code. The parts
are those of the "stages" paper (seed 003), which uses them to cut its stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pympa.footprint.rehearsal import Rehearsal
from pympa.plan.layout import split_batch, split_micro_batches, split_tokens
from pympa.plan.mesh import Plan
from pympa.runtime.ledger import BETWEEN, TILE, Uses
from pympa.spec import ModelSpec


@dataclass(frozen=True)
class WorkingSet:
    """The bytes that one layer's step uses, each part at its maximum.

    Attributes:
        weight_tile: the bytes of the weights' tile in the running linear.
        activation_chunk: the bytes of the residual stream.
        operator_buffers: the bytes of workspaces.
        intermediate_state: the bytes of arrays between kernels, including messages.
    """

    weight_tile: int
    activation_chunk: int
    operator_buffers: int
    intermediate_state: int

    @property
    def total(self) -> int:
        """The bytes of all four parts."""
        return (
            self.weight_tile
            + self.activation_chunk
            + self.operator_buffers
            + self.intermediate_state
        )


Measure = Callable[[int], dict[int, WorkingSet]]
"""A function from the rows of a chunk on this rank to the working set of each of its layers."""


def working_sets(rehearsal: Rehearsal) -> Measure:
    """Return a function that measures working sets on the rank of a rehearsal."""
    model, ledger = rehearsal.model, rehearsal.ledger

    def measure(rows: int) -> dict[int, WorkingSet]:
        plan = model.mesh.plan
        ledger.working.clear()
        rehearsal.step([rows * plan.cp] * plan.dp, micro_batches=1)
        stream_bytes = rows * model.spec.d_model * model.dtype.itemsize
        return {
            index: _working_set(ledger.working[f"layers.{alike[0]}"], stream_bytes)
            for alike in model.alike
            for index in alike
        }

    return measure


def _working_set(uses: Uses, stream_bytes: int) -> WorkingSet:
    return WorkingSet(uses[TILE], stream_bytes, uses["workspaces"], uses[BETWEEN])


def fitting_chunk(measure: Measure, cache_bytes: int, most: int) -> int:
    """Return the rows of the largest chunk whose working set fits a cache in every layer.

    The result is at least 1, even if 1 row does not fit. It is found by bisection. With experts,
    whose buffers are used in separate chunks, some larger chunk may fit as well.

    Args:
        measure: the function from `working_sets`.
        cache_bytes: the bytes of the cache.
        most: the number of rows of the whole batch.
    """

    def fits(rows: int) -> bool:
        return max(found.total for found in measure(rows).values()) <= cache_bytes

    fitting, failing = 1, max(most, 1) + 1
    while 2 * fitting < failing and fits(2 * fitting):
        fitting *= 2
    failing = min(failing, 2 * fitting)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def most_rows(plan: Plan, lengths: Sequence[int], micro_batches: int) -> int:
    """Return the rows of the largest micro-batch on any rank.

    Args:
        plan: the plan; its own number of micro-batches is not used.
        lengths: the number of tokens of each sequence of the batch.
        micro_batches: the number of micro-batches.
    """
    return max(
        layout.rows
        for group in split_batch(lengths, plan.dp)
        for part in split_micro_batches(group, micro_batches)
        for layout in split_tokens(part, plan.cp, plan.balance)
    )


def micro_batches_within(plan: Plan, spec: ModelSpec, lengths: Sequence[int], chunk: int) -> int:
    """Return the fewest micro-batches of at most `chunk` rows on any rank.

    Micro-batches are whole sequences if that is enough, otherwise token chunks. A model that is not
    causal cannot be cut into token chunks: it gets as many micro-batches as sequences.
    """
    groups = split_batch(lengths, plan.dp)
    sequences = max(len(group.ranges) for group in groups)
    whole = max(len(lengths) // plan.dp, 1) if not spec.causal else max(sequences, 1)
    fewest = max(1, -(-max(group.rows for group in groups) // (chunk * plan.cp)))
    uncut = [r.length for group in groups if len(group.ranges) >= whole for r in group.ranges]
    if most_rows(plan, [max(uncut, default=0)], 1) <= chunk:
        for count in range(fewest, whole + 1):
            if most_rows(plan, lengths, count) <= chunk:
                return count
    if not spec.causal:
        return whole
    count = max(whole + 1, fewest)
    while most_rows(plan, lengths, count) > chunk:
        count += 1
    return count
