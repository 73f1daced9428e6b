"""What the configurations of all families have in common: heads, windows, MLPs, runs of layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from pympa.checkpoint.config import Config
from pympa.checkpoint.rope_config import FULL, SLIDING
from pympa.spec import MOST_LAYERS, Activation, LayerSpec, ModelSpec

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

Fields = dict[str, Any]
"""Fields of a `LayerSpec`."""


def heads_of(config: Config) -> Fields:
    """Return the numbers of heads and their dimension."""
    heads = config.size("num_attention_heads")
    head_dim = config.optional_size("head_dim") or config.size("hidden_size") // heads
    if not head_dim:
        raise config.wrong("num_attention_heads", "at most hidden_size", heads)
    return {
        "heads": heads,
        "kv_heads": config.optional_size("num_key_value_heads"),
        "head_dim": head_dim,
    }


def gated_mlp(config: Config, hidden: str = "intermediate_size") -> Fields:
    """Return the fields of a gated MLP with RMSNorms."""
    return {
        "mlp_hidden": config.size(hidden),
        "gated": True,
        "activation": config.choice("hidden_act", ACTIVATIONS),
        "norm_eps": config.number("rms_norm_eps"),
    }


def layer_count(config: Config) -> int:
    """Return the number of layers.

    Raises:
        RefusedError: there are more than any model of ours may have.
    """
    count = config.size("num_hidden_layers")
    if count > MOST_LAYERS:
        raise config.wrong("num_hidden_layers", f"at most {MOST_LAYERS:,}", count)
    return count


def kinds_of_layers(config: Config, default: Callable[[int], bool]) -> tuple[str, ...]:
    """Return the kind of each layer, full or sliding attention.

    Args:
        config: the configuration.
        default: a function that returns whether a layer slides, if there is no `layer_types`.
    """
    count = layer_count(config)
    found = config.words("layer_types", count, (FULL, SLIDING))
    return found or tuple(SLIDING if default(index) else FULL for index in range(count))


def windows(config: Config, kinds: Sequence[str]) -> list[int | None]:
    """Return the window of each layer."""
    if SLIDING not in kinds:
        config.skip("sliding_window")
        return [None] * len(kinds)
    window = config.size("sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]


def runs(layers: Sequence[Fields]) -> tuple[LayerSpec, ...]:
    """Return layers, with equal ones after each other as one entry that repeats."""
    specs = [LayerSpec(**fields) for fields in layers]
    counted = ((spec, len(list(group))) for spec, group in itertools.groupby(specs))
    return tuple(LayerSpec(**_fields(spec) | {"repeat": count}) for spec, count in counted)


def _fields(spec: LayerSpec) -> Fields:
    return {name: getattr(spec, name) for name in spec.__struct_fields__}


def model(config: Config, layers: Sequence[Fields], **others: Any) -> ModelSpec:
    """Return a model of some layers.

    Args:
        config: the configuration.
        layers: the fields of each layer.
        others: more fields of the model.
    """
    return ModelSpec(
        d_model=config.size("hidden_size"),
        vocabulary=config.size("vocab_size"),
        layers=runs(layers),
        tied_head=config.flag("tie_word_embeddings"),
        **others,
    )
