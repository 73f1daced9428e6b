"""Experiments as data: what a paper ran, what it published, and a size that runs on a laptop."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import msgspec

from pympa.bench.experiment.published import PublishedFootprint
from pympa.plan.families import FAMILIES, family_plan
from pympa.plan.mesh import Plan, parse_plan
from pympa.spec import MOST_LAYERS, ModelSpec, SpecError
from pympa.text.files import read_file
from pympa.text.toml import convert_toml, load_toml

MOST_TOKENS = 1 << 40  # in a batch: a larger number is a typing error
MOST_SEQUENCES = 1 << 24  # in a batch: each one takes a few Python objects on every rank
LONGEST_ROLE = 60  # characters: a role is one cell of a table
LARGEST_FILE_BYTES = 1 << 20  # an experiment is a page of text; a larger file is something else


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model and a batch.

    Attributes:
        model: the transformer; its context is that of the batch, if it depends on one.
        batch: the number of sequences.
        tokens: the number of tokens of each sequence; a list of `batch` numbers if they differ.
        ours: the reason for this size, if the paper does not have it.
    """

    model: ModelSpec
    batch: int
    tokens: int | tuple[int, ...]
    ours: str | None = None

    def __post_init__(self) -> None:
        tokens = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        if self.batch < 1 or any(length < 1 for length in tokens):
            raise SpecError(
                f"batch and tokens: expected at least 1; got {self.batch} and {self.tokens}"
            )
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
        msgspec.structs.force_setattr(self, "model", self.model.within(max(tokens)))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return list(self.tokens) if isinstance(self.tokens, tuple) else [self.tokens] * self.batch

    @property
    def tokens_in_all(self) -> int:
        """The number of tokens of all sequences."""
        return self.batch * self.tokens if isinstance(self.tokens, int) else sum(self.tokens)

    def skewed(self, router_skew: float) -> Size:
        """Return this size with another router skew in all layers that have experts.

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
        """Return this size with a model that has `times` as many layers."""
        model = msgspec.structs.replace(self.model, layers=self.model.layers * times)
        return msgspec.structs.replace(self, model=model)

    def __str__(self) -> str:
        if isinstance(self.tokens, tuple):
            return f"{self.batch} sequences, {sum(self.tokens):,}"
        return f"{self.batch} × {self.tokens:,}"


class PlannedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One row of an experiment's table.

    Attributes:
        role: the purpose of the row: "baseline", "proposed", or another word.
        family: the name of a studied system, which adapts to any number of ranks; None with `plan`.
        plan: a fixed plan; None with `family`.
        options: the options added to the family's plan, as in "dim_algo=gather".
        ranks: the number of ranks that the row uses, the first of the job; None means all. A row
            that needs more ranks than the job has is left out of the table.
        grow: the factor that multiplies the number of layers of the size's model.
        published_tps: the tokens/s that the paper prints.
        published_tpot_ms: the ms for each token that the paper prints.
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
            raise SpecError(f"plans: role {self.role!r}: expected one of family and plan")
        if self.family is not None and self.family not in FAMILIES:
            raise SpecError(
                f"plans: role {self.role!r}: family: expected one of {', '.join(FAMILIES)}; "
                f"got {self.family!r}"
            )
        if self.options is not None and self.family is None:
            raise SpecError(
                f"plans: role {self.role!r}: options: expected only together with family; append "
                "them to the plan"
            )
        if self.grow < 1 or (self.ranks is not None and self.ranks < 1):
            raise SpecError(
                f"plans: role {self.role!r}: ranks and grow: expected at least 1; "
                f"got {self.ranks} and {self.grow}"
            )
        if self.grow > MOST_LAYERS:
            raise SpecError(
                f"plans: role {self.role!r}: grow: expected at most {MOST_LAYERS:,}; "
                f"got {self.grow:,}"
            )

    def resolve(self, spec: ModelSpec, world: int) -> Plan:
        """Return the plan for a number of ranks."""
        if self.plan is not None:
            return parse_plan(self.plan)
        plan = family_plan(self.family or "", spec, world)
        return plan if self.options is None else parse_plan(f"{plan},{self.options}")


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of an experiment's TOML file.

    Attributes:
        title: the title, one line.
        dtype: the dtype of weights and activations.
        sizes: the sizes by name; "local" takes seconds on a small machine.
        plans: the rows of the table.
        seed: the number of the paper extract that describes the experiment.
        published_footprint: the sizes that the paper prints for its model.
    """

    title: str
    dtype: str
    sizes: dict[str, Size]
    plans: tuple[PlannedRun, ...]
    seed: str | None = None
    published_footprint: PublishedFootprint | None = None

    @property
    def scales(self) -> bool:
        """Whether rows differ in their number of ranks; they are compared with the smallest row."""
        return any(row.ranks is not None for row in self.plans)

    def runs(self, plans: Sequence[str], where: str) -> Sequence[PlannedRun]:
        """Return rows for the given plans, or the experiment's own rows if none is given.

        Raises:
            SpecError: neither exists.
        """
        if not plans and not self.plans:
            raise SpecError(f"{where}: plans: expected at least one plan, or --plan; got none")
        return [PlannedRun(role="given", plan=text) for text in plans] or self.plans

    def size(self, name: str, where: str) -> Size:
        """Return a size by name.

        Raises:
            SpecError: no size has this name.
        """
        if not self.sizes:
            raise SpecError(f"{where}: sizes: expected at least one; got none")
        if name not in self.sizes:
            raise SpecError(f"{where}: size: expected one of {', '.join(self.sizes)}; got {name!r}")
        return self.sizes[name]


def packaged_experiments() -> list[str]:
    """Return the names of the experiments that ship with the package."""
    folder = resources.files("pympa") / "bench" / "experiments"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith("toml"))


def load_experiment(name: str) -> Experiment:
    """Load a packaged experiment by its name, or your own by the path of its TOML file.

    Raises:
        SpecError: no such experiment exists, or a field of the file is wrong.
    """
    return as_experiment(load_toml(read_description(name), name), name)


def as_experiment(values: dict[str, Any], name: str) -> Experiment:
    """Return the experiment that the values of a TOML file describe.

    Raises:
        SpecError: a field is wrong, or the file describes only a model.
    """
    if is_model(values):
        raise SpecError(
            f"{name}: expected an experiment; got only a model, which pympa footprint reads. "
            'To run it, begin the file with title = "...", dtype = "bfloat16", plans = [{ role = '
            '"given", family = "ring" }], [sizes.local] batch = 1, tokens = 4096, '
            "[sizes.local.model], and rename [[layers]] to [[sizes.local.model.layers]]"
        )
    return convert_toml(values, Experiment, name)


def is_model(values: dict[str, Any]) -> bool:
    """Return whether a TOML file describes only a model, without a batch and plans."""
    return "d_model" in values and "sizes" not in values


def read_description(name: str) -> bytes:
    """Return the bytes of a packaged experiment by name, or of your own TOML file by path.

    Raises:
        SpecError: the file does not exist, or is too long for an experiment.
    """
    known = packaged_experiments()
    if name in known:
        return (resources.files("pympa") / "bench" / "experiments" / f"{name}.toml").read_bytes()
    if not name.endswith(".toml") and "/" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"experiment {name!r}: expected one of {', '.join(known)}, or the path of a .toml "
            f"file{hint}"
        )
    try:
        return read_file(name, LARGEST_FILE_BYTES)
    except OSError as error:
        raise SpecError(f"experiment {name}: {error.strerror}") from None
