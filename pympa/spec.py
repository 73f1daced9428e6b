"""Frozen descriptions of a model and a dtype; `pympa.text.toml` reads them from files.

A `ModelSpec` is a list of `LayerSpec`s: all parameters of the mathematics of a transformer, and
nothing about how it is split.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np

Activation = Literal["gelu", "gelu_tanh", "silu"]
NormKind = Literal["rms", "layer"]
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MOST_LAYERS = 10_000
MOST_SIZE, MOST_FACTOR = 1 << 30, 1e30
"""The largest numbers of a model, whole and other: more is a typing error, or overflows float32."""
LEAST_FACTOR = 2.0**-126
"""The smallest normal float32 number: kernels round smaller ones, or treat them as 0."""
LEAST_SOFTCAP, MOST_SOFTCAP = LEAST_FACTOR, 1e5
"""The range of a cap on scores: below, float32 does not hold its reciprocal; above, it changes no
score below 40, so it is a typing error."""
_ROUNDING = 1e-9  # a share like 2.0000000000000004 is 2


class SpecError(ValueError):
    """A description that the mathematics or this version does not allow."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype with the name `name`.

    Raises:
        SpecError: `name` is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise SpecError(f"dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def check_softcap(softcap: float | None) -> None:
    """Refuse a cap on scores that float32 does not hold, or that has no effect.

    Raises:
        SpecError: the cap is neither None nor from `LEAST_SOFTCAP` to `MOST_SOFTCAP`.
    """
    if softcap is not None and not LEAST_SOFTCAP <= softcap <= MOST_SOFTCAP:
        raise SpecError(
            f"softcap: expected a number from {LEAST_SOFTCAP:.3g} to {MOST_SOFTCAP:g}, or None for "
            f"no cap; got {softcap:g}"
        )


def _positive(spec: msgspec.Struct, *fields: str) -> None:
    for field in fields:
        value = getattr(spec, field)
        most = MOST_SIZE if isinstance(value, int) else MOST_FACTOR
        if value is not None and not value > 0:
            raise SpecError(f"{field}: expected a positive number; got {value}")
        if value is not None and value > most:
            raise SpecError(f"{field}: expected at most {most:g}; got {value:g}")


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rotary position embedding (Su et al. 2021), half-split pairs (i, i + rotated/2).

    Attributes:
        theta: the base of the geometric sequence of frequencies.
        rotated_dim: the number of leading dimensions of a head that rotate; None means all of them.
        scaling_factor: the number that positions are divided by (linear scaling); 1 means none.
    """

    theta: float = 10000.0
    rotated_dim: int | None = None
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "theta", "scaling_factor")


class LayerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One pre-norm transformer block: attention branch, then MLP (or expert) branch.

    Attributes:
        heads: the number of query heads.
        head_dim: the dimension of a query or key head.
        mlp_hidden: the width of the MLP (of one expert, if there are experts).
        kv_heads: the number of key/value heads; None means `heads`. Query head h reads kv head
            h * kv_heads // heads.
        v_head_dim: the dimension of a value head; None means `head_dim`.
        rope: the rotary embedding of q and k, or None, which TOML writes as `rope = false`.
        qk_norm: whether each q and k head has an RMSNorm with a learned gain, before RoPE.
        attention_bias: whether the q, k, v and output projections have biases.
        mlp_bias: whether the MLP projections have biases.
        window: the number of keys that a query sees: itself and the keys before it; None means all.
        softcap: the cap in softcap * tanh(score / softcap) on scores; None means no cap.
        gated: whether hidden = act(gate) * up instead of act(up).
        activation: the activation function: "gelu" (erf), "gelu_tanh" or "silu".
        norm: the norm: "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016).
        norm_eps: the number added to the mean square or the variance.
        experts: the number of experts of the MLP branch (Shazeer et al. 2017); 0 means a dense MLP.
        top_k: the number of experts of each token, those of the largest logits; ties go to the
            lower id.
        renormalize: whether an expert's weight is its softmax probability among the chosen experts,
            instead of among all.
        capacity_factor: the number of rows that an expert accepts of a capacity group, over the
            even share group·top_k/experts, rounded up; later rows are dropped. None means dropless.
        capacity_group: the number of tokens of a capacity group, cut from the start of a sequence.
        shared_experts: the number of experts that every token uses, with weight 1.
        router_skew: the number s that adds -s·e/(experts - 1) to the logits of expert e, so that
            the first experts get more rows than the last.
        repeat: the number of such blocks one after the other.
    """

    heads: int
    head_dim: int
    mlp_hidden: int
    kv_heads: int | None = None
    v_head_dim: int | None = None
    rope: Rope | None = Rope()
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    softcap: float | None = None
    gated: bool = False
    activation: Activation = "gelu_tanh"
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    experts: int = 0
    top_k: int = 0
    renormalize: bool = True
    capacity_factor: float | None = None
    capacity_group: int | None = None
    shared_experts: int = 0
    router_skew: float = 0.0
    repeat: int = 1

    def __post_init__(self) -> None:
        _positive(
            self,
            "heads",
            "head_dim",
            "mlp_hidden",
            "kv_heads",
            "v_head_dim",
            "window",
            "capacity_factor",
            "capacity_group",
            "repeat",
        )
        check_softcap(self.softcap)
        if self.norm_eps and not LEAST_FACTOR <= self.norm_eps <= MOST_FACTOR:
            raise SpecError(
                f"norm_eps: expected 0 or a number from {LEAST_FACTOR:.3g} to {MOST_FACTOR:g}; "
                f"got {self.norm_eps:g}"
            )
        if self.n_kv_heads > self.heads:
            raise SpecError(f"kv_heads: expected at most heads={self.heads}; got {self.kv_heads}")
        if self.rope is not None:
            rotated = self.rotated_dim
            if rotated % 2 or not 0 < rotated <= self.head_dim:
                raise SpecError(
                    f"rope.rotated_dim: expected an even number in 2..{self.head_dim} "
                    f"(head_dim); got {rotated}"
                )
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts < 0 or self.shared_experts < 0:
            raise SpecError(
                "experts, shared_experts: expected numbers of at least 0; "
                f"got {self.experts} and {self.shared_experts}"
            )
        if not self.experts and (self.top_k or self.capacity_factor or self.shared_experts):
            raise SpecError("top_k, capacity_factor, shared_experts: need experts; got experts=0")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise SpecError(f"top_k: expected 1..{self.experts} (experts); got {self.top_k}")
        if (self.capacity_factor is None) != (self.capacity_group is None):
            raise SpecError("capacity_factor, capacity_group: expected both of them or none")
        if not abs(self.router_skew) <= MOST_FACTOR or (self.router_skew and self.experts < 2):
            raise SpecError(
                f"router_skew: expected a finite number up to {MOST_FACTOR:g}, and at least 2 "
                f"experts; got {self.router_skew} and {self.experts}"
            )

    @property
    def n_kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def value_dim(self) -> int:
        """The dimension of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def rotated_dim(self) -> int:
        """The number of leading dimensions of a q/k head that RoPE rotates; 0 without RoPE."""
        if self.rope is None:
            return 0
        return self.head_dim if self.rope.rotated_dim is None else self.rope.rotated_dim

    def capacity(self, rows: int) -> int:
        """Return an expert's capacity for a group of `rows` rows (GShard, Lepikhin 2020)."""
        share = (self.capacity_factor or math.inf) * rows * self.top_k / max(self.experts, 1)
        return rows if share >= rows else math.ceil(share - _ROUNDING)

    def kv_head_of(self, head: int) -> int:
        """Return the kv head that query head `head` reads."""
        return head * self.n_kv_heads // self.heads


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder: embedding, blocks, final norm, head.

    Attributes:
        d_model: the width of the residual stream; independent of heads * head_dim.
        vocabulary: the number of rows of the embedding and of the head.
        layers: the blocks in order; an entry with `repeat` represents several.
        causal: whether a token attends only to itself and earlier tokens.
        tied_head: whether the head reuses the embedding.
    """

    d_model: int
    vocabulary: int
    layers: tuple[LayerSpec, ...]
    causal: bool = True
    tied_head: bool = False

    def __post_init__(self) -> None:
        _positive(self, "d_model", "vocabulary")
        if not self.layers:
            raise SpecError("layers: expected at least one layer; got none")
        layers = sum(layer.repeat for layer in self.layers)
        if layers > MOST_LAYERS:
            raise SpecError(f"layers: expected at most {MOST_LAYERS:,} of them; got {layers:,}")

    @property
    def blocks(self) -> tuple[LayerSpec, ...]:
        """The blocks one by one, with `repeat` unrolled."""
        return tuple(layer for layer in self.layers for _ in range(layer.repeat))

    @property
    def has_experts(self) -> bool:
        """Whether some layer has experts."""
        return any(layer.experts for layer in self.layers)
