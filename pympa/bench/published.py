"""What a paper prints about the sizes of its model, beside what its own dimensions give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from pympa.accounting import linear_parameters, parameters
from pympa.spec import ModelSpec
from pympa.working_set import Measure

_AGREES = 0.01  # relative; papers round
_BINARY = ("MiB", 1.024**2), ("GiB", 1.024**3)  # over MB and GB


class PublishedFootprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes as printed, in elements, tokens and bytes; None where the paper is silent.

    Attributes:
        parameters, weight_bytes, layer_weight_bytes: of the model and of one layer.
        activation_bytes: the residual stream of the whole batch.
        chunk_tokens: of each sequence that go through a layer at a time. chunk_bytes: of these.
        weight_tile_bytes, operator_buffer_bytes, intermediate_state_bytes, working_set_bytes: of a
            layer's step. cache_use_bytes: of the cache, by such a step.
    """

    parameters: float | None = None
    weight_bytes: float | None = None
    layer_weight_bytes: float | None = None
    activation_bytes: float | None = None
    chunk_tokens: int | None = None
    chunk_bytes: float | None = None
    weight_tile_bytes: float | None = None
    operator_buffer_bytes: float | None = None
    intermediate_state_bytes: float | None = None
    working_set_bytes: float | None = None
    cache_use_bytes: float | None = None


@dataclass(frozen=True)
class Figure:
    """One printed figure.

    Attributes:
        name: what it is of. printed: as in the paper.
        given: what the paper's other figures give, in the same unit. how: it was computed.
        is_bytes: the unit is bytes, not elements.
    """

    name: str
    printed: float
    given: float
    how: str
    is_bytes: bool = True

    @property
    def verdict(self) -> str:
        """How both compare, in words."""
        factor = self.printed / self.given
        if abs(factor - 1) < _AGREES:
            return "agrees"
        name, ratio = _BINARY[self.printed >= 1e9]
        if self.is_bytes and abs(factor * ratio - 1) < _AGREES:
            return f"agrees in {name}"
        return f"{factor:.3g} × what follows"


def compare_figures(
    published: PublishedFootprint,
    spec: ModelSpec,
    lengths: Sequence[int],
    itemsize: int,
    measure: Measure,
) -> Iterator[Figure]:
    """Yield the printed figures beside what dimensions give, or what our kernels touch.

    Args:
        published: the paper's figures.
        spec: the paper's model.
        lengths: tokens of each sequence of its batch.
        itemsize: bytes of an element.
        measure: from `working_sets`, of a rank of the plan in question.
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
