"""Closed forms against counting by hand."""

import msgspec
import numpy as np

from pympa.bench.experiment.description import load_experiment
from pympa.model.weights import model_weights
from pympa.plan.accounting import (
    active_parameters,
    linear_parameters,
    parameters,
    performed_flops,
    roofline_seconds,
    step_flops,
)
from pympa.plan.comm_volume import comm_volume
from pympa.plan.mesh import Plan
from pympa.spec import LayerSpec, ModelSpec
from support import worlds


def test_parameters_are_the_weights():
    for spec in (
        worlds.DENSE, worlds.ODD, worlds.EXPERTS, worlds.ODD_EXPERTS, worlds.SANDWICH,
        worlds.POST_AND_PARALLEL, worlds.LATENT, worlds.SINKS,
    ):  # fmt: skip
        matrices = [w for w in model_weights(spec).values() if len(w.shape) == 2]
        assert parameters(spec) == sum(int(np.prod(w.shape)) for w in matrices)


def test_flops_of_a_step():
    spec = worlds.DENSE
    per_token = 2 * linear_parameters(spec, spec.blocks[0])
    pairs = sum(n * (n + 1) // 2 for n in (5, 1))
    attention = 2 * pairs * 8 * (16 + 16)
    head = 2 * 2 * 256 * 40
    assert step_flops(spec, (5, 1)) == 4 * (6 * per_token + attention) + head
    layer = msgspec.structs.replace(worlds.WINDOWED.layers[0], window=None)
    unwindowed = msgspec.structs.replace(worlds.WINDOWED, layers=(layer,))
    assert step_flops(worlds.WINDOWED, (64,)) < step_flops(unwindowed, (64,))


def test_seed_000_by_hand():
    """Seed 000 at paper size: 4 layers, 4096 wide, MLP 32768, 128 × 100,000 tokens, bfloat16."""
    size = load_experiment("ring-dense").sizes["paper"]
    assert linear_parameters(size.model, size.model.blocks[0]) == 4 * 4096**2 + 2 * 4096 * 32768
    tokens, stream = 128 * 100_000, 128 * 100_000 * 4096 * 2
    ring = comm_volume(size.model, Plan(cp=16), size.lengths, 2).sent
    assert ring == {"cp": 4 * 15 * tokens * 32 * (128 + 128) * 2}
    baseline = comm_volume(size.model, Plan(tp=8, pp=2), size.lengths, 2).sent
    assert baseline == {"tp": 9 * 2 * 7 * stream, "pp": 8 * stream}


def test_roofline_takes_the_slower_of_computing_and_reading():
    spec = worlds.DENSE
    common = {"spec": spec, "lengths": (10,), "itemsize": 4, "cores": 2}
    computing = roofline_seconds(**common, flops_per_second=1e9, bytes_per_second=1e30)
    reading = roofline_seconds(**common, flops_per_second=1e30, bytes_per_second=1e9)
    np.testing.assert_allclose(computing, step_flops(spec, (10,)) / 2e9)
    np.testing.assert_allclose(reading, parameters(spec) * 4 / 2e9)


def test_seed_004_by_hand():
    """Seed 004 at paper size: an expert is two matrices of 4096 x 16384; a token meets two."""
    model = load_experiment("experts").sizes["paper"].model
    expert, attention, router = 2 * 4096 * 16384, 4 * 4096**2, 16 * 4096
    assert linear_parameters(model, model.blocks[0]) == attention + router + 16 * expert
    assert active_parameters(model, model.blocks[0]) == attention + router + 2 * expert


def test_exchange_by_hand():
    """design: 2(m-1)/m of S for q and o, 2(m-1) of S for K and V, S = rows x heads x slice."""
    layer = LayerSpec(heads=4, kv_heads=2, head_dim=16, mlp_hidden=64)
    spec = ModelSpec(d_model=32, vocabulary=256, layers=(layer,))
    rows, slices, itemsize = 64, 4, 2
    of_rank = rows * layer.heads * layer.head_dim // slices * itemsize
    queries = 2 * (slices - 1) * of_rank // slices
    keys = 2 * (slices - 1) * of_rank * layer.n_kv_heads // layer.heads
    sent = comm_volume(spec, Plan(dim=slices), [rows], itemsize).sent
    assert sent["dim"] == slices * (queries + keys)


def test_reduce_sends_the_square_of_the_rows():
    layer = LayerSpec(heads=4, head_dim=16, mlp_hidden=64)
    spec = ModelSpec(d_model=32, vocabulary=256, causal=False, layers=(layer,))
    plan = Plan(dim=2, dim_algo="reduce")
    assert comm_volume(spec, plan, [600], 2).sent["dim"] == 2 * 600 * 600 * 4 * 4


def test_performed_flops():
    spec, lengths = worlds.DENSE, (5, 1)
    layer, useful = spec.blocks[0], step_flops(worlds.DENSE, (5, 1))
    assert performed_flops(spec, Plan(cp=4, dim=2, pp=2), lengths) == useful
    kv = 2 * 6 * spec.d_model * 2 * layer.head_dim * (4 - 3)  # 3 kv heads on 4 ranks: one twice
    assert performed_flops(spec, Plan(tp=2), lengths) == useful + 4 * kv
    scores = 2 * (15 + 1) * layer.heads * layer.head_dim
    gather = Plan(dim=3, dim_algo="gather")
    assert performed_flops(spec, gather, lengths) == useful + 4 * 2 * scores
