"""Write the models in families/: configurations as transformers saves them, and its logits.

    python tests/checkpoint/make_families.py [NAME ...]

needs torch and transformers (the extra `peers`). Weights follow from names and are not stored.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from safetensors import safe_open

from support.model_files import FOLDER, PROMPTS, VOCABULARY, prompt, rows_of, write_model
from support.peer_models import exact_logits

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in range(6)],
        "long_factor": [1.5 + i for i in range(6)]}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8,
          "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 8,
          "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2,
          "first_k_dense_replace": 1}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_linear": {"model_type": "llama", "tie_word_embeddings": True,
                     "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama_dynamic": {"model_type": "llama", "max_position_embeddings": 128,
                      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4,
                                          "factor": 2.0}},
    "llama_llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_yarn": {"model_type": "llama", "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": 11, "head_dim": 24},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 13,
              "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen2_moe": {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 56,
                  "decoder_sparse_step": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 24, "mlp_only_layers": [1],
                  "norm_topk_prob": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 24, "sliding_window": 9,
               "query_pre_attn_scalar": 20},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 24, "sliding_window": 9,
               "query_pre_attn_scalar": 20, "sliding_window_pattern": 3,
               "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6,
                                                      "factor": 8.0},
                                   "sliding_attention": {"rope_type": "default",
                                                         "rope_theta": 1e4}}},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.75, "pad_token_id": 0,
             "original_max_position_embeddings": 64, "rope_parameters": LONG},
    "olmo2": {"model_type": "olmo2"},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
    "gpt_neox_in_turn": {"model_type": "gpt_neox", "num_key_value_heads": None,
                         "use_parallel_residual": False, "attention_bias": False},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 3,
                "head_dim": 24, "sliding_window": 9},
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "topk_method": "group_limited_greedy",
                    "routed_scaling_factor": 1.7},
    "deepseek_v2_lite": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None,
                         "topk_method": "greedy", "n_shared_experts": 1},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "num_nextn_predict_layers": 0},
    "deepseek_v3_yarn": {"model_type": "deepseek_v3", **LATENT, "rope_interleave": False,
                         "num_nextn_predict_layers": 0,
                         "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
}  # fmt: skip
"""The fields in which the models differ from `SMALL`; None leaves one out."""


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    FOLDER.mkdir(exist_ok=True)
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.json").write_text(_family(MODELS[name], Path(folder)))
        print(name)


def _family(fields: dict[str, Any], folder: Path) -> str:
    given = {key: value for key, value in (SMALL | fields).items() if value is not None}
    if "q_lora_rank" in fields:
        given["q_lora_rank"] = fields["q_lora_rank"]
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    saved = json.loads((folder / "config.json").read_text())
    write_model(folder, saved, tensors)
    logits = {}
    for tokens in PROMPTS:
        rows = exact_logits(folder, prompt(tokens))[rows_of(tokens)]
        logits[str(tokens)] = [[float(f"{value:.10g}") for value in row] for row in rows]
    parts = {"config": saved, "tensors": tensors, "logits": logits}
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
