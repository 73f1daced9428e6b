"""Print the README's table of supported combinations, by calling the rules.

    python bench/supported.py

Each cell tests a way of splitting on a small model with one property, and in combination with every
way of splitting along another axis.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pympa.plan.mesh import Plan
from pympa.plan.rules import broken_rule
from pympa.spec import LayerSpec, ModelSpec

WAYS: dict[str, dict[str, Any]] = {
    "`pp`": {"pp": 2},
    "`dp`": {"dp": 2},
    "`cp`, ring": {"cp": 4},
    "`cp`, all-gather": {"cp": 4, "cp_scheme": "allgather"},
    "`cp`, Ulysses": {"cp": 4, "cp_scheme": "ulysses"},
    "`cp`, rings of Ulysses groups": {"cp": 4, "ulysses": 2},
    "`tp`": {"tp": 2},
    "`dim`, exchange": {"dim": 2},
    "`dim`, gather": {"dim": 2, "dim_algo": "gather"},
    "`dim`, reduce": {"dim": 2, "dim_algo": "reduce"},
    "token chunks in time": {"pp": 2, "micro_batches": 9},
}
LAYER = LayerSpec(heads=8, head_dim=16, mlp_hidden=64)
MODELS: dict[str, ModelSpec] = {
    name: ModelSpec(
        d_model=32,
        vocabulary=256,
        causal=name != "not causal",
        layers=(msgspec.structs.replace(LAYER, repeat=2, **fields),),
    )
    for name, fields in {
        "grouped kv heads": {"kv_heads": 3},
        "q/k-norm": {"qk_norm": "head"},
        "sliding window": {"window": 5},
        "not causal": {},
        "experts, capacity": {
            "experts": 4,
            "top_k": 2,
            "capacity_factor": 1.25,
            "capacity_group": 8,
        },
    }.items()
}
SEQUENCES = 4


def supported_table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| | " + " | ".join(MODELS) + " | with every other axis |",
        "|---" * (len(MODELS) + 2) + "|",
    ]
    for name, way in WAYS.items():
        cells = [_cell(way, spec) for spec in MODELS.values()]
        plain = MODELS["grouped kv heads"]
        others = [other for other in WAYS.values() if not {"cp", "dim"} & way.keys() & other.keys()]
        together = all(_cell({**other, **way}, plain) == "yes" for other in others)
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if together else 'no'} |")
    return "\n".join(lines)


def _cell(way: dict[str, Any], spec: ModelSpec) -> str:
    return "yes" if broken_rule(Plan(**way), spec, SEQUENCES) is None else "no"


if __name__ == "__main__":
    print(supported_table())
