"""The reference for a run: the oracle's outputs and one rank's own error, once for each job."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.bench.experiment.description import Size
from pympa.model.model import Model, Prepared
from pympa.model.random_weights import philox_bits
from pympa.model.weights import WeightSource
from pympa.plan.mesh import Plan
from pympa.session.resources import build_resources
from pympa.session.team import Team
from pympa.transport import Transport
from pympa.transport.endpoint import WORLD, Endpoint, NullEndpoint
from pympa.verify.collect import Outputs, collect
from pympa.verify.compare import compare, compare_sampled
from pympa.verify.oracle import oracle, routing_of
from pympa.verify.reference import Rounding
from pympa.verify.verdict import Verdict

WHOLE_ORACLE_FLOPS = 2e12  # about a minute of float64 arithmetic on one core: see `oracle_cost`
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Job:
    """A model, a batch and a dtype, without a plan.

    Attributes:
        experiment: the name of the experiment.
        size_name: the name of the size, such as "local".
        size: the size of that name.
        dtype: the dtype of weights and activations.
        ids: the token ids of each sequence; empty where only shapes count.
        source: the source of the weights.
    """

    experiment: str
    size_name: str
    size: Size
    dtype: np.dtype[np.generic]
    ids: tuple[NDArray[np.int32], ...]
    source: WeightSource

    @cached_property
    def _own_digest(self) -> bytes:
        """The digest that identifies this model, its weights and this batch."""
        what = self.size.model, self.size.lengths, self.source.identity
        digest = hashlib.sha256(msgspec.json.encode(what))
        for ids in self.ids:
            digest.update(ids.tobytes())
        return digest.digest()

    def digest(self, *options: object) -> str:
        """Return a digest that identifies this model, batch and these options."""
        return hashlib.sha256(self._own_digest + repr(options).encode()).hexdigest()[:16]


class Truth:
    """The reference for one job, on rank 0; the other ranks wait while it computes. Collective.

    Where the float64 oracle of the whole batch would take too much time or memory, some rows
    of the last sequence are checked instead, and there is no verdict on a single rank. With experts
    the oracle follows a run's choices, so each different set of choices gets its own oracle.

    Args:
        team: all ranks.
        job: the model, batch and dtype.
        samples: whether only some rows of the last sequence are checked.
    """

    def __init__(self, team: Team, job: Job, *, samples: bool = False) -> None:
        self._job = job
        self.samples = samples
        self._oracles: dict[bytes, Mapping[str, NDArray[np.float64]]] = {}
        self._alone: Verdict | None = None  # one rank's verdict with rows, on rank 0
        self._one_rank: Verdict | None = None
        if not self.samples:
            self._one_rank = team.on_first(1, self._judge_one_rank)

    def judge(self, team: Team, model: Model, prepared: Prepared) -> tuple[Verdict, Verdict | None]:
        """Run one step and judge it. Collective.

        Args:
            team: the ranks of the model.
            model: this rank's part of the model.
            prepared: the batch.

        Returns:
            The verdict on the run, and the one on a single rank if it exists.
        """
        checked = len(self._job.ids) - 1 if self.samples else None
        outputs = collect(model, prepared, team.world, only=checked)

        def verdict(_: Team) -> Verdict:
            return self._verdict(outputs or {}, team.size)

        return team.on_first(1, verdict), self._one_rank

    def _verdict(self, outputs: Outputs, ranks: int) -> Verdict:
        spec, dtype = self._job.size.model, self._job.dtype
        if self.samples:
            ids = self._job.ids[-1]
            draws = philox_bits("verified rows", 0, SAMPLED_ROWS).astype(np.int64)
            rows = np.unique([*draws % len(ids), len(ids) - 1])
            return compare_sampled(spec, dtype, outputs, self._job.source, ids, rows)
        alone = None if ranks == 1 else self._alone
        judged = compare(
            spec, dtype, outputs, self._oracle(outputs), alone, self._emulated(outputs)
        )
        return judged.summary

    def _oracle(self, run: Outputs) -> Mapping[str, NDArray[np.float64]]:
        """Return the oracle with the run's choices; one rank's oracle and the last one are kept."""
        job, routing = self._job, routing_of(run)
        key = b"".join(routing[name].tobytes() for name in sorted(routing))
        if key not in self._oracles:
            for other in list(self._oracles)[1:]:
                del self._oracles[other]
            self._oracles[key] = oracle(job.size.model, job.dtype, job.source, job.ids, routing)
        return self._oracles[key]

    def _emulated(self, run: Outputs) -> Callable[[Rounding], Mapping[str, NDArray[np.float64]]]:
        """Return a function from a rounding to the oracle with it and with the run's choices."""
        job, routing = self._job, routing_of(run)
        return functools.partial(oracle, job.size.model, job.dtype, job.source, job.ids, routing)

    def _judge_one_rank(self, team: Team) -> Verdict:
        spec, dtype = self._job.size.model, self._job.dtype
        endpoint: Endpoint = NullEndpoint(0, 1)
        resources = build_resources(
            endpoint, Plan(), isa=team.isa, threads=team.threads, accelerator=team.accelerator
        )
        world = Transport(endpoint, WORLD, [0], resources.arena, resources.trace, resources.traffic)
        model = Model(spec, resources, dtype, self._job.source)
        outputs = collect(model, model.prepare(self._job.ids), world) or {}
        resources.arena.close()
        self._alone = compare(
            spec, dtype, outputs, self._oracle(outputs), None, self._emulated(outputs)
        )
        return self._alone.summary
