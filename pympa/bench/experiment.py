"""Experiments as data: what a paper ran, what it published, and a size that runs here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.bench.published import PublishedFootprint
from pympa.files import read_file
from pympa.mesh import Plan, parse_plan
from pympa.rules import FAMILIES, family_plan
from pympa.spec import MOST_LAYERS, ModelSpec, SpecError
from pympa.toml import convert_toml, load_toml
from pympa.weights import input_ids

MOST_TOKENS = 1 << 40  # of a batch: more is a slip
MOST_SEQUENCES = 1 << 24  # of a batch: each is a few objects of Python on every rank
LONGEST_ROLE = 60  # characters: it is a cell of a table
LARGEST_FILE_BYTES = 1 << 20  # an experiment is a page of text; anything else is another file


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model and a batch.

    Attributes:
        model: the transformer.
        batch: sequences. tokens: of each sequence; a list of `batch` numbers if they differ.
        ours: why this size exists, where it is not the paper's.
    """

    model: ModelSpec
    batch: int
    tokens: int | tuple[int, ...]
    ours: str | None = None

    def __post_init__(self) -> None:
        tokens = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        if self.batch < 1 or any(length < 1 for length in tokens):
            raise SpecError(f"batch and tokens are at least 1; got {self.batch} and {self.tokens}")
        if self.batch > MOST_SEQUENCES:
            raise SpecError(
                f"batch: expected at most {MOST_SEQUENCES:,} sequences; got {self.batch:,}"
            )
        if self.batch * max(tokens) > MOST_TOKENS:
            raise SpecError(
                f"batch and tokens: expected at most {MOST_TOKENS:,} tokens; got {self.batch} × "
                f"{max(tokens)}"
            )
        if isinstance(self.tokens, tuple) and len(tokens) != self.batch:
            raise SpecError(f"tokens: expected batch={self.batch} lengths; got {len(tokens)}")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return list(self.tokens) if isinstance(self.tokens, tuple) else [self.tokens] * self.batch

    @property
    def tokens_in_all(self) -> int:
        """Tokens of all sequences."""
        return self.batch * self.tokens if isinstance(self.tokens, int) else sum(self.tokens)

    def skewed(self, router_skew: float) -> Size:
        """Return this size with another skew of the gate in all layers that have experts.

        Raises:
            SpecError: the skew is not a finite number.
        """
        layers = tuple(
            msgspec.structs.replace(layer, router_skew=router_skew) if layer.experts else layer
            for layer in self.model.layers
        )
        model = msgspec.structs.replace(self.model, layers=layers)
        return msgspec.structs.replace(self, model=model)

    def grown(self, times: int) -> Size:
        """Return this size with a model of so many times the layers."""
        model = msgspec.structs.replace(self.model, layers=self.model.layers * times)
        return msgspec.structs.replace(self, model=model)

    def __str__(self) -> str:
        if isinstance(self.tokens, tuple):
            return f"{self.batch} sequences, {sum(self.tokens):,}"
        return f"{self.batch} × {self.tokens:,}"


class PlannedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One row of an experiment's table.

    Attributes:
        role: "baseline", "proposed", or another word.
        family: a studied system, which adapts to any number of ranks; or
        plan: a fixed plan.
        options: added to the family's plan, as in "dim_algo=gather".
        ranks: that the row takes, the first of the job; None means all. Rows that take more
            ranks than the job has are left out of the table.
        grow: times the size's layers that the model of this row has.
        published_tps: tokens/s, as printed in the paper.
        published_tpot_ms: ms, as printed in the paper.
    """

    role: str
    family: str | None = None
    plan: str | None = None
    options: str | None = None
    ranks: int | None = None
    grow: int = 1
    published_tps: float | None = None
    published_tpot_ms: float | None = None

    def __post_init__(self) -> None:
        if len(self.role) > LONGEST_ROLE:
            raise SpecError(
                f"plans: role: expected at most {LONGEST_ROLE} characters; got {len(self.role):,}"
            )
        if (self.family is None) == (self.plan is None):
            raise SpecError(f"plans: role {self.role!r} takes either a family or a plan")
        if self.family is not None and self.family not in FAMILIES:
            raise SpecError(
                f"plans: role {self.role!r}: family: expected one of {', '.join(FAMILIES)}; "
                f"got {self.family!r}"
            )
        if self.options is not None and self.family is None:
            raise SpecError(f"plans: role {self.role!r}: options go with a family, not with a plan")
        if self.grow < 1 or (self.ranks is not None and self.ranks < 1):
            raise SpecError(
                f"plans: role {self.role!r}: ranks and grow are at least 1; "
                f"got {self.ranks} and {self.grow}"
            )
        if self.grow > MOST_LAYERS:
            raise SpecError(
                f"plans: role {self.role!r}: grow is at most {MOST_LAYERS:,}; got {self.grow:,}"
            )

    def resolve(self, spec: ModelSpec, world: int) -> Plan:
        """Return the plan for a number of ranks."""
        if self.plan is not None:
            return parse_plan(self.plan)
        plan = family_plan(self.family or "", spec, world)
        return plan if self.options is None else parse_plan(f"{plan},{self.options}")


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A TOML file.

    Attributes:
        title: one line. seed: number of the paper's extract.
        dtype: of weights and activations.
        sizes: by name; "local" takes seconds on a small machine.
        plans: rows of the table.
        published_footprint: sizes that the paper prints of its model.
    """

    title: str
    dtype: str
    sizes: dict[str, Size]
    plans: tuple[PlannedRun, ...]
    seed: str | None = None
    published_footprint: PublishedFootprint | None = None

    @property
    def scales(self) -> bool:
        """Rows differ in their number of ranks: they are compared with the smallest."""
        return any(row.ranks is not None for row in self.plans)

    def runs(self, plans: Sequence[str], where: str) -> Sequence[PlannedRun]:
        """Return rows for the plans that are asked for, or the experiment's own.

        Raises:
            SpecError: there is neither.
        """
        if not plans and not self.plans:
            raise SpecError(f"{where}: plans: expected at least one, or --plan; got none")
        return [PlannedRun(role="given", plan=text) for text in plans] or self.plans

    def size(self, name: str, where: str) -> Size:
        """Return a size by name.

        Raises:
            SpecError: there is none.
        """
        if not self.sizes:
            raise SpecError(f"{where}: sizes: expected at least one; got none")
        if name not in self.sizes:
            raise SpecError(f"{where}: size is one of {', '.join(self.sizes)}; got {name!r}")
        return self.sizes[name]


def packaged_experiments() -> list[str]:
    """Return the names of the experiments that ship with the package."""
    folder = resources.files("pympa") / "experiments"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith("toml"))


def load_experiment(name: str) -> Experiment:
    """Load a packaged experiment by name, or anybody's by the path of its TOML file.

    Raises:
        SpecError: no such experiment, or a field of the file is wrong.
    """
    return as_experiment(load_toml(read_description(name), name), name)


def as_experiment(values: dict[str, Any], name: str) -> Experiment:
    """Return an experiment from what is in its TOML file.

    Raises:
        SpecError: a field is wrong, or the file describes a model alone.
    """
    if is_model(values):
        raise SpecError(
            f"{name}: expected an experiment; got a model alone, which pympa footprint takes. To "
            'run it, begin the file with title = "...", dtype = "bfloat16", plans = [{ role = '
            '"given", family = "ring" }], [sizes.local] batch = 1, tokens = 4096, '
            "[sizes.local.model], and turn [[layers]] into [[sizes.local.model.layers]]"
        )
    return convert_toml(values, Experiment, name)


def is_model(values: dict[str, Any]) -> bool:
    """Tell whether a TOML file describes a model alone, without a batch and plans."""
    return "d_model" in values and "sizes" not in values


def read_description(name: str) -> bytes:
    """Return the text of a packaged experiment by name, or of anybody's TOML file by path.

    Raises:
        SpecError: there is none, or it is too long to be one.
    """
    known = packaged_experiments()
    if name in known:
        return (resources.files("pympa") / "experiments" / f"{name}.toml").read_bytes()
    if not name.endswith(".toml") and "/" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"experiment {name!r}: expected one of {', '.join(known)}, or a .toml file{hint}"
        )
    try:
        return read_file(name, LARGEST_FILE_BYTES)
    except OSError as error:
        raise SpecError(f"experiment {name}: {error.strerror}") from None


def check_input(path: str | None) -> None:
    """Look at an input file before anything is computed.

    Raises:
        OSError: it cannot be read, or is no regular file; the message names it.
    """
    if path is not None:
        _read_input(path, 1)


def load_ids(path: str | None, size: Size) -> Sequence[NDArray[np.int32]]:
    """Return the batch: bytes of a text file, or of the text that ships with the package.

    Raises:
        ValueError: the file is empty, or its bytes exceed the model's vocabulary.
        OSError: it cannot be read.
    """
    tokens = sum(size.lengths)
    if path is None:
        text = (resources.files("pympa") / "experiments" / "input.txt").read_bytes()
    else:
        text = _read_input(path, tokens)  # a token is a byte
    ids = input_ids(text, tokens)
    if ids.max() >= size.model.vocabulary:
        raise ValueError(
            f"input: expected byte values below the vocabulary {size.model.vocabulary}; "
            f"got {ids.max()}"
        )
    return np.split(ids, np.cumsum(size.lengths)[:-1])


def _read_input(path: str, most_bytes: int) -> bytes:
    try:
        return read_file(path, most_bytes, start=True)
    except OSError as error:
        raise OSError(f"--input {path}: {error.strerror}") from None
