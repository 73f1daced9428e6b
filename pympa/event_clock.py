"""The clock of a rank that computes on a device: events on its streams in place of seconds.

A kernel runs long after the host has started it, so reading a wall clock around the start tells
nothing. `EventClock` puts events on streams, which cost a microsecond each and hold nothing up,
and turns them all into seconds when the step is over. Events are used again by the next step, of
whatever plan.
"""

from __future__ import annotations

import time

from pympa.device import Device


class EventClock:
    """Marks places on a device's streams.

    Args:
        device: whose.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events = device.timed_events
        self._marks = 0
        self._zero = 0.0

    def restart(self) -> None:
        """Begin a step: forget all marks."""
        self._marks = 0

    def __call__(self, stream: int | None = None) -> int:
        """Return a mark of where a stream is now, in the order of the host; None means kernels'."""
        mark, self._marks = self._marks, self._marks + 1
        if mark == 0:
            self._zero = time.perf_counter()
        if mark == len(self._events):
            self._events.append(self._device.event(timed=True))
        self._device.record(self._events[mark], self._device.compute if stream is None else stream)
        return mark

    def seconds(self) -> list[float]:
        """Return the time of each mark of the step, once the device has come to all of them.

        Seconds as `time.perf_counter` counts them, from the host's time at the first mark on: a
        device that has nothing else to do reaches that one at once.

        Raises:
            TimeoutError: it does not get there; see `Device.finish`.
        """
        events = self._events[: self._marks]
        for event in reversed(events):  # the last one is mostly the last to be done
            self._device.finish(event, "a step")
        return [self._zero + self._device.seconds(events[0], event) for event in events]
