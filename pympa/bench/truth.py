"""What a run is judged by: the oracle's outputs and one rank's own error, once for each job."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from pympa.backend import build_rank
from pympa.bench.experiment import Size
from pympa.collect import Outputs, collect
from pympa.mesh import Plan
from pympa.model import Model, Prepared
from pympa.reference import Rounding
from pympa.team import Team
from pympa.transport import WORLD, Endpoint, NullEndpoint, Transport
from pympa.verify import Verdict, compare, compare_sampled, oracle, routing_of
from pympa.weights import PhiloxSource, philox_bits

WHOLE_ORACLE_FLOPS = 2e12  # about a minute of float64 on one core: see `oracle_cost`
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Job:
    """A model, a batch and a dtype, whatever the plan.

    Attributes:
        experiment: name. size_name: "local", ... size: of that name.
        dtype: of weights and activations.
        ids: token ids of each sequence; none where only shapes count.
        source: of the weights.
    """

    experiment: str
    size_name: str
    size: Size
    dtype: np.dtype[np.generic]
    ids: tuple[NDArray[np.int32], ...]
    source: PhiloxSource

    @cached_property
    def _told(self) -> bytes:
        """What tells this model and batch from others."""
        told = hashlib.sha256(msgspec.json.encode((self.size.model, self.size.lengths)))
        for ids in self.ids:
            told.update(ids.tobytes())
        return told.digest()

    def digest(self, *options: object) -> str:
        """Return what tells this model, batch and these options from others."""
        return hashlib.sha256(self._told + repr(options).encode()).hexdigest()[:16]


class Truth:
    """Rank 0's yardstick for one job; the other ranks rest while it computes. Collective.

    Where the float64 oracle of the whole batch would take too long, or too much memory, some rows
    of the last sequence are checked instead, and there is no verdict on a single rank. With experts
    the oracle follows a run's choices, so runs that differ in them have oracles of their own.

    Args:
        team: all ranks.
        job: model, batch and dtype.
        samples: check some rows of the last sequence only.
    """

    def __init__(self, team: Team, job: Job, *, samples: bool = False) -> None:
        self._job = job
        self.samples = samples
        self._oracles: dict[bytes, Mapping[str, NDArray[np.float64]]] = {}
        self._alone: Verdict | None = None  # rank 0's, with the rows
        self._one_rank: Verdict | None = None
        if not self.samples:
            self._one_rank = team.on_first(1, self._judge_one_rank)

    def judge(self, team: Team, model: Model, prepared: Prepared) -> tuple[Verdict, Verdict | None]:
        """Run one step and judge it. Collective.

        Args:
            team: the ranks of the model.
            model: this rank's part of it.
            prepared: the batch.

        Returns:
            The verdict on the run, and the one on a single rank if there is one.
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
        """Return the oracle that chose as the run did; one rank's and the last one are kept."""
        job, routing = self._job, routing_of(run)
        key = b"".join(routing[name].tobytes() for name in sorted(routing))
        if key not in self._oracles:
            for other in list(self._oracles)[1:]:
                del self._oracles[other]
            self._oracles[key] = oracle(job.size.model, job.dtype, job.source, job.ids, routing)
        return self._oracles[key]

    def _emulated(self, run: Outputs) -> Callable[[Rounding], Mapping[str, NDArray[np.float64]]]:
        """Return a function: a rounding -> the oracle with it, and with the run's choices."""
        job, routing = self._job, routing_of(run)
        return functools.partial(oracle, job.size.model, job.dtype, job.source, job.ids, routing)

    def _judge_one_rank(self, team: Team) -> Verdict:
        spec, dtype = self._job.size.model, self._job.dtype
        endpoint: Endpoint = NullEndpoint(0, 1)
        rank = build_rank(
            endpoint, Plan(), isa=team.isa, threads=team.threads, accelerator=team.accelerator
        )
        world = Transport(endpoint, WORLD, [0], rank.arena, rank.trace, rank.traffic)
        model = Model(spec, rank, dtype, self._job.source)
        outputs = collect(model, model.prepare(self._job.ids), world) or {}
        rank.arena.close()
        self._alone = compare(
            spec, dtype, outputs, self._oracle(outputs), None, self._emulated(outputs)
        )
        return self._alone.summary
