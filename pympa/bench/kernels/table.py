"""Records and table of the kernel benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pympa.bench.kernels.cases.workbench import CHECKED_ROWS
from pympa.text.table import Table

SCHEMA = 1


class Seconds(msgspec.Struct, frozen=True):
    """Seconds of one run over the iterations."""

    median: float
    min: float
    max: float


class KernelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One measured case, as in the output file; see `Case` for the fields.

    `torch_ratio` is torch's median seconds over ours; None without a peer.
    """

    schema: int = SCHEMA
    kernel: str
    dtype: str
    head_dim: int | None
    causal: bool | None
    tokens: int
    shape: str
    threads: int
    seconds: Seconds
    gflops: float
    gbytes_per_second: float
    peak_fraction: float
    torch_ratio: float | None
    error: float
    verified: bool
    isa: str
    iterations: int
    tolerance: float
    checked_rows: int


Measured = tuple[KernelRecord, str]
"""A record, and the limit of the kernel: "compute" or "memory"."""


def result_table(title: str, measured: Sequence[Measured]) -> Table:
    """Return one row for each case."""
    caption = [
        "shape: linear m × n × k; mlp rows × width × hidden; moe the same × experts × top_k;",
        "attention queries × keys × heads (/ kv heads, if fewer); rope rows × heads",
        "of roofline: share of the measured arithmetic (compute) or read bandwidth (memory)",
        f"error: relative to float64, in {CHECKED_ROWS} sampled rows (all if fewer); "
        "× torch: torch's median seconds over ours",
    ]
    table = Table(title, caption, keys=3)
    for heading in ("kernel", "dtype", "shape"):
        table.add_column(heading, text=True)
    for heading in (
        "head_dim", "causal", "GFLOP/s", "GB/s", "of roofline", "× torch", "error",
    ):  # fmt: skip
        table.add_column(heading)
    for r, bound in measured:
        table.add_row(
            r.kernel,
            r.dtype,
            r.shape.replace("x", " × "),
            "-" if r.head_dim is None else str(r.head_dim),
            "-" if r.causal is None else "yes" if r.causal else "no",
            f"{r.gflops:,.1f}",
            f"{r.gbytes_per_second:,.1f}",
            f"{r.peak_fraction:.0%} {bound}",
            "-" if r.torch_ratio is None else f"{r.torch_ratio:.2f}",
            f"{r.error:.1e}",
        )
    return table
