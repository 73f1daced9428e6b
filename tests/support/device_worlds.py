"""Rank threads with an emulated device each, and messages between the devices."""

from pympa.transport.local import LocalWorld
from pympa.transport.nccl import NcclEndpoint
from pympa.transport.staged import StagedEndpoint
from support.device_checks import Setup
from support.emulated import EmulatedDevice, Machine
from support.fake_nccl import Fabric, FakeNccl


def run_over_nccl(
    size,
    seed,
    body,
    fabric=None,
    timeout_seconds=20.0,
    device_class=EmulatedDevice,
    endpoint_class=NcclEndpoint,
):
    """Run `body(Setup)` on rank threads with a device each, over what stands for NCCL."""
    machine, fabric = Machine(seed), fabric or Fabric()

    def main(inner):
        device = device_class(machine, timeout_seconds=timeout_seconds)
        library = FakeNccl(fabric, device)
        endpoint = endpoint_class(
            inner, device, library, timeout_seconds=timeout_seconds, sleeps=False
        )
        result = body(Setup(endpoint, device))
        endpoint.close()
        assert not device.watchers
        device.close()
        return result

    return LocalWorld(size, seed=seed).run(main)


def run_staged(
    size, seed, body, timeout_seconds=20.0, piece_bytes=64, device_class=EmulatedDevice
):  # fmt: skip
    """Run `body(Setup)` on rank threads with a device each; messages fall into many pieces."""
    machine = Machine(seed)

    def main(inner):
        device = device_class(machine, timeout_seconds=timeout_seconds)
        endpoint = StagedEndpoint(
            inner, device, timeout_seconds=timeout_seconds, sleeps=False, piece_bytes=piece_bytes
        )
        result = body(Setup(endpoint, device))
        endpoint.close()
        device.synchronise("kernels")
        return result

    return LocalWorld(size, seed=seed).run(main)
