"""Blocks of rows, in which the oracle computes, and the norms of a block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pympa.spec import LayerSpec
from pympa.verify.reference.formulas import F64, Rounding, exactly, norm

BLOCK_ELEMENTS = 1 << 20  # the most elements of the widest array of a block of rows

Weight = Callable[[str], F64]


def row_blocks(rows: int, width: int, parts: int = 1) -> Iterator[slice]:
    """Cut rows of a width into blocks of which `parts` have at most `BLOCK_ELEMENTS` elements.

    There are at least `parts` of them, if there are as many rows.
    """
    step = max(1, min(BLOCK_ELEMENTS // (width * parts), -(-rows // parts)))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def for_row_blocks(
    rows: int, width: int, rounding: Rounding, work: Callable[[slice], None]
) -> None:
    """Call `work` for each block of rows; on all cores of this process, if nothing is rounded.

    Draws of a rounding come in order, so with one there is one thread.
    """
    cores = len(os.sched_getaffinity(0)) if rounding is exactly else 1
    if cores == 1:
        for block in row_blocks(rows, width):
            work(block)
        return
    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(work, row_blocks(rows, width, cores)):
            pass


def once(weight: Weight) -> Weight:
    """Return a function that calls `weight` once for each name, whichever thread asks first."""
    lock, found = threading.Lock(), dict[str, F64]()

    def get(name: str) -> F64:
        with lock:
            if name not in found:
                found[name] = weight(name)
            return found[name]

    return get


def widest(layer: LayerSpec, d_model: int) -> int:
    """Return the width of the widest array of a row in a block."""
    heads = layer.heads * max(layer.head_dim, layer.value_dim)
    hidden = max(layer.mlp_hidden, layer.shared_width)
    latents = 0 if layer.latent is None else max(layer.latent.kv_rank, layer.latent.q_rank or 0)
    return max(d_model, heads, hidden, layer.experts, latents)


def block_norm(layer: LayerSpec, x: F64, weight: Weight, name: str) -> F64:
    """Return the norm called `name` of a block, of rows `[rows, d_model]`."""
    bias = weight(f"{name}.bias") if layer.norm == "layer" else None
    gain = weight(f"{name}.weight")
    return norm(x, gain, bias, layer.norm_eps, layer.norm, float(layer.norm_offset))


def before_branch(layer: LayerSpec, x: F64, weight: Weight, branch: str, rounding: Rounding) -> F64:
    """Return the input of a branch, "attention" or "mlp": the stream, after its norm if any."""
    name = f"{branch}_norm"
    return rounding(block_norm(layer, x, weight, name)) if name in layer.norms else x


def after_branch(layer: LayerSpec, y: F64, weight: Weight, branch: str, rounding: Rounding) -> F64:
    """Return the output of a branch as it is added to the stream."""
    name = f"{branch}_post_norm"
    y = rounding(y)
    return rounding(block_norm(layer, y, weight, name)) if name in layer.norms else y
