"""Loading a model on all ranks: what it is, whether it fits, and its weights, with progress."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pympa.checkpoint.array_tensors import ArrayTensors
from pympa.checkpoint.checkpoint import open_checkpoint, read_config
from pympa.checkpoint.families import describe
from pympa.checkpoint.names import Part
from pympa.checkpoint.places import family_places, find_places
from pympa.checkpoint.source import CheckpointSource
from pympa.errors import RefusedError
from pympa.model.random_weights import random_weights
from pympa.model.weights import WeightSource, WeightSpec, model_weights
from pympa.plan.layout import Bounds
from pympa.session.arrays import host_array
from pympa.spec import ModelSpec

if TYPE_CHECKING:
    from pympa.checkpoint.tokenizer import Tokenizer

_DIGITS = 16  # of a digest of a model
_SECONDS = 2.0  # between two lines of progress
_GB = 1e9


@dataclass(frozen=True)
class LoadRequest:
    """A model and where its weights come from.

    Attributes:
        title: the name of the model, for messages.
        spec: the model.
        source: the weights.
        dtype: the name of the dtype that the files declare, or None.
        tokenizer: a function that reads the model's tokenizer; it returns None if there is none.
    """

    title: str
    spec: ModelSpec
    source: WeightSource
    dtype: str | None
    tokenizer: Callable[[], Tokenizer | None] = lambda: None

    def __str__(self) -> str:
        """A text that is the same for the same model and weights."""
        digest = hashlib.sha256(repr(self.spec).encode()).hexdigest()[:_DIGITS]
        return f"{self.title}, model {digest}, {self.source.identity}"


def find_request(
    model: str | Path | ModelSpec | Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    ignore_fields: Iterable[str],
) -> LoadRequest:
    """Return the model that a user asks for; weights are not read yet.

    Args:
        model: a model directory, the fields of a config.json, or a `ModelSpec`.
        weights: arrays by name, instead of those of the directory: names as in the files of the
            family, or with a `ModelSpec` as in `model_weights`.
        ignore_fields: the names of unknown fields of config.json to go on without.

    Raises:
        RefusedError: see `open_checkpoint`; or weights are missing, or an argument is no model.
    """
    if isinstance(model, ModelSpec):
        if weights is None:
            return LoadRequest("random weights", model, random_weights(model), None)
        known = {name: (Part(name),) for name in model_weights(model)}
        return _from_arrays(
            "weights", model, weights, lambda tensors: find_places(model, known, tensors), None
        )
    if not isinstance(model, (str, Path, Mapping)):
        raise RefusedError(
            "model: expected a path, the fields of a config.json, or a ModelSpec; "
            f"got {type(model).__name__}"
        )
    if isinstance(model, Mapping):
        if weights is None:
            raise RefusedError(
                "weights: expected arrays by name with the fields of a config; got none"
            )
        where, values = "config", model
    elif weights is None:
        found = open_checkpoint(model, ignore_fields)
        return LoadRequest(found.where, found.spec, found.source, found.dtype, found.tokenizer)
    else:
        where, values = str(model), read_config(Path(model))
    description = describe(values, where, ignore_fields)
    return _from_arrays(
        where,
        description.spec,
        weights,
        lambda tensors: family_places(description, tensors),
        description.dtype,
    )


def _from_arrays(
    title: str,
    spec: ModelSpec,
    weights: Mapping[str, Any],
    places: Callable[[ArrayTensors], Mapping[str, Part]],
    dtype: str | None,
) -> LoadRequest:
    tensors = ArrayTensors(weights, host_array)
    return LoadRequest(
        title, spec, CheckpointSource(tensors, places(tensors), tensors.identity), dtype
    )


class CountedSource:
    """A source that shows how far it has come, on standard error.

    Args:
        source: the source.
        title: the name of the model.
        total_bytes: the bytes of all weights of this rank.
        shows: whether lines are printed.
    """

    def __init__(self, source: WeightSource, title: str, total_bytes: int, *, shows: bool) -> None:
        self._source, self._title, self._total = source, title, total_bytes
        self._shows, self._done = shows, 0
        self._start = self._last = time.monotonic()

    @property
    def identity(self) -> str:
        """See `WeightSource.identity`."""
        return self._source.identity

    def read(
        self,
        spec: WeightSpec,
        out: NDArray[Any],
        rows: Sequence[Bounds] | None = None,
        cols: Sequence[Bounds] | None = None,
    ) -> NDArray[Any]:
        """See `WeightSource.read`."""
        found = self._source.read(spec, out, rows, cols)
        self._done += out.nbytes
        now = time.monotonic()
        if self._shows and now - self._last >= _SECONDS:
            self._last = now
            share = 100 * self._done / max(self._total, 1)
            self._print(f"loading {self._title}: {share:.0f}% of {self._total / _GB:.2f} GB a rank")
        return found

    def finish(self) -> None:
        """Print how long it took."""
        if self._shows:
            self._print(f"loaded {self._title}: {self._done / _GB:.2f} GB a rank")

    def _print(self, text: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / _GB / seconds
        print(f"{text}, {rate:.2f} GB/s, {seconds:.1f} s", file=sys.stderr, flush=True)
