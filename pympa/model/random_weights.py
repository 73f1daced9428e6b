"""Random weights that have the same bits in every plan and on every backend.

An element depends only on its tensor's name and its *global* index. Philox-4x64 (Salmon et al.
2011), with the name as key and the index as counter, gives 32 random bits; the value is those bits
as an integer, scaled in float64 and rounded once to the dtype. No libm is used, and a rank makes
only its shard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pympa.model.weights import WeightSpec
from pympa.plan.layout import Bounds
from pympa.spec import ModelSpec

_PER_COUNTER = 8  # one Philox counter gives four 64-bit words = eight 32-bit elements
_CHUNK_ELEMENTS = 1 << 20  # limits the float64 scratch memory of a fill to 8 MB
_STREAM_ELEMENTS = 6144  # take as long as starting a stream at an index
SCORE_STD = 2.0  # the deviation of q·k/sqrt(head_dim), so that attention matters


class Uniform(NamedTuple):
    """The uniform distribution of a tensor's elements: offset ± bound.

    Attributes:
        bound: the half-width.
        offset: the mean of the first element.
        slope: the number added to the mean for each element before; for vectors.
    """

    bound: float
    offset: float = 0.0
    slope: float = 0.0


def uniform_bound(std: float) -> float:
    """Return the half-width of a uniform distribution with deviation `std`."""
    return std * math.sqrt(3.0)


def distribution(model: ModelSpec, weight: WeightSpec) -> Uniform:
    """Return the distribution of the elements of a model's tensor.

    Deviations keep activations near 1; q and k are larger, so that scores have `SCORE_STD`.
    """
    prefix, _, kind = weight.name.rpartition(".")
    if weight.name == "embedding":
        return Uniform(uniform_bound(1.0 / model.embedding_scale))
    layer = model.blocks[_layer_index(weight) if prefix.startswith("layers.") else -1]
    offset = float(layer.norm_offset)
    gain = math.sqrt(SCORE_STD / (abs(layer.scale) * math.sqrt(layer.head_dim)))
    if kind == "weight":  # a norm's gain
        return Uniform(0.25, 1.0 - offset)
    if kind in ("q_norm", "k_norm"):
        return Uniform(0.25 * gain, gain - offset)
    if kind in ("q_latent_norm", "kv_latent_norm"):
        return Uniform(0.25, 1.0)
    if kind == "router_bias":
        bound = 0.5 if layer.routing.bias else 0.0
        return Uniform(bound, slope=-layer.router_skew / max(weight.shape[0] - 1, 1))
    if kind == "sinks":
        return Uniform(1.0, SCORE_STD)  # a score that matters beside those of a few keys
    if len(weight.shape) == 1:  # a bias
        return Uniform(0.1)
    scores = prefix.endswith(".attention") and kind in ("q", "k", "k_rotated")
    scaled = scores and layer.qk_norm == "none"
    return Uniform(uniform_bound((gain if scaled else 1.0) / math.sqrt(weight.shape[1])))


def _layer_index(weight: WeightSpec) -> int:
    """Return the index of the layer, as in `layers.3.router_bias`."""
    return int(weight.name.split(".")[1])


def random_weights(model: ModelSpec, seed: int = 0) -> PhiloxSource:
    """Return the random weights of a model; another seed gives another model."""
    return PhiloxSource(partial(distribution, model), seed)


class PhiloxSource:
    """A `WeightSource` of random weights, made on the host.

    Args:
        distribution: a function that returns the distribution of the elements of a tensor.
        seed: the seed; another seed gives another model.
    """

    def __init__(self, distribution: Callable[[WeightSpec], Uniform], seed: int = 0) -> None:
        self._distribution = distribution
        self._seed = seed

    @property
    def identity(self) -> str:
        """See `WeightSource.identity`."""
        return f"philox, seed {self._seed}"

    def read(
        self,
        spec: WeightSpec,
        out: NDArray[Any],
        rows: Sequence[Bounds] | None = None,
        cols: Sequence[Bounds] | None = None,
    ) -> NDArray[Any]:
        """See `WeightSource.read`."""
        width = spec.shape[1] if len(spec.shape) == 2 else 1
        at = 0
        for first, last in [(0, spec.shape[0])] if rows is None else rows:
            part = out[at : at + last - first]
            at += last - first
            if cols is None:
                self._fill_rows(spec, part.reshape(-1), first * width)
            elif cols:
                self._fill_columns(spec, part, first * width, cols)
        return out

    def _fill_rows(self, spec: WeightSpec, flat: NDArray[Any], start: int) -> None:
        for at in range(0, flat.size, _CHUNK_ELEMENTS):
            part = flat[at : at + _CHUNK_ELEMENTS]
            part[:] = self._values(spec, start + at, part.size)

    def _fill_columns(
        self, spec: WeightSpec, out: NDArray[Any], start: int, cols: Sequence[Bounds]
    ) -> None:
        width, first, last = spec.shape[1], cols[0][0], cols[-1][1]
        rows = _CHUNK_ELEMENTS // width
        if width - (last - first) > _STREAM_ELEMENTS or rows == 0:
            rows = 1  # makes only the columns that are wanted
        else:
            first, last = 0, width
        for at in range(0, len(out), rows):
            part = out[at : at + rows]
            begin, count = start + at * width + first, (len(part) - 1) * width + last - first
            values = self._values(spec, begin, count).reshape(len(part), -1)
            to = 0
            for one, end in cols:
                part[:, to : to + end - one] = values[:, one - first : end - first]
                to += end - one

    def _values(self, spec: WeightSpec, start: int, count: int) -> NDArray[np.float64]:
        bound, offset, slope = self._distribution(spec)
        bits = philox_bits(f"{self._seed}/{spec.name}", start, count)
        values = (bits.astype(np.float64) - 2147483647.5) * (bound / 2147483648.0) + offset
        return values + slope * np.arange(start, start + count) if slope else values


def philox_bits(name: str, start: int, count: int) -> NDArray[np.uint32]:
    """Return elements start..start+count of the 32-bit stream keyed by `name`."""
    counter, skip = divmod(start, _PER_COUNTER)
    words = -(-(skip + count) // _PER_COUNTER) * 4
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key, counter=counter).random_raw(words)
    return raw.astype("<u8", copy=False).view("<u4")[skip : skip + count]
