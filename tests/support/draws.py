"""Random models, batches and plans: the same ones for the same number.

What may meet is drawn apart, so that all of it meets: capacity groups, windows, the order of
tokens over `cp`, chunks in time.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import msgspec

from pympa.plan.mesh import Plan
from pympa.spec import LayerSpec, ModelSpec, Rope
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
    )


def _layer(pick: random.Random, norm: str) -> LayerSpec:
    heads, head_dim = pick.randint(1, 9), pick.choice([4, 6, 10, 16])
    rotated = pick.choice([None, 2, head_dim])
    experts = pick.choice([0, 0, 2, 5])
    limited = experts and pick.random() < 0.6
    return LayerSpec(
        heads=heads,
        kv_heads=pick.randint(1, heads),
        head_dim=head_dim,
        v_head_dim=pick.choice([None, 5, 8]),
        mlp_hidden=pick.choice([9, 24, 40]),
        rope=None if rotated is None else Rope(theta=100.0, rotated_dim=rotated),
        qk_norm="head" if pick.random() < 0.2 else "none",
        attention_bias=pick.random() < 0.3,
        mlp_bias=pick.random() < 0.3,
        window=pick.choice([None, None, None, 1, 7, 20]),
        softcap=pick.choice([None, None, 15.0]),
        gated=pick.random() < 0.5,
        activation=pick.choice(["gelu", "gelu_tanh", "silu"]),
        norm=norm,
        experts=experts,
        top_k=pick.randint(1, experts) if experts else 0,
        renormalize=pick.random() < 0.5,
        capacity_factor=pick.choice([0.5, 1.0, 1.25]) if limited else None,
        capacity_group=pick.choice([1, 3, 5, 8, 32]) if limited else None,
        shared_experts=pick.randint(0, 1) if experts else 0,
        router_skew=pick.choice([0.0, 3.0]) if experts else 0.0,
    )
