"""One plan of every family: exact, and as many bytes as the formula says.

Larger samples, and all plans, are in test_plans.py; this list is what no lane leaves out.
"""

import pytest

from pympa.plan.mesh import parse_plan
from pympa.transport.local import LocalWorld
from support import checks, worlds

FAMILIES = {
    "one rank": (worlds.ODD, "tp=1"),
    "stages": (worlds.DENSE, "pp=4"),
    "stages, chunks of tokens": (worlds.DENSE, "pp=2,micro_batches=9"),
    "sequences": (worlds.ODD, "dp=3"),
    "ring, zigzag": (worlds.DENSE, "cp=3"),
    "ring, contiguous": (worlds.ODD, "cp=4,balance=contiguous"),
    "ring, window": (worlds.SLIDING, "cp=4"),
    "ring, window, contiguous": (worlds.WINDOWED, "cp=4,balance=contiguous"),
    "all-gather, window": (worlds.SLIDING, "cp=4,cp_scheme=allgather"),
    "ring of slices, window": (worlds.SLIDING, "cp=2,dim=2,micro_batches=5"),
    "ring of summed scores, window": (worlds.SLIDING, "cp=3,dim=2,dim_algo=reduce"),
    "ring, not causal": (worlds.NOT_CAUSAL, "cp=3"),
    "all-gather": (worlds.DENSE, "cp=4,cp_scheme=allgather"),
    "ulysses": (worlds.DENSE, "cp=4,cp_scheme=ulysses"),
    "ulysses inside a ring": (worlds.DENSE, "cp=4,ulysses=2"),
    "heads and columns": (worlds.ODD, "tp=4"),
    "one kv head for all": (worlds.MULTI_QUERY, "tp=4"),
    "dim, exchange": (worlds.DENSE, "dim=3"),
    "dim, gather": (worlds.DENSE, "dim=3,dim_algo=gather"),
    "dim, reduce": (worlds.DENSE, "dim=3,dim_algo=reduce"),
    "grid": (worlds.ODD, "tp=2,dim=2"),
    "ring of slices": (worlds.DENSE, "cp=2,dim=2"),
    "experts": (worlds.EXPERTS, "dp=3,ep=3"),
    "columns of experts": (worlds.EXPERTS, "tp=4,ep=2,etp=2"),
    "experts over a ring": (worlds.EXPERTS, "cp=2,dp=2,ep=4"),
    "capacity": (worlds.ODD_EXPERTS, "cp=2,tp=2,ep=2"),
    "capacity, chunks of tokens": (worlds.ODD_EXPERTS, "cp=2,micro_batches=5"),
    "sandwich norms": (worlds.SANDWICH, "cp=2,tp=2"),
    "sandwich norms, stages": (worlds.SANDWICH, "pp=2,tp=3,micro_batches=3"),
    "sandwich norms, slices": (worlds.SANDWICH, "tp=2,dim=2"),
    "post norms, parallel": (worlds.POST_AND_PARALLEL, "tp=4"),
    "post norms, parallel, slices": (worlds.POST_AND_PARALLEL, "cp=2,dim=2"),
    "post norms, parallel, experts": (worlds.POST_AND_PARALLEL, "dp=2,tp=2,ep=2"),
    "latents": (worlds.LATENT, "tp=3"),
    "latents, ring": (worlds.LATENT, "cp=2,ep=2"),
    "latents, slices": (worlds.LATENT, "tp=2,dim=3"),
    "latents, gathered slices": (worlds.LATENT, "dim=2,dim_algo=gather"),
    "latents, summed scores": (worlds.LATENT, "dim=2,dim_algo=reduce"),
    "latents, ulysses": (worlds.LATENT, "cp=4,cp_scheme=ulysses,micro_batches=3"),
    "sinks": (worlds.SINKS, "tp=4"),
    "sinks, ring": (worlds.SINKS, "cp=4,ep=2"),
    "sinks, ulysses": (worlds.SINKS, "cp=4,ulysses=2"),
    "sinks, slices": (worlds.SINKS, "cp=2,dim=2,micro_batches=5"),
    "sinks, gathered slices": (worlds.SINKS, "dim=2,dim_algo=gather"),
    "sinks, summed scores": (worlds.SINKS, "dim=2,dim_algo=reduce"),
    "four axes": (worlds.DENSE, "pp=2,dp=2,cp=2,tp=2,micro_batches=2"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_of_every_family_is_exact(family, dtype):
    spec, text = FAMILIES[family]
    plan = parse_plan(text)
    LocalWorld(plan.world, seed=1).run(lambda e: checks.plan_is_exact(e, spec, plan, dtype))
