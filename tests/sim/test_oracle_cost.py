"""What the check of a run is said to take, against what it takes."""

import tracemalloc

import msgspec
import numpy as np
import pytest

from pympa.bench.experiment.description import load_experiment, packaged_experiments
from pympa.bench.measure.truth import WHOLE_ORACLE_FLOPS
from pympa.model.random_weights import random_weights
from pympa.spec import DTYPES, LayerSpec, ModelSpec
from pympa.verify.compare import compare, compare_sampled
from pympa.verify.oracle import oracle, routing_of
from pympa.verify.oracle_cost import (
    compare_bytes,
    output_bytes,
    sampled_bytes,
    whole_bytes,
    whole_flops,
)
from support import worlds
from support.lanes import lanes

WIDE = ModelSpec(
    d_model=64,
    vocabulary=5000,
    layers=(
        LayerSpec(
            repeat=2, heads=8, head_dim=32, mlp_hidden=1000, window=100, activation="gelu",
            gated=True,
        ),
        LayerSpec(heads=2, head_dim=16, mlp_hidden=600, experts=32, top_k=2, shared_experts=1),
    ),
)  # fmt: skip
LONG = ModelSpec(
    d_model=32,
    vocabulary=256,
    layers=(LayerSpec(repeat=2, heads=1, head_dim=16, mlp_hidden=32, window=8),),
)
CASES = [
    (LONG, (100_000,)),
    (WIDE, (2000, 1, 500)),
    (WIDE, (3,) * 300),
    (worlds.DENSE, (1500,)),
    (worlds.ODD_EXPERTS, (1500, 700)),
    (msgspec.structs.replace(worlds.NOT_CAUSAL, d_model=512), (600, 700)),
    (worlds.SANDWICH, (1500, 700)),
    (worlds.POST_AND_PARALLEL, (1500, 700)),
    (worlds.LATENT, (1500, 700)),
    (worlds.SINKS, (1500, 700)),
]
IDS = ["long", "wide", "short", "dense", "experts", "whole", "sandwich", "post, parallel",
       "latents", "sinks"]  # fmt: skip
SMALL = 160 << 20  # blocks and chunks of small models are smaller than they are taken to be


def traced_peak(work):
    tracemalloc.start()
    try:
        result = work()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("spec", "lengths"), lanes(CASES, [0]), ids=IDS)
def test_bytes_of_the_whole_oracle(spec, lengths):
    batch, kind = worlds.batch(lengths, spec.vocabulary), DTYPES["float32"]
    run = worlds.one_rank(spec, lengths, "float32")
    truth, peak = traced_peak(
        lambda: oracle(spec, kind, random_weights(spec), batch, routing_of(run))
    )
    said = whole_bytes(spec, lengths, 4)
    assert peak <= said <= 1.6 * peak + SMALL
    for found, itemsize in ((truth, 8), (run, 4)):
        kept = sum(array.nbytes for name, array in found.items() if name != "logits")
        assert kept == output_bytes(spec, sum(lengths), itemsize)
    _, peak = traced_peak(lambda: compare(spec, kind, run, truth))
    assert peak <= compare_bytes(spec, sum(lengths), len(lengths)) + (1 << 20)


@pytest.mark.parametrize(("spec", "lengths"), lanes(CASES, [0]), ids=IDS)
def test_bytes_of_the_sampled_check(spec, lengths):
    run = worlds.one_rank(spec, lengths[:1], "float32")
    ids, rows = worlds.batch(lengths[:1], spec.vocabulary)[0], np.arange(0, lengths[0], 100)
    kind = DTYPES["float32"]
    _, peak = traced_peak(
        lambda: compare_sampled(spec, kind, run, random_weights(spec), ids, rows)
    )  # fmt: skip
    assert peak <= sampled_bytes(spec, lengths[0], 4) <= 1.6 * peak + SMALL


def test_what_runs_here_is_checked_whole():
    for name in packaged_experiments():
        size = load_experiment(name).sizes["local"]
        for times in (1, 4):
            assert whole_flops(size.grown(times).model, size.lengths) < WHOLE_ORACLE_FLOPS, name


def test_narrow_heads_are_priced_by_their_scores():
    """A million visible pairs of a head of 8 take as long as many of their 32 flops each."""
    size = load_experiment("ring-dense").sizes["paper"]
    assert whole_flops(size.model, size.lengths) > WHOLE_ORACLE_FLOPS
    layer = LayerSpec(heads=8, head_dim=4, mlp_hidden=8)
    spec = ModelSpec(d_model=8, vocabulary=256, layers=(layer,))
    windowed = msgspec.structs.replace(spec, layers=(msgspec.structs.replace(layer, window=4),))
    assert whole_flops(spec, [100_000]) > WHOLE_ORACLE_FLOPS
    assert whole_flops(windowed, [1_000_003]) < WHOLE_ORACLE_FLOPS
