"""The use of an arena's bytes, by part of the model and by use, at high-water marks.

Every allocated byte has one part and one use, so the bytes by use add up to the high-water mark.
The ledger also records the tile of the weights that a kernel reads. So it knows the working set of
a layer's step: the bytes that must stay in the cache while one chunk of rows goes through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Use = Literal["weights", "loading", "activations", "keys/values", "messages", "workspaces"]
USES: tuple[Use, ...] = get_args(Use)
TILE = "weight tile"  # a part of the weights that is read, not allocated
BETWEEN = "between kernels"
OUTSIDE_LAYERS = "outside layers"
"""The part for everything that is not in a layer: embedding, head, residual stream, tables."""

Uses = Mapping[str, int]
"""The bytes by use."""


class Ledger:
    """The record of the bytes of one arena.

    Attributes:
        part: the part of the model that allocates now, as in "layers.0".
        peak: the bytes by (part, use) at the arena's high-water mark.
        peak_beside_kept: the most bytes that were in use at one time, keys and values not counted.
        parts: the bytes by use of each part at its own high-water mark, after loading.
        working: the bytes that the steps of each part use: `TILE`, "workspaces" and the arrays
            `BETWEEN` kernels, each at its maximum.
    """

    def __init__(self) -> None:
        self.part = OUTSIDE_LAYERS
        self.peak: dict[tuple[str, str], int] = {}
        self.parts: dict[str, Uses] = {}
        self.working: dict[str, Uses] = {}
        self.peak_beside_kept = 0
        self._peak_bytes = 0
        self._held: dict[tuple[str, str], int] = {}

    def take(self, use: Use, size: int, used_bytes: int) -> None:
        """Record an allocation of `size` bytes, after which `used_bytes` are in use in total."""
        self._add(use, size)
        if used_bytes > self._peak_bytes:
            self._peak_bytes = used_bytes
            self.peak = {key: held for key, held in self._held.items() if key[1] != TILE}
        self.peak_beside_kept = max(self.peak_beside_kept, used_bytes - self._kept())
        _keep_most(self.parts, self.part, {use: self._of(use) for use in USES if use != "loading"})
        self._record_working_set()

    def restart_peak(self, used_bytes: int) -> None:
        """Restart `peak` and `peak_beside_kept` from the bytes in use."""
        self._peak_bytes = used_bytes
        self.peak_beside_kept = used_bytes - self._kept()
        self.peak = {key: held for key, held in self._held.items() if key[1] != TILE}

    def read(self, size: int) -> None:
        """Record that a kernel reads a weight in tiles of `size` bytes."""
        self._add(TILE, size)
        self._record_working_set()

    def mark(self) -> dict[tuple[str, str], int]:
        """Return the current bytes by (part, use), for `release`."""
        return dict(self._held)

    def release(self, mark: dict[tuple[str, str], int]) -> None:
        """Restore the bytes of a mark."""
        self._held = mark

    def _add(self, use: str, size: int) -> None:
        key = self.part, use
        self._held[key] = self._held.get(key, 0) + size

    def _kept(self) -> int:
        return sum(held for (_, use), held in self._held.items() if use == "keys/values")

    def _of(self, use: str) -> int:
        return self._held.get((self.part, use), 0)

    def _record_working_set(self) -> None:
        now = {
            TILE: self._of(TILE),
            "workspaces": self._of("workspaces"),
            BETWEEN: sum(self._of(use) for use in ("activations", "keys/values", "messages")),
        }
        most = self.working.get(self.part, {})
        self.working[self.part] = {use: max(now[use], most.get(use, 0)) for use in now}


def _keep_most(kept: dict[str, Uses], part: str, uses: Uses) -> None:
    if sum(uses.values()) > sum(kept.get(part, {}).values()):
        kept[part] = uses
