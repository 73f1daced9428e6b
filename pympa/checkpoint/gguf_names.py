"""The names of tensors in GGUF files, which are the same for all families.

The converter of llama.cpp turns some weights as it goes: experts of a layer are one tensor, gate
and up of gpt-oss are apart, DeepSeek's and GPT-NeoX's are cut in ways of its own.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from pympa.checkpoint.names import Alternatives, Part, Rows
from pympa.spec import LayerSpec, ModelSpec

_ATTENTION = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "out": "attn_output",
}
_NORMS = {
    "attention_norm": ("attn_norm",),
    "mlp_norm": ("ffn_norm", "post_attention_norm"),
    "attention_post_norm": ("post_attention_norm",),
    "mlp_post_norm": ("post_ffw_norm",),
}


def gguf_tensors(spec: ModelSpec, stored: Container[str]) -> Iterator[tuple[str, Alternatives]]:
    """Yield the name of each tensor of a model, with the places where it may be in a GGUF file.

    Args:
        spec: the model.
        stored: the names of the tensors in the file.
    """
    yield "embedding", (Part("token_embd.weight"),)
    yield "final_norm.weight", (Part("output_norm.weight"),)
    yield "head", (Part("output.weight"),)
    for index, layer in enumerate(spec.blocks):
        at = f"blk.{index}."
        for name, parts in _layer(layer, apart=f"{at}ffn_gate.weight" in stored):
            places = tuple(part._replace(name=at + part.name) for part in parts)
            yield f"layers.{index}.{name}", places


def _layer(layer: LayerSpec, *, apart: bool) -> Iterator[tuple[str, Alternatives]]:
    for name in layer.norms:
        yield f"{name}.weight", tuple(Part(f"{stored}.weight") for stored in _NORMS[name])
    yield from _attention(layer)
    if not layer.experts:
        yield from _mlp(layer, apart=apart)
        return
    yield "router", (Part("ffn_gate_inp.weight"),)
    yield "router_bias", (Part("ffn_gate_inp.bias"),)
    for expert in range(layer.experts):
        for kind in ("gate", "up", "down"):
            stored = f"ffn_{kind}_exps"
            yield f"experts.{expert}.{kind}", (Part(f"{stored}.weight", expert=expert),)
            yield f"experts.{expert}.{kind}_bias", (Part(f"{stored}.bias", expert=expert),)


def _attention(layer: LayerSpec) -> Iterator[tuple[str, Alternatives]]:
    rows = {
        "q": layer.heads * layer.head_dim,
        "k": layer.n_kv_heads * layer.head_dim,
        "v": layer.n_kv_heads * layer.value_dim,
    }
    first = 0
    for name, stored in _ATTENTION.items():
        fused = Rows(rows.get(name, 1), 0, first)
        first += rows.get(name, 0)
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            apart = Part(f"{stored}.{kind}")
            together = () if name == "out" else (Part(f"attn_qkv.{kind}", fused),)
            yield f"attention.{name}{suffix}", (apart, *together)
    for name in ("q_norm", "k_norm"):
        yield f"attention.{name}", (Part(f"attn_{name}.weight"),)
    yield "attention.sinks", (Part("attn_sinks.weight"),)


def _mlp(layer: LayerSpec, *, apart: bool) -> Iterator[tuple[str, Alternatives]]:
    """Yield the weights of an MLP; gate and up may be one tensor (Phi-3)."""
    hidden = layer.mlp_hidden
    if layer.gated and not apart:
        yield "mlp.gate", (Part("ffn_up.weight", Rows(hidden, 0, 0)),)
        yield "mlp.up", (Part("ffn_up.weight", Rows(hidden, 0, hidden)),)
    else:
        yield "mlp.gate", (Part("ffn_gate.weight"),)
        yield "mlp.up", (Part("ffn_up.weight"),)
    yield "mlp.down", (Part("ffn_down.weight"),)
    for kind in ("gate", "up", "down"):
        yield f"mlp.{kind}_bias", (Part(f"ffn_{kind}.bias"),)
