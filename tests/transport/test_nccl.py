"""Messages between devices by NCCL, or what stands for it: order, deadlines, whole models."""

import time

import numpy as np
import pytest

from pympa.plan.mesh import Plan
from pympa.transport import nccl
from pympa.transport.endpoint import TransportError
from pympa.transport.nccl import NcclEndpoint
from support import device_checks, worlds
from support.device_worlds import run_over_nccl
from support.fake_nccl import Fabric
from support.lanes import lanes


def _only_plans(value):
    return str(value) if isinstance(value, Plan) else ""


def test_a_peer_that_stays_away_has_a_deadline():
    """Starting and waiting cost the host nothing; what the host reads ends with a message."""

    def body(rank):
        pair = rank.axis()
        if pair.index == 0:
            got = rank.zeros((4,), np.float32)
            pair.wait(pair.start([], [(got, 1)]))
            rank.device.read(got)
        return

    with pytest.raises(TransportError, match=r"rank 0 waited 0.3 s on cp .* ranks \[1\]"):
        run_over_nccl(2, 0, body, timeout_seconds=0.3)


def test_closing_waits_for_messages_no_longer_than_the_deadline():
    def body(rank):
        pair = rank.axis("pp")
        if pair.index == 0:
            pair.start([(rank.zeros((4,), np.float32), 1)], [])

    with pytest.raises(TransportError, match=r"rank 0 waited 0.3 s on pp .* ranks \[1\]"):
        run_over_nccl(2, 0, body, timeout_seconds=0.3)


def test_long_kernels_are_no_late_messages():
    """The deadline counts from when a device has come to the messages, which then arrive."""
    deadline = 0.1

    def body(rank):
        pair, device = rank.axis(), rank.device
        done = time.monotonic() + 5 * deadline
        device.enqueue(device.compute, lambda: None, lambda: time.monotonic() >= done)
        got, other = rank.zeros((4,), np.float32), 1 - pair.index
        own = rank.array(np.full(4, 1 + pair.index, np.float32))
        pair.wait(pair.start([(own, other)], [(got, other)]))
        device.timeout_seconds = 20
        return device.read(got).tolist(), time.monotonic() >= done

    assert run_over_nccl(2, 0, body, timeout_seconds=deadline) == [
        ([2.0] * 4, True),
        ([1.0] * 4, True),
    ]


def test_an_error_of_nccl_ends_the_rank():
    fabric = Fabric()

    def body(rank):
        pair = rank.axis("tp")
        if pair.index == 0:
            pair.start([], [(rank.zeros((4,), np.float32), 1)])
            fabric.error = "remote process exited"
            pair.poll()

    with pytest.raises(TransportError, match=r"on tp with ranks \[1\]: remote process exited"):
        run_over_nccl(2, 0, body, fabric)


def test_a_message_of_another_size():
    def body(rank):
        pair, size = rank.axis(), 2 + rank.endpoint.rank
        got = rank.zeros((2,), np.float64)
        pair.start([(rank.zeros((size,), np.float64), 1 - pair.index)], [(got, 1 - pair.index)])
        rank.device.synchronise("kernels")
        while True:
            pair.poll()

    with pytest.raises(TransportError, match="rank 0 expected 16 bytes from rank 1; got 24"):
        run_over_nccl(2, 0, body)


def test_ranks_that_never_connect():
    with pytest.raises(TransportError, match=r"waited 0.2 s on a communicator .* ranks \[0, 1\]"):
        run_over_nccl(2, 0, lambda rank: None, Fabric(stuck=True), timeout_seconds=0.2)


class Patient(NcclEndpoint):
    """Returns from `start` when all is sent and received, as if the host waited every time."""

    def _start(self, sends, receives, seen):
        group = super()._start(sends, receives, seen)
        self._until(lambda: group.finished, group.peers, group.what)
        return group


STREAMED = [
    (worlds.DENSE, Plan(pp=4, micro_batches=7)),
    (worlds.DENSE, Plan(pp=2, cp=2, micro_batches=5)),
    (worlds.DENSE, Plan(pp=2, tp=2, micro_batches=3)),
    (worlds.DENSE, Plan(pp=2, dim=2, micro_batches=3)),
    (worlds.ODD_EXPERTS, Plan(pp=2, dp=2, ep=2, micro_batches=3)),
]


@pytest.mark.parametrize(("spec", "plan"), STREAMED, ids=_only_plans)
@pytest.mark.parametrize("how", ["one lane", "patient"])
def test_order_alone_keeps_ranks_from_a_circle(spec, plan, how, monkeypatch):
    """Neither lanes of their own nor a host that runs ahead is needed to come to the end."""
    if how == "one lane":
        monkeypatch.setattr(nccl, "_LANES", {})
    run_over_nccl(
        plan.world,
        3,
        lambda rank: device_checks.same_as_on_the_host(
            rank.endpoint, rank.device, spec, plan, "bfloat16"
        ),
        endpoint_class=Patient if how == "patient" else NcclEndpoint,
    )


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (worlds.DENSE, Plan(cp=3)),
        (worlds.DENSE, Plan(tp=2, pp=2, micro_batches=3)),
        (worlds.DENSE, Plan(pp=4, micro_batches=5)),
        (worlds.ODD, Plan(cp=2, tp=2)),
        (worlds.DENSE, Plan(cp=2, dim=2)),
        (worlds.DENSE, Plan(cp=2, dim=2, dim_algo="reduce")),
        (worlds.DENSE, Plan(cp=4, ulysses=2)),
        (worlds.DENSE, Plan(cp=3, cp_scheme="allgather")),
        (worlds.SLIDING, Plan(cp=4)),
        (worlds.EXPERTS, Plan(dp=2, tp=2, ep=2, etp=2)),
        (worlds.ODD_EXPERTS, Plan(cp=2, dp=2, ep=4)),
    ],
    ids=_only_plans,
)
@pytest.mark.parametrize("seed", lanes([0, 1], [1]))
def test_whole_models(spec, plan, seed):
    """Bits and bytes are those of the host."""
    run_over_nccl(
        plan.world,
        seed,
        lambda rank: device_checks.same_as_on_the_host(
            rank.endpoint, rank.device, spec, plan, "bfloat16"
        ),
    )
