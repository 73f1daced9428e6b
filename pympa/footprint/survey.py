"""The memory that a plan needs, by rank and by layer, found by running each rank on shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pympa.footprint.rehearsal import Rehearsal
from pympa.footprint.working_set import WorkingSet, most_rows, working_sets
from pympa.model.weights import model_weights
from pympa.plan.mesh import Plan
from pympa.runtime.ledger import USES, Uses
from pympa.spec import ModelSpec


@dataclass(frozen=True)
class Need:
    """The memory that a rank or a layer needs.

    Attributes:
        parameters: the number of elements of the rank's weights, or of the whole layer's weights.
        uses: the bytes by use at their maximum. A rank's add up to its arena's high-water mark.
        working_set: the working set of the layer, or of the rank's layer with the largest one.
    """

    parameters: int
    uses: Uses
    working_set: WorkingSet

    @property
    def total_bytes(self) -> int:
        """The bytes of all uses."""
        return sum(self.uses.values())


@dataclass(frozen=True)
class LayerNeed(Need):
    """The memory that one layer needs on the rank that needs most for it.

    Attributes:
        stage: the number of its stage; layers of different stages may be equal otherwise.
    """

    stage: int = field(compare=False)


@dataclass(frozen=True)
class Survey:
    """The memory that a plan needs.

    Attributes:
        ranks: the needs of the ranks, in order.
        layers: the needs of the layers, in order.
        chunk_rows: the number of rows in the working sets: the largest micro-batch on any rank.
    """

    ranks: list[Need]
    layers: list[LayerNeed]
    chunk_rows: int


def survey(
    spec: ModelSpec, plan: Plan, lengths: Sequence[int], rehearsal_of: Callable[[int], Rehearsal]
) -> Survey:
    """Run all ranks of a plan on shapes, one after the other.

    Args:
        spec: the model.
        plan: the plan.
        lengths: the number of tokens of each sequence.
        rehearsal_of: a function that returns the rehearsal of a rank.
    """
    rows = most_rows(plan, lengths, plan.micro_batches)
    ranks: list[Need] = []
    layers: dict[int, LayerNeed] = {}
    elements = [layer_parameters(spec, index) for index in range(len(spec.blocks))]
    for rank in range(plan.world):
        rehearsal = rehearsal_of(rank)
        rehearsal.step(lengths)
        ledger = rehearsal.ledger
        uses = {str(use): _total(ledger.peak, use) for use in USES}
        held = {index: ledger.parts[f"layers.{index}"] for index in rehearsal.model.layers}
        touched = working_sets(rehearsal)(rows)
        ranks.append(
            Need(
                rehearsal.model.parameters,
                uses,
                max(touched.values(), key=lambda working_set: working_set.total),
            )
        )
        for index, found in held.items():
            need = LayerNeed(elements[index], found, touched[index], rank // plan.stage_ranks)
            if index not in layers or need.total_bytes > layers[index].total_bytes:
                layers[index] = need
    return Survey(ranks, [layers[index] for index in sorted(layers)], rows)


def layer_parameters(spec: ModelSpec, index: int) -> int:
    """Return the number of elements of a layer's weights, including norms and biases."""
    prefix = f"layers.{index}."
    return sum(
        math.prod(weight.shape)
        for name, weight in model_weights(spec).items()
        if name.startswith(prefix)
    )


def _total(peak: dict[tuple[str, str], int], use: str) -> int:
    return sum(size for (_, of_use), size in peak.items() if of_use == use)
