"""The table of families: how a configuration becomes a `ModelSpec`, and who can read it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pympa.checkpoint import dense_families as dense
from pympa.checkpoint import expert_families as sparse
from pympa.checkpoint.config import Config
from pympa.errors import RefusedError
from pympa.spec import DTYPES, ModelSpec, SpecError
from pympa.text.escape import shown


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: the name, as `model_type` has it.
        title: the name for people.
        architectures: the classes that configurations name.
        describe: a function from a configuration to a model.
        defaults: the values of fields that a file may lack, as the family's code has them.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    describe: Callable[[Config], ModelSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)


_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
_LONGEST = 64  # letters of a name for which the nearest one is looked up
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN = _COMMON | {"use_sliding_window": False, "max_window_layers": 28}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
} | {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attention_bias": False,
}
_SPARSE = {"decoder_sparse_step": 1, "norm_topk_prob": False}
_DEEPSEEK = _COMMON | _BIASES | {"first_k_dense_replace": 0, "q_lora_rank": 1536}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}

FAMILIES = (
    Family("llama", "Llama 1 to 3.3", ("LlamaForCausalLM",), dense.llama, _COMMON | _BIASES),
    Family("mistral", "Mistral", ("MistralForCausalLM",), dense.mistral,
           _COMMON | {"sliding_window": 4096, "num_key_value_heads": 8}),
    Family("mixtral", "Mixtral", ("MixtralForCausalLM",), sparse.mixtral,
           _COMMON | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}),
    Family("qwen2", "Qwen2, Qwen2.5", ("Qwen2ForCausalLM",), dense.qwen2,
           _QWEN | {"num_key_value_heads": 32}),
    Family("qwen3", "Qwen3", ("Qwen3ForCausalLM",), dense.qwen3,
           _QWEN | {"head_dim": 128, "num_key_value_heads": 32, "attention_bias": False}),
    Family("qwen2_moe", "Qwen2-MoE", ("Qwen2MoeForCausalLM",), sparse.qwen2_moe,
           _QWEN | _SPARSE | {"qkv_bias": True, "num_key_value_heads": 16}),
    Family("qwen3_moe", "Qwen3-MoE", ("Qwen3MoeForCausalLM",), sparse.qwen3_moe,
           _QWEN | _SPARSE | {"attention_bias": False, "num_key_value_heads": 4}),
    Family("gemma2", "Gemma 2", ("Gemma2ForCausalLM",), dense.gemma2,
           _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    Family("gemma3_text", "Gemma 3 (text)",
           ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel"),
           dense.gemma3, _GEMMA | {"num_attention_heads": 8,
                                   "vocab_size": 262208}),
    Family("phi3", "Phi-3", ("Phi3ForCausalLM",), dense.phi3,
           _COMMON | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096,
                      "max_position_embeddings": 4096}),
    Family("olmo2", "OLMo 2", ("Olmo2ForCausalLM",), dense.olmo2,
           _COMMON | _BIASES | {"rms_norm_eps": 1e-5}),
    Family("gpt_neox", "GPT-NeoX, Pythia", ("GPTNeoXForCausalLM",), dense.gpt_neox,
           {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
            "use_parallel_residual": True, "tie_word_embeddings": False}),
    Family("gpt_oss", "gpt-oss", ("GptOssForCausalLM",), sparse.gpt_oss,
           _COMMON | {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
                      "attention_bias": True, "head_dim": 64, "num_key_value_heads": 8,
                      "sliding_window": 128, "rope_scaling": _GPT_OSS_ROPE}),
    Family("deepseek_v2", "DeepSeek-V2", ("DeepseekV2ForCausalLM",), sparse.deepseek_v2,
           _DEEPSEEK | {"topk_method": "greedy", "routed_scaling_factor": 1.0,
                        "n_shared_experts": 2}),
    Family("deepseek_v3", "DeepSeek-V3, R1", ("DeepseekV3ForCausalLM",), sparse.deepseek_v3,
           _DEEPSEEK | {"n_group": 8, "topk_group": 4, "norm_topk_prob": True,
                        "routed_scaling_factor": 2.5, "rope_interleave": True,
                        "first_k_dense_replace": 3, "n_shared_experts": 1}),
)  # fmt: skip
"""All families."""


@dataclass(frozen=True)
class Description:
    """What a configuration says.

    Attributes:
        family: the family.
        spec: the model.
        ignored: the names of fields that change nothing.
        dtype: the name of the declared dtype; None if it is none of ours.
        extra_layers: the number of layers after the model's own that only predict more tokens.
    """

    family: Family
    spec: ModelSpec
    ignored: tuple[str, ...]
    dtype: str | None
    extra_layers: int = 0


def describe(
    values: Mapping[str, Any], where: str, ignore_fields: Iterable[str] = ()
) -> Description:
    """Return the model that the fields of a config.json describe.

    Args:
        values: the fields.
        where: the name of the file, for messages.
        ignore_fields: the names of unknown fields to go on without.

    Raises:
        RefusedError: the family is unknown, or a field is unknown, missing or not allowed; the
            message names it.
    """
    family = family_of(values, where)
    inner, path = values, ""
    text = values.get("text_config")
    if isinstance(text, dict):  # the text part of a model that also sees
        inner, path = text, "text_config."
    if isinstance(ignore_fields, str):
        raise RefusedError(f"ignore_fields: expected a list of names; got {shown(ignore_fields)}")
    config = Config(inner, where, family.defaults, path, [*ignore_fields])
    config.skip("quantization_config")
    try:
        spec = family.describe(config)
    except SpecError as error:
        raise RefusedError(f"{where}: {error}") from None
    ignored = config.finish()
    extra = next((inner[name] for name in _EXTRA_LAYERS if type(inner.get(name)) is int), 0)
    return Description(family, spec, tuple(sorted(ignored)), declared_dtype(values), extra)


def declared_dtype(values: Mapping[str, Any]) -> str | None:
    """Return the name of the dtype that a configuration declares, if it is one of ours."""
    for fields in (values, values.get("text_config")):
        if isinstance(fields, Mapping):
            name = fields.get("dtype") or fields.get("torch_dtype")
            if isinstance(name, str) and name.removeprefix("torch.") in DTYPES:
                return name.removeprefix("torch.")
    return None


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """Return the family of a configuration, by its architecture.

    Raises:
        RefusedError: there is none; the message names the nearest one.
    """
    found = values.get("architectures")
    names = found if isinstance(found, list) and found else [None]
    known = {name: family for family in FAMILIES for name in family.architectures}
    name = names[0]
    if name is None:  # files that only have the type
        by_type = {family.name: family for family in FAMILIES}
        kind = values.get("model_type")
        if isinstance(kind, str) and kind in by_type:
            return by_type[kind]
        name = kind
    if isinstance(name, str) and name in known:
        return known[name]
    stems = {_stem(other): other for other in known}
    near = stems[difflib.get_close_matches(_stem(str(name))[:_LONGEST], stems, 1, 0.0)[0]]
    raise RefusedError(
        f"{where}: architectures: expected one of {', '.join(known)}; got {shown(str(name))}. The "
        f"nearest family is {known[near].title} ({near})"
    )


def _stem(architecture: str) -> str:
    """Return the name of a class without the task: LlamaForCausalLM is Llama."""
    return architecture.partition("For")[0]
