"""Layers on stages: the best partition there is, under a limit, and the bits of one rank."""

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.footprint.rehearsal import dry_resources
from pympa.model.random_weights import random_weights
from pympa.model.shards import Shards
from pympa.plan.accounting import layer_flops
from pympa.plan.layout import Layout, Range, split
from pympa.plan.mesh import Mesh, Plan, PlanError
from pympa.plan.partition import rank_parameters, stage_bounds
from pympa.runtime.arena import ALIGNMENT_BYTES
from pympa.spec import DTYPES, LayerSpec, ModelSpec
from pympa.transport.endpoint import NullEndpoint
from support import worlds

DENSE_LAYER = LayerSpec(heads=4, head_dim=8, mlp_hidden=64)
EXPERT_LAYER = LayerSpec(heads=4, head_dim=8, mlp_hidden=40, experts=6, top_k=2)
# Odd numbers of layers, cheap and dear ones: a partition by number would be another.
MIXED = ModelSpec(
    d_model=32,
    vocabulary=256,
    layers=(
        msgspec.structs.replace(EXPERT_LAYER, top_k=6),
        msgspec.structs.replace(DENSE_LAYER, repeat=3, window=5),
        EXPERT_LAYER,
    ),
)
EMBEDDING_HEAVY = ModelSpec(
    d_model=16,
    vocabulary=5000,
    layers=(LayerSpec(repeat=5, heads=2, head_dim=4, mlp_hidden=16),),
)

layers = st.builds(
    LayerSpec,
    heads=st.integers(1, 4),
    head_dim=st.just(4),
    mlp_hidden=st.integers(1, 60),
    window=st.sampled_from([None, 3]),
    experts=st.just(4),
    top_k=st.integers(1, 4),
) | st.builds(
    LayerSpec, heads=st.integers(1, 4), head_dim=st.just(4), mlp_hidden=st.sampled_from([8, 50])
)
models = st.builds(
    ModelSpec,
    d_model=st.just(8),
    vocabulary=st.sampled_from([1, 40, 400]),
    layers=st.lists(layers, min_size=1, max_size=7).map(tuple),
)


def partitions(count, stages):
    """Every way to cut, the longest first stages first."""
    for cuts in itertools.combinations(range(1, count), stages - 1):
        yield tuple(itertools.pairwise((0, *cuts, count)))


def held_bytes(spec, bounds, itemsize):
    """Bytes of weight matrices by stage, embedding and head included."""
    held = [
        sum(rank_parameters(spec, layer, Plan()) for layer in spec.blocks[a:b]) for a, b in bounds
    ]
    held[0] += spec.vocabulary * spec.d_model
    held[-1] += spec.vocabulary * spec.d_model
    return [itemsize * count for count in held]


@given(models, st.integers(1, 7), st.sampled_from([1, 16, 4096]), st.floats(0.3, 1.2))
def test_none_is_better(spec, stages, context, allowed):
    """Among all partitions within the limit: least slowest stage, then even, then long first."""
    stages = min(stages, len(spec.blocks))
    limit = int(allowed * max(held_bytes(spec, [(0, len(spec.blocks))], 2)))
    candidates = [
        bounds
        for bounds in partitions(len(spec.blocks), stages)
        if max(held_bytes(spec, bounds, 2)) <= limit
    ]
    plan = Plan(pp=stages)
    if not candidates:
        least = min(
            max(held_bytes(spec, bounds, 2)) for bounds in partitions(len(spec.blocks), stages)
        )
        with pytest.raises(PlanError, match=f"at least {least:,} bytes.*got {limit:,};"):
            stage_bounds(spec, plan, context, itemsize=2, limit_bytes=limit)
        return

    sequence = Layout((Range(0, 0, context),))

    def rank(bounds):
        flops = [
            sum(layer_flops(spec, layer, sequence) for layer in spec.blocks[a:b]) for a, b in bounds
        ]
        return max(flops), sum(f**2 for f in flops), [a - b for a, b in bounds]

    found = stage_bounds(spec, plan, context, itemsize=2, limit_bytes=limit)
    assert found == min(candidates, key=rank)


@pytest.mark.parametrize("count", range(1, 12))
def test_layers_alike_are_cut_as_by_number(count):
    spec = msgspec.structs.replace(
        worlds.DENSE, layers=(msgspec.structs.replace(DENSE_LAYER, repeat=count),)
    )
    for stages in range(1, count + 1):
        assert list(stage_bounds(spec, Plan(pp=stages), itemsize=4)) == split(count, stages)


def test_more_stages_than_layers():
    with pytest.raises(PlanError, match="pp=5: expected at most"):
        stage_bounds(worlds.DENSE, Plan(pp=5), itemsize=4)


def test_flops_count_context_and_limits_count_tables():
    """Dear layers move the cut; a limit on bytes moves layers away from the embedding."""
    by_flops = stage_bounds(MIXED, Plan(pp=2), itemsize=2)
    assert by_flops == ((0, 2), (2, 5))
    assert [b - a for a, b in by_flops] != [b - a for a, b in split(5, 2)]
    block = 2 * rank_parameters(EMBEDDING_HEAVY, EMBEDDING_HEAVY.blocks[0], Plan())
    limit = 2 * 5000 * 16 + block
    assert stage_bounds(EMBEDDING_HEAVY, Plan(pp=3), itemsize=2) == ((0, 2), (2, 4), (4, 5))
    limited = stage_bounds(EMBEDDING_HEAVY, Plan(pp=3), itemsize=2, limit_bytes=limit)
    assert limited == ((0, 1), (1, 4), (4, 5))


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (worlds.DENSE, Plan(tp=3)),
        (worlds.ODD, Plan(tp=4)),
        (worlds.ODD, Plan(tp=2, dim=3)),
        (worlds.MULTI_QUERY, Plan(tp=2, pp=2)),
        (worlds.EXPERTS, Plan(dp=2, ep=2)),
        (worlds.EXPERTS, Plan(tp=4, ep=2, etp=2)),
        (worlds.ODD_EXPERTS, Plan(tp=2, dp=2, ep=2)),
        (worlds.ODD_EXPERTS, Plan(tp=2, dp=2, ep=4)),
        (worlds.SANDWICH, Plan(tp=3)),
        (worlds.POST_AND_PARALLEL, Plan(tp=4)),
        (worlds.LATENT, Plan(tp=2, dp=2, ep=2)),
        (worlds.LATENT, Plan(tp=2, dim=2)),
        (worlds.SINKS, Plan(tp=2, dp=2, ep=2)),
    ],
    ids=lambda value: str(value) if isinstance(value, Plan) else "",
)
def test_a_rank_holds_what_is_counted(spec, plan):
    """The matrices that the fullest rank of a stage packs, layer by layer."""
    most: dict[int, int] = {}
    for rank in range(plan.world):
        built = dry_resources(NullEndpoint(rank, plan.world), plan, isa=worlds.ISA)
        shards = Shards(spec, built, DTYPES["float32"], random_weights(spec))
        for index in range(*shards.layers):
            held = sum(
                math.prod(matrix.data.shape[:-1]) * matrix.n * matrix.k
                for name, matrix in shards.matrices.items()
                if name.startswith(f"layers.{index}.")
            )
            most[index] = max(held, most.get(index, 0))
    for index, layer in enumerate(spec.blocks):
        assert most[index] <= rank_parameters(spec, layer, plan) <= 1.03 * most[index]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [1, 3, 31])
@pytest.mark.parametrize("pp", [2, 3, 5])
@pytest.mark.parametrize("spec", [MIXED, EMBEDDING_HEAVY], ids=["mixed", "embedding-heavy"])
def test_uneven_stages_equal_one_rank(spec, pp, micro_batches, dtype):
    plan = Plan(pp=pp, micro_batches=micro_batches)
    outputs, _ = worlds.run_local(spec, plan, dtype=dtype)
    assert worlds.digest(outputs) == worlds.digest(worlds.one_rank(spec, worlds.LENGTHS, dtype))


def test_given_stages_are_kept():
    """Whatever the cut, each layer lies on one stage, and the memory follows it."""
    bounds = ((0, 1), (1, 4))
    plan = Plan(pp=2)
    for rank, layers_here in enumerate(bounds):
        built = dry_resources(NullEndpoint(rank, 2), plan, isa=worlds.ISA)
        shards = Shards(
            worlds.DENSE, built, DTYPES["float32"], random_weights(worlds.DENSE), bounds
        )
        assert shards.layers == layers_here
        assert Mesh(plan, rank).coordinate("pp") == rank
        assert built.arena.used_bytes % ALIGNMENT_BYTES == 0
