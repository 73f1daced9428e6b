"""An element depends on its name and global index only; input never repeats verbatim."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pympa.bench.experiment.input import input_ids
from pympa.checkpoint.array_tensors import ArrayTensors
from pympa.model.random_weights import (
    SCORE_STD,
    PhiloxSource,
    Uniform,
    philox_bits,
    random_weights,
    uniform_bound,
)
from pympa.model.shards import Shards
from pympa.model.weights import WeightSpec, fill_weight, full_weight, model_weights
from pympa.plan.mesh import Plan
from pympa.session.loading import find_request
from pympa.session.resources import build_resources
from pympa.spec import DTYPES
from pympa.transport.endpoint import NullEndpoint
from support import worlds

SPEC = WeightSpec("w", (37, 29))
SOURCE = PhiloxSource(lambda _: Uniform(uniform_bound(0.5)))


@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_any_shard_is_a_part_of_the_whole(data, dtype):
    whole = np.empty(SPEC.shape, DTYPES[dtype])
    fill_weight(SOURCE, SPEC, whole)
    r0, c0 = data.draw(st.integers(0, 36)), data.draw(st.integers(0, 28))
    r1, c1 = data.draw(st.integers(r0, 37)), data.draw(st.integers(c0, 29))
    part = np.empty((r1 - r0, c1 - c0), DTYPES[dtype])
    fill_weight(SOURCE, SPEC, part, [(r0, r1)], [(c0, c1)])
    assert part.tobytes() == np.ascontiguousarray(whole[r0:r1, c0:c1]).tobytes()
    cut = data.draw(st.integers(c0, c1))
    gaps = np.empty((2, cut - c0 + 29 - c1), DTYPES[dtype])
    fill_weight(SOURCE, SPEC, gaps, [(3, 4), (1, 2)], [(c0, cut), (c1, 29)])
    picked = np.concatenate([whole[[3, 1], c0:cut], whole[[3, 1], c1:]], axis=1)
    assert gaps.tobytes() == picked.tobytes()


@pytest.mark.parametrize("width", [700_000, 7_000])
def test_columns_of_wide_rows(width):
    """Few columns are made row by row, many of them with all that lies between."""
    spec = WeightSpec("w", (3, width))
    whole = full_weight(SOURCE, spec, DTYPES["float32"])
    for cols in ([(5, 60), (100, 103)], [(0, 3), (width - 4_000, width - 1)]):
        part = np.empty((2, sum(last - first for first, last in cols)), np.float32)
        fill_weight(SOURCE, spec, part, [(2, 3), (0, 1)], cols)
        picked = [whole[[2, 0], first:last] for first, last in cols]
        np.testing.assert_array_equal(part, np.concatenate(picked, axis=1))


@given(st.integers(0, 1000), st.integers(0, 100))
def test_stream_starts_anywhere(start, count):
    whole = philox_bits("name", 0, start + count)
    np.testing.assert_array_equal(philox_bits("name", start, count), whole[start:])


def philox_4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Salmon et al. 2011, ten rounds, in plain integers."""
    mask = 2**64 - 1
    x, (k0, k1) = [counter & mask, counter >> 64, 0, 0], key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(p1 >> 64) ^ x[1] ^ k0, p1 & mask, (p0 >> 64) ^ x[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return x


def test_stream_is_philox():
    """Whatever NumPy, machine or version of this package: the model is the same."""
    digest = hashlib.sha256(b"0/embedding").digest()
    key = tuple(int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    words = [w for counter in (1, 2, 3) for w in philox_4x64(counter, key)]
    expected = [half for w in words for half in (w & 0xFFFFFFFF, w >> 32)]
    assert philox_bits("0/embedding", 0, 24).tolist() == expected


def test_names_and_seeds_differ():
    streams = [philox_bits(n, 0, 64).tobytes() for n in ("0/a", "0/b", "1/a")]
    assert len(set(streams)) == 3


def test_distribution():
    uniform = Uniform(uniform_bound(0.02), 1.0)
    spec = WeightSpec("big", (300, 500))
    values = full_weight(PhiloxSource(lambda _: uniform), spec, DTYPES["float32"])
    assert abs(values.mean() - 1.0) < 2e-4
    assert abs(values.std() / 0.02 - 1) < 0.01
    assert abs(values - 1.0).max() <= uniform.bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (worlds.SANDWICH, Plan(tp=2)),
        (worlds.LATENT, Plan(cp=2)),
        (worlds.DENSE, Plan(dim=2)),
        (worlds.EXPERTS, Plan(dp=2, ep=2)),
    ],
)
def test_pieces_of_rows_make_the_same_weights(spec, plan, monkeypatch):
    def all_loaded():
        return [loaded(spec, plan, rank, random_weights(spec)) for rank in range(plan.world)]

    whole = all_loaded()
    monkeypatch.setattr("pympa.kernels.LOADED_BYTES", 1)
    assert all_loaded() == whole


def loaded(spec, plan, rank, source):
    """Return the bytes of a rank's weights by name."""
    resources = build_resources(NullEndpoint(rank, plan.world), plan, isa=worlds.ISA)
    shards = Shards(spec, resources, DTYPES["bfloat16"], source)
    found = shards.vectors | {name: m.data for name, m in shards.matrices.items()}
    return {name: array.tobytes() for name, array in found.items()}


def unaligned(array):
    """Return an equal array that begins at an odd address."""
    memory = np.empty(array.nbytes + 1, np.uint8)
    out = memory[1 - memory.ctypes.data % 2 :][: array.nbytes].view(array.dtype)
    out = out.reshape(array.shape)
    out[...] = array
    return out


@pytest.mark.parametrize(
    "arranged",
    [
        np.asfortranarray,
        unaligned,
        lambda array: array[::-1].copy()[::-1],
        lambda array: np.stack([array, array], axis=-1)[..., 1],
        lambda array: np.repeat(array, 2, axis=0)[::2],
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_own_arrays_may_lie_in_any_order(arranged, dtype):
    spec, source = worlds.DENSE, random_weights(worlds.DENSE)
    arrays = {}
    for name, weight in model_weights(spec).items():
        arrays[name] = np.empty(weight.shape, DTYPES[dtype])
        fill_weight(source, weight, arrays[name])
    odd = {name: arranged(array) for name, array in arrays.items()}
    for array in odd.values():
        array.flags.writeable = False
    for plan in (Plan(tp=2), Plan(dim=2)):
        want, found = (find_request(spec, weights, ()).source for weights in (arrays, odd))
        assert loaded(spec, plan, 1, found) == loaded(spec, plan, 1, want)


def test_an_array_is_moved_to_the_host_once():
    moved = []

    def on_host(array, what):
        moved.append(what)
        return array

    tensors = ArrayTensors({"a": np.ones((40, 3)), "b": np.ones((20, 3))}, on_host)
    for name in ("a", "b"):
        for row in range(20):
            tensors.read(name, [(row, row + 1)])
    assert moved == ["weights['a']", "weights['b']"]


def test_scores_are_not_flat():
    """Attention must matter: q·k/sqrt(head_dim) of normed rows deviates by about SCORE_STD."""
    specs = model_weights(worlds.DENSE)
    source, f32 = random_weights(worlds.DENSE), DTYPES["float32"]
    q, k = (full_weight(source, specs[f"layers.0.attention.{n}"], f32) for n in "qk")
    rows = np.random.default_rng(0).standard_normal((200, worlds.DENSE.d_model))
    rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True))
    layer = worlds.DENSE.blocks[0]
    left, right = ((rows @ w.T).reshape(200, -1, layer.head_dim) for w in (q, k))
    right = right[:, [layer.kv_head_of(head) for head in range(layer.heads)]]
    scores = np.einsum("ihd,jhd->hij", left, right) / np.sqrt(left.shape[2])
    assert 0.7 * SCORE_STD < scores.std() < 1.4 * SCORE_STD


def test_input_repeats_are_permuted():
    text = bytes(range(100))
    ids = input_ids(text, 350).reshape(-1, 50)[:6].reshape(3, 100)
    assert ids[0].tolist() == list(text)
    assert all(sorted(row) == list(text) for row in ids.tolist())
    assert len({row.tobytes() for row in ids}) == 3
    with pytest.raises(ValueError, match="empty file"):
        input_ids(b"", 5)
