"""Figures that a paper prints about its model's sizes, and those that its dimensions give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pympa.bench.experiment.published import PublishedFootprint
from pympa.footprint.working_set import Measure
from pympa.plan.accounting import linear_parameters, parameters
from pympa.spec import ModelSpec

_AGREES = 0.01  # relative; papers round
_BINARY = ("MiB", 1.024**2), ("GiB", 1.024**3)  # the ratio to MB and GB


@dataclass(frozen=True)
class Figure:
    """One printed figure.

    Attributes:
        name: the quantity.
        printed: the figure as the paper prints it.
        given: the figure that follows from the paper's other figures, in the same unit.
        how: the way to compute it.
        is_bytes: whether the unit is bytes, not elements.
    """

    name: str
    printed: float
    given: float
    how: str
    is_bytes: bool = True

    @property
    def verdict(self) -> str:
        """The comparison of both figures, in words."""
        factor = self.printed / self.given
        if abs(factor - 1) < _AGREES:
            return "agrees"
        name, ratio = _BINARY[self.printed >= 1e9]
        if self.is_bytes and abs(factor * ratio - 1) < _AGREES:
            return f"agrees in {name}"
        return f"{factor:.3g} × computed"


def compare_figures(
    published: PublishedFootprint,
    spec: ModelSpec,
    lengths: Sequence[int],
    itemsize: int,
    measure: Measure,
) -> Iterator[Figure]:
    """Yield each printed figure beside the one that the dimensions give, or our kernels use.

    Args:
        published: the paper's figures.
        spec: the paper's model.
        lengths: the number of tokens of each sequence of its batch.
        itemsize: the bytes of one element.
        measure: the function from `working_sets`, for a rank of the plan.
    """
    p, row_bytes = published, spec.d_model * itemsize
    layer, whole = linear_parameters(spec, spec.blocks[0]), parameters(spec)
    wanted: list[tuple[str, float | None, float, str, bool]] = [
        ("parameters", p.parameters, whole, "layers, embedding and head", False),
        ("weights", p.weight_bytes, whole * itemsize, "parameters × bytes of each", True),
        ("weights of a layer", p.layer_weight_bytes, layer * itemsize, "q, k, v, out, MLP", True),
        ("activations", p.activation_bytes, sum(lengths) * row_bytes, "tokens × d_model", True),
    ]
    if p.chunk_tokens is not None:
        chunk = len(lengths) * p.chunk_tokens * row_bytes
        name = f"chunk of {p.chunk_tokens} tokens"
        wanted.append((name, p.chunk_bytes, chunk, "× sequences × d_model", True))
    if p.chunk_bytes is not None:
        rows = max(1, round(p.chunk_bytes / row_bytes))
        touched = max(measure(rows).values(), key=lambda working_set: working_set.total)
        how = f"by our kernels, {rows} rows"
        wanted += [
            ("weight tile", p.weight_tile_bytes, touched.weight_tile, how, True),
            ("operator buffers", p.operator_buffer_bytes, touched.operator_buffers, how, True),
            (
                "intermediate state",
                p.intermediate_state_bytes,
                touched.intermediate_state,
                how,
                True,
            ),
            ("working set", p.working_set_bytes, touched.total, how, True),
        ]
    if p.working_set_bytes is not None:
        used = p.working_set_bytes
        wanted.append(("cache in use", p.cache_use_bytes, used, "the printed working set", True))
    for name, printed, given, how, is_bytes in wanted:
        if printed is not None:
            yield Figure(name, printed, given, how, is_bytes)
