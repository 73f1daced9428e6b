"""GGUF metadata -> `ModelSpec`, by the same families as config.json.

The metadata's keys become the fields of a config.json of the family. What llama.cpp's converter
changes in the weights changes the model that they are weights of: it adds 1 to the gains of
Gemma's norms, and turns the rows of Llama's q and k so that neighbours rotate together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pympa.checkpoint.families import Description, describe
from pympa.checkpoint.gguf_fields import Fields, Keys, add_experts, add_window, common_fields
from pympa.checkpoint.gguf_file import GgufFile
from pympa.checkpoint.gguf_rope import scaling_fields, stored_scaling
from pympa.checkpoint.rope_config import FULL
from pympa.errors import RefusedError
from pympa.spec import LayerSpec, LongRopeScaling, SpecError
from pympa.text.escape import shown

_ROTATED, _LOCAL_BASE = "rope.dimension_count", "rope.freq_base_swa"
_SOFTMAX, _SOFTMAX_OF_CHOSEN = 1, 3  # llama.cpp's numbers of ways to weigh experts


@dataclass(frozen=True)
class _Architecture:
    """How an architecture of llama.cpp is one of our families.

    Attributes:
        family: the class that the family's config.json names.
        more: a function that adds the fields that not all families have.
        turned: whether neighbouring dimensions rotate together.
        gains: whether the gains of norms are stored with 1 added.
        scalings: the types of scaling of RoPE by keys of the metadata.
        divisors: whether tensors may have the divisors of RoPE.
    """

    family: str
    more: Callable[[Fields, Keys, GgufFile], None] = lambda *_: None
    turned: bool = False
    gains: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    divisors: bool = False


def _add_llama(fields: Fields, keys: Keys, _: GgufFile) -> None:
    """Add the experts of Mixtral, which llama.cpp has no other name for."""
    keys.must_be("tensor_data_layout", "Meta AI original pth")
    if not keys.optional_size("expert_count"):
        return
    fields["architectures"] = ["MixtralForCausalLM"]
    add_experts(fields, keys, gating=_SOFTMAX)
    keys.must_be("expert_weights_norm", True)
    width = fields["intermediate_size"]
    keys.equals("expert_feed_forward_length", width, "as feed_forward_length")


def _add_phi3(fields: Fields, keys: Keys, _: GgufFile) -> None:
    fields["sliding_window"] = keys.optional_size("attention.sliding_window")


def _add_gemma2(fields: Fields, keys: Keys, _: GgufFile) -> None:
    for name, missing in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        fields[name] = keys.positive(name) if keys.has(name) else missing
    add_window(fields, keys, period=2, missing=4096)
    _same_local_base(fields, keys)
    _add_gemma_scale(fields, large=46)


def _add_gemma3(fields: Fields, keys: Keys, _: GgufFile) -> None:
    fields["rope_local_base_freq"] = (
        keys.positive(_LOCAL_BASE) if keys.has(_LOCAL_BASE) else 10000.0
    )
    fields["final_logit_softcapping"] = keys.optional_number("final_logit_softcapping") or None
    if keys.optional_size("attention.sliding_window"):
        add_window(fields, keys, period=6)
    elif any(keys.sliding(1)):  # llama.cpp takes a file without a window as one without windows
        raise keys.wrong("attention.sliding_window", "a window for the layers that slide", None)
    else:
        fields["layer_types"] = [FULL] * keys.layers
    _add_gemma_scale(fields, large=62)


def _add_gemma_scale(fields: Fields, large: int) -> None:
    """Add the scale of scores, which the 27B models have by d_model, as llama.cpp knows them."""
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    by_width = fields["num_hidden_layers"] == large
    fields["query_pre_attn_scalar"] = width // heads if by_width else fields["head_dim"]
    fields["hidden_activation"] = "gelu_pytorch_tanh"


def _same_local_base(fields: Fields, keys: Keys) -> None:
    """Refuse another theta in layers with a window."""
    keys.number_of(_LOCAL_BASE, fields["rope_theta"], why="as rope.freq_base")


def _add_qwen3_moe(fields: Fields, keys: Keys, file: GgufFile) -> None:
    add_experts(fields, keys, gating=_SOFTMAX)
    fields["moe_intermediate_size"] = keys.size("expert_feed_forward_length")
    fields["norm_topk_prob"] = keys.flag("expert_weights_norm", True)
    routers = (f"blk.{index}.ffn_gate_inp.weight" for index in range(keys.layers))
    fields["mlp_only_layers"] = [i for i, name in enumerate(routers) if name not in file.stored]


def _add_gpt_oss(fields: Fields, keys: Keys, _: GgufFile) -> None:
    add_experts(fields, keys, gating=_SOFTMAX_OF_CHOSEN)
    width = keys.size("expert_feed_forward_length")
    keys.equals("feed_forward_length", width, "as expert_feed_forward_length")
    add_window(fields, keys, period=2)
    _same_local_base(fields, keys)
    if fields.get("rope_scaling", {}).get("rope_type") == "yarn":
        fields["rope_scaling"]["truncate"] = False  # as it was trained; the file does not say so


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _add_llama, turned=True, divisors=True),
    "qwen2": _Architecture("Qwen2ForCausalLM"),
    "qwen3": _Architecture("Qwen3ForCausalLM"),
    "qwen3moe": _Architecture("Qwen3MoeForCausalLM", _add_qwen3_moe),
    "gemma2": _Architecture("Gemma2ForCausalLM", _add_gemma2, gains=True),
    "gemma3": _Architecture("Gemma3ForCausalLM", _add_gemma3, gains=True),
    "phi3": _Architecture("Phi3ForCausalLM", _add_phi3, scalings=(), divisors=True),
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
    keys = Keys(file, str(name))
    fields: Fields = {"architectures": [known.family], **common_fields(keys, file)}
    head_dim = fields["head_dim"]
    rotated = keys.size(_ROTATED) if keys.has(_ROTATED) else head_dim
    if rotated % 2 or rotated > head_dim or (known.turned and rotated != head_dim):
        numbers = f"{head_dim}" if known.turned else f"an even number up to {head_dim}"
        raise keys.wrong(_ROTATED, f"{numbers}, the length of a head's keys", rotated)
    scaling = scaling_fields(keys, file, by_keys=known.scalings, by_tensors=known.divisors)
    if scaling:
        fields["rope_scaling"] = scaling
    known.more(fields, keys, file)
    keys.finish()
    try:
        found = describe(fields, file.where)
        divisors = stored_scaling(keys, file, rotated)
        layers = tuple(_as_stored(layer, known, rotated, divisors) for layer in found.spec.layers)
        spec = msgspec.structs.replace(found.spec, layers=layers)
    except (RefusedError, SpecError) as error:
        raise keys.renamed(error) from None
    return Description(found.family, spec, found.ignored, None)


def _as_stored(
    layer: LayerSpec, architecture: _Architecture, rotated: int, divisors: LongRopeScaling | None
) -> LayerSpec:
    """Return a layer whose weights are as the converter has written them."""
    rope = layer.rope
    if rope is not None:
        rope = msgspec.structs.replace(
            rope,
            interleaved=architecture.turned,
            rotated_dim=None if rotated == layer.head_dim else rotated,
            scaling=divisors or rope.scaling,
        )
    offset = layer.norm_offset and not architecture.gains
    return msgspec.structs.replace(layer, rope=rope, norm_offset=offset)
