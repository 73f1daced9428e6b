"""The memory that a plan needs, by rank and by layer, found by running each rank on shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pympa.footprint.kinds import first_alike
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
    """Run the ranks of a plan on shapes, one after the other; of ranks that do the same, one.

    Args:
        spec: the model.
        plan: the plan.
        lengths: the number of tokens of each sequence.
        rehearsal_of: a function that returns the rehearsal of a rank.
    """
    rows = most_rows(plan, lengths, plan.micro_batches)
    ranks: list[Need] = []
    layers: dict[int, LayerNeed] = {}
    elements = _layer_elements(spec)
    for rank, first in enumerate(first_alike(rehearsal_of(0), lengths)):
        if first < rank:
            ranks.append(ranks[first])
            continue
        rehearsal = rehearsal_of(rank)
        rehearsal.step(lengths)
        ledger = rehearsal.ledger
        uses = {str(use): _total(ledger.peak, use) for use in USES}
        held = {
            index: ledger.parts[f"layers.{alike[0]}"]
            for alike in rehearsal.model.alike
            for index in alike
        }
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
    return _layer_elements(spec)[index]


def _layer_elements(spec: ModelSpec) -> Counter[int]:
    """Return the number of elements of each layer's weights."""
    found: Counter[int] = Counter()
    for name, weight in model_weights(spec).items():
        kind, _, rest = name.partition(".")
        if kind == "layers":
            found[int(rest.partition(".")[0])] += math.prod(weight.shape)
    return found


def _total(peak: dict[tuple[str, str], int], use: str) -> int:
    return sum(size for (_, of_use), size in peak.items() if of_use == use)
