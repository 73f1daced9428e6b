"""Models in a program of one's own: loaded on all ranks, logits of its sequences."""

import numpy as np
import pytest
from mpi4py import MPI

from pympa import Session
from pympa.errors import RefusedError
from pympa.model.random_weights import random_weights
from pympa.model.weights import full_weight, model_weights
from pympa.plan.layout import split
from support import worlds
from support.model_files import load_family, prompt, rows_of, weights, write_family

SIZE = MPI.COMM_WORLD.Get_size()
PLANS = {1: ["tp=1"], 2: ["tp=2", "cp=2", "dp=2"], 4: ["tp=2,cp=2", "pp=3,micro_batches=2"]}
TOLERANCE = 2e-6 * 3**0.5


def error(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.fixture
def directory(tmp_path):
    """A model directory that all ranks see."""
    path = MPI.COMM_WORLD.bcast(str(tmp_path))
    if MPI.COMM_WORLD.Get_rank() == 0:
        write_family("qwen3", tmp_path)
    MPI.COMM_WORLD.Barrier()
    return path


def plan_of():
    return PLANS[SIZE][0] if SIZE in PLANS else f"cp={SIZE}"


@pytest.mark.parametrize("number", range(3))
def test_logits_of_a_directory(directory, number):
    plans = PLANS.get(SIZE, [])
    if number >= len(plans) or "3" in plans[number]:
        pytest.skip("no such plan for this number of ranks")
    want = load_family("qwen3")["logits"]
    ids = [prompt(7), prompt(1), prompt(300)]
    with Session(plans[number]) as session, session.load(directory) as model:
        logits = model.logits(ids)
        if session.rank:
            assert logits is None
        else:
            assert [one.shape for one in logits] == [(7, 99), (1, 99), (300, 99)]
            for one, of in zip(logits, ids, strict=True):
                assert one.dtype == np.float32
                assert error(one[rows_of(len(of))], np.array(want[str(len(of))])) < TOLERANCE
        again = model.logits([list(map(int, of)) for of in ids], everywhere=True, last=True)
        assert [one.shape for one in again] == [(1, 99)] * 3
        if session.rank == 0:
            for one, whole in zip(again, logits, strict=True):
                assert error(one[0], whole[-1]) < TOLERANCE


def test_weights_of_ones_own():
    """By the names of the family's files with its configuration, or by ours with a spec."""
    family = load_family("qwen3")
    arrays = weights(family["tensors"])
    want = np.array(family["logits"]["7"])
    with Session(plan_of()) as session:
        with session.load(family["config"], weights=arrays) as model:
            logits = model.logits([prompt(7)], everywhere=True)
            assert error(logits[0], want) < TOLERANCE
        spec = worlds.DENSE
        source = random_weights(spec)
        named = {
            name: full_weight(source, weight, np.dtype(np.float32)).astype(np.float32)
            for name, weight in model_weights(spec).items()
        }
        with session.load(spec, weights=named) as own, session.load(spec) as random:
            ids = [prompt(20)]
            found, other = (m.logits(ids, everywhere=True)[0] for m in (own, random))
            np.testing.assert_array_equal(found, other)


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is the extra 'peers'")
    family = load_family("llama")
    arrays = weights(family["tensors"])
    halves = {name: torch.from_numpy(a).to(torch.bfloat16) for name, a in arrays.items()}
    with Session(plan_of()) as session:
        whole = {name: torch.from_numpy(a) for name, a in arrays.items()}
        with session.load(family["config"], weights=whole) as model:
            logits = model.logits([torch.from_numpy(prompt(7))], everywhere=True)
            assert error(logits[0], np.array(family["logits"]["7"])) < TOLERANCE
        with session.load(family["config"], dtype="bfloat16", weights=halves) as model:
            logits = model.logits([torch.from_numpy(prompt(7)).long()], everywhere=True)
            assert error(logits[0], np.array(family["logits"]["7"])) < 0.1


WRONG_SEQUENCES = [
    ([], "sequences: expected a list of at least one sequence"),
    ([[]], r"sequences\[0\]: expected at least one token; got none"),
    ([[1, 99]], r"sequences\[0\]: expected token ids in 0..98; got 99"),
    ([[1], [-3]], r"sequences\[1\]: expected token ids in 0..98; got -3"),
    (["ab"], "expected token ids; got a text"),
    ([[1.5]], "expected whole numbers"),
    ([np.ones((2, 2), np.int32)], r"expected whole numbers \[tokens\]; got int32 \[2, 2\]"),
    ([np.ones(2)], r"expected whole numbers \[tokens\]; got float64"),
    ([object()], "expected an array of NumPy, CuPy or torch; got builtins.object"),
    ([[1, False]], "expected whole numbers; got"),
    ([[2**70]], r"expected token ids in 0\.\.98; got 1180591620717411303424"),
]


def test_wrong_sequences_are_refused_on_all_ranks(directory):
    with Session(plan_of()) as session, session.load(directory) as model:
        for sequences, message in WRONG_SEQUENCES:
            with pytest.raises(RefusedError, match=message):
                model.logits(sequences)
        with pytest.raises(RefusedError, match="everywhere, last: expected True or False"):
            model.logits([[1]], everywhere=np.array([1, 0]))
        if SIZE > 1:
            with pytest.raises(RefusedError, match="logits: expected the same on all ranks"):
                model.logits([[session.rank]])
        assert model.logits([[1, 2]], everywhere=True)[0].shape == (2, 99)
        if session.rank == SIZE - 1:
            model.close()
        with pytest.raises(RefusedError, match="expected a model that is not closed"):
            model.logits([[1]])
    with Session(plan_of()) as session:
        model = session.load(directory, context=20)
        with pytest.raises(RefusedError, match=r"sequences\[1\]: expected at most 20 tokens"):
            model.logits([[1], [1] * 21])


def own(**changes):
    """Return arrays for a model of ours, with some changed."""
    source = random_weights(worlds.DENSE)
    known = model_weights(worlds.DENSE).items()
    found = {name: full_weight(source, weight, np.float32) for name, weight in known}
    return found | changes


def test_ranks_with_other_weights_are_refused():
    weights = own()
    weights["head"][100:] += MPI.COMM_WORLD.Get_rank()
    with Session(plan_of()) as session:
        if SIZE > 1:
            with pytest.raises(RefusedError, match="load: expected the same on all ranks"):
                session.load(worlds.DENSE, weights=weights)


def test_a_dtype_that_does_not_hold_a_weight_is_refused_on_all_ranks():
    weights = own()
    weights["layers.0.attention.q"][0, 0] = 1e6
    with Session(plan_of()) as session:
        with pytest.raises(
            RefusedError, match=r"attention\.q: expected numbers that float16 holds"
        ):
            session.load(worlds.DENSE, weights=weights, dtype="float16")
        with session.load(worlds.DENSE, weights=weights) as model:
            assert model.logits([[1, 2]], everywhere=True)[0].shape == (2, 256)


def test_the_same_call_again_needs_no_more_memory(directory):
    with Session(plan_of()) as session, session.load(directory) as model:
        for _ in range(3):
            model.logits([[1] * 300])
        held = model._resources.arena.touched_bytes
    assert held >= model._needed[(300,), False]


def test_wrong_models_are_refused_on_all_ranks(directory):
    with Session(plan_of()) as session:
        for model, options, message in (
            ("/nowhere/at/all", {}, "expected a model directory or a file"),
            (directory, {"dtype": "int8"}, "dtype: expected one of float32"),
            (directory, {"weights": {}}, "expected a tensor model.embed_tokens.weight"),
            (directory, {"weights": [1]}, "weights: expected arrays by name; got list"),
            (directory, {"weights": {"a": 1}}, r"weights\['a'\]: expected an array of float32"),
            (directory, {"ignore_fields": "foo"}, "ignore_fields: expected a list of names"),
            (5, {}, "model: expected a path, the fields of a config.json, or a ModelSpec; got int"),
            (worlds.DENSE, {"weights": {}}, "expected a tensor embedding"),
            (worlds.DENSE, {"weights": own(head=np.zeros((256, 40)) + 1j)}, "got complex128"),
            (worlds.DENSE, {"weights": own(head=np.zeros((261, 40)))}, r"the shape \[256, 40\]"),
            (worlds.DENSE, {"weights": own(more=np.zeros(3))}, "got also more"),
            ({"architectures": ["X"]}, {"weights": {}}, "architectures: expected one of"),
            (load_family("qwen3")["config"], {}, "weights: expected arrays by name"),
            (directory, {"context": 1 << 40}, "does not fit: node"),
            (directory, {"context": 0}, "context: expected a whole number from 1 to"),
            (directory, {"context": 10, "batch": 1 << 30}, "batch: expected a whole number"),
        ):
            with pytest.raises(RefusedError, match=message):
                session.load(model, **options)
        with session.load(directory) as found:
            heavy = [np.zeros(60_000_000, np.int32)]
            with pytest.raises(RefusedError, match="does not fit: node"):
                found.logits(heavy)


def test_shares_are_read_alone(directory):
    """A rank asks the files for its rows and columns only."""
    from pympa.checkpoint.source import CheckpointSource

    read = []
    of_files = CheckpointSource.read

    def counted(self, spec, out, rows=None, cols=None):
        read.append(out.size)
        return of_files(self, spec, out, rows, cols)

    CheckpointSource.read = counted
    try:
        with Session(f"tp={SIZE}" if SIZE <= 4 else plan_of()) as session:
            with session.load(directory) as model:
                whole = sum(int(np.prod(w.shape)) for w in model_weights(model.spec).values())
            share = max(b - a for a, b in split(4, SIZE)) / 4 if SIZE <= 4 else 1.0
            assert sum(read) <= whole * (share + 0.2)
    finally:
        CheckpointSource.read = of_files
