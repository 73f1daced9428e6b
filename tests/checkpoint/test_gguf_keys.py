"""Each key of a GGUF file changes the model or is refused; so does its absence."""

import re

import msgspec
import numpy as np
import pytest

from pympa.checkpoint.families import describe
from pympa.checkpoint.gguf_file import open_gguf
from pympa.checkpoint.gguf_model import describe_gguf
from pympa.errors import RefusedError
from support.gguf_models import ARCHITECTURES, keys_of, write_gguf
from support.model_files import load_family

NAMES = ["llama_llama3", "llama_linear", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2",
         "gemma3", "phi3", "olmo2", "gpt_oss"]  # fmt: skip
WITHOUT_EFFECT = {"context_length"}  # as max_position_embeddings of a config.json
DIVISORS = np.ones(8, np.float32)


def spec_of(name, path, changes=None, tensors=None):
    file = write_gguf(name, path / "m.gguf", changes=changes, tensors=tensors)
    return describe_gguf(open_gguf(file)).spec


def refusal(name, path, changes, tensors=None):
    """Return the message of a refusal, after the name of the file."""
    with pytest.raises(RefusedError) as caught:
        spec_of(name, path, changes, tensors)
    start = f"{path / 'm.gguf'}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def outcome(name, path, changes):
    """Return the model, or the message of the refusal."""
    try:
        return spec_of(name, path, changes)
    except RefusedError as error:
        return str(error)


def other(value):
    if isinstance(value, str):
        return "none" if value != "none" else "yarn"
    return value + 1 if isinstance(value, int) else value * 1.5


# Keys that the converter may write, each with a value that the small models do not have.
MORE = {
    "attention.key_length": 8,
    "attention.scale": 0.5,
    "attention.sliding_window": 7,
    "attention.sliding_window_pattern": 4,
    "attn_logit_softcapping": 20.0,
    "expert_count": 3,
    "expert_feed_forward_length": 32,
    "expert_gating_func": 2,
    "expert_group_count": 2,
    "expert_group_used_count": 2,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 32,
    "expert_used_count": 1,
    "expert_weights_scale": 2.5,
    "final_logit_softcapping": 20.0,
    "leading_dense_block_count": 1,
    "logit_scale": 2.0,
    "nextn_predict_layers": 1,
    "rope.dimension_count": 8,
    "rope.freq_base_swa": 5000.0,
    "rope.scale_linear": 2.0,
    "rope.scaling.alpha": 2.0,
    "rope.scaling.attn_factor": 1.5,
    "rope.scaling.factor": 3.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.yarn_attn_factor": 1.5,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "tensor_data_layout": "another",
    "vocab_size": 98,
}


@pytest.mark.parametrize("name", NAMES)
def test_each_key_changes_the_model_or_is_refused(name, tmp_path):
    base = {"attention.sliding_window_pattern": 3} if name == "gemma3" else {}
    keys, want = keys_of(name), spec_of(name, tmp_path, base)
    changed = {key: other(value) for key, value in keys.items() if key not in WITHOUT_EFFECT}
    more = {key: value for key, value in MORE.items() if keys.get(key) != value}
    for key, value in [*changed.items(), *more.items(), ("rope.scaling.foo", 1.0)]:
        found = outcome(name, tmp_path, base | {key: value})
        assert found != want, key
        assert not isinstance(found, str) or f"{ARCHITECTURES[name]}." in found, found


@pytest.mark.parametrize("name", NAMES)
def test_each_key_has_its_type(name, tmp_path):
    for key, value in keys_of(name).items():
        wrong = 1.5 if isinstance(value, str) else "x"
        assert refusal(name, tmp_path, {key: wrong}).startswith(f"{ARCHITECTURES[name]}.{key}: ")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_weights_of_experts_that_do_not_add_up(name, tmp_path):
    changes = {"expert_weights_norm": False, "expert_gating_func": 1}
    if name == "mixtral":
        assert "llama.expert_weights_norm: expected true" in refusal(name, tmp_path, changes)
        return
    layers = spec_of(name, tmp_path, changes).layers
    assert {layer.renormalize for layer in layers if layer.experts} == {False}
    same = changes | {"expert_weights_norm": True}
    assert spec_of(name, tmp_path, same) == spec_of(name, tmp_path)


REFUSED = [
    ("gemma2", {"block_count": None}, "gemma2.block_count: .* missing"),
    ("gemma3", {"embedding_length": None}, "gemma3.embedding_length: .* missing"),
    ("gemma2", {"attention.head_count": None}, "gemma2.attention.head_count: .* missing"),
    ("gemma2", {"block_count": 46, "attention.head_count": 0}, "gemma2.attention.head_count: "),
    ("gemma2", {"attention.sliding_window": 0}, "gemma2.attention.sliding_window: "),
    ("gemma3", {"attention.sliding_window": None, "attention.sliding_window_pattern": 6},
     "gemma3.attention.sliding_window: "),
    ("gemma3", {"attention.sliding_window_pattern": [True, False]},
     "gemma3.attention.sliding_window_pattern: .* 3 layers"),
    ("gemma3", {"attention.sliding_window_pattern": "x"},
     "gemma3.attention.sliding_window_pattern: "),
    ("gpt_oss", {"attention.sliding_window": None}, "gpt-oss.attention.sliding_window: .*missing"),
    ("gpt_oss", {"block_count": "x"}, "gpt-oss.block_count: "),
    ("llama_linear", {"block_count": 4_000_000_000}, "llama.block_count: expected at most 10,000"),
    ("qwen3_moe", {"block_count": 4_000_000_000}, "qwen3moe.block_count: expected at most 10,000"),
    ("qwen3", {"attention.layer_norm_rms_epsilon": None},
     "qwen3.attention.layer_norm_rms_epsilon: .* missing"),
    ("qwen3", {"attention.head_count": 65}, "qwen3.attention.head_count: expected at most "),
    ("qwen3", {"attention.head_count": 1}, "qwen3.attention.head_count_kv: expected at most"),
    ("mixtral", {"expert_used_count": 24}, "llama.expert_used_count: expected 1..5"),
    ("qwen3", {"attention.head_count": [4, 4, 2]},
     r"qwen3.attention.head_count: expected one number, .*\[4, 4, 2\]"),
    ("qwen3", {"feed_forward_length": [96, 96]},
     "qwen3.feed_forward_length: expected one number, or 3 equal ones"),
    ("qwen2", {"attention.sliding_window": 7}, "qwen2.attention.sliding_window: expected only"),
    ("qwen2", {"rope.scaling.type": "dynamic"}, "qwen2.rope.scaling.type: expected one of none, "),
    ("phi3", {"rope.scaling.original_context_length": "x"},
     "phi3.rope.scaling.original_context_length: "),
    ("phi3", {"rope.scaling.attn_factor": "x"}, "phi3.rope.scaling.attn_factor: "),
    ("phi3", {"rope.scaling.type": "yarn"}, "phi3.rope.scaling.type: expected one of none, long"),
    ("llama_llama3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
     "llama.rope.scaling.type: expected one of none, llama3"),
    ("llama_llama3", {"rope.scaling.type": "yarn"}, "llama.rope.scaling.type: "),
    ("llama_llama3", {"rope.scaling.factor": 8.0}, "llama.rope.scaling.factor: expected 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refusals_name_the_key(name, changes, message, tmp_path):
    assert re.match(message, refusal(name, tmp_path, changes))


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("phi3", {"rope_factors_long.weight": None}),
        ("phi3", {"rope_factors_short.weight": None}),
        ("llama_llama3", {"rope_factors_long.weight": DIVISORS}),
        ("qwen3", {"rope_freqs.weight": DIVISORS}),
    ],
)
def test_tensors_with_divisors(name, tensors, tmp_path):
    assert refusal(name, tmp_path, {}, tensors).startswith("tensor rope_f")


@pytest.mark.parametrize("name", ["llama_llama3", "phi3"])
def test_types_beside_tensors_with_divisors(name, tmp_path):
    want = spec_of(name, tmp_path)
    for kind in ("none", "longrope" if name == "phi3" else "llama3"):
        assert spec_of(name, tmp_path, {"rope.scaling.type": kind}) == want


def test_keys_that_llama_cpp_does_without(tmp_path):
    for name, key, value in [
        ("qwen3_moe", "attention.head_count_kv", 4),
        ("llama_linear", "attention.key_length", 16),
        ("llama_linear", "rope.scaling.type", "linear"),
        ("gpt_oss", "attention.sliding_window_pattern", 2),
        ("gemma2", "attention.sliding_window", 4096),
        ("gemma3", "rope.freq_base_swa", 10000.0),
        ("qwen3", "rope.freq_base", 10000.0),
        ("qwen3", "feed_forward_length", [96] * 3),
    ]:
        kept = {"attention.value_length": None} if key == "attention.key_length" else {}
        without = {key: 96 if isinstance(value, list) else None}
        missing = spec_of(name, tmp_path, without | kept)
        assert spec_of(name, tmp_path, {key: value} | kept) == missing, key


def spec_of_config(name, **changes):
    """Return what a config.json says, with the epsilon as a GGUF file rounds it."""
    config = load_family(name)["config"] | changes
    config["rms_norm_eps"] = float(np.float32(config["rms_norm_eps"]))
    spec = describe(config, "config.json").spec
    layers = tuple(msgspec.structs.replace(layer, norm_offset=False) for layer in spec.layers)
    return msgspec.structs.replace(spec, layers=layers)


def test_yarn_as_in_config_json(tmp_path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128, "rope_type": "yarn",
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25}  # fmt: skip
    want = spec_of_config("qwen3", rope_parameters={"rope_theta": 10000.0} | yarn)
    keys = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 128,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 2.0,
        "yarn_attn_factor": 1.25,
        "yarn_ext_factor": 1.0,
        "finetuned": True,
    }
    changes = {f"rope.scaling.{key}": value for key, value in keys.items()}
    assert spec_of("qwen3", tmp_path, changes) == want


@pytest.mark.parametrize("window", [9, None])
@pytest.mark.parametrize("pattern", [2, 3, 1, None, [True, False, True]])
def test_windows_of_gemma_3_as_in_config_json(pattern, window, tmp_path):
    slides = pattern if isinstance(pattern, list) else [
        (layer + 1) % (pattern or 6) != 0 for layer in range(3)
    ]  # fmt: skip
    if window is None:
        slides, pattern = [False] * 3, None
    ropes = load_family("gemma3")["config"]["rope_parameters"]
    ropes["sliding_attention"]["rope_theta"] = 5000.0
    want = spec_of_config(
        "gemma3",
        query_pre_attn_scalar=24,
        rope_parameters=ropes,
        layer_types=[("sliding" if slide else "full") + "_attention" for slide in slides],
    )
    changes = {"rope.freq_base_swa": 5000.0, "attention.sliding_window": window}
    changes["attention.sliding_window_pattern"] = pattern
    assert spec_of("gemma3", tmp_path, changes) == want
