"""Small models as GGUF files, converted as llama.cpp's converter does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from support.model_files import load_family, weights

ARCHITECTURES = {
    "llama_llama3": "llama", "llama_linear": "llama", "mistral": "llama", "mixtral": "llama",
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma2": "gemma2",
    "gemma3": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "gpt_oss": "gpt-oss",
}  # fmt: skip
"""The architecture of each stored model that GGUF files can hold."""

WINDOWS = ("gemma2", "gemma3", "phi3", "gpt-oss")
"""The architectures that the converter writes a window of."""

_NAMES = [
    (r"model\.embed_tokens", "token_embd"),
    (r"model\.norm", "output_norm"),
    (r"lm_head", "output"),
    (r"model\.layers\.(\d+)\.", r"blk.\1."),
    (r"self_attn\.(q|k|v)_proj", r"attn_\1"),
    (r"self_attn\.qkv_proj", "attn_qkv"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"self_attn\.(q|k)_norm", r"attn_\1_norm"),
    (r"self_attn\.sinks", "attn_sinks.weight"),
    (r"mlp\.gate_up_proj", "ffn_up"),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
    (r"(mlp\.router|mlp\.gate|block_sparse_moe\.gate)\.", "ffn_gate_inp."),
    (r"input_layernorm", "attn_norm"),
    (r"pre_feedforward_layernorm", "ffn_norm"),
    (r"post_feedforward_layernorm", "post_ffw_norm"),
]


def keys_of(name: str) -> dict[str, Any]:
    """Return the metadata of a stored model, without the architecture before each key."""
    return _metadata(load_family(name)["config"], ARCHITECTURES[name])


def write_gguf(
    name: str,
    path: Path,
    kind: str = "F32",
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32] | None] | None = None,
) -> Path:
    """Write a stored model as a GGUF file.

    Args:
        name: the stored model.
        path: the file.
        kind: the type of matrices.
        changes: other values of keys; None means that a key is missing.
        tensors: other tensors; None means that one is missing.
    """
    family, architecture = load_family(name), ARCHITECTURES[name]
    config = family["config"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(config, architecture) | dict(changes or {})).items():
        _add(writer, f"{architecture}.{key}", value)
    stored = dict(_tensors(config, architecture, weights(family["tensors"])))
    for tensor, array in (stored | dict(tensors or {})).items():
        if array is None:
            continue
        quantised = kind != "F32" and array.ndim == 2 and array.shape[-1] % 32 == 0
        if quantised:
            qtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(tensor, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
        list: writer.add_array,
    }
    if value is not None:
        add[type(value)](key, value)


def _metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
    }
    share = rope.get("partial_rotary_factor", 1.0)
    found["rope.dimension_count"] = int(head_dim * share)
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = rope["factor"]
    if kind in ("yarn", "longrope"):
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    if kind == "longrope":
        growth = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(growth) / math.log(original))
        found["rope.scaling.attn_factor"] = factor
    if config.get("sliding_window") and architecture in WINDOWS:
        found["attention.sliding_window"] = config["sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            found[key] = config[key]
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        found["expert_count"] = experts
        found["expert_used_count"] = config["num_experts_per_tok"]
    if architecture == "qwen3moe":
        found["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if architecture == "gpt-oss":
        found["expert_feed_forward_length"] = config["intermediate_size"]
    return found


def _tensors(
    config: dict[str, Any], architecture: str, arrays: dict[str, NDArray[np.float32]]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    head_counts = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    experts: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name, array in arrays.items():
        stored = _renamed(name, config, architecture)
        turned = re.search(r"attn_(q|k)\.", stored)
        if architecture == "llama" and turned:
            array = _turned(array, head_counts[turned[1]])
        if architecture in ("gemma2", "gemma3") and stored.endswith("norm.weight"):
            array = array + np.float32(1.0)
        of_one = re.search(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+?)(?:_proj)?\.w",
                           stored)  # fmt: skip
        if of_one:
            kind = {"w1": "gate", "w2": "down", "w3": "up"}.get(of_one[3], of_one[3])
            experts.setdefault(f"{of_one[1]}.ffn_{kind}_exps.weight", {})[int(of_one[2])] = array
        elif ".experts." in stored:
            yield from _gpt_oss_experts(stored, array)
        else:
            yield stored, array
    for stored, of_layer in experts.items():
        yield stored, np.stack([of_layer[number] for number in sorted(of_layer)])
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_divisors(rope, 16)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)


def _renamed(name: str, config: dict[str, Any], architecture: str) -> str:
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    after = architecture in ("gemma2", "gemma3", "olmo2", "gpt-oss")
    return name.replace("post_attention_layernorm", "post_attention_norm" if after else "ffn_norm")


def _turned(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return rows of heads in the order in which neighbours rotate together."""
    pairs = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _gpt_oss_experts(
    stored: str, array: NDArray[np.float32]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    layer, kind = stored.split(".mlp.experts.")
    end = "bias" if kind.endswith("_bias") else "weight"
    if end == "weight":
        array = array.swapaxes(1, 2)  # [experts, outputs, inputs]
    if kind.startswith("down"):
        yield f"{layer}.ffn_down_exps.{end}", np.ascontiguousarray(array)
        return
    for number, part in enumerate(("gate", "up")):
        yield f"{layer}.ffn_{part}_exps.{end}", np.ascontiguousarray(array[:, number::2])


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    found = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(rope["factor"])
        else:
            original = rope["original_max_position_embeddings"] / wavelength
            smooth = (original - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)
