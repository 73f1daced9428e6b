"""Messages between devices through the host's memory, on rank threads; over MPI: mpi/."""

import numpy as np
import pytest

from pympa.plan.mesh import Plan
from pympa.transport.endpoint import TransportError
from support import device_checks, worlds
from support.device_worlds import run_staged
from support.lanes import lanes


@pytest.mark.parametrize("seed", lanes(range(3), [0]))
@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 129, 1000])
def test_pieces(size, seed):
    """Messages of any length around that of pieces, several to the same peer at once."""

    def body(rank):
        pair = rank.axis()
        other = 1 - pair.index
        values = [np.full(size, 1 + 2 * i + pair.index, np.uint8) for i in range(3)]
        sends = [(rank.array(value), other) for value in values]
        got = [rank.zeros((size,), np.uint8) for _ in values]
        pair.wait(pair.start(sends, [(array, other) for array in got]))
        for i, array in enumerate(got):
            assert (rank.device.read(array) == 1 + 2 * i + other).all()

    run_staged(2, seed, body)


def test_pinned_memory_is_two_pieces_for_each_lane():
    def body(rank):
        device_checks.messages_keep_their_order(rank)
        rank.device.read(rank.zeros((1,), np.uint8))  # by a window of its own
        window = rank.device._window.nbytes
        lanes = 2 * 2  # cp and tp, one peer to send to and one to receive from
        assert rank.device.pinned_bytes - window == lanes * 2 * 64

    run_staged(3, 0, body)


def test_a_peer_that_stays_away_has_a_deadline():
    def body(rank):
        pair = rank.axis()
        if pair.index == 0:
            pair.wait(pair.start([], [(rank.zeros((4,), np.float32), 1)]))

    with pytest.raises(TransportError, match=r"rank 0 waited 0.3 s on cp .* ranks \[1\]"):
        run_staged(2, 0, body, timeout_seconds=0.3)


@pytest.mark.parametrize("sizes", [(2, 3), (8, 16), (16, 8), (9, 8), (100, 4)])
def test_a_message_of_another_size(sizes):
    """Even where the difference is a whole piece."""

    def body(rank):
        pair, size = rank.axis(), sizes[rank.endpoint.rank]
        other = 1 - pair.index
        got = rank.zeros((sizes[0],), np.float64)
        pair.wait(pair.start([(rank.zeros((size,), np.float64), other)], [(got, other)]))

    with pytest.raises(TransportError, match=r"expected .* bytes from rank .; got"):
        run_staged(2, 0, body)


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (worlds.DENSE, Plan(cp=3)),
        (worlds.DENSE, Plan(tp=2, pp=2, micro_batches=3)),
        (worlds.DENSE, Plan(cp=2, dim=2)),
        (worlds.DENSE, Plan(cp=4, ulysses=2)),
        (worlds.SLIDING, Plan(cp=4)),
        (worlds.ODD_EXPERTS, Plan(cp=2, dp=2, ep=4)),
    ],
    ids=lambda value: str(value) if isinstance(value, Plan) else "",
)
@pytest.mark.parametrize("piece_bytes", lanes([1 << 10, 1 << 20], [0]))
def test_whole_models(spec, plan, piece_bytes):
    """Bits and bytes are those of the host."""

    def body(rank):
        device_checks.same_as_on_the_host(rank.endpoint, rank.device, spec, plan, "bfloat16")

    run_staged(plan.world, 0, body, piece_bytes=piece_bytes)
