"""Score tiles and fold tiles: together they are `attend_block`, bit for bit."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pympa import _core
from pympa.kernels import AttentionSpec, State
from pympa.kernels.cpu import CpuKernels
from pympa.kernels.virtual import VirtualKernels
from pympa.runtime.arena import Arena
from pympa.runtime.trace import Trace
from support.compare import assert_close, assert_same_bits, normal

ISA = _core.supported_isas()[0]
ON = _core.Execution(ISA)
F32 = np.float32
MAP = [1, 0, 1]  # uneven, and out of order


def tiles(start, keys):
    """Yield (first, last) global positions of the key tiles that `attend_block` meets."""
    first, end = start, start + keys
    while first < end:
        last = min(first // 512 * 512 + 512, end)
        yield first, last
        first = last


def by_tiles(kernels, q, k, v, state, *, q_start, k_start, threads=1, **options):
    for first, last in tiles(k_start, len(k)):
        keys = slice(first - k_start, last - k_start)
        scores = kernels.score_tile(q, k[keys], MAP, threads=threads)
        before = scores.tobytes()
        kernels.fold_tile(
            scores, v[keys], state, MAP, q_start=q_start, k_start=first, threads=threads, **options
        )
        assert scores.tobytes() == before


def in_one_call(kernels, q, k, v, state, *, q_start, k_start, **options):
    kernels.attend(
        q,
        k,
        v,
        state,
        q_ranges=[(0, q_start, len(q))],
        k_ranges=[(0, k_start, len(k))],
        kv_head_of_q=MAP,
        **options,
    )


def draw(rng, dtype, rows, keys, head_dim, v_head_dim):
    return (
        normal(rng, (rows, 3, head_dim), dtype, 1.5),
        normal(rng, (keys, 2, head_dim), dtype, 1.5),
        normal(rng, (keys, 2, v_head_dim), dtype),
    )


@pytest.fixture
def kernels(attention_kernels):
    return attention_kernels


def same_states(a, b):
    for one, other in zip(a, b, strict=True):
        assert_same_bits(one, other)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(0, 220),
    keys=st.integers(0, 1200),
    q_start=st.integers(0, 1300),
    k_start=st.integers(0, 900),
    head_dim=st.integers(1, 70),
    v_head_dim=st.integers(1, 70),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 40, 600]),
    softcap=st.sampled_from([0.0, 0.0, 4.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bits_of_attend_block(
    kernels, dtype, rows, keys, q_start, k_start, head_dim, v_head_dim,
    causal, window, softcap, threads, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    arrays = draw(rng, dtype, rows, keys, head_dim, v_head_dim)
    options = {
        "q_start": q_start, "k_start": k_start, "scale": head_dim**-0.5, "causal": causal,
        "window": window, "softcap": softcap,
    }  # fmt: skip
    whole, tiled = (kernels.new_state(rows, 3, v_head_dim) for _ in range(2))
    in_one_call(kernels, *arrays, whole, **options)
    by_tiles(kernels, *arrays, tiled, threads=threads, **options)
    same_states(tiled, whole)


def test_wide_heads_and_long_rows(kernels, dtype, rng):
    widest = 512 if kernels.isa == "cuda" else 576
    arrays = draw(rng, dtype, 40, 1100, widest, 512)
    options = {"q_start": 1060, "k_start": 0, "scale": 0.05}
    whole, tiled = (kernels.new_state(40, 3, 512) for _ in range(2))
    in_one_call(kernels, *arrays, whole, **options)
    by_tiles(kernels, *arrays, tiled, **options)
    same_states(tiled, whole)


@pytest.mark.parametrize("cut", [1, 95, 96, 97, 600])
def test_cuts_of_the_rows_change_nothing(kernels, dtype, rng, cut):
    q, k, v = draw(rng, dtype, 1300, 300, 20, 12)
    whole, cut_up = (kernels.new_state(1300, 3, 12) for _ in range(2))
    by_tiles(kernels, q, k, v, whole, q_start=100, k_start=200)
    for rows in (slice(cut), slice(cut, None)):
        state = tuple(array[rows] for array in cut_up)
        by_tiles(
            kernels, q[rows], k, v, state, q_start=100 + rows.indices(1300)[0], k_start=200,
            threads=3,
        )  # fmt: skip
    same_states(cut_up, whole)


def test_strided_arrays(kernels, dtype, rng):
    fused = normal(rng, (200, 7, 24), dtype)
    q, k, v = fused[:, :3], fused[:, 3:5], fused[:, 5:]
    packed, state = np.full((200, 5, 300), np.nan, F32), kernels.new_state(200, 3, 24)
    loose, loose_state = packed[:, 1:4, 50:250], kernels.new_state(200, 5, 24)
    scores = kernels.score_tile(*(np.ascontiguousarray(a) for a in (q, k)), MAP)
    kernels.score_tile(q, k, MAP, out=loose)
    assert_same_bits(np.ascontiguousarray(loose), scores)
    assert np.isnan(packed).sum() == packed.size - loose.size
    kernels.fold_tile(scores, np.ascontiguousarray(v), state, MAP, q_start=0, k_start=0)
    view = tuple(array[:, 1:4] for array in loose_state)
    kernels.fold_tile(loose, v, view, MAP, q_start=0, k_start=0)
    same_states([np.ascontiguousarray(array) for array in view], state)
    for array in loose_state[1:]:
        assert not array[:, [0, 4]].any()


@pytest.mark.parametrize(
    ("rows", "keys", "head_dim", "slices"),
    [(5, 512, 128, 4), (130, 77, 33, 5), (3, 1, 7, 7), (20, 500, 640, 2)],
)
def test_scores_of_slices_add_up(kernels, dtype, rng, rows, keys, head_dim, slices):
    q, k, _ = draw(rng, dtype, rows, keys, head_dim, 1)
    parts = zip(np.array_split(q, slices, 2), np.array_split(k, slices, 2), strict=True)
    total = sum(kernels.score_tile(*part, MAP) for part in parts)
    assert total.dtype == F32
    want = np.einsum("qhd,khd->qhk", q.astype(np.float64), k[:, MAP].astype(np.float64))
    assert_close(total, want, kernels.accuracy(dtype))


def test_rows_that_see_nothing_stay(kernels, dtype, rng):
    _, _, v = draw(rng, dtype, 60, 100, 1, 16)
    scores = normal(rng, (60, 3, 100), F32)
    state = tuple(rng.random(array.shape, F32) for array in kernels.new_state(60, 3, 16))
    before = [array.copy() for array in state]
    kernels.fold_tile(scores, v, state, MAP, q_start=480, k_start=512)
    for array, old in zip(state, before, strict=True):
        assert_same_bits(array[:32], old[:32])
        assert (array[32:] != old[32:]).any()
    empty = kernels.new_state(60, 3, 16)
    kernels.fold_tile(scores, v, empty, MAP, q_start=0, k_start=60)
    assert (empty[0] == -np.inf).all()
    assert not empty[1].any()
    assert not empty[2].any()


def test_nan_stays_in_its_row(kernels, dtype, rng):
    _, _, v = draw(rng, dtype, 30, 50, 1, 8)
    scores = normal(rng, (30, 3, 50), F32)
    scores[7, 1, 20] = np.nan
    scores[8, 1, 40] = np.nan  # masked
    state = kernels.new_state(30, 3, 8)
    kernels.fold_tile(scores, v, state, MAP, q_start=20, k_start=0)
    broken = np.isnan(state[2]).all(axis=2)
    assert broken[7, 1]
    assert broken.sum() == np.isnan(state[2]).any(axis=2).sum() == 1


def score_arguments():
    return {
        "q": np.ones((5, 2, 8), F32),
        "k": np.ones((7, 1, 8), F32),
        "kv_head_of_q": np.zeros(2, np.int32),
        "scores": np.empty((5, 2, 7), F32),
        "workspace": np.empty(_core.attention_workspace_bytes(8, 0, "float32", ON), np.uint8),
        "on": ON,
    }


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("q", np.ones((5, 2, 8), np.int32), r"q: expected dtype .*bfloat16, got int32"),
        ("k", np.ones((7, 1, 9), F32), r"k: expected shape \[any, any, 8\], got \[7, 1, 9\]"),
        ("k", np.ones((7, 1, 8), np.float16), r"k: expected dtype float32, got float16"),
        ("k", np.ones((513, 1, 8), F32), r"keys: expected at most 512 to .* tile, got 513"),
        ("scores", np.ones((5, 2, 6), F32), r"scores: expected shape \[5, 2, 7\], got"),
        ("scores", np.ones((5, 2, 7), np.float16), r"scores: expected dtype float32, got float16"),
        ("kv_head_of_q", np.ones(2, np.int32), r"kv_head_of_q: .*\[0, 1\), got 1 for head 0"),
        ("workspace", np.ones(8, np.uint8), r"workspace: expected at least \d+ bytes, got 8"),
    ],
)
def test_errors_of_score_tile(argument, value, message):
    _core.score_tile(**score_arguments())
    with pytest.raises(ValueError, match=message):
        _core.score_tile(**score_arguments() | {argument: value})


def test_no_head_dim():
    empty = {"q": np.ones((5, 2, 0), F32), "k": np.ones((7, 1, 0), F32)}
    with pytest.raises(ValueError, match=r"score_tile: head_dim: expected at least 1, got 0"):
        _core.score_tile(**score_arguments() | empty)


def fold_arguments():
    return {
        "scores": np.ones((5, 2, 7), F32),
        "v": np.ones((7, 1, 6), np.float16),
        "kv_head_of_q": np.zeros(2, np.int32),
        "q_start": 0,
        "k_start": 505,
        "row_max": np.full((5, 2), -np.inf, F32),
        "row_sum": np.zeros((5, 2), F32),
        "out": np.zeros((5, 2, 6), F32),
        "scale": 1.0,
        "causal": False,
        "window": 0,
        "softcap": 0.0,
        "workspace": np.empty(_core.attention_workspace_bytes(0, 6, "float16", ON), np.uint8),
        "on": ON,
    }


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("scores", np.ones((5, 2, 6), F32), r"scores: expected shape \[any, any, 7\], got"),
        ("scores", np.ones((5, 2, 7), np.float16), r"scores: expected dtype float32, got float16"),
        ("v", np.ones((7, 1, 0), F32), r"v_head_dim: expected at least 1, got 0"),
        ("q_start", -1, r"q_start: expected at least 0, got -1"),
        ("k_start", -1, r"k_start: expected at least 0, got -1"),
        ("k_start", 506, r"keys: expected at most 6 to the end of the tile, got 7"),
        ("kv_head_of_q", np.zeros(3, np.int32), r"kv_head_of_q: expected shape \[2\], got \[3\]"),
        ("row_max", np.zeros((5, 1), F32), r"row_max: expected shape \[5, 2\], got \[5, 1\]"),
        ("out", np.zeros((5, 2, 6), np.float16), r"out: expected dtype float32, got float16"),
        ("window", -1, r"window: expected at least 0, got -1"),
        ("softcap", 1e-50, r"softcap: expected 0 or a number from .* to 100000, got 1e-50"),
        ("scale", float("inf"), r"abs\(scale\): expected 0 or a number from .*, got inf"),
        ("workspace", np.ones(8, np.uint8), r"workspace: expected at least \d+ bytes, got 8"),
    ],
)
def test_errors_of_fold_tile(argument, value, message):
    _core.fold_tile(**fold_arguments())
    with pytest.raises(ValueError, match=message):
        _core.fold_tile(**fold_arguments() | {argument: value})


class SpanNames(Trace):
    """A trace that only lists the names of its spans."""

    def __init__(self):
        super().__init__()
        self.names = []

    def span(self, kind, name):
        self.names.append((kind, name))
        return nullcontext()


def run_a_tile(kind, *, dry):
    """Run every new method once; return the arena's peak and the names of spans."""
    arena, trace = Arena(dry=dry), SpanNames()
    kernels = kind(isa=ISA, threads=2, arena=arena, trace=trace)
    q, k, v = (arena.empty(shape, F32) for shape in [(9, 3, 8), (11, 2, 8), (11, 2, 6)])
    scores, copied = arena.empty((9, 3, 11), F32), arena.empty((3, 9, 6), F32)
    state = State(arena.empty((9, 3), F32), arena.empty((9, 3), F32), arena.empty((9, 3, 6), F32))
    spec = AttentionSpec(np.array(MAP, np.int32), 0.5, True, window=4, softcap=2.0)
    if not dry:
        for array in (q, k, v):
            array.fill(1.0)
    kernels.start_state(state)
    kernels.score_tile(q, k, spec.kv_head_of_q, scores)
    kernels.fold_tile(scores, 2, 0, v, state, spec)
    kernels.copy(state.out.transpose(1, 0, 2), copied)
    if not dry:
        assert (copied == state.out.transpose(1, 0, 2)).all()
        assert copied.any()
    return arena.peak_bytes, trace.names


def test_methods_and_their_shadows():
    peak, names = run_a_tile(CpuKernels, dry=False)
    kernels = ("start_state", "score_tile", "fold_tile", "copy")
    assert names == [("compute", name) for name in kernels]
    assert run_a_tile(VirtualKernels, dry=True) == (peak, names)


def test_copy_refuses_another_shape():
    arena = Arena()
    kernels = CpuKernels(isa=ISA, threads=1, arena=arena, trace=Trace())
    with pytest.raises(ValueError, match=r"copy: out: expected float32 \[2, 3\]; got float32 \[1"):
        kernels.copy(np.ones((2, 3), F32), np.ones((1, 3), F32))
