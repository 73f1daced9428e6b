"""Where each tensor of a model is in a checkpoint, checked before anything is loaded.

Every tensor of the model must be there with its shape, and every stored tensor must be used:
one that is not, such as a bias that the configuration does not know, would change the mathematics.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from pympa.checkpoint.families import Description
from pympa.checkpoint.names import Alternatives, Dialect, Part, prefixes
from pympa.checkpoint.tensors import StoredTensor, Tensors, find_tensor
from pympa.errors import RefusedError
from pympa.model.weights import WeightSpec, model_weights
from pympa.spec import ModelSpec
from pympa.text.escape import shown

Places = Mapping[str, Part]
"""The place of each tensor of a model, by its name."""

_UNUSED = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|masked_bias|attention\.bias"
    r"|[kv]_scale|[kv]_zero_point|input_scale|input_activation_scale|output_scale)\Z"
    r"|(?:.*\.)?(?:vision_tower|vision_model|multi_modal_projector|visual)\..*"
)
"""Stored tensors that change no logits of a text: tables, masks, the scales of other runtimes."""
_COMPARED_ROWS = 4096
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\..*")


def family_places(described: Description, tensors: Tensors) -> Places:
    """Return where the tensors of a model are in files of its family; see `find_places`.

    Args:
        described: the model and its family.
        tensors: the stored tensors.
    """
    spec, family = described.spec, described.family.name
    dialect = Dialect(family, _prefix(family, tensors))
    extra = range(len(spec.blocks), len(spec.blocks) + described.extra_layers)
    unused = [name for name in tensors.stored if _layer_of(name) in extra]
    return find_places(spec, dict(dialect.tensors(spec)), tensors, unused)


def find_places(
    spec: ModelSpec,
    known: Mapping[str, Alternatives],
    tensors: Tensors,
    unused: Iterable[str] = (),
) -> Places:
    """Return where the tensors of a model are stored.

    Args:
        spec: the model.
        known: the places where each tensor may be.
        tensors: the stored tensors.
        unused: the names of stored tensors that are used for something else.

    Raises:
        RefusedError: a tensor is missing, has a wrong shape, or is stored and not used.
    """
    wanted = model_weights(spec)
    places = {name: _first_stored(tensors, known[name]) for name in wanted}
    _check_shapes(tensors, wanted, places)
    used = {part.name for part in places.values()} | {*unused}
    if spec.tied_head:
        used |= _heads(tensors, known.get("head", ()), places["embedding"])
    _refuse_unused(tensors, used)
    return places


def _heads(tensors: Tensors, heads: Alternatives, embedding: Part) -> set[str]:
    """Return the stored heads of a model whose head is its embedding.

    Raises:
        RefusedError: a head differs from the embedding.
    """
    found = {part.name for part in heads if part.name in tensors.stored}
    for name in found:
        find_tensor(tensors, name, tensors.stored[embedding.name].shape)
        rows = tensors.stored[name].shape[0]
        for first in range(0, rows, _COMPARED_ROWS):
            span = [(first, min(first + _COMPARED_ROWS, rows))]
            if not np.array_equal(tensors.read(name, span), tensors.read(embedding.name, span)):
                raise RefusedError(
                    f"{tensors.where}: tensor {shown(name)}: expected the same numbers as in "
                    f"{shown(embedding.name)}, because tie_word_embeddings is true; got others; "
                    "set tie_word_embeddings to false, or remove the tensor"
                )
    return found


def _prefix(family: str, tensors: Tensors) -> str:
    """Return the prefix of names in a checkpoint, by the name of its embedding."""
    embedding = "embed_in.weight" if family == "gpt_neox" else "embed_tokens.weight"
    found = prefixes(family)
    return next((p for p in found if p + embedding in tensors.stored), found[0])


def _first_stored(tensors: Tensors, alternatives: Alternatives) -> Part:
    """Return the first place whose tensor is stored.

    Raises:
        RefusedError: none is.
    """
    for part in alternatives:
        if part.name in tensors.stored:
            whole = tensors.stored[part.name].dtype == "MXFP4"  # always [outputs, inputs]
            return part._replace(transposed=part.transposed and not whole)
    find_tensor(tensors, alternatives[0].name)
    raise RefusedError(f"{tensors.where}: expected a tensor {shown(alternatives[0].name)}")


def _check_shapes(tensors: Tensors, wanted: Mapping[str, WeightSpec], places: Places) -> None:
    """Refuse stored tensors whose shapes are not those of the model's tensors in them."""
    parts_of: defaultdict[str, list[str]] = defaultdict(list)
    for name, part in places.items():
        parts_of[part.name].append(name)
    for stored, names in parts_of.items():
        shape = stored_shape([(wanted[name], places[name]) for name in names])
        find_tensor(tensors, stored, shape)


def stored_shape(parts: Iterable[tuple[WeightSpec, Part]]) -> tuple[int, ...]:
    """Return the shape that a stored tensor has, which holds some tensors of a model."""
    found = list(parts)
    weight, part = found[0]
    counts: defaultdict[int | None, int] = defaultdict(int)
    for other, place in found:
        counts[place.expert] += other.shape[0]
    matrix = (counts[part.expert], *weight.shape[1:])
    if part.transposed:
        matrix = matrix[::-1]
    return matrix if part.expert is None else (len(counts), *matrix)


def _refuse_unused(tensors: Tensors, used: set[str]) -> None:
    """Refuse a stored tensor that no tensor of the model is in, unless it changes no logits."""
    unused = [
        tensor
        for name, tensor in tensors.stored.items()
        if name not in used and _UNUSED.fullmatch(name) is None
    ]
    if unused:
        raise _unknown(tensors, unused)


def _layer_of(name: str) -> int | None:
    """Return the number of the layer of a stored tensor; None outside layers."""
    found = _LAYER.fullmatch(name)
    return None if found is None else int(found[1])


def _unknown(tensors: Tensors, unused: list[StoredTensor]) -> RefusedError:
    names = ", ".join(shown(tensor.name) for tensor in unused[:3])
    more = f" and {len(unused) - 3:,} more" if len(unused) > 3 else ""
    return RefusedError(
        f"{tensors.where}: expected only tensors of the model that config.json describes; got also "
        f"{names}{more}; do config.json and the weights belong together?"
    )


def stored_bytes(tensors: Tensors, places: Places) -> int:
    """Return the bytes in files of the tensors that a model uses."""
    return sum(tensors.stored[name].nbytes for name in {part.name for part in places.values()})
