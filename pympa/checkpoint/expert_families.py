"""config.json of families with experts -> `ModelSpec`.

Each function follows the family's code in `transformers`, `models/NAME/modeling_NAME.py`.
"""

from __future__ import annotations

import math

from pympa.checkpoint.config import Config
from pympa.checkpoint.layers import (
    Fields,
    gated_mlp,
    heads_of,
    kinds_of_layers,
    layer_count,
    model,
    windows,
)
from pympa.checkpoint.rope_config import rope_of, rope_table, yarn_scale
from pympa.spec import Latent, ModelSpec, Routing


def mixtral(config: Config) -> ModelSpec:
    """Mixtral: softmax over all experts, the weights of the chosen ones add up to 1."""
    heads, window = heads_of(config), config.optional_size("sliding_window")
    layer = {
        **heads,
        **gated_mlp(config),
        "rope": rope_of(config, heads["head_dim"]),
        "window": window,
        "experts": config.size("num_local_experts"),
        "top_k": config.size("num_experts_per_tok"),
    }
    return model(config, [layer] * layer_count(config))


def qwen2_moe(config: Config) -> ModelSpec:
    """Qwen2-MoE: experts in some layers, a gate of the shared expert."""
    slides, last = config.flag("use_sliding_window"), config.count("max_window_layers")
    kinds = kinds_of_layers(config, lambda i: slides and i % 2 == 0 and i < last)
    shared = {
        "shared_experts": 1,
        "shared_hidden": config.size("shared_expert_intermediate_size"),
        "shared_gate": True,
    }
    attention = {"attention_bias": config.flag("qkv_bias"), "out_bias": False}
    return _qwen_moe(config, attention, windows(config, kinds), shared)


def qwen3_moe(config: Config) -> ModelSpec:
    """Qwen3-MoE: experts in some layers, a norm of each q and k head."""
    count = layer_count(config)
    window = config.optional_size("sliding_window")
    found = [window if config.flag("use_sliding_window") else None] * count
    attention = {"attention_bias": config.flag("attention_bias"), "qk_norm": "head"}
    return _qwen_moe(config, attention, found, {})


def _qwen_moe(
    config: Config, attention: Fields, of_layers: list[int | None], shared: Fields
) -> ModelSpec:
    heads = heads_of(config)
    every, without = config.size("decoder_sparse_step"), config.sizes("mlp_only_layers")
    dense = {
        **heads,
        **attention,
        **gated_mlp(config),
        "rope": rope_of(config, heads["head_dim"]),
    }
    sparse = {
        "mlp_hidden": config.size("moe_intermediate_size"),
        "experts": config.size(config.first("num_experts", "num_local_experts")),
        "top_k": config.size("num_experts_per_tok"),
        "renormalize": config.flag("norm_topk_prob"),
        **shared,
    }

    def has_experts(index: int) -> bool:
        return index not in without and (index + 1) % every == 0

    layers = [
        dense | {"window": window} | (sparse if has_experts(index) else {})
        for index, window in enumerate(of_layers)
    ]
    return model(config, layers)


def gpt_oss(config: Config) -> ModelSpec:
    """gpt-oss: sinks, windows in every other layer, clamped SwiGLU, biases everywhere."""
    heads = heads_of(config)
    kinds = kinds_of_layers(config, lambda index: index % 2 == 0)
    config.must_be("hidden_act", "silu")
    config.skip("experts_per_token")
    layer = {
        **heads,
        "rope": rope_of(config, heads["head_dim"], theta=150000.0),
        "attention_bias": config.flag("attention_bias"),
        "sinks": True,
        "mlp_hidden": config.size("intermediate_size"),
        "mlp_bias": True,
        "gated": True,
        "activation": "swiglu_clamped",
        "swiglu_limit": config.number("swiglu_limit"),
        "swiglu_alpha": config.number("swiglu_alpha"),
        "norm_eps": config.number("rms_norm_eps"),
        "experts": config.size(config.first("num_local_experts", "num_experts")),
        "top_k": config.size("num_experts_per_tok"),
        "routing": Routing(bias=True),
    }
    return model(config, [layer | {"window": window} for window in windows(config, kinds)])


def deepseek_v2(config: Config) -> ModelSpec:
    """DeepSeek-V2: latent attention, softmax routing, in groups if the file says so."""
    config.must_be("scoring_func", "softmax")
    config.must_be("norm_topk_prob", False, None)
    in_groups = config.choice("topk_method", {"greedy": False, "group_limited_greedy": True})
    routing = Routing(
        groups=(config.optional_size("n_group") or 1) if in_groups else 1,
        top_groups=config.optional_size("topk_group") if in_groups else None,
        scale=config.number("routed_scaling_factor"),
    )
    config.skip("n_group", "topk_group")
    more = {"routing": routing, "renormalize": False, "mlp_bias": config.flag("mlp_bias")}
    return _deepseek(config, more, interleaved=True)


def deepseek_v3(config: Config) -> ModelSpec:
    """DeepSeek-V3 and R1: latent attention, sigmoid routing in groups with a choice bias."""
    config.must_be("scoring_func", "sigmoid")
    config.must_be("topk_method", "noaux_tc")
    routing = Routing(
        score="sigmoid",
        choice_bias=True,
        groups=config.size("n_group"),
        top_groups=config.size("topk_group"),
        group_score="top2",
        scale=config.number("routed_scaling_factor"),
    )
    more = {"routing": routing, "renormalize": config.flag("norm_topk_prob")}
    return _deepseek(config, more, interleaved=config.flag("rope_interleave"))


def _deepseek(config: Config, more: Fields, *, interleaved: bool) -> ModelSpec:
    config.must_be("attention_bias", False)
    config.must_be("moe_layer_freq", 1)
    config.skip("head_dim", "qk_head_dim", "num_key_value_heads")
    rotated = config.size("qk_rope_head_dim")
    head_dim = config.size("qk_nope_head_dim") + rotated
    rope = rope_of(config, rotated, trailing=True, interleaved=interleaved)
    rope = type(rope)(
        theta=rope.theta,
        rotated_dim=rotated,
        trailing=True,
        interleaved=interleaved,
        scaling=rope.scaling,
    )
    layer = {
        **gated_mlp(config),
        **more,
        "heads": config.size("num_attention_heads"),
        "head_dim": head_dim,
        "v_head_dim": config.size("v_head_dim"),
        "rope": rope,
        "latent": Latent(
            kv_rank=config.size("kv_lora_rank"), q_rank=config.optional_size("q_lora_rank")
        ),
        "attention_scale": _yarn_attention_scale(config) / math.sqrt(head_dim),
    }
    sparse = {
        "mlp_hidden": config.size("moe_intermediate_size"),
        "experts": config.size("n_routed_experts"),
        "top_k": config.size("num_experts_per_tok"),
        "shared_experts": config.optional_size("n_shared_experts") or 0,
    }
    dense = {name: value for name, value in layer.items() if name not in ("routing", "renormalize")}
    count, first = layer_count(config), config.count("first_k_dense_replace")
    return model(config, [dense if i < first else layer | sparse for i in range(count)])


def _yarn_attention_scale(config: Config) -> float:
    """Return the factor on the attention scale that comes with yarn's `mscale_all_dim`."""
    table = rope_table(config)
    if table is None or not table.has("mscale_all_dim"):
        return 1.0
    kinds = (table.has("rope_type") or table.has("type")) and table.has("factor")
    weight = table.number("mscale_all_dim")
    return yarn_scale(table.number("factor"), weight) ** 2 if kinds and weight else 1.0
