"""Attention cases of `bench/cuda_kernels.py`: prefill, carried states, decoding."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cuda_rig import GpuRig, Work
from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.plan.layout import Layout, Range
from pympa.verify import reference

_WIDTH = 2048  # heads × head_dim of a prefill
_HEAD_DIMS = (64, 128, 256, 512)
_TOKENS = (8192, 16384, 32768)
_SUMMARY_TOKENS = 16384
_SAMPLED_ROWS = 16
_MOST_SCORES = 2**31  # the most scores that torch's plain formula may store
_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class Shape(NamedTuple):
    """Sequences of equal shape; queries are the last positions of each."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    @property
    def flops(self) -> int:
        """The flops of the pairs (query, key) in which the query sees the key."""
        hidden = self.queries * (self.queries - 1) // 2 if self.causal else 0
        area = self.queries * self.keys - hidden
        return 4 * self.batch * area * self.heads * self.head_dim

    @property
    def moved(self) -> int:
        """The bytes of q, k, v and o, once each."""
        rows = 2 * self.queries * self.heads + 2 * self.keys * self.kv_heads
        return 2 * self.batch * rows * self.head_dim


_DECODE = (
    Shape(1, 1, 131072, 32, 8, 128, True),
    Shape(16, 1, 8192, 32, 8, 128, True),
    Shape(16, 1, 8192, 8, 8, 64, True),
    Shape(16, 1, 8192, 4, 4, 512, True),
)


class Attention:
    """One shape on a rig, computed by our kernels."""

    def __init__(self, rig: GpuRig, shape: Shape) -> None:
        self._rig, self._shape = rig, shape
        batch, queries, keys, heads, kv_heads, head_dim, causal = shape
        q_shape, kv_shape = (batch * queries, heads, head_dim), (batch * keys, kv_heads, head_dim)
        self._inputs = [
            (rig.random(*q_shape), rig.random(*kv_shape), rig.random(*kv_shape))
            for _ in range(rig.sets(shape.moved))
        ]
        self._ours = [tuple(map(rig.ours, tensors)) for tensors in self._inputs]
        self._o = torch.empty(q_shape, device="cuda", dtype=rig.torch_dtype)
        state = (q_shape[:2], q_shape[:2], q_shape, q_shape[:2])
        *parts, lse = (torch.empty(s, device="cuda", dtype=torch.float32) for s in state)
        self._state = State(*map(rig.ours, parts))
        self._result = rig.ours(self._o), rig.ours(lse)
        self._kv_head_of_q = np.arange(heads, dtype=np.int32) // (heads // kv_heads)
        scale, decodes = head_dim**-0.5, queries == 1
        self._spec = AttentionSpec(self._kv_head_of_q, scale, causal, decode=decodes)
        self._q_layout = Layout(tuple(Range(s, keys - queries, queries) for s in range(batch)))
        self._kv_layout = Layout(tuple(Range(s, 0, keys) for s in range(batch)))

    def run(self, index: int, blocks: int = 1) -> None:
        """Attend from an empty state to the output, with the keys in one block or in several."""
        kernels = self._rig.kernels
        q, k, v = self._ours[index % len(self._ours)]
        kernels.start_state(self._state)
        step = len(k) // blocks
        for first in range(0, len(k), step):
            layout = self._kv_layout.slice(first, first + step)
            kv = KvBlock(k[first : first + step], v[first : first + step], layout)
            kernels.attend_block(q, self._q_layout, kv, self._state, self._spec)
        kernels.finish(self._state, *self._result)

    def check(self, what: str, blocks: int = 1) -> None:
        """Compare rows of the first and the last head of the last sequence with float64.

        Raises:
            ValueError: they differ too much, or some element was not written.
        """
        rig, shape = self._rig, self._shape
        self._o.fill_(float("nan"))
        self.run(0, blocks)
        rows = np.unique(np.linspace(0, shape.queries - 1, _SAMPLED_ROWS).astype(np.int64))
        picked = (rows + (shape.batch - 1) * shape.queries).tolist()
        q, k, v = self._inputs[0]
        for head in sorted({0, shape.heads - 1}):
            kv_head = int(self._kv_head_of_q[head])
            want, _ = reference.attention(
                rig.wide(q[picked, head : head + 1]),
                rig.wide(k[-shape.keys :, kv_head : kv_head + 1]),
                rig.wide(v[-shape.keys :, kv_head : kv_head + 1]),
                rows + (shape.keys - shape.queries),
                np.arange(shape.keys),
                kv_head_of_q=[0],
                scale=self._spec.scale,
                causal=shape.causal,
            )
            rig.check(what, rig.wide(self._o[picked, head : head + 1]), want)
        if not bool(torch.isfinite(self._o).all()):
            raise ValueError(f"{what}: some elements are not finite, or were not written")

    def peer(self) -> tuple[str, Work] | None:
        """Return torch's fastest backend for this shape, or None if no backend supports it."""
        batch, queries, keys, heads, kv_heads, head_dim, causal = self._shape

        def laid_out(tensor: torch.Tensor, rows: int) -> torch.Tensor:
            return tensor.view(batch, rows, -1, head_dim).transpose(1, 2).contiguous()

        tensors = [
            (laid_out(q, queries), laid_out(k, keys), laid_out(v, keys)) for q, k, v in self._inputs
        ]
        attend = partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=causal and queries > 1,
            enable_gqa=kv_heads < heads,
        )

        def call(backend: SDPBackend, index: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return attend(*tensors[index % len(tensors)])

        found = []
        for backend in _BACKENDS:
            if backend is SDPBackend.MATH and batch * heads * queries * keys > _MOST_SCORES:
                continue
            try:
                call(backend, 0)
                torch.cuda.synchronize()
            except RuntimeError:
                continue  # the backend does not support the shape
            begin = time.perf_counter()
            for index in range(3):
                call(backend, index)
            torch.cuda.synchronize()
            found.append((time.perf_counter() - begin, backend.name, partial(call, backend)))
        if not found:
            return None
        _, name, work = min(found)
        return f"torch ({name.removesuffix('_ATTENTION').lower()})", work


def _time(
    rig: GpuRig, what: str, shape: Shape, cost: dict[str, float], headline: str | None
) -> None:
    """Check and time a shape beside torch, if torch supports it."""
    case = Attention(rig, shape)
    case.check(what)
    peer = case.peer()
    if peer is None:
        print(f"{what}: no backend of torch's attention supports this shape", file=sys.stderr)
        rig.report(what, rig.time(case.run)[0], **cost, headline=headline)
        return
    name, work = peer
    ours, theirs = rig.time(case.run, work)
    rig.report(what, ours, **cost, peer=theirs, peer_name=name, headline=headline)


def prefill(rig: GpuRig) -> None:
    """Time all rows of one sequence, from an empty state to the output."""
    for head_dim in _HEAD_DIMS:
        for causal in (False, True):
            for tokens in _TOKENS:
                heads = _WIDTH // head_dim
                shape = Shape(1, tokens, tokens, heads, heads, head_dim, causal)
                mask = "causal" if causal else "full"
                what = f"attention head_dim {head_dim} {mask} {tokens // 1024}k"
                headline = None
                if tokens == _SUMMARY_TOKENS and head_dim in (128, 512):
                    headline = f"{head_dim} {mask}"
                cost = {"flops": shape.flops}
                rig.attempt(what, partial(_time, rig, what, shape, cost, headline))


def decode(rig: GpuRig) -> None:
    """Time one row of each sequence."""
    for shape in _DECODE:
        heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}"
        what = f"decode {shape.batch} × {shape.keys // 1024}k, {heads}"
        headline = "decode" if shape == _DECODE[0] else None
        rig.attempt(what, partial(_time, rig, what, shape, {"moved": shape.moved}, headline))


def carried(rig: GpuRig) -> None:
    """Time the same keys in one block and in eight, as on a ring of eight ranks."""
    for head_dim in (128, 512):
        for tokens in (8192, 32768):
            heads = _WIDTH // head_dim
            shape = Shape(1, tokens, tokens, heads, heads, head_dim, False)
            what = f"carried state head_dim {head_dim}: 8 blocks of {tokens // 8192}k"
            headline = f"carried {head_dim}" if tokens == 32768 else None
            rig.attempt(what, partial(_carry, rig, what, shape, headline))


def _carry(rig: GpuRig, what: str, shape: Shape, headline: str | None) -> None:
    case = Attention(rig, shape)
    case.check(what, blocks=8)
    whole, blocks = rig.time(case.run, partial(case.run, blocks=8))
    rig.report(
        what, blocks, flops=shape.flops, peer=whole, peer_name="one block", headline=headline
    )
