"""A model directory, opened: what it describes, and its weights."""

from __future__ import annotations

from dataclasses import dataclass

from pympa.checkpoint.families import Description
from pympa.checkpoint.source import CheckpointSource
from pympa.spec import ModelSpec

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with its weights.

    Attributes:
        where: the path that the user gave.
        description: the family, the model, and the fields that were ignored.
        dtype: the name of the dtype that the file declares; None if it declares none.
        source: the weights.
        stored_bytes: the bytes of the weights in files.
    """

    where: str
    description: Description
    dtype: str | None
    source: CheckpointSource
    stored_bytes: int

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.description.spec
