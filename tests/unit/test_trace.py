"""Where the time of a step goes: the definitions, on clocks that tests turn by hand."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pympa.plan.mesh import Plan
from pympa.runtime.step import Flight, Overlap, Span, Step, Times, mean_times, union
from pympa.runtime.trace import Trace
from pympa.transport.endpoint import Message
from pympa.transport.local import LocalWorld
from support import worlds


class Clock:
    """Stands still until `pass_`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def message(peer: int, nbytes: int) -> Message:
    return Message(np.zeros(nbytes, np.uint8), peer, 0)


def test_a_message_partly_hidden():
    """Posted, 5 s of computing, 2 s of Python, 3 s of waiting until it is there."""
    clock = Clock()
    trace = Trace(clock)
    with trace.step():
        clock.pass_(1)
        seen = trace.post("cp", [message(3, 64)], [message(1, 32)])
        with trace.span("compute", "attend_block"):
            clock.pass_(5)
        clock.pass_(2)
        seen(1)
        with trace.span("wait", "cp"):
            clock.pass_(3)
            seen(0)
        with trace.span("compute", "finish"):
            clock.pass_(4)
    assert trace.last == Step(
        100,
        115,
        [
            Span("compute", "attend_block", 101, 106),
            Span("wait", "cp", 108, 111),
            Span("compute", "finish", 111, 115),
        ],
        [Flight("cp", 3, 64, True, 101, 111), Flight("cp", 1, 32, False, 101, 108)],
    )
    assert trace.last.times() == Times(15, 9, {"cp": 3}, 7, {"cp": Overlap(10, 3, 7)})


def test_seen_before_the_wait_is_all_hidden():
    clock = Clock()
    trace = Trace(clock)
    with trace.step():
        seen = trace.post("cp", [message(1, 8)], [])
        clock.pass_(2)
        seen(0)  # a poll
        clock.pass_(6)
        with trace.span("wait", "cp"):
            pass
    assert trace.last.times() == Times(8, 0, {"cp": 0}, 2, {"cp": Overlap(2, 0, 2)})


def test_waiting_for_one_axis_does_not_hide_another():
    clock = Clock()
    trace = Trace(clock)
    with trace.step():
        stage = trace.post("pp", [message(2, 8)], [])
        clock.pass_(1)
        reduce = trace.post("tp", [message(1, 8)], [])
        with trace.span("wait", "tp"):
            clock.pass_(4)
            reduce(0)
        clock.pass_(2)
        stage(0)
    times = trace.last.times()
    assert times.overlap == {"pp": Overlap(7, 4, 3), "tp": Overlap(4, 4, 0)}
    assert (times.waits, times.hidden) == ({"tp": 4}, 3)


def test_what_is_under_way_when_the_step_ends_counts_until_then():
    clock = Clock()
    trace = Trace(clock)
    with trace.step():
        seen = trace.post("pp", [], [message(1, 8), message(1, 8)])
        clock.pass_(3)
    clock.pass_(9)
    seen(0)
    assert trace.last.times().overlap == {"pp": Overlap(3, 0, 3)}


def test_a_trace_keeps_one_step_and_nothing_outside_of_steps():
    clock = Clock()
    trace = Trace(clock)

    def work():
        with trace.span("compute", "linear"):
            clock.pass_(1)
        trace.post("cp", [message(1, 8)], [])(0)

    work()
    assert trace.last == Step(0, 0, [], [])
    for _ in range(3):
        with trace.step():
            work()
        assert len(trace.last.spans) == len(trace.last.flights) == 1
        work()
    kept = trace.last
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert trace.last.spans is kept.spans


EVENT = st.one_of(
    st.tuples(st.sampled_from(["compute", "wait", "other"]), st.integers(0, 4)),
    st.tuples(st.just("post"), st.sampled_from(["cp", "tp", "pp"])),
    st.tuples(st.just("see"), st.integers(0, 99)),
)


@given(st.lists(EVENT, max_size=40))
def test_any_step_adds_up(events):
    """Against a count of every second, one by one."""
    clock = Clock()
    trace = Trace(clock)
    flying: list[tuple[str, object]] = []
    doing: list[tuple[str, set[str]]] = []  # of each second: what, and the axes in flight
    with trace.step():
        for what, value in events:
            if what == "post":
                flying.append((value, trace.post(value, [message(1, 8)], [])))
            elif what == "see" and flying:
                flying.pop(value % len(flying))[1](0)
            elif what in ("compute", "wait"):
                with trace.span(what, "cp"):
                    clock.pass_(value)
                doing += [(what, {axis for axis, _ in flying})] * value
            elif what == "other":
                clock.pass_(value)
                doing += [(what, {axis for axis, _ in flying})] * value
        for _, seen in flying:
            seen(0)
    times = trace.last.times()
    assert times.step == len(doing)
    assert times.compute == sum(what == "compute" for what, _ in doing)
    waited = sum(times.waits.values())
    assert waited == sum(what == "wait" for what, _ in doing)
    assert times.hidden == sum(what != "wait" and bool(axes) for what, axes in doing)
    for axis, overlap in times.overlap.items():
        assert overlap.in_flight == sum(axis in axes for _, axes in doing)
        assert overlap.exposed == sum(what == "wait" and axis in axes for what, axes in doing)
        assert overlap.in_flight == overlap.exposed + overlap.hidden
        assert overlap.exposed <= waited
        assert 0 <= overlap.hidden <= times.hidden


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=12))
def test_union(pairs):
    found = union((start, start + length) for start, length in pairs)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
    ticks = {t for start, length in pairs for t in range(start, start + length)}
    assert {t for start, stop in found for t in range(start, stop)} == ticks


def test_means():
    first = Times(2, 1, {"cp": 1.0}, 3, {"cp": Overlap(4, 1, 3)})
    second = Times(4, 3, {"pp": 2.0}, 5, {"cp": Overlap(6, 1, 5), "pp": Overlap(2, 2, 0)})
    assert mean_times([first, second]) == Times(
        3, 2, {"cp": 0.5, "pp": 1.0}, 4, {"cp": Overlap(5, 1, 4), "pp": Overlap(1, 1, 0)}
    )


def test_a_step_that_fails_ends():
    clock = Clock()
    trace = Trace(clock)

    def fail():
        with trace.step():
            clock.pass_(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert trace.last.times().step == 1


def traced_steps(plan: Plan, seed: int | None) -> list[Step]:
    """Run one step on rank threads; the clock counts scheduling steps."""
    world = LocalWorld(plan.world, seed=seed)

    def by_world_clock(rank):
        rank.trace.clock = lambda: float(world.steps)

    results = world.run(
        lambda e: worlds.run_plan(e, worlds.DENSE, plan, worlds.LENGTHS, "float32", by_world_clock)
    )
    return [rank.trace.last for _, rank in results]


@pytest.mark.parametrize("seed", range(4))
def test_ring_attention_hides_its_blocks(seed):
    """Polls between attention and waits pass turns on, in which delayed blocks arrive."""
    steps = traced_steps(Plan(cp=3), seed)
    assert steps == traced_steps(Plan(cp=3), seed)
    for step in steps:
        times = step.times()
        ring = times.overlap["cp"]
        assert set(times.overlap) == set(times.waits) == {"cp"}
        assert ring.hidden == times.hidden > 0
        assert ring.exposed <= times.waits["cp"] < times.step


def test_sums_of_partials_hide_nothing():
    """They are waited for where they are started, so without other ranks in between all is seen."""
    for step in traced_steps(Plan(tp=3), None):
        sums = step.times().overlap["tp"]
        assert sums.hidden == 0
        assert sums.exposed == sums.in_flight > 0


def test_spans_are_named_to_a_profiler_inside_of_steps():
    seen = []
    trace = Trace(clock=itertools.count().__next__)
    trace.named_ranges = seen.append, lambda: seen.append("end")
    with trace.span("compute", "linear"):
        pass
    with trace.step():
        with trace.span("compute", "linear"):
            seen.append("kernel")
        with pytest.raises(ValueError, match="late"), trace.span("wait", "cp"):
            raise ValueError("late")
    assert seen == ["compute linear", "kernel", "end", "wait cp", "end"]
    assert [span.name for span in trace.last.spans] == ["linear", "cp"]
