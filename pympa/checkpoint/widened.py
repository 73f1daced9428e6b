"""A checkpoint of quantised weights, seen as one of plain weights under the usual names.

`quantization_config` of config.json says how weights were quantised; its `quant_method` decides
which tensors are scales. A tensor with scales is widened as it is read (`widening`), scales are
not listed, and every other tensor is read as it is. Only weights are widened: a format that also
quantises activations at run time is computed with activations of the dtype instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from pympa.checkpoint.tensors import Spans, StoredTensor, Tensors, find_tensor
from pympa.checkpoint.widening import MXFP4_GROUP, widen_mxfp4, widen_scaled
from pympa.errors import RefusedError
from pympa.text.escape import shown

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "F16", "BF16", "F8_E8M0")
_SCALED = ("fp8", "fbgemm_fp8", "compressed-tensors")  # values of quant_method
_SUFFIXES = ("_scale_inv", "_scale")  # both multiply, whatever the first is called
_METHODS = "fp8, fbgemm_fp8, compressed-tensors (float-quantized) or mxfp4"
_BLOCKS, _EXPONENTS = "_blocks", "_scales"  # the suffixes of MXFP4
_GROUP_BYTES = MXFP4_GROUP // 2


def widened(tensors: Tensors, quantization: Mapping[str, Any] | None) -> Tensors:
    """Return a checkpoint whose tensors are all plain numbers.

    Args:
        tensors: the checkpoint as it is stored.
        quantization: `quantization_config` of config.json, or None if it has none.

    Returns:
        The checkpoint itself if nothing is quantised.

    Raises:
        RefusedError: the method is not one that can be widened, or scales are missing, or they do
            not fit their tensors.
    """
    where = f"{tensors.where}: quantization_config"
    if quantization is None:
        _refuse_fp8(tensors)
        return tensors
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method == "mxfp4":
        _refuse_fp8(tensors)
        return WidenedTensors(tensors, _mxfp4(tensors))
    if not isinstance(method, str) or method not in _SCALED:
        raise RefusedError(
            f"{where}: quant_method: expected {_METHODS}; got {shown(repr(method))}; use weights "
            "that are not quantised, or a GGUF file"
        )
    form = quantization.get("format")
    if method == "compressed-tensors" and form != "float-quantized":
        raise RefusedError(
            f"{where}: format: expected float-quantized; got {shown(repr(form))}; use weights that "
            "are not quantised, or a GGUF file"
        )
    block = _block(method, quantization, where)
    return WidenedTensors(tensors, _scaled(tensors, block))


@dataclass(frozen=True)
class _Quantised:
    """A tensor that is widened when it is read.

    Attributes:
        seen: the tensor as it is listed.
        values: the name of the stored numbers.
        scales: the name of their scales.
        shape: the shape in which the scales are used, with an axis for each of the tensor.
        blocks: the extent of the block of a scale on each axis; None for MXFP4.
    """

    seen: StoredTensor
    values: str
    scales: str
    shape: tuple[int, ...] = ()
    blocks: tuple[int, ...] | None = None


class WidenedTensors:
    """A checkpoint, some tensors of which are widened when they are read; see `Tensors`.

    Args:
        tensors: the checkpoint as it is stored.
        quantised: its quantised tensors.
    """

    def __init__(self, tensors: Tensors, quantised: list[_Quantised]) -> None:
        self.where = tensors.where
        self._tensors = tensors
        self._quantised = {one.seen.name: one for one in quantised}
        hidden = {name for one in quantised for name in (one.values, one.scales)}
        plain = {name: one for name, one in tensors.stored.items() if name not in hidden}
        self.stored: Mapping[str, StoredTensor] = plain | {
            one.seen.name: one.seen for one in quantised
        }

    def read(self, name: str, *spans: Spans) -> NDArray[Any]:
        """See `Tensors.read`; a quantised tensor is float32."""
        find_tensor(self, name)
        quantised = self._quantised.get(name)
        if quantised is None:
            return self._tensors.read(name, *spans)
        values = self._tensors.read(quantised.values)
        scales = self._tensors.read(quantised.scales)
        if quantised.blocks is None:
            return widen_mxfp4(values, scales, *spans)
        return widen_scaled(values, scales.reshape(quantised.shape), quantised.blocks, *spans)


def _scaled(tensors: Tensors, block: tuple[int, int] | None) -> list[_Quantised]:
    """Return the fp8 tensors with their scales."""
    found = []
    for name, tensor in tensors.stored.items():
        if tensor.dtype in _FP8:
            names = [name + suffix for suffix in _SUFFIXES]
            scales = find_tensor(tensors, next(filter(tensors.stored.get, names), names[0]))
            where = f"{tensors.where}: tensor {shown(scales.name)}"
            if scales.dtype not in _SCALES:
                raise RefusedError(
                    f"{where}: expected the dtype {', '.join(_SCALES)}; got {scales.dtype}"
                )
            shape = _as_blocks(scales.shape, tensor.shape)
            blocks = _blocks_of(shape, tensor.shape, block)
            if blocks is None:
                raise RefusedError(
                    f"{where}: expected a scale for the tensor, for each row, or for each block of "
                    f"{list(block) if block else 'no declared size'}; got the shape "
                    f"{list(scales.shape)} for {list(tensor.shape)}"
                )
            found.append(_Quantised(tensor, name, scales.name, shape, blocks))
    return found


def _as_blocks(scales: tuple[int, ...], values: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of scales with an axis for each of the tensor's.

    One scale may have no axis or one, and a scale for each row may lack the last axis.
    """
    if scales in ((), (1,)):
        return (1,) * len(values)
    return (*scales, 1) if len(scales) == len(values) - 1 else scales


def _blocks_of(
    scales: tuple[int, ...], values: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, ...] | None:
    """Return the extent of a scale's block on each axis, or None if the shapes do not fit."""
    if len(scales) != len(values):
        return None
    declared = [None] * len(values) if block is None else [*[None] * (len(values) - 2), *block]
    blocks = []
    for count, extent, wanted in zip(scales, values, declared, strict=True):
        if wanted is not None and count == -(-extent // wanted):
            blocks.append(wanted)
        elif count in (1, extent):
            blocks.append(1 if count == extent else extent)
        else:
            return None
    return tuple(blocks)


def _block(method: str, quantization: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Return the declared extents of a block, outputs and inputs, if there are blocks."""
    name, declared = "weight_block_size", quantization.get("weight_block_size")
    if method == "compressed-tensors":
        name, declared = "config_groups: weights: block_structure", None
        groups = quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                declared = weights.get("block_structure") or declared
    if declared is None:
        return None
    sizes = tuple(declared) if isinstance(declared, (list, tuple)) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise RefusedError(
            f"{where}: {name}: expected two sizes, as in [128, 128]; got {shown(str(declared))}"
        )
    return sizes[0], sizes[1]


def _mxfp4(tensors: Tensors) -> list[_Quantised]:
    """Return the tensors of blocks and exponents, under the names without their suffixes."""
    found = []
    for name, blocks in tensors.stored.items():
        if not name.endswith(_BLOCKS) or blocks.dtype != "U8":
            continue
        plain = name.removesuffix(_BLOCKS)
        scales = find_tensor(tensors, plain + _EXPONENTS, blocks.shape[:-1])
        if scales.dtype != "U8" or len(blocks.shape) < 3 or blocks.shape[-1] != _GROUP_BYTES:
            raise RefusedError(
                f"{tensors.where}: tensor {shown(name)}: expected U8 [..., rows, groups, "
                f"{_GROUP_BYTES}] and U8 scales; got {list(blocks.shape)} and {scales.dtype}"
            )
        if plain in tensors.stored:
            raise RefusedError(
                f"{tensors.where}: tensor {shown(plain)}: expected it once; got it plain and as "
                f"{shown(name)}"
            )
        shape = (*scales.shape[:-1], scales.shape[-1] * MXFP4_GROUP)
        seen = replace(blocks, name=plain, dtype="MXFP4", shape=shape)
        found.append(_Quantised(seen, name, scales.name))
    return found


def _refuse_fp8(tensors: Tensors) -> None:
    for name, tensor in tensors.stored.items():
        if tensor.dtype in _FP8:
            raise RefusedError(
                f"{tensors.where}: tensor {shown(name)}: expected a quantization_config in "
                f"config.json for {tensor.dtype}; got none, so its scale is unknown"
            )
