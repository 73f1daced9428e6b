"""GGUF metadata -> `ModelSpec`, by the same families as config.json.

The metadata's keys become the fields of a config.json of the family. What llama.cpp's converter
changes in the weights changes the model that they are weights of: it adds 1 to the gains of
Gemma's norms, and turns the rows of Llama's q and k so that neighbours rotate together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pympa.checkpoint.config import Config
from pympa.checkpoint.families import Description, describe
from pympa.checkpoint.gguf_file import GgufFile
from pympa.checkpoint.layers import layer_count
from pympa.errors import RefusedError
from pympa.spec import LayerSpec, LongRopeScaling, SpecError
from pympa.text.escape import shown

Fields = dict[str, Any]
"""The fields of a config.json."""

_COMMON = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_USED_KEYS = {
    "attention.value_length",
    "attn_logit_softcapping",
    "expert_feed_forward_length",
    "final_logit_softcapping",
    "rope.dimension_count",
    "vocab_size",
}
_UNUSED_KEYS = {
    "attention.sliding_window_pattern",
    "expert_gating_func",
    "expert_weights_norm",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_log_multiplier",
    "tensor_data_layout",
}
FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""The tensors with a divisor for each pair that RoPE rotates."""


@dataclass(frozen=True)
class _Architecture:
    """How an architecture of llama.cpp is one of our families.

    Attributes:
        family: the class that the family's config.json names.
        more: a function that adds the fields that the metadata has under other names.
        turned: whether neighbouring dimensions rotate together.
        gains: whether the gains of norms are stored with 1 added.
    """

    family: str
    more: Callable[[Fields, Mapping[str, Any], GgufFile], None] = lambda *_: None
    turned: bool = False
    gains: bool = False


def _add_softcaps(fields: Fields, values: Mapping[str, Any], _: GgufFile) -> None:
    """Add what Gemma 2 has; the scale of its 27B is by d_model, as the converter knows it."""
    fields["attn_logit_softcapping"] = values.get("attn_logit_softcapping", 50.0)
    fields["final_logit_softcapping"] = values.get("final_logit_softcapping", 30.0)
    _add_gemma_scale(fields, large=46)


def _add_gemma3(fields: Fields, values: Mapping[str, Any], _: GgufFile) -> None:
    fields["rope_local_base_freq"] = values.get("rope.freq_base_swa", 10000.0)
    fields["final_logit_softcapping"] = values.get("final_logit_softcapping")
    fields["sliding_window_pattern"] = 6
    _add_gemma_scale(fields, large=62)


def _add_gemma_scale(fields: Fields, large: int) -> None:
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    by_width = fields["num_hidden_layers"] == large
    fields["query_pre_attn_scalar"] = width / heads if by_width else fields["head_dim"]
    fields["hidden_activation"] = "gelu_pytorch_tanh"


def _add_experts(fields: Fields, values: Mapping[str, Any], file: GgufFile) -> None:
    fields["moe_intermediate_size"] = values.get("expert_feed_forward_length")
    fields["norm_topk_prob"] = True
    layers = range(layer_count(Config(fields, file.where)))
    routers = (f"blk.{index}.ffn_gate_inp.weight" for index in layers)
    fields["mlp_only_layers"] = [i for i, name in enumerate(routers) if name not in file.stored]


def _add_gpt_oss(fields: Fields, values: Mapping[str, Any], _: GgufFile) -> None:
    fields["intermediate_size"] = values.get("expert_feed_forward_length")
    if "rope_scaling" in fields:  # as it was trained; the file does not say so
        fields["rope_scaling"]["truncate"] = False


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", turned=True),
    "qwen2": _Architecture("Qwen2ForCausalLM"),
    "qwen3": _Architecture("Qwen3ForCausalLM"),
    "qwen3moe": _Architecture("Qwen3MoeForCausalLM", _add_experts),
    "gemma2": _Architecture("Gemma2ForCausalLM", _add_softcaps, gains=True),
    "gemma3": _Architecture("Gemma3ForCausalLM", _add_gemma3, gains=True),
    "phi3": _Architecture("Phi3ForCausalLM"),
    "olmo2": _Architecture("Olmo2ForCausalLM"),
    "gpt-oss": _Architecture("GptOssForCausalLM", _add_gpt_oss),
}


def describe_gguf(file: GgufFile) -> Description:
    """Return the model that a GGUF file holds.

    Raises:
        RefusedError: the architecture or a key is not known, or a key is missing or not allowed.
    """
    name = file.metadata.get("general.architecture")
    known = _ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None:
        raise RefusedError(
            f"{file.where}: general.architecture: expected one of {', '.join(_ARCHITECTURES)}; got "
            f"{shown(str(name))}; use the model's safetensors instead"
        )
    prefix = f"{name}."
    values = {
        key.removeprefix(prefix): _plain(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    fields = _fields(file, values)
    known.more(fields, values, file)
    experts = "num_local_experts" in fields
    architecture = "MixtralForCausalLM" if name == "llama" and experts else known.family
    fields["architectures"] = [architecture]
    found = describe(fields, file.where)
    try:
        layers = tuple(_as_stored(layer, known, values, file) for layer in found.spec.layers)
        spec = msgspec.structs.replace(found.spec, layers=layers)
    except SpecError as error:
        raise RefusedError(f"{file.where}: {error}") from None
    return Description(found.family, spec, found.ignored, None)


def _fields(file: GgufFile, values: Mapping[str, Any]) -> Fields:
    """Return the fields of a config.json that the keys of the metadata say."""
    names = _COMMON | (_EXPERTS if values.get("expert_count") else {})
    known = {*names.values(), *_EXPERTS.values(), *_USED_KEYS, *_UNUSED_KEYS}
    unknown = [key for key in values if key not in known and not key.startswith("rope.scaling.")]
    if unknown:
        raise RefusedError(
            f"{file.where}: {shown(unknown[0])}: expected only keys that this version knows, "
            "because others may change the mathematics"
        )
    fields = {field: values[key] for field, key in names.items() if key in values}
    embedding = file.stored.get("token_embd.weight")
    if embedding is None:
        raise RefusedError(f"{file.where}: expected a tensor token_embd.weight; got none")
    fields["vocab_size"] = embedding.shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.stored
    kind = values.get("rope.scaling.type")
    if kind not in (None, "none") and not any(name in file.stored for name in FREQUENCIES):
        fields["rope_scaling"] = {
            "rope_type": kind,
            "factor": values.get("rope.scaling.factor"),
            "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
            "attention_factor": values.get("rope.scaling.attn_factor"),
        }
    return fields


def _as_stored(
    layer: LayerSpec, architecture: _Architecture, values: Mapping[str, Any], file: GgufFile
) -> LayerSpec:
    """Return a layer whose weights are as the converter has written them."""
    rope = layer.rope
    if rope is not None:
        rotated = values.get("rope.dimension_count", layer.head_dim)
        rope = msgspec.structs.replace(
            rope,
            interleaved=architecture.turned,
            rotated_dim=None if rotated == layer.head_dim else rotated,
            scaling=_stored_scaling(values, file) or rope.scaling,
        )
    offset = layer.norm_offset and not architecture.gains
    return msgspec.structs.replace(layer, rope=rope, norm_offset=offset)


def _stored_scaling(values: Mapping[str, Any], file: GgufFile) -> LongRopeScaling | None:
    """Return the scaling whose divisors are tensors: of Llama 3, or longrope; None without them."""
    found = {name: _divisors(file, name) for name in FREQUENCIES if name in file.stored}
    if not found:
        return None
    plain = found.get(FREQUENCIES[0], ())
    trained = values.get("rope.scaling.original_context_length") or values.get("context_length")
    factor = 1.0 if plain else values.get("rope.scaling.attn_factor")
    return LongRopeScaling(
        short=found.get(FREQUENCIES[2], plain),
        long=found.get(FREQUENCIES[1], plain),
        trained_context=int(trained or 2),
        attention_factor=None if factor is None else float(factor),
    )


def _divisors(file: GgufFile, name: str) -> tuple[float, ...]:
    return tuple(float(value) for value in file.read(name).reshape(-1))


def _plain(value: Any) -> Any:
    """Return a value of the metadata; of equal numbers, one for each layer, the first one."""
    if isinstance(value, np.ndarray):
        same = value.size and (value == value.flat[0]).all()
        value = value.flat[0].item() if same else value.tolist()
    return int(value) if isinstance(value, float) and value.is_integer() else value
