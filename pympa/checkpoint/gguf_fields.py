"""The metadata of a GGUF file, each key read once with its type, as fields of a config.json.

A missing key stands for what llama.cpp takes without it, which may differ from what the family's
config.json means without the field. So fields that have a default are always written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pympa.checkpoint.config import Config
from pympa.checkpoint.gguf_file import GgufFile
from pympa.checkpoint.rope_config import FULL, SLIDING
from pympa.errors import RefusedError
from pympa.spec import MOST_LAYERS
from pympa.text.escape import shown

Fields = dict[str, Any]
"""The fields of a config.json."""

LAYERS, WIDTH, HEADS = "block_count", "embedding_length", "attention.head_count"
_PATTERN = "attention.sliding_window_pattern"
_KEYS_OF_SPEC = {
    "d_model": WIDTH,
    "heads": HEADS,
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "mlp_hidden": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "window": "attention.sliding_window",
    "softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "experts": "expert_count",
    "experts, shared_experts": "expert_count",
    "top_k": "expert_used_count",
    "rope.theta": "rope.freq_base",
    "rope.scaling.factor": "rope.scaling.factor",
    "rope.scaling.trained_context": "rope.scaling.original_context_length",
    "rope.scaling.beta_fast": "rope.scaling.yarn_beta_fast",
    "rope.scaling.beta_slow": "rope.scaling.yarn_beta_slow",
}
"""The keys that fields of a model come from."""


class Keys(Config):
    """The keys of a GGUF file that belong to its architecture.

    A key may have one number for each layer, if all of them are the same.

    Args:
        file: the GGUF file with the keys.
        architecture: the name of the architecture, before the first point of the keys.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        prefix = f"{architecture}."
        self._found: dict[str, Any] = {
            key.removeprefix(prefix): value
            for key, value in file.metadata.items()
            if key.startswith(prefix)
        }
        super().__init__(self._found, file.where, path=prefix)
        self.layers = self.size(LAYERS)
        if self.layers > MOST_LAYERS:
            raise self.wrong(LAYERS, f"at most {MOST_LAYERS:,}", self.layers)
        for key, value in self._found.items():
            if isinstance(value, np.ndarray):
                by_layer = key == _PATTERN
                self._found[key] = value.tolist() if by_layer else self._of_layers(key, value)

    def _of_layers(self, key: str, value: Any) -> Any:
        """Return the number that an array has for all layers."""
        if value.size == self.layers and (value == value[0]).all():
            return value[0].item()
        raise self.wrong(
            shown(key), f"one number, or {self.layers} equal ones for the layers", value.tolist()
        )

    def equals(self, name: str, number: int, why: str) -> None:
        """Refuse a whole number that is there and is another one."""
        if self.has(name) and self.size(name) != number:
            raise self.wrong(name, f"{number}, {why}", self.size(name))

    def number_of(self, name: str, *allowed: float, why: str) -> None:
        """Refuse a number that is there and not among some."""
        found = self.optional_number(name)
        if found is not None and found not in allowed:
            raise self.wrong(name, f"{allowed[0]:g}, {why}", found)

    def renamed(self, error: Exception) -> RefusedError:
        """Return the refusal of a model, with the key in place of the model's field."""
        message = str(error).removeprefix(f"{self.where}: ")
        field, _, rest = message.partition(": ")
        of_experts = field == "mlp_hidden" and self.has("expert_feed_forward_length")
        if field in _KEYS_OF_SPEC and not of_experts:
            message = f"{self._path}{_KEYS_OF_SPEC[field]}: {rest}"
        return RefusedError(f"{self.where}: {message}")

    def sliding(self, default: int) -> list[bool]:
        """Return for each layer whether it has a window.

        Args:
            default: the number of layers of a group, the last of which has none.
        """
        self.skip(_PATTERN)
        pattern = self._found.get(_PATTERN, default)
        if type(pattern) is int and pattern >= 0:
            return [not pattern or layer % pattern < pattern - 1 for layer in range(self.layers)]
        if type(pattern) is list and len(pattern) == self.layers and set(pattern) <= {False, True}:
            return [bool(slides) for slides in pattern]
        expected = f"a whole number, or true or false for each of {self.layers} layers"
        raise self.wrong(_PATTERN, expected, pattern)

    def finish(self) -> list[str]:
        """Refuse keys that nothing has read and that are not off.

        Raises:
            RefusedError: there is a key that may change the mathematics.
        """
        unknown = [name for name, value in self._found.items() if name not in self._read and value]
        if unknown:
            names = ", ".join(shown(self._path + name) for name in unknown[:8])
            raise RefusedError(
                f"{self.where}: {names}: expected only keys that this version knows for this "
                "architecture, because others may change the mathematics"
            )
        return []


def common_fields(keys: Keys, file: GgufFile) -> Fields:
    """Return the fields that all families have, but for the scaling of RoPE."""
    heads, width = keys.size(HEADS), keys.size(WIDTH)
    if heads > width:
        raise keys.wrong(HEADS, f"at most {WIDTH}={width}", heads)
    head_dim = _size(keys, "attention.key_length", width // heads)
    keys.equals("attention.value_length", head_dim, "the length of a head's keys")
    embedding = file.stored.get("token_embd.weight")
    if embedding is None:
        raise RefusedError(f"{file.where}: expected a tensor token_embd.weight; got none")
    keys.equals("vocab_size", embedding.shape[0], "the rows of token_embd.weight")
    base = "rope.freq_base"
    return {
        "num_hidden_layers": keys.layers,
        "hidden_size": width,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(keys, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.positive(base) if keys.has(base) else 10000.0,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.stored,
    }


def _size(keys: Keys, name: str, missing: int) -> int:
    return keys.size(name) if keys.has(name) else missing


def add_window(fields: Fields, keys: Keys, *, period: int, missing: int | None = None) -> None:
    """Add the window, and which layers have it.

    Args:
        fields: the fields of config.json found so far; more are added.
        keys: the keys of the architecture.
        period: the number of layers of a group, the last of which has no window.
        missing: the window of a file that does not say it; None means that it must.
    """
    name = "attention.sliding_window"
    given = keys.has(name) or missing is None
    fields["sliding_window"] = keys.size(name) if given else missing
    fields["layer_types"] = [SLIDING if slides else FULL for slides in keys.sliding(period)]


def add_experts(fields: Fields, keys: Keys, *, gating: int) -> None:
    """Add the numbers of experts; what the family cannot do is refused.

    Args:
        fields: the fields of config.json found so far; more are added.
        keys: the keys of the architecture.
        gating: the family's way to weigh experts, as llama.cpp numbers them.
    """
    fields["num_local_experts"] = keys.size("expert_count")
    fields["num_experts_per_tok"] = keys.size("expert_used_count")
    if keys.has("expert_gating_func") and keys.count("expert_gating_func"):  # 0 is the family's own
        keys.equals("expert_gating_func", gating, "the gating of this architecture")
    keys.number_of("expert_weights_scale", 1.0, 0.0, why="as experts of this architecture have")
    for name in ("expert_group_count", "expert_group_used_count"):
        keys.number_of(name, 1.0, 0.0, why="as experts of this architecture are in one group")
