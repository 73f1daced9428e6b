"""Kernels of one instruction set behind allocating wrappers, and tolerances by dtype alone."""

from collections.abc import Sequence

import numpy as np
import pytest

from on_device import assert_close, assert_same_bits, normal
from pympa import _core
from pympa.spec import DTYPES


class Kernels:
    """The functions of a core for one ISA, with outputs and workspaces made on the spot."""

    def __init__(self, core, isa):
        self.core, self.isa = core, isa

    def on(self, threads=1):
        return self.core.Execution(self.isa, threads=threads)

    def pack(self, weight):
        """Pack a weight `[n, k]`, or those of a group `[groups, n, k]`."""
        if weight.ndim == 3:
            return np.stack([self.pack(one) for one in weight])
        n, k = weight.shape
        size = self.core.packed_weight_bytes(n, k, weight.dtype.name, self.on())
        packed = np.full(size, 0xA5, np.uint8)
        self.core.pack_weight(weight, packed, self.on())
        return packed

    def linear(
        self,
        x,
        weight,
        *,
        bias=None,
        activation="none",
        residual=None,
        branch=None,
        group_rows=None,
        out=None,
        out_dtype=None,
        threads=1,
    ):
        if out is None:
            out = np.full((len(x), weight.shape[-2]), np.nan, out_dtype or x.dtype)
        self.core.linear(
            x,
            self.pack(weight),
            out,
            bias,
            activation,
            residual,
            branch,
            None if group_rows is None else np.array(group_rows, np.int64),
            self._workspace(x, weight, False, threads),
            self.on(threads),
        )
        return out

    def gated_linear(
        self,
        x,
        gate,
        up,
        *,
        activation,
        bias_gate=None,
        bias_up=None,
        group_rows=None,
        threads=1,
    ):
        out = np.full((len(x), gate.shape[-2]), np.nan, x.dtype)
        self.core.gated_linear(
            x,
            self.pack(gate),
            self.pack(up),
            out,
            bias_gate,
            bias_up,
            activation,
            None if group_rows is None else np.array(group_rows, np.int64),
            self._workspace(x, gate, True, threads),
            self.on(threads),
        )
        return out

    def mlp(
        self,
        x,
        up,
        down,
        *,
        activation,
        gate=None,
        bias_gate=None,
        bias_up=None,
        bias=None,
        residual=None,
        branch=None,
        group_rows=None,
        item_rows=96,
        out=None,
        out_dtype=None,
        threads=1,
    ):
        n, hidden = down.shape[-2:]
        if out is None:
            out = np.full((len(x), n), np.nan, out_dtype or x.dtype)
        size = self.core.mlp_workspace_bytes(
            item_rows, hidden, n, gate is not None, self.on(threads)
        )
        self.core.mlp(
            x,
            None if gate is None else self.pack(gate),
            self.pack(up),
            self.pack(down),
            out,
            bias_gate,
            bias_up,
            bias,
            activation,
            hidden,
            residual,
            branch,
            None if group_rows is None else np.array(group_rows, np.int64),
            item_rows,
            np.full(size, 0xFF, np.uint8),
            self.on(threads),
        )
        return out

    def _workspace(self, x, weight, gated, threads):
        n, k = weight.shape[-2:]
        size = self.core.linear_workspace_bytes(len(x), n, k, x.dtype.name, gated, self.on(threads))
        return np.full(size, 0xFF, np.uint8)

    def new_state(self, rows, heads, v_head_dim):
        return (
            np.full((rows, heads), -np.inf, np.float32),
            np.zeros((rows, heads), np.float32),
            np.zeros((rows, heads, v_head_dim), np.float32),
        )

    def attend(
        self,
        q,
        k,
        v,
        state,
        *,
        q_ranges: Sequence[tuple[int, int, int]],
        k_ranges: Sequence[tuple[int, int, int]],
        kv_head_of_q=None,
        scale=None,
        causal=True,
        window=0,
        softcap=0.0,
        decode=False,
        threads=1,
    ):
        """Fold keys into `state` in place."""
        heads, head_dim = q.shape[1:]
        if kv_head_of_q is None:
            kv_head_of_q = np.arange(heads) * k.shape[1] // heads
        size = self.core.attention_workspace_bytes(
            head_dim, v.shape[2], q.dtype.name, self.on(threads)
        )
        q_ranges = np.array(q_ranges, np.int64).reshape(-1, 3)
        k_ranges = np.array(k_ranges, np.int64).reshape(-1, 3)
        if decode:
            size += self.core.decode_workspace_bytes(
                v.shape[2], heads, q_ranges, k_ranges, self.on(threads)
            )
        self.core.attend_block(
            q,
            k,
            v,
            q_ranges,
            k_ranges,
            *state,
            np.array(kv_head_of_q, np.int32),
            head_dim**-0.5 if scale is None else scale,
            causal,
            window,
            softcap,
            decode,
            np.full(size, 0xFF, np.uint8),
            self.on(threads),
        )

    def score_tile(self, q, k, kv_head_of_q, *, out=None, threads=1):
        if out is None:
            out = np.full((len(q), q.shape[1], len(k)), np.nan, np.float32)
        size = self.core.attention_workspace_bytes(q.shape[2], 0, q.dtype.name, self.on(threads))
        workspace = np.full(size, 0xFF, np.uint8)
        kv_head_of_q = np.array(kv_head_of_q, np.int32)
        self.core.score_tile(q, k, kv_head_of_q, out, workspace, self.on(threads))
        return out

    def fold_tile(
        self,
        scores,
        v,
        state,
        kv_head_of_q,
        *,
        q_start,
        k_start,
        scale=1.0,
        causal=True,
        window=0,
        softcap=0.0,
        threads=1,
    ):
        """Fold scores into `state` in place."""
        size = self.core.attention_workspace_bytes(0, v.shape[2], v.dtype.name, self.on(threads))
        self.core.fold_tile(
            scores,
            v,
            np.array(kv_head_of_q, np.int32),
            q_start,
            k_start,
            *state,
            scale,
            causal,
            window,
            softcap,
            np.full(size, 0xFF, np.uint8),
            self.on(threads),
        )

    def finish(self, state, dtype, threads=1):
        row_max, _, out = state
        o = np.full(out.shape, np.nan, dtype)
        lse = np.full(row_max.shape, np.nan, np.float32)
        self.core.finish(*state, o, lse, self.on(threads))
        return o, lse

    def attention(self, q, k, v, **options):
        """Return (o, lse) of one call over everything."""
        state = self.new_state(q.shape[0], q.shape[1], v.shape[2])
        options.setdefault("q_ranges", [(0, 0, q.shape[0])])
        options.setdefault("k_ranges", [(0, 0, k.shape[0])])
        self.attend(q, k, v, state, **options)
        return self.finish(state, q.dtype)


@pytest.fixture(params=_core.supported_isas(), scope="session")
def cpu_kernels(request):
    return Kernels(_core, request.param)


@pytest.fixture(scope="session")
def kernels(cpu_kernels):
    return cpu_kernels


@pytest.fixture(scope="session")
def cuda_kernels():
    """Return the GPU's kernels as an interpreter of CUDA runs them on the CPU."""
    emulated = pytest.importorskip("pympa._cuda_emulated", reason="no emulation of CUDA is built")
    return Kernels(emulated, "cuda")


@pytest.fixture(params=[*_core.supported_isas(), "cuda"], scope="session")
def all_kernels(request):
    """Return the CPU's kernels by ISA, and the GPU's."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda_kernels")
    return Kernels(_core, request.param)


@pytest.fixture
def attention_kernels(all_kernels, request):
    """Return what `all_kernels` does, for the dtypes that attention takes there."""
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else None
    if all_kernels.isa == "cuda" and dtype == np.float32:
        pytest.skip("attention on a GPU takes 16-bit floats")
    return all_kernels


@pytest.fixture(scope="session")
def best_kernels():
    return Kernels(_core, _core.supported_isas()[0])


@pytest.fixture(params=list(DTYPES), scope="session")
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture
def rng():
    return np.random.default_rng(20250711)


@pytest.fixture(scope="session", name="normal")
def normal_fixture():
    """Return a function that draws standard normal arrays of a dtype."""
    return normal


@pytest.fixture(scope="session")
def check():
    """Return the check of a result against float64: whole norm x 1, worst row x 8, no NaN."""
    return assert_close


@pytest.fixture(scope="session")
def same_bits():
    """Return the check that two arrays are equal byte for byte."""
    return assert_same_bits
