"""Ways to break a run in one place: what a rank receives is altered before it is used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pympa.model.resources import RankResources
from pympa.transport import Transport


def on_receive(
    rank: RankResources,
    axis: str,
    number: int,
    tamper: Callable[[list[np.ndarray], list[np.ndarray]], None],
) -> None:
    """Tamper with the `number`-th group of messages received over a transport.

    `tamper` gets the arrays just received and a copy of the ones received before them.
    """
    transport: Transport = rank.transports[axis]
    start, wait = transport.start, transport.wait
    received: list[list[np.ndarray]] = []
    waiting: dict[int, list[np.ndarray]] = {}

    def tampered_start(sends, receives):
        pending = start(sends, receives)
        waiting[id(pending)] = [array for array, _ in receives if array.size]
        return pending

    def tampered_wait(pending):
        wait(pending)
        arrays = waiting.pop(id(pending))
        if not arrays:
            return
        if len(received) == number:
            tamper(arrays, received[-1] if received else arrays)
        received.append([array.copy() for array in arrays])

    transport.start, transport.wait = tampered_start, tampered_wait


def drop(arrays, before):
    for array in arrays:
        array[...] = 0


def drop_row(arrays, before):
    for array in arrays:
        array[-1] = 0


def double(arrays, before):
    for array, old in zip(arrays, before, strict=False):
        same = min(array.size, old.size)
        array.reshape(-1)[:same] = old.reshape(-1)[:same]


def swap_rows(arrays, before):
    for array in arrays:
        array[...] = array[::-1].copy()
