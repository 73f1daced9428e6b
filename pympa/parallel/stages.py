"""Pipeline parallelism (`pp`): layers over ranks, micro-batches streaming through them.

Huang et al. 2019 (GPipe), forward only. Three buffers are used in rotation: while a micro-batch is
computed in one, the next is received into another and the previous is sent from the third, so a
stage waits only when it has nothing to compute. That waiting is the bubble.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pympa.runtime.arena import Array
from pympa.transport import Transport


def stream_micro_batches(
    transport: Transport, rows: Sequence[int], width: int, dtype: np.dtype[Any]
) -> Iterator[tuple[int, Array]]:
    """Yield the number of each micro-batch and its input, which becomes its output. Collective.

    The input of a micro-batch is `[rows[i], width]`; the caller replaces it by the stage's output
    in place before it asks for the next one. On the first stage it is uninitialised.

    Args:
        transport: the ranks of the stages.
        rows: the number of rows of each micro-batch.
        width: the width of the residual stream, d_model.
        dtype: the dtype of the residual stream.
    """
    stage, last_stage = transport.index, transport.size - 1
    count = 3 if transport.size > 1 else 1
    buffers = [transport.empty((max(rows, default=0), width), dtype) for _ in range(count)]
    sending: dict[int, Any] = {}

    def buffer(index: int) -> Array:
        return buffers[index % count][: rows[index]]

    def receive(index: int) -> Any:
        if index >= len(rows) or stage == 0:
            return None
        free_buffer(index)
        return transport.start([], [(buffer(index), stage - 1)])

    def free_buffer(index: int) -> None:
        if index - count in sending:
            transport.wait(sending.pop(index - count))

    incoming = receive(0)
    for index in range(len(rows)):
        if stage == 0:
            free_buffer(index)
        else:
            transport.wait(incoming)
        incoming = receive(index + 1)
        yield index, buffer(index)
        if stage < last_stage:
            sending[index] = transport.start([(buffer(index), stage + 1)], [])
    for pending in sending.values():
        transport.wait(pending)
