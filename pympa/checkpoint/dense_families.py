"""config.json of families with dense MLPs -> `ModelSpec`.

Each function follows the family's code in `transformers`, `models/NAME/modeling_NAME.py`.
"""

from __future__ import annotations

import math

from pympa.checkpoint.config import Config
from pympa.checkpoint.layers import (
    ACTIVATIONS,
    gated_mlp,
    heads_of,
    kinds_of_layers,
    layer_count,
    model,
    windows,
)
from pympa.checkpoint.rope_config import FULL, SLIDING, rope_of
from pympa.spec import ModelSpec, Rope


def llama(config: Config) -> ModelSpec:
    """Llama 1 to 3.3."""
    heads = heads_of(config)
    layer = {
        **heads,
        **gated_mlp(config),
        "rope": rope_of(config, heads["head_dim"]),
        "attention_bias": config.flag("attention_bias"),
        "mlp_bias": config.flag("mlp_bias"),
    }
    return model(config, [layer] * layer_count(config))


def mistral(config: Config) -> ModelSpec:
    """Mistral: as Llama, with a window in all layers if the configuration has one."""
    heads, window = heads_of(config), config.optional_size("sliding_window")
    layer = {
        **heads,
        **gated_mlp(config),
        "rope": rope_of(config, heads["head_dim"]),
        "window": window,
    }
    return model(config, [layer] * layer_count(config))


def qwen2(config: Config) -> ModelSpec:
    """Qwen2 and Qwen2.5: biases of q, k and v alone."""
    return _qwen(config, {"attention_bias": True, "out_bias": False})


def qwen3(config: Config) -> ModelSpec:
    """Qwen3: a norm of each q and k head."""
    return _qwen(config, {"attention_bias": config.flag("attention_bias"), "qk_norm": "head"})


def _qwen(config: Config, more: dict[str, object]) -> ModelSpec:
    heads, slides = heads_of(config), config.flag("use_sliding_window")
    first = config.count("max_window_layers")
    kinds = kinds_of_layers(config, lambda index: slides and index >= first)
    if not slides:
        kinds = (FULL,) * len(kinds)
    layer = {**heads, **gated_mlp(config), **more, "rope": rope_of(config, heads["head_dim"])}
    return model(config, [layer | {"window": window} for window in windows(config, kinds)])


def gemma2(config: Config) -> ModelSpec:
    """Gemma 2: sandwich norms with gains 1 + w, caps on scores and logits, every other window."""
    kinds = kinds_of_layers(config, lambda index: index % 2 == 0)
    heads = heads_of(config)
    rope = rope_of(config, heads["head_dim"])
    return _gemma(config, heads, kinds, {FULL: rope, SLIDING: rope}, {})


def gemma3(config: Config) -> ModelSpec:
    """Gemma 3, the text model: as Gemma 2, with norms of q and k heads and two thetas."""
    config.must_be("use_bidirectional_attention", False, None)
    period = config.optional_size("sliding_window_pattern") or 6
    kinds = kinds_of_layers(config, lambda index: (index + 1) % period != 0)
    heads = heads_of(config)
    local = config.optional_number("rope_local_base_freq")
    config.must_be("attn_logit_softcapping", None)
    table = config.table("rope_parameters")
    if table is not None and not (table.has(FULL) and table.has(SLIDING)):
        raise config.wrong("rope_parameters", f"a table {FULL} and a table {SLIDING}", "one table")
    full = rope_of(config, heads["head_dim"], theta=1e6)
    sliding = rope_of(config, heads["head_dim"], kind=SLIDING)
    if not config.has("rope_parameters"):  # transformers 4 has no scaling in these layers
        sliding = Rope(theta=local or 10000.0)
    return _gemma(config, heads, kinds, {FULL: full, SLIDING: sliding}, {"qk_norm": "head"})


def _gemma(
    config: Config,
    heads: dict[str, int],
    kinds: tuple[str, ...],
    ropes: dict[str, Rope],
    more: dict[str, object],
) -> ModelSpec:
    config.must_be("use_bidirectional_attention", False, None)
    config.skip("hidden_act")  # the family's code reads only the other one
    layer = {
        **heads,
        **more,
        "mlp_hidden": config.size("intermediate_size"),
        "gated": True,
        "activation": config.choice("hidden_activation", ACTIVATIONS),
        "norm_eps": config.number("rms_norm_eps"),
        "norm_offset": True,
        "norm_order": "sandwich",
        "attention_bias": config.flag("attention_bias"),
        "attention_scale": 1.0 / math.sqrt(config.positive("query_pre_attn_scalar")),
        "softcap": config.optional_number("attn_logit_softcapping"),
    }
    layers = [
        layer | {"window": window, "rope": ropes[kind]}
        for window, kind in zip(windows(config, kinds), kinds, strict=True)
    ]
    return model(
        config,
        layers,
        embedding_scale=math.sqrt(config.size("hidden_size")),
        logit_softcap=config.optional_number("final_logit_softcapping"),
    )


def phi3(config: Config) -> ModelSpec:
    """Phi-3: fused weights, longrope ("yarn" in old files means it, too), partial rotation."""
    heads, window = heads_of(config), config.optional_size("sliding_window")
    kinds = {"default": "default"} | dict.fromkeys(("longrope", "su", "yarn"), "longrope")
    config.optional_size("original_max_position_embeddings")
    layer = {
        **heads,
        **gated_mlp(config),
        "rope": rope_of(config, heads["head_dim"], kinds=kinds, share=1.0),
        "window": window,
    }
    return model(config, [layer] * layer_count(config))


def olmo2(config: Config) -> ModelSpec:
    """OLMo 2: norms after the branches, and norms of q and k over all heads."""
    heads = heads_of(config)
    layer = {
        **heads,
        **gated_mlp(config),
        "rope": rope_of(config, heads["head_dim"]),
        "attention_bias": config.flag("attention_bias"),
        "qk_norm": "all",
        "norm_order": "post",
    }
    return model(config, [layer] * layer_count(config))


def gpt_neox(config: Config) -> ModelSpec:
    """GPT-NeoX and Pythia: both branches read the same stream, a part of each head rotates."""
    heads = config.size("num_attention_heads")
    head_dim = config.size("hidden_size") // heads
    rope = rope_of(
        config, head_dim, theta_field="rotary_emb_base", share_field="rotary_pct", share=0.25
    )
    layer = {
        "heads": heads,
        "head_dim": head_dim,
        "rope": rope,
        "attention_bias": config.flag("attention_bias"),
        "mlp_hidden": config.size("intermediate_size"),
        "mlp_bias": True,
        "activation": config.choice("hidden_act", ACTIVATIONS),
        "norm": "layer",
        "norm_eps": config.number("layer_norm_eps"),
        "parallel": config.flag("use_parallel_residual"),
    }
    return model(config, [layer] * layer_count(config))
