"""Random models, batches and plans: the same ones for the same number.

What may meet is drawn apart, so that all of it meets: capacity groups, windows, the order of
tokens over `cp`, chunks in time.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import msgspec

from pympa.plan.mesh import Plan
from pympa.spec import (
    DynamicScaling,
    Latent,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    Rope,
    Routing,
    Scaling,
    YarnScaling,
)
from support import worlds


class Draw(NamedTuple):
    """A model, the lengths of its sequences, and a plan that can run it."""

    spec: ModelSpec
    lengths: tuple[int, ...]
    plan: Plan


def draw(number: int) -> Draw:
    pick = random.Random(number)
    while True:
        spec = _model(pick)
        lengths = tuple(pick.randint(1, 40) for _ in range(pick.choice([1, 1, 2, 3, 4])))
        if pick.random() < 0.08:  # more keys than a tile, more rows than travel to experts together
            lengths = (pick.randint(500, 700), *lengths[:1])
        if spec.depends_on_context:  # so that a token does not depend on the rest of the batch
            spec = msgspec.structs.replace(spec, context=max(lengths) + pick.randint(0, 9))
        found = worlds.plans(pick.choice([1, 2, 3, 4, 5, 6, 8]), spec, len(lengths))
        if not found:
            continue
        of_tokens = [plan for plan in found if plan.cp > 1]
        plan = pick.choice(of_tokens if of_tokens and pick.random() < 0.5 else found)
        most = max(sum(lengths) if spec.causal else len(lengths) // plan.dp, 1)
        micro_batches = min(pick.choice([1, 1, 2, 3, 5, 7, 16]), most)
        return Draw(spec, lengths, msgspec.structs.replace(plan, micro_batches=micro_batches))


def _model(pick: random.Random) -> ModelSpec:
    norm = pick.choice(["rms", "layer"])
    layers = tuple(_layer(pick, norm) for _ in range(pick.randint(1, 3)))
    return ModelSpec(
        d_model=pick.choice([8, 17, 32]),
        vocabulary=pick.choice([97, 256]),
        layers=layers,
        causal=pick.random() < 0.8,
        tied_head=pick.random() < 0.3,
        embedding_scale=pick.choice([1.0, 1.0, 5.7]),
        logit_softcap=pick.choice([None, None, 4.0]),
    )


def _layer(pick: random.Random, norm: str) -> LayerSpec:
    heads, head_dim = pick.randint(1, 9), pick.choice([4, 6, 10, 16])
    parallel, activation = pick.random() < 0.2, pick.choice(["gelu", "gelu_tanh", "silu"])
    if pick.random() < 0.15:
        activation = "swiglu_clamped"
    return LayerSpec(
        heads=heads,
        head_dim=head_dim,
        v_head_dim=pick.choice([None, 5, 8]),
        mlp_hidden=pick.choice([9, 24, 40]),
        out_bias=pick.choice([None, None, True, False]),
        attention_scale=pick.choice([None, None, 0.3]),
        sinks=pick.random() < 0.2,
        mlp_bias=pick.random() < 0.3,
        window=pick.choice([None, None, None, None, None, 7, 7, 300]),
        softcap=pick.choice([None, None, 15.0]),
        gated=activation == "swiglu_clamped" or pick.random() < 0.5,
        activation=activation,
        swiglu_limit=0.8 if activation == "swiglu_clamped" else 7.0,
        norm=norm,
        norm_offset=pick.random() < 0.3,
        norm_order="pre" if parallel else pick.choice(["pre", "pre", "post", "sandwich"]),
        parallel=parallel,
        **_heads(pick, heads, head_dim),
        **_experts(pick),
    )


def _heads(pick: random.Random, heads: int, head_dim: int) -> dict[str, Any]:
    """Draw latents, or what does not go with them."""
    turning: dict[str, Any] = {"interleaved": pick.random() < 0.3}
    if pick.random() < 0.2:
        latent = Latent(kv_rank=pick.choice([3, 12]), q_rank=pick.choice([None, 10]))
        return {
            "latent": latent,
            "rope": Rope(
                theta=100.0, rotated_dim=2, trailing=True, scaling=_scaling(pick, 2), **turning
            ),
        }
    rotated = pick.choice([None, 2, head_dim])
    turning |= {"trailing": pick.random() < 0.3, "scaling": _scaling(pick, rotated or 2)}
    rope = Rope(theta=100.0, rotated_dim=rotated, **turning)
    return {
        "kv_heads": pick.randint(1, heads),
        "rope": None if rotated is None else rope,
        "qk_norm": pick.choice(["none", "none", "none", "head", "all"]),
        "attention_bias": pick.random() < 0.3,
    }


def _scaling(pick: random.Random, rotated: int) -> Scaling | None:
    pairs = rotated // 2
    return pick.choice([
        None, None, None, None,
        LinearScaling(factor=2.0),
        Llama3Scaling(factor=8.0, trained_context=16),
        YarnScaling(factor=4.0, trained_context=16),
        LongRopeScaling(
            short=tuple(1.0 + n / 8 for n in range(pairs)),
            long=tuple(2.0 + n for n in range(pairs)),
            trained_context=16,
            factor=4.0,
        ),
        DynamicScaling(factor=2.0, trained_context=16) if rotated > 2 else None,
    ])  # fmt: skip


def _experts(pick: random.Random) -> dict[str, Any]:
    experts = pick.choice([0, 0, 2, 6])
    if not experts:
        return {}
    shared, limited = pick.randint(0, 1), pick.random() < 0.6
    grouped = experts == 6 and pick.random() < 0.4
    routing = Routing(
        score=pick.choice(["softmax", "softmax", "sigmoid"]),
        bias=pick.random() < 0.3,
        choice_bias=pick.random() < 0.3,
        groups=3 if grouped else 1,
        top_groups=2 if grouped else None,
        group_score=pick.choice(["largest", "top2"]) if grouped else "largest",
        scale=pick.choice([1.0, 1.0, 2.5]),
    )
    return {
        "experts": experts,
        "top_k": pick.randint(1, 4 if grouped else experts),
        "renormalize": pick.random() < 0.5,
        "routing": routing,
        "capacity_factor": pick.choice([0.5, 1.0, 1.25]) if limited else None,
        "capacity_group": pick.choice([1, 3, 5, 8, 32]) if limited else None,
        "shared_experts": shared,
        "shared_hidden": pick.choice([None, 11]) if shared else None,
        "shared_gate": bool(shared) and pick.random() < 0.4,
        "router_skew": pick.choice([0.0, 3.0]),
    }
