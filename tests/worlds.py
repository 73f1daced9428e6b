"""Small models, and ways to run them on any endpoint: what in-process and MPI tests share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from pympa.collect import Outputs, collect
from pympa.kernels.cpu import supported_isas
from pympa.mesh import Plan, all_plans, broken_rule
from pympa.rank import Rank
from pympa.spec import DTYPES, LayerSpec, ModelSpec, Rope
from pympa.transport import WORLD, Endpoint, NullEndpoint, Transport
from pympa.transport.local import LocalWorld
from pympa.verify import Verdict, compare, oracle
from pympa.weights import PhiloxSource, input_ids

ISA = supported_isas()[0]
TEXT = b"Each rank keeps its queries; keys and values travel round the ring until all were seen."

DENSE = ModelSpec(
    d_model=40,
    vocabulary=256,
    layers=(LayerSpec(repeat=4, heads=8, head_dim=16, mlp_hidden=72),),
)
# Everything at once: GQA, other value width, q/k-norm, biases, softcap, gated, layer norm, tied.
ODD = ModelSpec(
    d_model=24,
    vocabulary=131,
    tied_head=True,
    layers=(
        LayerSpec(
            heads=7, kv_heads=3, head_dim=12, v_head_dim=10, mlp_hidden=33, qk_norm=True,
            attention_bias=True, mlp_bias=True, softcap=20.0, gated=True, activation="silu",
            norm="layer", rope=Rope(theta=500.0, rotated_dim=8, scaling_factor=2.0),
        ),
        LayerSpec(heads=10, kv_heads=2, head_dim=8, mlp_hidden=50, activation="gelu", rope=None),
    ),
)  # fmt: skip
WINDOWED = ModelSpec(
    d_model=32,
    vocabulary=256,
    layers=(LayerSpec(repeat=2, heads=4, head_dim=8, mlp_hidden=64, window=9),),
)
NOT_CAUSAL = ModelSpec(
    d_model=32,
    vocabulary=256,
    causal=False,
    layers=(LayerSpec(repeat=2, heads=4, head_dim=8, mlp_hidden=64),),
)
MULTI_QUERY = ModelSpec(
    d_model=32,
    vocabulary=256,
    layers=(LayerSpec(repeat=2, heads=6, kv_heads=1, head_dim=8, mlp_hidden=64),),
)
LENGTHS = (37, 1, 20, 9)


def batch(lengths: Sequence[int], vocabulary: int = 256) -> list[np.ndarray[Any, Any]]:
    ids = input_ids(TEXT, sum(lengths)) % vocabulary
    return np.split(ids.astype(np.int32), np.cumsum(lengths)[:-1])


def run_plan(
    endpoint: Endpoint, spec: ModelSpec, plan: Plan, lengths: Sequence[int], dtype: str,
    alter: Callable[[Rank], None] = lambda rank: None,
) -> tuple[Outputs | None, Rank]:  # fmt: skip
    """Run one step; rank 0 gets all outputs, every rank what it sent."""
    rank = Rank(endpoint, plan, isa=ISA)
    world = Transport(endpoint, WORLD, range(endpoint.size), rank.arena, rank.trace, rank.traffic)
    alter(rank)
    model = rank.model(spec, DTYPES[dtype])
    outputs = collect(model, model.prepare(batch(lengths, spec.vocabulary)), world)
    return outputs, rank


def run_local(
    spec: ModelSpec, plan: Plan, lengths: Sequence[int] = LENGTHS, dtype: str = "float32",
    seed: int | None = None, alter: Callable[[Rank], None] = lambda rank: None,
) -> tuple[Outputs, list[Rank]]:  # fmt: skip
    """Run one step on rank threads."""
    world = LocalWorld(plan.world, seed=seed)
    results = world.run(lambda e: run_plan(e, spec, plan, lengths, dtype, alter))
    outputs = results[0][0]
    assert outputs is not None
    return outputs, [rank for _, rank in results]


@cache
def one_rank(spec: ModelSpec, lengths: tuple[int, ...], dtype: str) -> Outputs:
    outputs, _ = run_plan(NullEndpoint(0, 1), spec, Plan(), lengths, dtype)
    assert outputs is not None
    return outputs


@cache
def truth(spec: ModelSpec, lengths: tuple[int, ...], dtype: str) -> Any:
    return oracle(spec, DTYPES[dtype], PhiloxSource(), batch(lengths, spec.vocabulary))


def judge(
    spec: ModelSpec, outputs: Outputs, lengths: tuple[int, ...] = LENGTHS, dtype: str = "float32"
) -> Verdict:
    """Compare a distributed run with the oracle and with one rank."""
    expected, kind = truth(spec, lengths, dtype), DTYPES[dtype]
    alone = compare(spec, kind, one_rank(spec, lengths, dtype), expected)
    assert alone.passed, alone.failed
    return compare(spec, kind, outputs, expected, alone)


def plans(world: int, spec: ModelSpec, sequences: int = len(LENGTHS)) -> list[Plan]:
    return [plan for plan in all_plans(world) if broken_rule(plan, spec, sequences) is None]


def digest(outputs: Outputs) -> str:
    """Hash every bit of a run."""
    parts = [name.encode() + array.tobytes() for name, array in sorted(outputs.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def sent_by_axis(ranks: Sequence[Rank]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for rank in ranks:
        for (axis, _), count in rank.traffic.sent.items():
            total[axis] += count
    return dict(total)
