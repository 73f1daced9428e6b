"""A model on the ranks of a session, and the logits of a program's own sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pympa.errors import RefusedError
from pympa.footprint.rehearsal import Rehearsal
from pympa.hardware.memory import DEVICE_BYTES
from pympa.model.model import Logits, Model
from pympa.model.resources import RankResources
from pympa.plan.layout import sequence_starts
from pympa.plan.mesh import Plan
from pympa.plan.partition import stage_bounds
from pympa.plan.rules import check_plan
from pympa.runtime.arena import Arena
from pympa.session.arrays import token_ids
from pympa.session.loading import CountedSource, LoadRequest
from pympa.session.room import Need, Room
from pympa.session.team import Team
from pympa.transport import Transport

if TYPE_CHECKING:
    from pympa.checkpoint.tokenizer import Tokenizer

_ID_BYTES = 2 * 4  # one token id, on every rank, while ids are made
MOST_CONTEXT, MOST_BATCH = 1 << 40, 1 << 24  # more is a typing error
_DIGITS = 16  # of a digest of token ids
_DEFAULT_CONTEXT = 4096  # tokens for which layers are cut into stages if none are declared


@dataclass(frozen=True)
class Declared:
    """What a user declares about the use of a model.

    Attributes:
        context: the most tokens of a sequence; None means as many as a call brings.
        batch: the number of such sequences for which there must be memory.
    """

    context: int | None
    batch: int

    def check(self) -> None:
        """Refuse numbers that are not allowed.

        Raises:
            RefusedError: a number is not whole, or out of its range.
        """
        for name, value, most in (
            ("context", self.context, MOST_CONTEXT),
            ("batch", self.batch, MOST_BATCH),
        ):
            allowed = name == "context" and value is None
            if not allowed and (type(value) is not int or not 1 <= value <= most):
                raise RefusedError(
                    f"{name}: expected a whole number from 1 to {most:,}; got {value!r}"
                )


class LoadedModel:
    """A model whose weights are on the ranks of a session. Collective to make and to use.

    Use it inside the session's `with`; `close`, or a `with` of its own, frees its memory earlier.

    Args:
        team: a function that returns the ranks of the session, if the session is open.
        plan: the plan that splits the model.
        request: the model and its weights.
        dtype: the dtype of weights and activations.
        declared: the use that must fit into memory.
        shows_progress: whether this rank prints how far loading has come.

    Attributes:
        spec: the model.
        plan: the plan that splits it.
    """

    def __init__(
        self,
        team: Callable[[], Team],
        plan: Plan,
        request: LoadRequest,
        dtype: np.dtype[Any],
        declared: Declared,
        *,
        shows_progress: bool,
    ) -> None:
        self.plan = plan
        self.spec = request.spec
        if declared.context is not None:
            self.spec = self.spec.within(declared.context)
        self._team, self._dtype, self._context = team, dtype, declared.context
        self._read_tokenizer = request.tokenizer
        longest = declared.context or _DEFAULT_CONTEXT
        self._stages = stage_bounds(self.spec, plan, longest, itemsize=dtype.itemsize)
        rehearsal = self._rehearsal()
        weights = rehearsal.model.parameters * dtype.itemsize
        what = f"{request.title}: plan {plan}"
        if declared.context is not None:
            lengths = [declared.context] * declared.batch
            what = f"{what}, {declared.batch:,} sequences of {declared.context:,} tokens"
            kv_bytes = rehearsal.model.kv_bytes(lengths)
            self._refuse_shortage(what, self._held_bytes(rehearsal.arena) + kv_bytes)
            rehearsal.step(lengths)  # of a length that fits, so it does not take long
        held = max(self._held_bytes(rehearsal.arena), rehearsal.loading_bytes)
        self._refuse_shortage(what, held)
        source = CountedSource(request.source, request.title, weights, shows=shows_progress)
        resources = team().resources(plan)
        self._model = team().check(
            lambda: Model(self.spec, resources, dtype, source, stages=self._stages)
        )
        self._resources: RankResources | None = resources
        self._needed: dict[tuple[tuple[int, ...], bool], int] = {}  # by the last step alone
        source.finish()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def close(self) -> None:
        """Free the memory of the weights on this rank. The model cannot be used any more."""
        if self._resources is not None:
            self._resources.arena.close()
            self._resources = None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, read when it is first used; None if it has none.

        Raises:
            RefusedError: its files are broken, or of a kind that is not known.
        """
        return self._read_tokenizer()

    def logits(
        self, sequences: Sequence[Any], *, everywhere: bool = False, last: bool = False
    ) -> list[NDArray[np.float32]] | None:
        """Return the logits of sequences of token ids. Collective.

        All ranks bring the same sequences.

        Args:
            sequences: the token ids of each sequence: lists, or NumPy, CuPy or torch arrays of
                whole numbers `[tokens]`.
            everywhere: whether all ranks get the result.
            last: whether only the logits after the last token of each sequence are computed.

        Returns:
            An array `[tokens, vocabulary]` float32 for each sequence, or `[1, vocabulary]` with
            `last`; on other ranks than 0 None, unless `everywhere`.

        Raises:
            RefusedError: the ranks differ in their arguments, an id is not in the vocabulary, the
                plan does not fit the batch, or a memory is too small.
        """
        team = self._team()
        ids, resources = team.check(lambda: self._checked(sequences, everywhere, last))
        lengths = [len(sequence) for sequence in ids]
        digest = hashlib.sha256(np.concatenate([lengths, *ids]).tobytes()).hexdigest()[:_DIGITS]
        told = f"{len(lengths)} sequences of {sum(lengths)} tokens, with the digest {digest}"
        team.agree("logits", f"{told}, everywhere={everywhere}, last={last}")
        self._refuse_step(resources, lengths, everywhere=everywhere, last=last)
        with resources.arena.scope():
            prepared = self._model.prepare(ids, all_logits=not last)
            found = self._model.forward(prepared)
            return collect_logits(self._model, team.world, found, lengths, last, everywhere)

    def _checked(
        self, sequences: Sequence[Any], *flags: bool
    ) -> tuple[list[NDArray[np.int32]], RankResources]:
        """Return the token ids of a call, after checking that it can run, and what it runs on."""
        if self._resources is None:
            raise RefusedError("logits: expected a model that is not closed")
        if not all(isinstance(flag, bool) for flag in flags):
            raise RefusedError("logits: everywhere, last: expected True or False")
        if not isinstance(sequences, (list, tuple)) or not sequences:
            raise RefusedError("logits: sequences: expected a list of at least one sequence")
        vocabulary = self.spec.vocabulary
        ids = [token_ids(s, f"sequences[{i}]", vocabulary) for i, s in enumerate(sequences)]
        lengths = [len(sequence) for sequence in ids]
        if self._context is not None and max(lengths) > self._context:
            raise RefusedError(
                f"logits: sequences[{lengths.index(max(lengths))}]: expected at most "
                f"{self._context:,} tokens, the context of load; got {max(lengths):,}"
            )
        check_plan(self.plan, self.spec, self.plan.world, len(ids), sum(lengths))
        return ids, self._resources

    def _rehearsal(self) -> Rehearsal:
        team = self._team()
        return Rehearsal(
            self.spec,
            self.plan,
            team.rank,
            self._dtype,
            isa=team.isa,
            threads=team.threads,
            stages=self._stages,
            reaches=team.reaches,
            accelerator=team.accelerator,
        )

    def _refuse_step(
        self, resources: RankResources, lengths: Sequence[int], *, everywhere: bool, last: bool
    ) -> None:
        """Refuse a batch for which too little memory is free. Collective."""
        team = self._team()
        step = tuple(lengths), last
        if step not in self._needed:
            rehearsal = self._rehearsal()
            rehearsal.step(lengths, all_logits=not last)
            self._needed = {step: self._held_bytes(rehearsal.arena)}
        missing = max(self._needed[step] - self._held_bytes(resources.arena), 0)
        rows = len(lengths) if last else sum(lengths)
        result = 4 * rows * self.spec.vocabulary
        host = _ID_BYTES * sum(lengths) + (3 * result if everywhere or team.rank == 0 else result)
        what = f"logits: {len(lengths)} sequences of {sum(lengths):,} tokens: plan {self.plan}"
        self._refuse_shortage(what, missing, host)

    def _held_bytes(self, arena: Arena) -> int:
        """Return the bytes that an arena takes: all blocks on a GPU, pages in use on the host."""
        on_device = self._team().accelerator is not None
        return arena.mapped_bytes if on_device else arena.touched_bytes

    def _refuse_shortage(self, what: str, arena_bytes: int, host_bytes: int = 0) -> None:
        """Refuse what does not fit into the memory that is free now. Collective.

        Raises:
            RefusedError: a memory is too small for all its ranks together.
        """
        team = self._team()
        need = Need(host_bytes + arena_bytes)
        if team.accelerator is not None:
            need = Need(host_bytes, arena_bytes + DEVICE_BYTES)
        short = Room(team).shortage(team, [need])
        if short is not None:
            raise RefusedError(
                f"{what} does not fit: {short}; use more nodes, another plan, or shorter or fewer "
                "sequences"
            )


def collect_logits(
    model: Model,
    world: Transport,
    found: Sequence[Logits],
    lengths: Sequence[int],
    last: bool = False,
    everywhere: bool = False,
) -> list[NDArray[np.float32]] | None:
    """Return the logits of all ranks by sequence, micro-batch by micro-batch. Collective.

    Args:
        model: this rank's part of the model.
        world: the transport over all ranks.
        found: the logits of this rank, from `Model.forward`.
        lengths: the number of tokens of each sequence.
        last: whether they are those of last tokens only.
        everywhere: whether all ranks get the result; otherwise only rank 0, and others None.
    """
    counts = [1] * len(lengths) if last else list(lengths)
    starts = [length - 1 for length in lengths] if last else [0] * len(lengths)
    first_rows = sequence_starts(counts) - np.array(starts)
    mine = everywhere or world.index == 0
    whole = np.empty((sum(counts) if mine else 0, model.spec.vocabulary), np.float32)
    for number in range(model.mesh.plan.micro_batches):
        part = None
        if number < len(found):
            logits = found[number]
            values = model.read(logits.values)
            part = logits.layout.rows_from(first_rows), logits.vocabulary, values
        for piece in world.gather_objects(part, root=None if everywhere else 0):
            if piece is not None:
                rows, (first, stop), values = piece
                whole[rows, first:stop] = values
    return np.split(whole, np.cumsum(counts)[:-1]) if mine else None
