"""Many micro-batches: what one of them costs depends on its own sequences, not on their number."""

import sys
from collections.abc import Callable

import numpy as np
import pytest

from pympa.footprint.rehearsal import Rehearsal, rehearse
from pympa.footprint.working_set import micro_batches_within, most_rows
from pympa.model.batch import lay_out_batch
from pympa.model.model import Model
from pympa.plan.comm_volume import comm_volume
from pympa.plan.layout import Layout, Range, split_micro_batches
from pympa.plan.mesh import Mesh, Plan, parse_plan
from pympa.session.resources import build_resources
from pympa.spec import DTYPES
from pympa.transport.endpoint import NullEndpoint
from pympa.transport.local import LocalWorld
from support import worlds
from support.lanes import FULL, lanes

SHORT = (4,) * 59
CUT = [  # micro-batches that cut sequences: one more than these are, or many more
    "tp=1,micro_batches=60",
    "tp=1,micro_batches=150",
    "cp=2,micro_batches=60",
    "cp=2,micro_batches=60,balance=contiguous",
    "cp=4,micro_batches=90",
    "cp=4,ulysses=2,micro_batches=70",
    "cp=2,cp_scheme=ulysses,micro_batches=60",
    "cp=3,cp_scheme=allgather,micro_batches=60",
    "dp=2,micro_batches=31",
    "dp=2,cp=2,pp=2,micro_batches=30",
    "cp=2,dim=2,dim_algo=reduce,micro_batches=60",
]
FEW_RANGES = 8  # of two or three sequences, in the halves that zigzag makes of what is cut


def counted(work: Callable[[], object]) -> int:
    """Return how many functions Python and C call in some work."""
    calls = 0

    def count(frame: object, event: str, what: object) -> None:
        nonlocal calls
        calls += event.endswith("call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("shares_memory", lanes([False, True], [0]), ids=["sent", "shared"])
@pytest.mark.parametrize("text", lanes(CUT, [0, 3, 5, 7, 9]))
def test_attention_meets_the_keys_of_its_own_sequences(text, shares_memory):
    ranges = []

    def spy(rank):
        attend = rank.kernels.attend_block

        def attend_block(q, q_layout, kv, state, spec):
            assert len(kv.k) == len(kv.v) == kv.layout.rows
            ranges.append((len(q_layout.ranges), len(kv.layout.ranges)))
            attend(q, q_layout, kv, state, spec)

        rank.kernels.attend_block = attend_block

    plan = parse_plan(text)
    outputs, ranks = worlds.run_local(
        worlds.DENSE, plan, SHORT, alter=spy, shares_memory=shares_memory
    )
    verdict = worlds.judge(worlds.DENSE, outputs, SHORT)
    assert verdict.passed, verdict.failed
    assert max((max(pair) for pair in ranges), default=0) <= FEW_RANGES
    if plan.cp == plan.dim == 1:
        alone = worlds.one_rank(worlds.DENSE, SHORT, "float32")
        assert worlds.digest(outputs) == worlds.digest(alone)
    volume = comm_volume(worlds.DENSE, plan, SHORT, 4, shares_memory=shares_memory)
    assert worlds.sent_by_axis(ranks) == volume.sent
    assert worlds.by_axis(rank.traffic.read for rank in ranks) == volume.read


@pytest.mark.parametrize("text", lanes(CUT, [0, 2, 9]))
def test_what_stands_for_micro_batches_that_are_alike_needs_what_they_need(text):
    plan = parse_plan(text)

    def body(endpoint):
        rank = build_resources(endpoint, plan, isa=worlds.ISA)
        model = Model(worlds.DENSE, rank, DTYPES["float32"])
        model.forward(model.prepare(worlds.batch(SHORT)))
        return rank.arena.peak_bytes

    rehearsed = [
        rehearse(worlds.DENSE, plan, rank, SHORT, DTYPES["float32"], isa=worlds.ISA)
        for rank in range(plan.world)
    ]
    assert LocalWorld(plan.world).run(body) == rehearsed


def kinds(plan: Plan, lengths: tuple[int, ...]) -> list[int]:
    ids = [np.broadcast_to(np.int32(0), (length,)) for length in lengths]
    batch = lay_out_batch(Mesh(plan, 0), ids, plan.micro_batches, dry=True)
    return [part.kind for part in batch.micro_batches]


def test_micro_batches_that_are_alike():
    assert kinds(parse_plan("cp=2,micro_batches=4"), (5, 5, 6, 5)) == [0, 0, 2, 0]
    # 8 tokens in 5 chunks: 2, 2, 2, 1, 1; the last two are the end of a sequence that was cut
    assert kinds(Plan(micro_batches=5), (2, 2, 2, 2)) == [0, 0, 0, 3, 4]
    assert kinds(Plan(micro_batches=6), (3, 3, 3, 3)) == [0, 1, 2, 0, 1, 2]
    assert kinds(Plan(micro_batches=4), (8,)) == [0, 1, 2, 3], "each meets more keys"
    assert len(set(kinds(parse_plan("cp=2,dp=2,micro_batches=1501"), (4,) * 3000))) < 9


def test_alike_on_one_rank_is_not_alike():
    """The second sequence of a micro-batch is cut in one of two, and whole in the other."""
    assert kinds(parse_plan("cp=2,micro_batches=7"), (6, 2, 6, 4, 2, 2)) == [*range(7)]


class Counting(tuple):
    """Ranges that count how often one of them is looked at."""

    looks = 0

    def __getitem__(self, index):
        Counting.looks += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)

    def __iter__(self):
        Counting.looks += len(self)
        return super().__iter__()


def test_splitting_looks_at_each_range_a_few_times():
    layout = Layout(Counting(Range(sequence, 0, 4) for sequence in range(3000)))
    Counting.looks = 0
    parts = split_micro_batches(layout, 3001)
    assert sum(part.rows for part in parts) == 12_000
    assert Counting.looks <= 4 * 3001


@pytest.mark.parametrize("text", lanes(["tp=1", "cp=2", "dp=2"], [1]))
def test_three_thousand_micro_batches_are_rehearsed_at_once(text):
    rehearsal = Rehearsal(
        worlds.DENSE, parse_plan(text), 0, DTYPES["float32"], isa=worlds.ISA
    )  # fmt: skip

    def calls(count: int) -> int:
        return counted(lambda: rehearsal.step((4,) * (count - 1), micro_batches=count))

    calls(3)  # what is imported and cached only once
    few, many = calls(301), calls(3001)
    assert many < 10.5 * few


@FULL
def test_a_step_is_linear_in_micro_batches():
    rank = build_resources(NullEndpoint(0, 1), Plan(), isa=worlds.ISA)
    model = Model(worlds.DENSE, rank, DTYPES["float32"])

    def calls(count: int) -> int:
        ids = worlds.batch((4,) * (count - 1))
        return counted(lambda: model.forward(model.prepare(ids, count)))

    calls(3)
    few, many = calls(101), calls(601)
    assert many < 6.2 * few


def test_the_fewest_micro_batches_are_found_without_trying_all(monkeypatch):
    tried = []

    def spy(plan, lengths, count):
        tried.append(count)
        return most_rows(plan, lengths, count)

    monkeypatch.setattr("pympa.footprint.working_set.most_rows", spy)
    lengths = [4] * 3000
    assert micro_batches_within(Plan(), worlds.DENSE, lengths, 40) == 300
    assert micro_batches_within(Plan(), worlds.DENSE, lengths, 3) == 4000
    assert micro_batches_within(Plan(cp=2), worlds.DENSE, lengths, 40) == 150
    assert micro_batches_within(Plan(), worlds.NOT_CAUSAL, lengths, 3) == 3000
    assert len(tried) < 20
