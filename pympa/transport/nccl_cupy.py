"""NCCL through CuPy's bindings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pympa.errors import RefusedError
from pympa.hardware.device_cupy import address, import_cupy
from pympa.runtime.arena import Array
from pympa.transport.nccl import NcclError

_IN_PROGRESS = 7  # ncclInProgress: not a failure
_NAMES = {8: "the deadline of the communicator passed"}  # codes that CuPy does not know


class CupyNccl:
    """See `Nccl`.

    Attributes:
        version: the version, as in "2.28.9".

    Raises:
        RefusedError: CuPy finds no NCCL.
    """

    def __init__(self) -> None:
        nccl = import_cupy().cuda.nccl
        if not nccl.available:
            raise RefusedError("no NCCL; install it with: pip install nvidia-nccl-cu13")
        self._nccl = nccl
        code = int(nccl.get_version())
        self.version = f"{code // 10000}.{code // 100 % 100}.{code % 100}"

    def unique_id(self) -> bytes:
        """See `Nccl.unique_id`."""
        return bytes(_checked(self._nccl, self._nccl.get_unique_id))

    def connect(self, size: int, unique_id: bytes, rank: int) -> CupyCommunicator:
        """See `Nccl.connect`."""
        made = _checked(self._nccl, lambda: self._nccl.NcclCommunicator(size, unique_id, rank))
        return CupyCommunicator(self._nccl, made)


class CupyCommunicator:
    """See `Communicator`.

    Args:
        nccl: CuPy's module.
        communicator: the communicator of that module.
    """

    def __init__(self, nccl: Any, communicator: Any) -> None:
        self._nccl, self._communicator = nccl, communicator

    def exchange(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]], stream: int
    ) -> None:
        """See `Communicator.exchange`."""
        nccl, communicator = self._nccl, self._communicator

        def group() -> None:
            nccl.groupStart()
            try:
                for move, messages in ((communicator.recv, receives), (communicator.send, sends)):
                    for array, peer in messages:
                        move(address(array), array.nbytes, nccl.NCCL_UINT8, peer, stream)
            finally:
                nccl.groupEnd()  # an open group would include the next messages

        _checked(nccl, group)

    def check(self) -> None:
        """See `Communicator.check`."""
        _checked(self._nccl, self._communicator.check_async_error)

    def abort(self) -> None:
        """See `Communicator.abort`."""
        self._communicator.abort()

    def destroy(self) -> None:
        """See `Communicator.destroy`."""
        _checked(self._nccl, self._communicator.destroy)


def _checked(nccl: Any, call: Callable[[], Any]) -> Any:
    """Return the result of a call to CuPy, whose table of errors lacks newer codes."""
    try:
        return call()
    except nccl.NcclError as error:
        raise NcclError(str(error)) from None
    except KeyError as error:
        code = error.args[0]
        if code == _IN_PROGRESS:
            return None
        raise NcclError(_NAMES.get(code, f"error {code}")) from None
