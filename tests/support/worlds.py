"""Small models, and ways to run them on any endpoint: what in-process and MPI tests share."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from pympa.bench.experiment.input import input_ids
from pympa.kernels.cpu import supported_isas
from pympa.kernels.cuda import Accelerator
from pympa.model.model import Model
from pympa.model.random_weights import random_weights
from pympa.model.resources import RankResources
from pympa.plan.enumerate import degree_choices, expert_choices, option_choices
from pympa.plan.mesh import Plan
from pympa.plan.rules import broken_rule
from pympa.session.resources import build_resources
from pympa.spec import (
    DTYPES,
    Latent,
    LayerSpec,
    LinearScaling,
    ModelSpec,
    Rope,
    Routing,
    YarnScaling,
)
from pympa.transport import Transport
from pympa.transport.endpoint import WORLD, Endpoint, NullEndpoint
from pympa.transport.local import LocalWorld
from pympa.verify.collect import Outputs, collect
from pympa.verify.compare import compare
from pympa.verify.oracle import oracle, routing_of
from pympa.verify.reference import kept
from pympa.verify.verdict import Verdict

ISA = supported_isas()[0]
TEXT = b"Each rank keeps its queries; keys and values travel round the ring until all were seen."

DENSE = ModelSpec(
    d_model=40,
    vocabulary=256,
    layers=(LayerSpec(repeat=4, heads=8, kv_heads=3, head_dim=16, mlp_hidden=72),),
)
# Everything at once: GQA, other value width, q/k-norm, biases, softcap, gated, layer norm, tied.
ODD = ModelSpec(
    d_model=24,
    vocabulary=131,
    tied_head=True,
    layers=(
        LayerSpec(
            heads=7, kv_heads=3, head_dim=12, v_head_dim=10, mlp_hidden=33, qk_norm="head",
            attention_bias=True, mlp_bias=True, softcap=20.0, gated=True, activation="silu",
            norm="layer", rope=Rope(theta=500.0, rotated_dim=8, scaling=LinearScaling(factor=2.0)),
        ),
        LayerSpec(heads=10, kv_heads=2, head_dim=8, mlp_hidden=50, activation="gelu", rope=None),
    ),
)  # fmt: skip
WINDOWED = ModelSpec(
    d_model=32,
    vocabulary=256,
    layers=(LayerSpec(repeat=2, heads=4, head_dim=8, mlp_hidden=64, window=9),),
)
# Layers with a window and without one, as many models have them in turn.
SLIDING = ModelSpec(
    d_model=32,
    vocabulary=256,
    layers=(
        LayerSpec(heads=6, kv_heads=3, head_dim=8, mlp_hidden=48, window=9),
        LayerSpec(heads=6, kv_heads=2, head_dim=8, v_head_dim=6, mlp_hidden=40),
        LayerSpec(heads=4, head_dim=10, v_head_dim=7, mlp_hidden=40, window=3, softcap=15.0),
    ),
)
# As Gemma has it: sandwich norms of 1 + weight, a scale and caps, two embeddings, q/k-norm.
SANDWICH = ModelSpec(
    d_model=36,
    vocabulary=131,
    tied_head=True,
    embedding_scale=6.0,
    logit_softcap=9.0,
    layers=tuple(
        LayerSpec(
            heads=6, kv_heads=3, head_dim=8, mlp_hidden=48, gated=True, window=window, rope=rope,
            qk_norm="head", norm_offset=True, norm_order="sandwich", attention_scale=0.2,
            softcap=12.0,
        )
        for window, rope in ((9, Rope(theta=100.0)), (None, Rope(scaling=LinearScaling(factor=8))))
    ),
)  # fmt: skip
# As OLMo 2 and GPT-NeoX have them: norms after branches and over all heads; branches in parallel.
POST_AND_PARALLEL = ModelSpec(
    d_model=36,
    vocabulary=131,
    layers=(
        LayerSpec(heads=7, kv_heads=3, head_dim=8, mlp_hidden=48, gated=True, activation="silu",
                  qk_norm="all", norm_order="post"),
        LayerSpec(heads=6, head_dim=12, mlp_hidden=40, activation="gelu", parallel=True,
                  attention_bias=True, mlp_bias=True, rope=Rope(rotated_dim=4), norm="layer"),
        LayerSpec(heads=5, kv_heads=2, head_dim=8, mlp_hidden=40, qk_norm="all", norm_offset=True,
                  attention_bias=True, out_bias=False, experts=4, top_k=2, norm_order="post"),
    ),
)  # fmt: skip
# As DeepSeek has it: latents, trailing neighbours rotate, choices in groups, first layer dense.
LATENT = ModelSpec(
    d_model=32,
    vocabulary=131,
    layers=tuple(
        LayerSpec(
            heads=5, head_dim=14, v_head_dim=6, gated=True, activation="silu",
            latent=Latent(kv_rank=20, q_rank=q_rank),
            rope=Rope(rotated_dim=6, trailing=True, interleaved=interleaved,
                      scaling=YarnScaling(factor=4.0, trained_context=16)),
            attention_scale=0.4, **experts,
        )
        for q_rank, interleaved, experts in (
            (None, False, {"mlp_hidden": 40}),
            (24, True, {"mlp_hidden": 16, "experts": 8, "top_k": 3, "shared_experts": 1,
                        "routing": Routing(score="sigmoid", choice_bias=True, groups=4,
                                           top_groups=2, group_score="top2", scale=2.5)}),
            (24, True, {"mlp_hidden": 16, "experts": 6, "top_k": 2, "renormalize": False,
                        "shared_experts": 1, "shared_hidden": 20, "shared_gate": True,
                        "routing": Routing(groups=3, top_groups=2, scale=1.5)}),
        )
    ),
)  # fmt: skip
# As gpt-oss has it: sinks, windows in turn, clamped SwiGLU with biases, a bias of the router.
SINKS = ModelSpec(
    d_model=32,
    vocabulary=131,
    layers=tuple(
        LayerSpec(
            heads=6, kv_heads=2, head_dim=8, mlp_hidden=40, window=window, sinks=True,
            attention_bias=True, mlp_bias=True, gated=True, activation="swiglu_clamped",
            swiglu_limit=1.5, experts=experts, top_k=2 if experts else 0,
            routing=Routing(bias=True) if experts else Routing(),
        )
        for window, experts in ((9, 5), (None, 0), (5, 4))
    ),
)  # fmt: skip
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
EXPERTS = ModelSpec(
    d_model=64,
    vocabulary=256,
    layers=(
        LayerSpec(repeat=2, heads=8, kv_heads=3, head_dim=16, mlp_hidden=72, experts=6, top_k=2),
    ),
)
# Dense and sparse layers, shared experts, a skewed gate, capacity whose groups cross ranks.
ODD_EXPERTS = ModelSpec(
    d_model=24,
    vocabulary=256,
    layers=(
        LayerSpec(
            heads=4, kv_heads=2, head_dim=12, mlp_hidden=33, experts=5, top_k=3, gated=True,
            renormalize=False, shared_experts=2, mlp_bias=True, router_skew=2.0, activation="silu",
            capacity_factor=1.1, capacity_group=8,
        ),
        LayerSpec(heads=4, head_dim=8, mlp_hidden=50),
        LayerSpec(heads=5, head_dim=8, mlp_hidden=20, experts=9, top_k=1, norm="layer"),
    ),
)  # fmt: skip
NARROW_EXPERTS = ModelSpec(
    d_model=8,
    vocabulary=64,
    layers=(LayerSpec(heads=21, head_dim=2, mlp_hidden=20, experts=2, top_k=1),),
)
LENGTHS = (37, 1, 20, 9)


def batch(lengths: Sequence[int], vocabulary: int = 256) -> list[np.ndarray[Any, Any]]:
    ids = input_ids(TEXT, sum(lengths)) % vocabulary
    return np.split(ids.astype(np.int32), np.cumsum(lengths)[:-1])


def run_plan(
    endpoint: Endpoint, spec: ModelSpec, plan: Plan, lengths: Sequence[int], dtype: str,
    alter: Callable[[RankResources], None] = lambda rank: None,
    accelerator: Accelerator | None = None,
) -> tuple[Outputs | None, RankResources]:  # fmt: skip
    """Run one step; rank 0 gets all outputs, every rank what it sent."""
    rank = build_resources(endpoint, plan, isa=ISA, accelerator=accelerator)
    world = Transport(endpoint, WORLD, range(endpoint.size), rank.arena, rank.trace, rank.traffic)
    alter(rank)
    model = Model(spec, rank, DTYPES[dtype])
    outputs = collect(model, model.prepare(batch(lengths, spec.vocabulary)), world)
    return outputs, rank


def run_local(
    spec: ModelSpec, plan: Plan, lengths: Sequence[int] = LENGTHS, dtype: str = "float32",
    seed: int | None = None, alter: Callable[[RankResources], None] = lambda rank: None,
    shares_memory: bool = False,
) -> tuple[Outputs, list[RankResources]]:  # fmt: skip
    """Run one step on rank threads."""
    world = LocalWorld(plan.world, seed=seed, shares_memory=shares_memory)
    results = world.run(lambda e: run_plan(e, spec, plan, lengths, dtype, alter))
    outputs = results[0][0]
    assert outputs is not None
    return outputs, [rank for _, rank in results]


@cache
def one_rank(spec: ModelSpec, lengths: tuple[int, ...], dtype: str) -> Outputs:
    outputs, _ = run_plan(NullEndpoint(0, 1), spec, Plan(), lengths, dtype)
    assert outputs is not None
    return outputs


_truths: dict[tuple[Any, ...], Any] = {}


def truth(spec: ModelSpec, run: Outputs, lengths: tuple[int, ...], dtype: str) -> Any:
    """Return the oracle that takes a run's choices of experts."""
    routing = routing_of(run)
    key = spec, lengths, dtype, b"".join(routing[name].tobytes() for name in sorted(routing))
    if key not in _truths:
        ids = batch(lengths, spec.vocabulary)
        _truths[key] = oracle(spec, DTYPES[dtype], random_weights(spec), ids, routing)
    return _truths[key]


def emulated(spec: ModelSpec, run: Outputs, lengths: tuple[int, ...], dtype: str) -> Any:
    """Return a function: a rounding -> the oracle with it, and with a run's choices of experts."""
    ids = batch(lengths, spec.vocabulary)
    return partial(oracle, spec, DTYPES[dtype], random_weights(spec), ids, routing_of(run))


def judge(
    spec: ModelSpec, outputs: Outputs, lengths: tuple[int, ...] = LENGTHS, dtype: str = "float32"
) -> Verdict:
    """Compare a distributed run with the oracle and with one rank."""
    one, kind = one_rank(spec, lengths, dtype), DTYPES[dtype]

    def against(run: Outputs, alone: Verdict | None = None) -> Verdict:
        exact = truth(spec, run, lengths, dtype)
        return compare(spec, kind, run, exact, alone, emulated(spec, run, lengths, dtype))

    alone = against(one)
    assert alone.passed, [str(error) for error in alone.failed]
    return against(outputs, alone)


def kept_routing(
    spec: ModelSpec, outputs: Outputs, lengths: Sequence[int] = LENGTHS
) -> dict[int, np.ndarray[Any, Any]]:
    """Return the experts of each token by layer, -1 where the capacity rule drops them."""
    found = {}
    for index, layer in enumerate(spec.blocks):
        if layer.experts:
            chosen = outputs[f"layers.{index}.routing"]
            parts = np.split(chosen, np.cumsum(lengths)[:-1])
            keep = np.concatenate([kept(layer, part) for part in parts])
            found[index] = np.where(keep, chosen, -1)
    return found


def plans(world: int, spec: ModelSpec, sequences: int = len(LENGTHS)) -> list[Plan]:
    """Return every plan of a number of ranks that can run.

    All degrees, with experts all ways of placing them; and without experts all options, with
    experts each in its turn.
    """
    found = []
    for plan in degree_choices(world):
        if not spec.has_experts:
            found += option_choices(plan)
            continue
        for placed in expert_choices(plan):
            options = list(option_choices(placed))
            found.append(options[len(found) % len(options)])
    return [plan for plan in found if broken_rule(plan, spec, sequences) is None]


def some(found: Sequence[Plan], count: int) -> list[Plan]:
    """Return a fixed sample of plans, in order; all of them if there are no more than that."""
    picked = random.Random(len(found)).sample(range(len(found)), min(count, len(found)))
    return [found[index] for index in sorted(picked)]


def record_routing(rank: RankResources) -> list[np.ndarray[Any, Any]]:
    """Return a list that gets the rows of each expert from every call of `sort_rows`."""
    found: list[np.ndarray[Any, Any]] = []
    sort_rows = rank.kernels.sort_rows

    def recording(*arguments: Any) -> np.ndarray[Any, Any]:
        found.append(sort_rows(*arguments))
        return found[-1]

    rank.kernels.sort_rows = recording  # type: ignore[method-assign]
    return found


def digest(outputs: Outputs) -> str:
    """Hash every bit of a run."""
    parts = [name.encode() + array.tobytes() for name, array in sorted(outputs.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def assert_same_bits(run: Outputs, other: Outputs) -> None:
    """Compare two runs byte by byte."""
    assert run.keys() == other.keys()
    for name, array in run.items():
        np.testing.assert_array_equal(
            array.view(np.uint8), other[name].view(np.uint8), err_msg=name
        )


def by_axis(counts: Iterable[Mapping[tuple[str, int], int]]) -> dict[str, int]:
    """Add up the bytes of ranks by (axis, peer)."""
    total: Counter[str] = Counter()
    for of_rank in counts:
        for (axis, _), count in of_rank.items():
            total[axis] += count
    return dict(total)


def sent_by_axis(ranks: Sequence[RankResources]) -> dict[str, int]:
    return by_axis(rank.traffic.sent for rank in ranks)
