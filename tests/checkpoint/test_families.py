"""Families of models: the logits of transformers in float64, on one rank and on every axis."""

import math

import numpy as np
import pytest

from pympa.checkpoint.checkpoint import open_checkpoint
from pympa.model.model import Model
from pympa.model.weights import full_weight, model_weights
from pympa.plan.mesh import parse_plan
from pympa.session.loaded_model import collect_logits
from pympa.session.resources import build_resources
from pympa.transport import Transport
from pympa.transport.endpoint import WORLD
from pympa.transport.local import LocalWorld
from pympa.verify import reference
from pympa.verify.contract import TOLERANCE
from support import worlds
from support.lanes import lanes
from support.model_files import PROMPTS, families, load_family, prompt, rows_of, write_family

PLANS = ["tp=1", "cp=2", "tp=2", "pp=2", "dim=2", "dp=2,ep=2"]
FEW = 7  # cases of the fast lane are every so many


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    found = {}

    def get(name):
        if name not in found:
            directory = tmp_path_factory.mktemp("families") / name
            write_family(name, directory)
            found[name] = open_checkpoint(directory)
        return found[name]

    return get


def run(checkpoint, plan, batches):
    """Return the logits of batches of sequences on rank threads."""
    plan = parse_plan(plan)

    def work(endpoint):
        rank = build_resources(endpoint, plan, isa=worlds.ISA)
        world = Transport(
            endpoint, WORLD, range(endpoint.size), rank.arena, rank.trace, rank.traffic
        )
        model = Model(checkpoint.spec, rank, np.dtype(np.float32), checkpoint.source)
        found = []
        for ids in batches:
            with rank.arena.scope():
                logits = model.forward(model.prepare(ids, all_logits=True))
                found.append(collect_logits(model, world, logits, [len(s) for s in ids]))
        return found

    return LocalWorld(plan.world, seed=1).run(work)[0]


def error(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


def expected(name):
    """Return the stored logits by tokens of the prompt."""
    return {n: np.array(load_family(name)["logits"][str(n)]) for n in PROMPTS}


CASES = [(name, plan) for name in families() for plan in PLANS]


@pytest.mark.parametrize(("name", "plan"), lanes(CASES, range(0, len(CASES), FEW)))
def test_logits_of_every_family(name, plan, checkpoint_of):
    checkpoint = checkpoint_of(name)
    spec = checkpoint.spec
    if "ep" in plan and not spec.has_experts:
        pytest.skip("the family has no experts")
    tolerance = TOLERANCE["float32"] * math.sqrt(len(spec.blocks))
    batches = [[prompt(n)] for n in PROMPTS]
    if not spec.depends_on_context:  # otherwise the longest sequence changes the others
        batches.append([prompt(n) for n in PROMPTS])
    alone, ragged = {}, {}
    found = run(checkpoint, plan, batches)
    for n, logits in zip(PROMPTS, found, strict=False):
        alone[n] = logits[0]
    if len(found) > len(PROMPTS):
        ragged = dict(zip(PROMPTS, found[-1], strict=True))
    for n, want in expected(name).items():
        for logits in (alone, ragged):
            if n in logits:
                assert error(logits[n][rows_of(n)], want) < tolerance, (n, logits is ragged)


@pytest.mark.parametrize("name", families())
def test_the_oracle_of_every_family(name, checkpoint_of):
    checkpoint = checkpoint_of(name)
    specs = model_weights(checkpoint.spec)

    def weight(tensor):
        return full_weight(checkpoint.source, specs[tensor], np.dtype(np.float32))

    for n, want in expected(name).items():
        _, logits = reference.forward(checkpoint.spec, weight, [prompt(n)], all_logits=True)
        assert error(logits[rows_of(n)], want) < 1e-9  # as many digits as are stored


@pytest.mark.parametrize("name", families())
def test_transformers_itself(name, checkpoint_of):
    """What is stored is what the installed version gives, and all tokens of our run equal it."""
    pytest.importorskip("transformers", reason="transformers is the extra 'peers'")
    pytest.importorskip("torch", reason="torch is the extra 'peers'")
    from support.peer_models import exact_logits

    checkpoint = checkpoint_of(name)
    tolerance = TOLERANCE["float32"] * math.sqrt(len(checkpoint.spec.blocks))
    found = run(checkpoint, "tp=1", [[prompt(n)] for n in PROMPTS])
    for n, logits in zip(PROMPTS, found, strict=True):
        want = exact_logits(checkpoint.files.directory, prompt(n))
        assert error(want[rows_of(n)], expected(name)[n]) < 1e-9
        assert error(logits[0], want) < tolerance
