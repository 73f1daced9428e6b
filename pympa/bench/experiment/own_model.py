"""A user's own model as an experiment: a model directory, or a TOML file with only a model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pympa.bench.experiment.description import (
    Experiment,
    Size,
    as_experiment,
    is_model,
    read_description,
)
from pympa.errors import RefusedError
from pympa.spec import ModelSpec
from pympa.text.toml import convert_toml, load_toml

if TYPE_CHECKING:
    from pympa.checkpoint.checkpoint import Checkpoint

DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """The batch of a model that is no experiment, and what else the command line says of it.

    Attributes:
        tokens: the number of tokens of each sequence; None means `DEFAULT_TOKENS`.
        batch: the number of sequences; None means 1.
        dtype: the name of the dtype; None means that of the files.
        ignore_fields: the names of unknown fields of config.json to go on without.
    """

    tokens: int | None = None
    batch: int | None = None
    dtype: str | None = None
    ignore_fields: Sequence[str] = ()

    @classmethod
    def of(cls, options: Namespace) -> Batch:
        """Return the batch of a command line, see `command.line.add_batch`."""
        return cls(options.tokens, options.batch, options.dtype, options.ignore_field or ())

    def size(self, model: ModelSpec) -> Size:
        """Return a model with this batch, whose context is the length of its sequences."""
        return Size(model=model, batch=self.batch or 1, tokens=self.tokens or DEFAULT_TOKENS)


@dataclass(frozen=True)
class Described:
    """An experiment, and where its weights come from.

    Attributes:
        experiment: the experiment; a user's own model is its only size, "local".
        checkpoint: the weights; None means random ones.
    """

    experiment: Experiment
    checkpoint: Checkpoint | None = None


def load_described(name: str, batch: Batch, *, with_weights: bool) -> Described:
    """Load an experiment by its name, or a user's own model by its path.

    Args:
        name: a packaged experiment, a TOML file, or a model directory.
        batch: the batch of a model that is no experiment.
        with_weights: whether the weights of a directory are opened; else config.json is enough.

    Raises:
        RefusedError: the directory is not a model, or options do not go with an experiment.
        SpecError: see `load_experiment`.
    """
    from pympa.checkpoint.checkpoint import describe_directory, is_model_path, open_checkpoint

    if is_model_path(name):
        if with_weights:
            checkpoint = open_checkpoint(name, batch.ignore_fields)
            spec, declared = checkpoint.spec, checkpoint.dtype
        else:
            checkpoint, description = None, describe_directory(name, batch.ignore_fields)
            spec, declared = description.spec, description.dtype
        dtype = batch.dtype or declared or "float32"
        return Described(_experiment(name, spec, batch, dtype), checkpoint)
    values = load_toml(read_description(name), name)
    if is_model(values):
        model = convert_toml(values, ModelSpec, name)
        return Described(_experiment(name, model, batch, batch.dtype))
    for option, value in (("--tokens", batch.tokens), ("--batch", batch.batch)):
        if value is not None:
            raise RefusedError(
                f"{name}: {option}: expected none, because the experiment has its own; got {value}"
            )
    return Described(as_experiment(values, name))


def _experiment(name: str, model: ModelSpec, batch: Batch, dtype: str | None) -> Experiment:
    if dtype is None:
        raise RefusedError(
            f"{name}: --dtype: expected a dtype, because the file describes only a model; got none"
        )
    return Experiment(title=name, dtype=dtype, sizes={"local": batch.size(model)}, plans=())
