"""Attention by a ring of ranks, called from a program: arguments, exactness, orders of memory."""

import numpy as np
import pytest
from mpi4py import MPI

from pympa import Session
from pympa.errors import RefusedError
from pympa.spec import DTYPES
from support import worlds
from support.compare import assert_close, assert_lse_close, tolerance_of
from support.oracles import batch_attention

SIZE = MPI.COMM_WORLD.Get_size()


def test_session_ring_attention():
    with Session() as session:
        layout = session.layout(worlds.LENGTHS)
        rng = np.random.default_rng(0)
        rows = layout.global_rows(worlds.LENGTHS)
        q, k, v = (rng.standard_normal((sum(worlds.LENGTHS), 4, 8), np.float32) for _ in range(3))
        o, lse = session.ring_attention(q[rows], k[rows], v[rows], lengths=worlds.LENGTHS)
        first = o.tobytes()
        again, _ = session.ring_attention(q[rows], k[rows], v[rows], lengths=worlds.LENGTHS)
        assert first == o.tobytes() == again.tobytes()
        with Session("tp=1", comm=MPI.COMM_SELF) as alone:
            whole = alone.layout(worlds.LENGTHS).global_rows(worlds.LENGTHS)
            assert (whole == np.arange(len(q))).all()
        want, want_lse = batch_attention(q, k, v, worlds.LENGTHS)
        assert_close(o, want[rows], np.float32)
        assert_lse_close(lse, want_lse[rows], np.float32)


F32 = np.ones((2, 1, 16), np.float32)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"q": F32[..., :0]}, r"q: expected a head_dim of at least 1; got \(2, 1, 0\)"),
        ({"q": F32.astype(np.float64)}, "q: expected float32, float16, bfloat16; got float64"),
        ({"v": F32.astype(np.float16)}, "v: expected float32, as q; got float16"),
        ({"q": F32.tolist()}, "q: expected a NumPy array.*; got builtins.list"),
        ({"k": F32[:, 0]}, r"k: expected an array \[rows, heads, head_dim\]; got \(2, 16\)"),
        ({"k": F32[..., :8]}, "k: expected a head_dim of 16, as q; got 8"),
        ({"k": np.ones((2, 8, 16), np.float32)}, "k: expected 1 to 1 kv heads, .*; got 8"),
        ({"k": F32[:, :0]}, "k: expected 1 to 1 kv heads, .*; got 0"),
        ({"k": F32[:1]}, "k: expected 2 rows, as q; got 1"),
        ({"window": 2.5}, "window: expected a whole number of at least 1, or None; got 2.5"),
        ({"window": 0}, "window: expected a whole number of at least 1, or None; got 0"),
        ({"window": True}, "window: expected a whole number of at least 1, or None; got True"),
        ({"scale": np.nan}, "scale: expected a finite float32 number, or None; got nan"),
        ({"scale": "1"}, "scale: expected a finite float32 number, or None; got '1'"),
        ({"softcap": 1e39}, r"softcap: expected a finite float32 number, .*; got 1e\+39"),
        ({"softcap": 1e-50}, "softcap: expected a number from 1.18e-38 to .*; got 1e-50"),
        ({"softcap": 0}, "softcap: expected a number from 1.18e-38 to .*; got 0"),
        ({"causal": 2}, "causal: expected True or False; got 2"),
        ({"scale": 10**400}, "scale: expected a finite float32 number, or None; got 1000"),
        ({"lengths": [2.0]}, "lengths: expected a list of whole numbers of at least 0"),
        ({"lengths": 2}, "lengths: expected a list of whole numbers of at least 0; got 2"),
        ({"lengths": [3]}, "expected 3 rows on rank 0; got 2"),
    ],
)
def test_ring_attention_refuses_arguments(given, says):
    with Session("tp=1", comm=MPI.COMM_SELF) as session, pytest.raises(ValueError, match=says):
        session.ring_attention(**{"q": F32, "k": F32, "v": F32, "lengths": [2], **given})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_how_good_lse_is_in_16_bits(dtype):
    """As good as the docstring says, half a step of rounded weights, and of that size."""
    half_a_step = tolerance_of(dtype) / 4
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((256, 4, 64)).astype(DTYPES[dtype]) for _ in range(3))
    with Session("tp=1", comm=MPI.COMM_SELF) as session:
        _, lse = session.ring_attention(q, k, v, lengths=[256])
    _, want = batch_attention(q, k, v, [256])
    assert half_a_step / 10 < abs(lse - want).max() < half_a_step


def test_ring_attention_takes_any_order_of_memory():
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((40, 4, 8), np.float32) for _ in range(3))
    with Session("tp=1", comm=MPI.COMM_SELF) as session:
        expected, _ = session.ring_attention(q, k, v, lengths=[40])
        turned = [np.asfortranarray(array) for array in (q, k, v)]
        o, _ = session.ring_attention(*turned, lengths=np.array([40]))
        assert o.tobytes() == expected.tobytes()
        reversed_rows = [array[::-1].copy()[::-1] for array in (q, k, v)]
        for window in (np.int64(40), 2**62, 10**30):
            o, _ = session.ring_attention(*reversed_rows, lengths=[40], window=window)
            assert o.tobytes() == expected.tobytes()


@pytest.mark.skipif(SIZE != 2, reason="torch takes long to import on many ranks; two tell enough")
def test_ring_attention_names_torch():
    torch = pytest.importorskip("torch", reason="torch is in the extra 'peers'")
    q = torch.ones((2, 1, 16))
    with (
        Session("tp=1", comm=MPI.COMM_SELF) as session,
        pytest.raises(ValueError, match=r"k: expected .*; got torch.Tensor; pass k.numpy\(\)"),
    ):
        session.ring_attention(q.numpy(), q, q, lengths=[2])


@pytest.mark.parametrize("what", ["lengths", "causal", "dtype"])
def test_ring_attention_refuses_arguments_that_differ(what):
    if SIZE == 1:
        pytest.skip("one rank differs from nobody")
    with Session(f"cp={SIZE},balance=contiguous") as session:
        differs = session.rank == SIZE - 1
        lengths = [32 * SIZE] * 2 if differs and what == "lengths" else [64 * SIZE]
        dtype = np.float16 if differs and what == "dtype" else np.float32
        q = np.ones((64, 2, 8), dtype)
        with pytest.raises(RefusedError, match="ring_attention: expected the same on all ranks"):
            session.ring_attention(
                q, q, q, lengths=lengths, causal=not (differs and what == "causal")
            )


def test_ring_attention_is_for_rings_of_whole_heads():
    if SIZE == 1:
        pytest.skip("dim=1 splits nothing")
    q = np.zeros((sum(worlds.LENGTHS), 2, 8), np.float32)
    with (
        Session(f"dim={SIZE}") as session,
        pytest.raises(ValueError, match="so that each rank has whole heads"),
    ):
        session.ring_attention(q, q, q, lengths=worlds.LENGTHS)


def test_session_windows():
    if SIZE == 1:
        pytest.skip("one rank has no order to choose")
    rng = np.random.default_rng(1)
    q = rng.standard_normal((sum(worlds.LENGTHS), 2, 8), np.float32)
    want, want_lse = batch_attention(q, q, q, worlds.LENGTHS, window=5)
    for balance in ("zigzag", "contiguous"):
        with Session(f"cp={SIZE},balance={balance}") as session:
            rows = session.layout(worlds.LENGTHS).global_rows(worlds.LENGTHS)
            o, lse = session.ring_attention(*[q[rows]] * 3, lengths=worlds.LENGTHS, window=5)
        assert_close(o, want[rows], np.float32)
        assert_lse_close(lse, want_lse[rows], np.float32)
