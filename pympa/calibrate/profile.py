"""A profile: this machine's cores as a cluster with measured curves, in TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from pympa.calibrate.links import LinkFit
from pympa.costs.cluster import Cluster
from pympa.costs.curves import Curve
from pympa.text.table import Table


def profile_text(profile: Cluster) -> str:
    """Return a profile as TOML, which `load_cluster` reads."""
    fields: dict[str, Any] = msgspec.to_builtins(profile)
    return "\n".join(_lines(fields, "")) + "\n"


def _lines(fields: dict[str, Any], table: str) -> Iterator[str]:
    """Yield plain values first, as TOML requires, then the tables below `table`."""
    nested = {}
    for name, value in fields.items():
        if isinstance(value, dict) or (
            isinstance(value, (list, tuple)) and value and isinstance(value[0], dict)
        ):
            nested[name] = value
        elif value is not None:
            yield f"{name} = {json.dumps(value)}"  # strings, numbers and lists are TOML, too
    for name, value in nested.items():
        inner = f"{table}.{name}" if table else name
        if isinstance(value, dict):
            yield f"\n[{inner}]"
            yield from _lines(value, inner)
            continue
        for entry in value:
            yield f"\n[[{inner}]]"
            yield from _lines(entry, inner)


def error_table(curves: tuple[Curve, ...], link: LinkFit | None) -> Table:
    """Return the fit error of each curve: its error at grid points that are left out."""
    table = Table(
        "fit error: of each grid point, interpolated from its neighbours; of each message, from "
        "latency + bytes / bandwidth",
        keys=2,
    )
    table.add_column("kernel", text=True)
    for heading in ("dtype", "ranks\nat once", "points", "median\nerror", "largest\nerror"):
        table.add_column(heading)
    for curve in curves:
        judged = bool(curve.left_out())
        table.add_row(
            curve.kernel,
            curve.dtype,
            str(curve.ranks),
            str(len(curve.seconds)),
            f"{curve.error:.1%}" if judged else "-",
            f"{curve.worst:.1%}" if judged else "-",
        )
    if link is not None:
        counts = str(link.link.ranks), str(link.sizes)
        table.add_row("message", "", *counts, f"{link.error:.1%}", f"{link.worst:.1%}")
    return table
