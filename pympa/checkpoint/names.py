"""The names of tensors in files: which stored tensor has the elements of a tensor of a model.

A stored tensor may hold several tensors of a model, one after the other or interleaved by rows, or
those of all experts. Row r of a tensor is then row (r // block) · stride + r % block + offset of
the stored one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pympa.spec import LayerSpec, ModelSpec


class Rows(NamedTuple):
    """The rows of a tensor in a stored tensor; see the module.

    Attributes:
        block: the number of rows that lie together.
        stride: the distance from one block to the next.
        offset: the first row.
    """

    block: int
    stride: int
    offset: int


class Part(NamedTuple):
    """A tensor of a model as a part of a stored tensor.

    Attributes:
        name: the name of the stored tensor.
        rows: its rows in it; None means all.
        expert: the expert, the index of the first axis, in a tensor of all experts; else None.
        transposed: whether the stored tensor is `[inputs, outputs]`.
    """

    name: str
    rows: Rows | None = None
    expert: int | None = None
    transposed: bool = False


Alternatives = tuple[Part, ...]
"""The places where a tensor of a model may be; the first whose stored tensor exists counts."""

PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "language_model.")
"""The prefixes of names in files of a text model, or of the text part of another model."""


class Dialect:
    """The names of tensors in the files of a family.

    Args:
        family: the name of the family.
        prefix: the prefix of all names but the head's.
    """

    def __init__(self, family: str, prefix: str) -> None:
        self._family, self._prefix = family, prefix

    def tensors(self, spec: ModelSpec) -> Iterator[tuple[str, Alternatives]]:
        """Yield the name of each tensor of a model, with the places where it may be."""
        neox, at = self._family == "gpt_neox", self._prefix
        final = "final_layer_norm" if neox else "norm"
        yield "embedding", (Part(at + ("embed_in" if neox else "embed_tokens") + ".weight"),)
        yield "final_norm.weight", (Part(f"{at}{final}.weight"),)
        yield "final_norm.bias", (Part(f"{at}{final}.bias"),)
        heads = (
            ("embed_out.weight",) if neox else ("lm_head.weight", "language_model.lm_head.weight")
        )
        yield "head", tuple(map(Part, heads))
        for index, layer in enumerate(spec.blocks):
            inside = f"{at}layers.{index}."
            for name, parts in self._layer(layer):
                yield (
                    f"layers.{index}.{name}",
                    tuple(part._replace(name=inside + part.name) for part in parts),
                )

    def _layer(self, layer: LayerSpec) -> Iterator[tuple[str, Alternatives]]:
        yield from _norms(layer)
        if self._family == "gpt_neox":
            yield from _neox_layer(layer)
            return
        yield from _attention(layer)
        if not layer.experts:
            yield from _mlp(layer.mlp_hidden, "mlp.", "mlp.")
            return
        block = "block_sparse_moe." if self._family == "mixtral" else "mlp."
        router = f"{block}router" if self._family == "gpt_oss" else f"{block}gate"
        yield "router", (Part(f"{router}.weight"),)
        yield "router_bias", (Part(f"{router}.bias"),)
        yield "choice_bias", (Part(f"{router}.e_score_correction_bias"),)
        for expert in range(layer.experts):
            yield from _expert(layer, expert, block, interleaved=self._family == "gpt_oss")
        shared = f"{block}shared_expert" + ("" if layer.shared_gate else "s")
        yield from _mlp(layer.shared_width, "shared.", f"{shared}.")
        yield "shared_gate", (Part(f"{block}shared_expert_gate.weight"),)


def _norms(layer: LayerSpec) -> Iterator[tuple[str, Alternatives]]:
    """Yield the norms of a block; where two follow branches, others are called after them, too."""
    after_both = {"mlp_norm": "pre_feedforward_layernorm"}
    stored = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if layer.norm_order == "sandwich":
        stored |= after_both
    stored |= {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    for name in layer.norms:
        yield f"{name}.weight", (Part(f"{stored[name]}.weight"),)
        yield f"{name}.bias", (Part(f"{stored[name]}.bias"),)


def _attention(layer: LayerSpec) -> Iterator[tuple[str, Alternatives]]:
    """Yield the weights and biases of attention; q, k and v are apart, or one after the other."""
    at = "self_attn."
    yield "attention.out", (Part(f"{at}o_proj.weight"),)
    yield "attention.out_bias", (Part(f"{at}o_proj.bias"),)
    yield "attention.sinks", (Part(f"{at}sinks"),)
    for name in ("q_norm", "k_norm"):
        yield f"attention.{name}", (Part(f"{at}{name}.weight"),)
    if layer.latent is not None:
        yield from _latent_attention(layer, layer.latent.kv_rank, at)
        return
    rows = {
        "q": layer.heads * layer.head_dim,
        "k": layer.n_kv_heads * layer.head_dim,
        "v": layer.n_kv_heads * layer.value_dim,
    }
    first = 0
    for name, count in rows.items():
        fused = Rows(count, 0, first)
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            yield (
                f"attention.{name}{suffix}",
                (Part(f"{at}{name}_proj.{kind}"), Part(f"{at}qkv_proj.{kind}", fused)),
            )
        first += count


def _latent_attention(
    layer: LayerSpec, kv_rank: int, at: str
) -> Iterator[tuple[str, Alternatives]]:
    """Yield the weights of latent attention: keys and values are interleaved by heads."""
    unrotated, v_dim = layer.head_dim - layer.rotated_dim, layer.value_dim
    stride = unrotated + v_dim
    yield "attention.q", (Part(f"{at}q_b_proj.weight"), Part(f"{at}q_proj.weight"))
    yield "attention.q_latent", (Part(f"{at}q_a_proj.weight"),)
    yield "attention.q_latent_norm", (Part(f"{at}q_a_layernorm.weight"),)
    yield "attention.kv_latent_norm", (Part(f"{at}kv_a_layernorm.weight"),)
    down, up = f"{at}kv_a_proj_with_mqa.weight", f"{at}kv_b_proj.weight"
    yield "attention.kv_latent", (Part(down, Rows(kv_rank, 0, 0)),)
    yield "attention.k_rotated", (Part(down, Rows(layer.rotated_dim, 0, kv_rank)),)
    yield "attention.k", (Part(up, Rows(unrotated, stride, 0)),)
    yield "attention.v", (Part(up, Rows(v_dim, stride, unrotated)),)


def _mlp(hidden: int, name: str, at: str) -> Iterator[tuple[str, Alternatives]]:
    """Yield the weights and biases of an MLP; gate and up are apart, or one after the other."""
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        for number, part in enumerate(("gate", "up")):
            fused = Part(f"{at}gate_up_proj.{kind}", Rows(hidden, 0, number * hidden))
            yield f"{name}{part}{suffix}", (Part(f"{at}{part}_proj.{kind}"), fused)
        yield f"{name}down{suffix}", (Part(f"{at}down_proj.{kind}"),)


def _expert(
    layer: LayerSpec, expert: int, block: str, *, interleaved: bool
) -> Iterator[tuple[str, Alternatives]]:
    """Yield the weights and biases of an expert; experts are apart, or in one tensor of all.

    In gpt-oss that tensor is `[experts, inputs, outputs]`, and gate and up are interleaved.
    """
    at, of_all = f"{block}experts.{expert}.", f"{block}experts."
    old, hidden = {"gate": "w1", "up": "w3", "down": "w2"}, layer.mlp_hidden
    for number, part in enumerate(("gate", "up", "down")):
        name = f"experts.{expert}.{part}"
        fused = f"{of_all}down_proj" if part == "down" else f"{of_all}gate_up_proj"
        rows = None
        if part != "down":
            rows = Rows(1, 2, number) if interleaved else Rows(hidden, 0, number * hidden)
        apart = (Part(f"{at}{part}_proj.weight"), Part(f"{at}{old[part]}.weight"))
        yield name, (*apart, Part(fused, rows, expert, transposed=interleaved))
        yield (
            f"{name}_bias",
            (Part(f"{at}{part}_proj.bias"), Part(f"{fused}_bias", rows, expert)),
        )


def _neox_layer(layer: LayerSpec) -> Iterator[tuple[str, Alternatives]]:
    """Yield the weights of a GPT-NeoX block: q, k and v are interleaved by heads."""
    dim = layer.head_dim
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        for number, name in enumerate(("q", "k", "v")):
            rows = Rows(dim, 3 * dim, number * dim)
            part = Part(f"attention.query_key_value.{kind}", rows)
            yield f"attention.{name}{suffix}", (part,)
        yield f"attention.out{suffix}", (Part(f"attention.dense.{kind}"),)
        yield f"mlp.up{suffix}", (Part(f"mlp.dense_h_to_4h.{kind}"),)
        yield f"mlp.down{suffix}", (Part(f"mlp.dense_4h_to_h.{kind}"),)


def prefixes(family: str) -> Sequence[str]:
    """Return the prefixes that names in files of a family may have, the usual one first."""
    return ("gpt_neox.", "") if family == "gpt_neox" else PREFIXES
