"""config.json -> ModelSpec: both versions of transformers, refusals by the name of a field."""

import random

import msgspec
import pytest

from pympa.checkpoint.families import FAMILIES, describe
from pympa.errors import RefusedError
from pympa.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    YarnScaling,
)
from support.model_files import families, load_family


def spec_of(config, **options) -> ModelSpec:
    return describe(config, "config.json", **options).spec


def config_of(name):
    return load_family(name)["config"]


def as_transformers_4(config):
    """Return a configuration as transformers 4 writes it: flat fields for RoPE, torch_dtype."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["torch_dtype"] = old.pop("dtype")
    if "full_attention" in rope:
        sliding, full = rope["sliding_attention"], dict(rope["full_attention"])
        old["rope_local_base_freq"] = sliding["rope_theta"]
        rope = full
    theta = "rotary_emb_base" if old["model_type"] == "gpt_neox" else "rope_theta"
    old[theta] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        share = "rotary_pct" if old["model_type"] == "gpt_neox" else "partial_rotary_factor"
        old[share] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old.pop("layer_types", None)
    return old


@pytest.mark.parametrize("name", families())
def test_both_versions_of_transformers(name):
    config = config_of(name)
    assert spec_of(as_transformers_4(config)) == spec_of(config)


@pytest.mark.parametrize("name", families())
def test_what_is_saved_is_known(name):
    """No field of a configuration is refused, and housekeeping is listed as ignored."""
    found = describe(config_of(name), "config.json")
    assert "initializer_range" in found.ignored
    assert found.dtype == "float32"


def with_heads(spec):
    """Return a model whose layers name the number of kv heads."""
    layers = (msgspec.structs.replace(layer, kv_heads=layer.n_kv_heads) for layer in spec.layers)
    return msgspec.structs.replace(spec, layers=tuple(layers))


@pytest.mark.parametrize("name", families())
def test_missing_fields_are_those_of_the_family(name):
    """A field that is not there has the value that transformers gives it, or is refused."""
    auto = pytest.importorskip("transformers", reason="transformers is the extra 'peers'")
    config, checked = config_of(name), 0
    for field in [*config, "all"]:
        left = {key: value for key, value in config.items() if key not in (field, "layer_types")}
        if field == "all":
            sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_experts_per_tok", "max_position_embeddings",
                     "architectures", "model_type", "moe_intermediate_size")  # fmt: skip
            left = {key: value for key, value in config.items() if key in sizes}
        if "architectures" not in left or "model_type" not in left:
            continue
        try:
            kind = type(auto.AutoConfig.for_model(left["model_type"]))
            whole = kind.from_dict(dict(left)).to_dict() | {"architectures": left["architectures"]}
        except Exception:  # it cannot be made without this field
            continue
        try:
            found = spec_of(left)
        except RefusedError:  # it names the field
            continue
        assert with_heads(found) == with_heads(spec_of(whole)), field
        checked += 1
    assert checked > 10


def test_every_family_has_a_model():
    kinds = {describe(config_of(name), "").family.name for name in families()}
    assert kinds == {family.name for family in FAMILIES}


PUBLISHED = {
    # Fields of configurations on Hugging Face, and what must come of them.
    "Llama-2-7b": (
        {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
         "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000},
        lambda spec: len(spec.layers) == 1 and spec.layers[0].repeat == 32,
    ),
    "Llama-3.1-70B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
         "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 131072,
         "mlp_bias": False, "num_attention_heads": 64, "num_hidden_layers": 80,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
         "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "torch_dtype": "bfloat16", "vocab_size": 128256},
        lambda spec: spec.layers[0].rope.scaling
        == Llama3Scaling(factor=8.0, trained_context=8192),
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
         "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
         "sliding_window": 4096, "vocab_size": 32000},
        lambda spec: spec.layers[0].window == 4096,
    ),
    "Qwen2.5-7B": (
        {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584,
         "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
         "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
         "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
         "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064},
        lambda spec: spec.layers[0].window is None and not spec.layers[0].has_out_bias,
    ),
    "gemma-3-1b": (
        {"architectures": ["Gemma3ForCausalLM"], "head_dim": 256, "hidden_size": 1152,
         "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 6912,
         "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
         "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
         "sliding_window_pattern": 6, "vocab_size": 262144},
        lambda spec: [layer.window for layer in spec.blocks[:7]] == [512] * 5 + [None, 512]
        and {layer.rope.theta for layer in spec.blocks} == {1e4, 1e6},
    ),
    "gemma-3-4b": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 262144,
         "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
                         "num_hidden_layers": 34, "sliding_window": 1024,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
        lambda spec: spec.layers[1].rope.scaling == LinearScaling(factor=8.0)
        and spec.vocabulary == 262208 and spec.tied_head,
    ),
    "Phi-3-mini-128k": (
        {"architectures": ["Phi3ForCausalLM"], "hidden_act": "silu", "hidden_size": 3072,
         "intermediate_size": 8192, "max_position_embeddings": 131072,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
         "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
         "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.1] * 48, "type": "su"},
         "rope_theta": 10000.0, "sliding_window": 262144, "vocab_size": 32064},
        lambda spec: isinstance(spec.layers[0].rope.scaling, LongRopeScaling)
        and spec.layers[0].rope.scaling.factor == 32.0,
    ),
    "DeepSeek-V3": (
        {"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "ep_size": 1,
         "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
         "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
         "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
         "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
         "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
         "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
         "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                          "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                          "type": "yarn"},
         "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
         "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280},
        lambda spec: [layer.experts for layer in spec.layers] == [0, 256]
        and isinstance(spec.layers[0].rope.scaling, YarnScaling)
        and abs(spec.layers[0].scale * 192**0.5 - 1.3688879**2) < 1e-6,
    ),
    "gpt-oss-20b": (
        {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4,
         "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
         "intermediate_size": 2880, "max_position_embeddings": 131072,
         "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64,
         "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
         "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"},
         "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128,
         "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                          "original_max_position_embeddings": 4096, "rope_type": "yarn",
                          "truncate": False},
         "swiglu_limit": 7.0, "vocab_size": 201088},
        lambda spec: not spec.layers[0].rope.scaling.truncate and spec.layers[0].sinks
        and [layer.window for layer in spec.layers[:2]] == [128, None],
    ),
    "a long Llama": (
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
         "max_position_embeddings": 2048, "num_attention_heads": 4, "num_hidden_layers": 2,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}, "vocab_size": 100},
        lambda spec: spec.layers[0].rope.scaling == DynamicScaling(factor=2.0, trained_context=2048)
        and spec.within(5000).context == 5000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config, holds = PUBLISHED[name]
    assert holds(spec_of(config))


WRONG = [
    ({"parallel_attn": True}, "parallel_attn: expected only fields that this version knows"),
    ({"hidden_act": "relu"}, "hidden_act: expected one of silu"),
    ({"hidden_size": "64"}, "hidden_size: expected a positive whole number; got '64'"),
    ({"hidden_size": True}, "hidden_size: expected a positive whole number; got True"),
    ({"num_attention_heads": 0}, "num_attention_heads: expected a positive whole number; got 0"),
    ({"num_key_value_heads": 8}, "kv_heads: expected at most heads=4; got 8"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number; got nan"),
    ({"attention_bias": 1.5}, "attention_bias: expected true or false"),
    ({"rope_parameters": [1]}, "rope_parameters: expected a table of fields"),
    ({"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "rope_parameters.rope_type: "),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "gamma": 1}}, "parameters.gamma: "),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: .*is missing"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rope.scaling.factor: expected a"),
    ({"architectures": ["Llama4ForConditionalGeneration"]}, r"nearest family is Llama 1 to 3\.3"),
    ({"architectures": ["Qwen3NextForCausalLM"]}, "nearest family is Qwen3"),
    ({"architectures": []}, "expected"),
    ({"vocab_size": 1 << 40}, "vocabulary: expected at most"),
    ({"num_hidden_layers": 20_000}, "layers: expected at most"),
    ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor: expected only fields"),
    ({"rope_parameters": {"rope_typ": "linear"}}, "rope_parameters.rope_typ: expected only"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters, rope_scaling: "),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, because"),
]
WRONG_GEMMA = [
    ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: expected none; got 30.0"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: expected a table full_atten"),
    ({"layer_types": [[], [], []]}, "layer_types: expected a list of 3 words"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_refusals(change, message):
    config = config_of("llama") | change
    if change == {"architectures": []}:
        config["model_type"] = "llama4"
    with pytest.raises(RefusedError, match=message) as caught:
        spec_of(config)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), WRONG_GEMMA, ids=lambda value: str(value)[:40])
def test_refusals_of_gemma(change, message):
    with pytest.raises(RefusedError, match=message):
        spec_of(config_of("gemma3") | change)


def test_a_field_of_a_table_may_be_ignored_by_name():
    config = config_of("llama") | {"rope_parameters": {"rope_type": "default", "gamma": 2}}
    for name in ("gamma", "rope_parameters.gamma"):
        assert spec_of(config, ignore_fields=[name]) == spec_of(config_of("llama"))
    with pytest.raises(RefusedError, match="ignore_fields: expected a list of names; got gamma"):
        spec_of(config, ignore_fields="gamma")


def test_a_field_may_be_ignored_by_name():
    config = config_of("llama") | {"parallel_attn": True, "scale_emb": 3}
    with pytest.raises(RefusedError, match="parallel_attn, scale_emb"):
        spec_of(config)
    with pytest.raises(RefusedError, match="scale_emb"):
        spec_of(config, ignore_fields=["parallel_attn"])
    found = describe(config, "", ignore_fields=["parallel_attn", "scale_emb"])
    assert {"parallel_attn", "scale_emb"} < set(found.ignored)


def test_fields_that_are_off_change_nothing():
    off = {"a": None, "b": False, "c": 0, "d": "", "e": [], "f": {}}
    assert spec_of(config_of("llama") | off) == spec_of(config_of("llama"))


VALUES = [None, True, -1, 0, 1, 3, 10**6, 1 << 40, 1.5, -0.0, 1e308, "", "x" * 200, "silu", [], {},
          [1, "a"], {"rope_type": "yarn"}, [[[]]], {"a": {"b": {}}}]  # fmt: skip


@pytest.mark.parametrize("name", families())
def test_broken_configurations(name):
    """Whatever stands in a field: a model, or one message."""
    rng = random.Random(name)
    for _ in range(60):
        config = msgspec.json.decode(msgspec.json.encode(config_of(name)))
        for _ in range(rng.randint(1, 3)):
            field = rng.choice([*config, "unknown_field"])
            if rng.random() < 0.3:
                config.pop(field, None)
            elif isinstance(config.get(field), dict) and config[field] and rng.random() < 0.7:
                config[field][rng.choice([*config[field], "more"])] = rng.choice(VALUES)
            else:
                config[field] = rng.choice(VALUES)
        message = ""
        try:
            assert isinstance(spec_of(config), ModelSpec)
        except RefusedError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 2000
