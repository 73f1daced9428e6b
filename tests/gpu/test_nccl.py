"""NCCL as CuPy binds it, on one GPU: a rank that sends to itself."""

import numpy as np
import pytest

from pympa.transport.nccl_cupy import CupyNccl


def test_an_exchange_with_itself(bench):
    if bench.emulated:
        pytest.skip("NCCL needs a GPU")
    nccl = CupyNccl()
    communicator = nccl.connect(1, nccl.unique_id(), 0)
    sent = np.arange(100_003, dtype=np.float32)
    with bench.scope():
        source, target = bench.put(sent), bench.empty(sent.shape, np.float32)
        communicator.exchange([(source, 0)], [(target, 0)], bench.device.compute)
        np.testing.assert_array_equal(bench.get(target), sent)
    communicator.check()
    communicator.destroy()
