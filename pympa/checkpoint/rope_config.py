"""Rotary embeddings in config.json, as transformers 4 (`rope_scaling`) and 5 (`rope_parameters`).

The formulas of both are those of `transformers.modeling_rope_utils`; defaults are its defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pympa.checkpoint.config import Config
from pympa.errors import RefusedError
from pympa.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")} | {
    "su": "longrope"
}


def rope_of(
    config: Config,
    head_dim: int,
    *,
    kind: str = FULL,
    theta: float = 10000.0,
    theta_field: str = "rope_theta",
    share_field: str = "partial_rotary_factor",
    share: float | None = None,
    kinds: Mapping[str, str] = _KINDS,
    **how: Any,
) -> Rope:
    """Return the rotary embedding of the layers of one kind.

    Args:
        config: the configuration.
        head_dim: the dimension of a head, or of its rotated part.
        kind: the kind of these layers, if the configuration has one embedding for each kind.
        theta: theta if the configuration does not have it.
        theta_field: the name of the field with theta outside of a table.
        share_field: the name of the field with the share of a head that rotates, outside of one.
        share: that share if the configuration does not have it; None means that whole heads rotate.
        kinds: the kinds of scaling by the words of the configuration.
        how: more fields of `Rope`.

    Raises:
        RefusedError: a field is not known or not allowed.
    """
    config.skip("rope_theta", theta_field)
    table = rope_table(config)
    if table is not None and (table.has(FULL) or table.has(SLIDING)):
        table = table.table(kind)
    fields = table or Config({}, config.where)
    found_theta = fields.optional_number("rope_theta")
    if found_theta is None:
        found_theta = config.optional_number(theta_field)
    rotated = int(head_dim * _share(config, fields, share_field, share))
    word = "rope_type" if fields.has("rope_type") else "type"
    scaling = None
    if fields.has(word):
        fields.skip("rope_type", "type")
        scaling = _scaling(config, fields, fields.choice(word, kinds))
    fields.finish()
    return Rope(
        theta=theta if found_theta is None else found_theta,
        rotated_dim=None if rotated == head_dim else rotated,
        scaling=scaling,
        **how,
    )


def rope_table(config: Config) -> Config | None:
    """Return the table of a configuration's rotary embeddings, of either transformers; or None.

    Raises:
        RefusedError: there are two that differ.
    """
    new, old = (config.table(name) for name in ("rope_parameters", "rope_scaling"))
    both = config.has("rope_parameters") and config.has("rope_scaling")
    if both and not config.same("rope_parameters", "rope_scaling"):
        raise RefusedError(
            f"{config.where}: rope_parameters, rope_scaling: expected one of them, or both alike; "
            "got two that differ"
        )
    return new or old


def _share(config: Config, fields: Config, name: str, share: float | None) -> float:
    """Return the share of a head that rotates."""
    outer, found = config.optional_number(name), fields.optional_number("partial_rotary_factor")
    if found is None:
        found = outer
    if share is None and found not in (None, 1.0):
        raise config.wrong(name, "1, because this family rotates whole heads", found)
    return found or share or 1.0


def _scaling(config: Config, fields: Config, kind: str) -> Scaling | None:
    """Return the scaling of an embedding from the fields of its table."""
    longest = config.optional_size("max_position_embeddings")
    if kind == "default":
        fields.skip(*("factor", "original_max_position_embeddings", "attention_factor"))
        return None
    if kind == "linear":
        return LinearScaling(factor=fields.number("factor"))
    if kind == "dynamic":
        fields.skip("original_max_position_embeddings")
        return DynamicScaling(
            factor=fields.number("factor"), trained_context=config.size("max_position_embeddings")
        )
    trained = _trained_context(config, fields)
    if kind == "llama3":
        return Llama3Scaling(
            factor=fields.number("factor"),
            trained_context=trained,
            low_frequency_factor=fields.number("low_freq_factor"),
            high_frequency_factor=fields.number("high_freq_factor"),
        )
    factor = fields.optional_number("factor") or (longest or trained) / trained
    attention_factor = fields.optional_number("attention_factor")
    if kind == "longrope":
        return LongRopeScaling(
            short=fields.numbers("short_factor"),
            long=fields.numbers("long_factor"),
            trained_context=trained,
            factor=factor,
            attention_factor=attention_factor,
        )
    scale, scale_of_all = (fields.optional_number(n) for n in ("mscale", "mscale_all_dim"))
    if attention_factor is None and scale and scale_of_all:
        attention_factor = yarn_scale(factor, scale) / yarn_scale(factor, scale_of_all)
    return YarnScaling(
        factor=factor,
        trained_context=trained,
        beta_fast=fields.optional_number("beta_fast") or 32.0,
        beta_slow=fields.optional_number("beta_slow") or 1.0,
        truncate=fields.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _trained_context(config: Config, fields: Config) -> int:
    """Return the tokens of a text in training: of the file, of the table, or of the family."""
    name = "original_max_position_embeddings"
    outer, inner = config.optional_size(name), fields.optional_size(name)
    if inner is None or config.has(name):
        inner = outer
    return inner or config.size("max_position_embeddings")


def yarn_scale(factor: float, weight: float) -> float:
    """Return 0.1 · weight · ln(factor) + 1, or 1 for factors up to 1 (DeepSeek's "mscale")."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0
