"""What a plan needs, by rank and by layer, found by running each rank on shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pympa.backend import Rehearsal
from pympa.ledger import USES, Uses
from pympa.mesh import Plan
from pympa.spec import ModelSpec
from pympa.weights import model_weights
from pympa.working_set import WorkingSet, most_rows, working_sets


@dataclass(frozen=True)
class Need:
    """What a rank needs, or a layer.

    Attributes:
        parameters: elements of the rank's weights; of the whole layer's, whatever the plan.
        uses: bytes by use when they are most. A rank's add up to its arena's high-water mark.
        working_set: of the layer's step; of a rank's layers, the one that touches most.
    """

    parameters: int
    uses: Uses
    working_set: WorkingSet

    @property
    def total_bytes(self) -> int:
        """Of all uses."""
        return sum(self.uses.values())


@dataclass(frozen=True)
class LayerNeed(Need):
    """What one layer needs on the rank that needs most for it.

    Attributes:
        stage: that has it; layers on different ones may be alike.
    """

    stage: int = field(compare=False)


@dataclass(frozen=True)
class Survey:
    """What a plan needs.

    Attributes:
        ranks, layers: in order.
        chunk_rows: of the largest micro-batch on any rank, which working sets are of.
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
        plan: the mesh.
        lengths: tokens of each sequence.
        rehearsal_of: makes the rehearsal of a rank.
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
    """Return the elements of all weights of one layer, norms and biases included."""
    prefix = f"layers.{index}."
    return sum(
        math.prod(weight.shape)
        for name, weight in model_weights(spec).items()
        if name.startswith(prefix)
    )


def _total(peak: dict[tuple[str, str], int], use: str) -> int:
    return sum(size for (_, of_use), size in peak.items() if of_use == use)
