"""What a run is judged by: the oracle's outputs and one rank's own error, once for each job."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pympa.bench.experiment import Size
from pympa.mesh import Plan
from pympa.model import Model, Prepared
from pympa.rank import Rank
from pympa.session import Session
from pympa.transport import WORLD, Endpoint, NullEndpoint, Transport
from pympa.verify import Verdict, collect, compare, oracle
from pympa.weights import PhiloxSource


@dataclass(frozen=True)
class Job:
    """A model, a batch and a dtype, whatever the plan.

    Attributes:
        experiment: name. size_name: "local", ... size: of that name.
        dtype: of weights and activations.
        ids: token ids of each sequence.
        source: of the weights.
    """

    experiment: str
    size_name: str
    size: Size
    dtype: np.dtype[np.generic]
    ids: tuple[NDArray[np.int32], ...]
    source: PhiloxSource


class Truth:
    """Rank 0's yardstick for one job; the other ranks only take part in `judge`."""

    def __init__(self, session: Session, job: Job) -> None:
        self._session = session
        self._job = job
        self._one_rank: Verdict | None = None
        if session.rank == 0:
            self._outputs = oracle(job.size.model, job.dtype, job.source, job.ids)
            self._one_rank = self._judge_one_rank()

    def judge(self, model: Model, prepared: Prepared) -> tuple[Verdict, Verdict]:
        """Run one step and judge it. Collective.

        Returns:
            The verdict on the run, and the one on a single rank.
        """
        outputs = collect(model, prepared, self._session.world)
        verdicts = None
        if outputs is not None and self._one_rank is not None:
            alone = None if self._session.size == 1 else self._one_rank
            spec, dtype = self._job.size.model, self._job.dtype
            verdicts = compare(spec, dtype, outputs, self._outputs, alone), self._one_rank
        judged: tuple[Verdict, Verdict] = self._session.world.gather_objects(verdicts)[0]
        return judged

    def _judge_one_rank(self) -> Verdict:
        spec, dtype = self._job.size.model, self._job.dtype
        endpoint: Endpoint = NullEndpoint(0, 1)
        rank = Rank(endpoint, Plan(), isa=self._session.isa, threads=self._session.threads)
        world = Transport(endpoint, WORLD, [0], rank.arena, rank.trace, rank.traffic)
        model = rank.model(spec, dtype, self._job.source)
        outputs = collect(model, model.prepare(self._job.ids), world)
        rank.arena.close()
        return compare(spec, dtype, outputs or {}, self._outputs)
