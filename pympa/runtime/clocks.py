"""The clock of a rank that computes on a device: events on its streams instead of seconds.

A kernel runs long after the host has started it, so a wall clock around the start measures
nothing. `EventClock` records events on streams, which cost a microsecond each and block nothing,
and converts them all to seconds when the step is over. The next step reuses the events.
"""

from __future__ import annotations

import time

from pympa.hardware.device import Device


class EventClock:
    """A clock that marks positions on a device's streams.

    Args:
        device: the device.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events = device.timed_events
        self._marks = 0
        self._zero = 0.0

    def restart(self) -> None:
        """Begin a step without marks."""
        self._marks = 0

    def __call__(self, stream: int | None = None) -> int:
        """Return a mark of the current end of a stream; None means the stream of kernels."""
        mark, self._marks = self._marks, self._marks + 1
        if mark == 0:
            self._zero = time.perf_counter()
        if mark == len(self._events):
            self._events.append(self._device.event(timed=True))
        self._device.record(self._events[mark], self._device.compute if stream is None else stream)
        return mark

    def seconds(self) -> list[float]:
        """Return the time of each mark of the step, once the device has reached all of them.

        Times are seconds as in `time.perf_counter`, from the host's time at the first mark on,
        because an idle device reaches that mark at once.

        Raises:
            TimeoutError: the device does not reach a mark; see `Device.finish`.
        """
        events = self._events[: self._marks]
        for event in reversed(events):  # the last one is usually the last to be done
            self._device.finish(event, "a step")
        return [self._zero + self._device.seconds(events[0], event) for event in events]
