"""What a layer's step over a chunk of rows touches, and the largest chunk that a cache holds.

The working set of a layer is what has to stay in the cache while one chunk of rows goes through it:
the tile of a weight that a kernel reads (512 outputs, which all rows of the chunk meet before the
next ones), the chunk of the residual stream, the kernel's workspace, and what lies between two
kernels: normed rows, q, k, v, the running softmax, hidden rows, messages. Keys and values of
earlier chunks are read once for each chunk, in tiles that the workspace holds, and do not count.

Each part counts when it is most, so that a cache of that size is never short. All but the tile is
found by running the layer on shapes, so it follows what the strategies do. The parts are those of
the "stages" paper (seed 003), whose stages are cut by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pympa.backend import Rehearsal
from pympa.layout import split_batch, split_micro_batches, split_tokens
from pympa.ledger import BETWEEN, REST, TILE, Uses
from pympa.mesh import Plan
from pympa.spec import ModelSpec


@dataclass(frozen=True)
class WorkingSet:
    """Bytes that one layer's step touches, each part when it is most.

    Attributes:
        weight_tile: of the linear at work. activation_chunk: the residual stream.
        operator_buffers: workspaces. intermediate_state: between kernels, messages included.
    """

    weight_tile: int
    activation_chunk: int
    operator_buffers: int
    intermediate_state: int

    @property
    def total(self) -> int:
        """All four parts."""
        return (
            self.weight_tile
            + self.activation_chunk
            + self.operator_buffers
            + self.intermediate_state
        )


Measure = Callable[[int], dict[int, WorkingSet]]
"""From rows of a chunk on this rank to the working set of each layer of its stage."""


def working_sets(rehearsal: Rehearsal) -> Measure:
    """Return what measures working sets on the rank of a rehearsal."""
    model, ledger = rehearsal.model, rehearsal.ledger

    def measure(rows: int) -> dict[int, WorkingSet]:
        plan = model.mesh.plan
        ledger.working.clear()
        rehearsal.step([rows * plan.cp] * plan.dp, micro_batches=1)
        stream_bytes = rows * model.spec.d_model * model.dtype.itemsize
        return {
            int(part.rpartition(".")[2]): _working_set(uses, stream_bytes)
            for part, uses in ledger.working.items()
            if part != REST
        }

    return measure


def _working_set(uses: Uses, stream_bytes: int) -> WorkingSet:
    return WorkingSet(uses[TILE], stream_bytes, uses["workspaces"], uses[BETWEEN])


def fitting_chunk(measure: Measure, cache_bytes: int, most: int) -> int:
    """Return the rows of the largest chunk whose working set fits a cache, in every layer.

    At least 1, whether or not that fits. Found by bisection: with experts, whose buffers take turns
    in chunks of their own, some larger chunk may fit as well.

    Args:
        measure: from `working_sets`.
        cache_bytes: of the cache.
        most: rows that there are.
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
        plan: the mesh; its own number of micro-batches does not count.
        lengths: tokens of each sequence of the batch.
        micro_batches: parts in time.
    """
    return max(
        layout.rows
        for group in split_batch(lengths, plan.dp)
        for part in split_micro_batches(group, micro_batches)
        for layout in split_tokens(part, plan.cp, plan.balance)
    )


def micro_batches_within(plan: Plan, spec: ModelSpec, lengths: Sequence[int], chunk: int) -> int:
    """Return the fewest micro-batches of at most `chunk` rows on any rank.

    Whole sequences if that is enough, else token chunks. A model that is not causal cannot be cut
    into these: it gets as many micro-batches as it has sequences.
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
