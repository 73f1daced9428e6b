"""What an arena's bytes are for: by part of the model and by use, at high-water marks.

Every byte has one part and one use, so the uses of a mark add up to it. Beside what is taken, the
ledger sees which tile of the weights a kernel reads meanwhile, and so knows the working set of a
layer's step: what has to stay in the cache while one chunk of rows goes through the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Use = Literal["weights", "loading", "activations", "keys/values", "messages", "workspaces"]
USES: tuple[Use, ...] = get_args(Use)
TILE = "weight tile"  # read, not taken: a part of the weights
BETWEEN = "between kernels"
REST = "rest"
"""The part that is no layer: embedding, head, residual stream, tables."""

Uses = Mapping[str, int]
"""Bytes by use."""


class Ledger:
    """The books of one arena.

    Attributes:
        part: of the model that what is taken now is for, as in "layers.0".
        peak: bytes by (part, use) at the arena's high-water mark.
        parts: bytes by use of each part at its own high-water mark, once it is loaded.
        working: bytes of each part that its steps touch: `TILE`, "workspaces" and what lies
            `BETWEEN` kernels, each when it was most.
    """

    def __init__(self) -> None:
        self.part = REST
        self.peak: dict[tuple[str, str], int] = {}
        self.parts: dict[str, Uses] = {}
        self.working: dict[str, Uses] = {}
        self._peak_bytes = 0
        self._held: dict[tuple[str, str], int] = {}

    def take(self, use: Use, size: int, used_bytes: int) -> None:
        """Write down that `size` bytes were taken, which makes it `used_bytes` in all."""
        self._add(use, size)
        if used_bytes > self._peak_bytes:
            self._peak_bytes = used_bytes
            self.peak = {key: held for key, held in self._held.items() if key[1] != TILE}
        _keep_most(self.parts, self.part, {use: self._of(use) for use in USES if use != "loading"})
        self._weigh()

    def read(self, size: int) -> None:
        """Write down that a kernel reads a weight in tiles of `size` bytes."""
        self._add(TILE, size)
        self._weigh()

    def mark(self) -> dict[tuple[str, str], int]:
        """Return what is held now, for `release`."""
        return dict(self._held)

    def release(self, mark: dict[tuple[str, str], int]) -> None:
        """Go back to what was held at a mark."""
        self._held = mark

    def _add(self, use: str, size: int) -> None:
        key = self.part, use
        self._held[key] = self._held.get(key, 0) + size

    def _of(self, use: str) -> int:
        return self._held.get((self.part, use), 0)

    def _weigh(self) -> None:
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
