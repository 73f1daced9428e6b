"""NCCL as CuPy binds it, on one GPU: a rank that sends to itself."""

import re

import numpy as np
import pytest

from pympa.transport.nccl_cupy import CupyNccl
from support.compare import assert_same_bits


@pytest.fixture
def communicator(rig):
    if rig.emulated:
        pytest.skip("NCCL needs a GPU")
    nccl = CupyNccl()
    assert re.fullmatch(r"2\.\d+\.\d+", nccl.version)
    made = nccl.connect(1, nccl.unique_id(), 0)
    yield made
    made.destroy()


def test_a_group_delivers_each_message_in_its_turn(rig, communicator):
    """Two messages of one group, of odd sizes, and again what was received."""
    sent = [np.arange(100_003, dtype=np.float32), np.arange(17, dtype=np.float32) - 1e6]
    with rig.scope():
        sources = [rig.put(array) for array in sent]
        targets, again = ([rig.empty(a.shape, np.float32) for a in sent] for _ in range(2))
        assert all(np.isnan(rig.get(array)).all() for array in (*targets, *again))
        for group, to in ((sources, targets), (targets, again)):
            sends, receives = ([(array, 0) for array in arrays] for arrays in (group, to))
            communicator.exchange(sends, receives, rig.device.compute)
        for got, array in zip(again, sent, strict=True):
            assert_same_bits(rig.get(got), array)
    communicator.check()
