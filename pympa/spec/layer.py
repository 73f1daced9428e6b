"""One transformer block: an attention branch and an MLP or expert branch."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from pympa.spec.checks import (
    LEAST_FACTOR,
    MOST_EXPERTS,
    MOST_FACTOR,
    SpecError,
    check_eps,
    check_positive,
    check_softcap,
)
from pympa.spec.experts import Routing
from pympa.spec.rope import Rope

Activation = Literal["gelu", "gelu_tanh", "silu", "swiglu_clamped"]
NormKind = Literal["rms", "layer"]
NormOrder = Literal["pre", "post", "sandwich"]
QkNorm = Literal["none", "head", "all"]
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702  # as gpt-oss has them
_ROUNDING = 1e-9  # a share like 2.0000000000000004 is 2


class Latent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434).

    Keys and values of all heads are linear in one latent vector for each token; the rotated
    dimensions of a key are projected from the token itself and are the same in all heads.

    Attributes:
        kv_rank: the width of the latent of keys and values, which has an RMSNorm.
        q_rank: the width of the latent of queries, which has an RMSNorm; None projects queries
            from the token itself.
        norm_eps: the number added to the mean square in these norms.
    """

    kv_rank: int
    q_rank: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "kv_rank", "q_rank", where="latent.")
        check_eps(self.norm_eps, "latent.norm_eps")


class LayerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One transformer block: attention branch, then MLP (or expert) branch.

    Attributes:
        heads: the number of query heads.
        head_dim: the dimension of a query or key head.
        mlp_hidden: the width of the MLP (of one expert, if there are experts).
        kv_heads: the number of key/value heads; None means `heads`. Query head h reads kv head
            h * kv_heads // heads.
        v_head_dim: the dimension of a value head; None means `head_dim`.
        rope: the rotary embedding of q and k, or None, which TOML writes as `rope = false`.
        latent: the latents of multi-head latent attention; None projects q, k and v directly.
        qk_norm: the RMSNorm with a learned gain of q and k before RoPE: "none", one of each "head",
            or one of "all" heads together.
        attention_bias: whether the q, k and v projections have biases.
        out_bias: whether the output projection has a bias; None means as `attention_bias`.
        attention_scale: the factor on q·k; None means 1/sqrt(head_dim).
        sinks: whether each head has a learned score of a key without value (an attention sink;
            Xiao et al. 2023, arXiv 2309.17453).
        mlp_bias: whether the MLP projections have biases.
        window: the number of keys that a query sees: itself and the keys before it; None means all.
        softcap: the cap in softcap * tanh(score / softcap) on scores; None means no cap.
        gated: whether hidden = act(gate) * up instead of act(up).
        activation: the activation function: "gelu" (erf), "gelu_tanh", "silu", or
            "swiglu_clamped", which is gated: with g = min(gate, limit) and u = up within ±limit,
            hidden = g * sigmoid(alpha * g) * (u + 1).
        swiglu_limit: the limit of "swiglu_clamped".
        swiglu_alpha: the alpha of "swiglu_clamped".
        norm: the norm: "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016).
        norm_eps: the number added to the mean square or the variance.
        norm_offset: whether gains of norms are 1 + weight, those of q and k included.
        norm_order: the place of norms: "pre", x + f(norm(x)); "post", x + norm(f(x)); "sandwich",
            x + norm(f(norm(x))).
        parallel: whether both branches read the stream before the block:
            x + attention(x) + mlp(x).
        experts: the number of experts of the MLP branch (Shazeer et al. 2017); 0 means a dense MLP.
        top_k: the number of experts of each token.
        renormalize: whether the weights of a token's experts are divided by their sum.
        routing: the choice of a token's experts.
        capacity_factor: the number of rows that an expert accepts of a capacity group, over the
            even share group·top_k/experts, rounded up; later rows are dropped. None means dropless.
        capacity_group: the number of tokens of a capacity group, cut from the start of a sequence.
        shared_experts: the number of experts that every token uses, with weight 1.
        shared_hidden: the width of all shared experts together; None means
            shared_experts * mlp_hidden.
        shared_gate: whether the weight of the shared experts is the sigmoid of a linear of the
            token.
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
    latent: Latent | None = None
    qk_norm: QkNorm = "none"
    attention_bias: bool = False
    out_bias: bool | None = None
    attention_scale: float | None = None
    sinks: bool = False
    mlp_bias: bool = False
    window: int | None = None
    softcap: float | None = None
    gated: bool = False
    activation: Activation = "gelu_tanh"
    swiglu_limit: float = SWIGLU_LIMIT
    swiglu_alpha: float = SWIGLU_ALPHA
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_offset: bool = False
    norm_order: NormOrder = "pre"
    parallel: bool = False
    experts: int = 0
    top_k: int = 0
    renormalize: bool = True
    routing: Routing = Routing()
    capacity_factor: float | None = None
    capacity_group: int | None = None
    shared_experts: int = 0
    shared_hidden: int | None = None
    shared_gate: bool = False
    router_skew: float = 0.0
    repeat: int = 1

    def __post_init__(self) -> None:
        check_positive(
            self,
            "heads",
            "head_dim",
            "mlp_hidden",
            "kv_heads",
            "v_head_dim",
            "window",
            "swiglu_limit",
            "swiglu_alpha",
            "capacity_factor",
            "capacity_group",
            "shared_hidden",
            "repeat",
        )
        check_softcap(self.softcap)
        check_eps(self.norm_eps, "norm_eps")
        self._check_attention()
        if self.activation == "swiglu_clamped" and not self.gated:
            raise SpecError("activation: swiglu_clamped: expected gated = true; got false")
        if self.activation != "swiglu_clamped" and (
            self.swiglu_limit != SWIGLU_LIMIT or self.swiglu_alpha != SWIGLU_ALPHA
        ):
            raise SpecError(
                "swiglu_limit, swiglu_alpha: expected none without swiglu_clamped; "
                f"got {self.swiglu_limit:g}, {self.swiglu_alpha:g}"
            )
        if self.parallel and self.norm_order != "pre":
            raise SpecError(
                f'parallel: expected norm_order = "pre" with it; got {self.norm_order!r}'
            )
        self._check_experts()

    def _check_attention(self) -> None:
        if self.n_kv_heads > self.heads:
            raise SpecError(f"kv_heads: expected at most heads={self.heads}; got {self.kv_heads}")
        if self.rope is not None:
            self.rope.check(self.head_dim)
        scale = self.attention_scale
        if scale is not None and not LEAST_FACTOR <= abs(scale) <= MOST_FACTOR:
            raise SpecError(
                f"attention_scale: expected a number from {LEAST_FACTOR:.3g} to {MOST_FACTOR:g}, "
                f"or its negative; got {scale:g}"
            )
        if self.latent is None:
            return
        if self.rope is None or not self.rope.trailing or self.rotated_dim == self.head_dim:
            raise SpecError(
                "latent: expected rope.trailing = true and rope.rotated_dim below "
                f"{self.head_dim} (head_dim); got {self.rope}"
            )
        if self.n_kv_heads != self.heads or self.qk_norm != "none" or self.attention_bias:
            raise SpecError(
                "latent: expected kv_heads = heads, and neither qk_norm nor attention_bias; got "
                f"kv_heads={self.n_kv_heads}, qk_norm={self.qk_norm}, "
                f"attention_bias={self.attention_bias}"
            )

    def _check_experts(self) -> None:
        if max(self.experts, self.shared_experts) > MOST_EXPERTS:
            raise SpecError(
                f"experts, shared_experts: expected at most {MOST_EXPERTS:,}; "
                f"got {self.experts:,} and {self.shared_experts:,}"
            )
        if self.experts < 0 or self.shared_experts < 0:
            raise SpecError(
                "experts, shared_experts: expected numbers of at least 0; "
                f"got {self.experts} and {self.shared_experts}"
            )
        if not self.experts and (self.top_k or self.capacity_factor or self.shared_experts):
            raise SpecError("top_k, capacity_factor, shared_experts: need experts; got experts=0")
        if not self.experts and self.routing != Routing():
            raise SpecError("routing: needs experts; got experts=0")
        if not self.shared_experts and (self.shared_hidden or self.shared_gate):
            raise SpecError("shared_hidden, shared_gate: need shared_experts; got shared_experts=0")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise SpecError(f"top_k: expected 1..{self.experts} (experts); got {self.top_k}")
        if self.experts:
            self.routing.check(self.experts, self.top_k)
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
        """The number of dimensions of a q/k head that RoPE rotates; 0 without RoPE."""
        return 0 if self.rope is None else self.rope.rotated(self.head_dim)

    @property
    def scale(self) -> float:
        """The factor on q·k."""
        if self.attention_scale is not None:
            return self.attention_scale
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def has_out_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.attention_bias if self.out_bias is None else self.out_bias

    @property
    def has_router_bias(self) -> bool:
        """Whether the logits of experts have a bias."""
        return self.routing.bias or bool(self.router_skew)

    @property
    def shared_width(self) -> int:
        """The width of all shared experts together."""
        return self.shared_hidden or self.shared_experts * self.mlp_hidden

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the norms of d_model values, those before branches first."""
        before, after = ("attention_norm", "mlp_norm"), ("attention_post_norm", "mlp_post_norm")
        return {"pre": before, "post": after, "sandwich": before + after}[self.norm_order]

    def capacity(self, rows: int) -> int:
        """Return an expert's capacity for a group of `rows` rows (GShard, Lepikhin 2020)."""
        share = (self.capacity_factor or math.inf) * rows * self.top_k / max(self.experts, 1)
        return rows if share >= rows else math.ceil(share - _ROUNDING)

    def kv_head_of(self, head: int) -> int:
        """Return the kv head that query head `head` reads."""
        return head * self.n_kv_heads // self.heads
