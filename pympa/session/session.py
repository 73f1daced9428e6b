"""The entry point for programs: a context manager that makes MPI ranks a mesh.

    with Session("cp=4") as session:
        o, lse = session.ring_attention(q, k, v, lengths=[4096])

No rank waits for ever: whatever ends one rank early inside the `with` (an exception, sys.exit, a
message that never arrives) prints one message and ends the whole job. With a communicator of your
own, ending the job is up to you: see `Session`.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pympa._start import unlink_shared_files
from pympa.errors import RefusedError
from pympa.hardware.cores import count_processors, even_threads, own_placement
from pympa.kernels import KvBlock, State
from pympa.kernels.cuda import Accelerator
from pympa.model.resources import RankResources
from pympa.parallel.ring import (
    RingBlocks,
    attend,
    fold_in_pieces,
    gathered,
    sent_round_the_ring,
)
from pympa.plan.layout import Layout, split_batch, split_tokens
from pympa.plan.mesh import Mesh, Plan
from pympa.plan.rules import check_plan as check_whole_plan
from pympa.runtime.arena import Array
from pympa.session.attention_call import check_call, check_lengths, check_plan
from pympa.session.ending import end_job, refuse_once
from pympa.session.launch import launched_tasks, mpi_library_name, refuse_singletons
from pympa.session.opening import Request, open_team, parse_session_plan
from pympa.session.team import Team
from pympa.spec import ModelSpec, numpy_dtype
from pympa.transport import Transport
from pympa.transport.choice import DeviceTransport

if TYPE_CHECKING:
    from pympa.session.loaded_model import LoadedModel
    from pympa.transport.mpi import MpiEndpoint

F32 = np.float32


class Session:
    """The ranks of an MPI communicator as a mesh. Collective to enter and to leave.

    A session belongs to the thread that entered it, and takes one call at a time. Calls of other
    threads are refused, because ranks would match calls in the order in which each rank makes them.

    Args:
        plan: the plan that splits the work, as `Plan` or text; None means a ring of all ranks.
        comm: an mpi4py communicator. None means all ranks of the job; then a failure inside the
            `with` ends the job. With your own communicator an exception is raised where it occurs,
            and the other ranks wait for `timeout_seconds`: your program ends the job, for example
            by `comm.Abort`.
        isa: the instruction set of the kernels; None means the best one that every rank has.
        threads: the number of threads of each kernel; None means an even share of the cores that
            ranks may use. 1 or None with backend "cuda", whose kernels have no threads.
        timeout_seconds: the longest time that any rank waits for a message.
        shares_memory: whether ranks of one node read each other's keys and values in shared memory
            instead of sending them, where the system allows it.
        backend: "cpu", or "cuda", in which ranks use the GPUs of their node round-robin.
        device_transport: the route between GPUs: "nccl", or "staged" (MPI through host memory);
            "auto" uses NCCL unless ranks share a GPU or NCCL is missing.
        accelerator: the GPU of this rank with its kernels; None opens one if the backend is "cuda".

    Raises:
        RefusedError: the ranks differ in their arguments, or an argument is not allowed; or a
            launcher started several tasks and each of them is a world of one rank.
    """

    def __init__(
        self,
        plan: Plan | str | None = None,
        *,
        comm: Any = None,
        isa: str | None = None,
        threads: int | None = 1,
        timeout_seconds: float = 300.0,
        shares_memory: bool = True,
        backend: str = "cpu",
        device_transport: DeviceTransport = "auto",
        accelerator: Accelerator | None = None,
    ) -> None:
        self._asked_plan, self._comm = plan, comm
        self._request = Request(
            threads, isa, timeout_seconds, shares_memory, backend, device_transport
        )
        self._given_accelerator = accelerator
        self._owns_job = comm is None
        self.rank = 0
        self._endpoint: MpiEndpoint | None = None
        self._team: Team | None = None
        self._resources: RankResources | None = None
        self._thread: threading.Thread | None = None  # while it is open

    def __enter__(self) -> Session:
        from mpi4py import MPI

        from pympa.transport.mpi import MpiEndpoint

        if self._comm is None:
            self._comm = MPI.COMM_WORLD
        if self._comm == MPI.COMM_NULL:
            raise RefusedError("comm: expected a communicator that this rank is in; got COMM_NULL")
        self._abort, self.rank = self._comm.Abort, self._comm.Get_rank()
        if self._comm == MPI.COMM_WORLD:
            self._refuse_singletons(self._comm.Get_size())
        if self._owns_job:
            self._usual_hook = sys.excepthook
            sys.excepthook = refuse_once(self.rank, self._usual_hook)
        request = self._request
        everyone = self._comm.allgather((own_placement(), request))
        placements = [placement for placement, _ in everyone]
        request.check_same([asked for _, asked in everyone])
        request.check()  # the same on all ranks
        threads = request.threads or 1
        if request.threads is None and request.backend == "cpu":
            threads = even_threads(placements)
        if self._owns_job:
            unlink_shared_files()  # every rank has passed MPI_Init: its cores were gathered
        self._endpoint = MpiEndpoint(
            self._comm,
            timeout_seconds=request.timeout_seconds,
            sleeps=count_processors(placements, threads).oversubscribed,
            shares_memory=request.shares_memory and request.backend == "cpu",
        )
        self._thread = threading.current_thread()
        try:
            self._team = open_team(
                self._endpoint,
                placements,
                request,
                self._given_accelerator,
                threads=threads,
                mpi_library=mpi_library_name(MPI.Get_library_version()),
            )
            team = self._team
            self.plan = team.check(lambda: parse_session_plan(self._asked_plan, team.size))
            team.agree("plan", str(self.plan))
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, RefusedError):
            self._close()
            if error is None and self._owns_job:
                sys.excepthook = self._usual_hook
        elif self._owns_job:
            end_job(self.rank, error, self._abort)

    def _close(self) -> None:
        """Free memory, the endpoint and the GPU that this session opened."""
        team, self._team, self._thread = self._team, None, None
        if self._resources is not None:
            self._resources.arena.close()
            self._resources = None
        endpoint = self._endpoint if team is None else team.endpoint
        if endpoint is not None:
            endpoint.close()
        if team is not None and team.accelerator is not None and self._given_accelerator is None:
            team.accelerator.device.synchronise("the session")
            team.accelerator.device.close()

    @property
    def team(self) -> Team:
        """The ranks of the session.

        Raises:
            RuntimeError: the session is not entered, or another thread calls it.
        """
        caller = threading.current_thread()
        if self._team is None or self._thread is None:
            raise RuntimeError("session: expected to be used inside its with block")
        if caller is not self._thread:
            raise RuntimeError(
                "session: expected one call at a time, by the thread that entered it "
                f"({self._thread.name}); got one by {caller.name}: let one thread make all calls, "
                "in the same order on all ranks"
            )
        return self._team

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.team.size

    @property
    def world(self) -> Transport:
        """The transport between all ranks."""
        return self.team.world

    def layouts(self, lengths: Sequence[int]) -> list[Layout]:
        """Return the tokens that each rank of this rank's ring has.

        Args:
            lengths: the number of tokens of each sequence of the batch.
        """
        team = self.team
        groups = split_batch(check_lengths(lengths), self.plan.dp)
        mine = groups[Mesh(self.plan, team.rank).coordinate("dp")]
        return split_tokens(mine, self.plan.cp, self.plan.balance)

    def layout(self, lengths: Sequence[int]) -> Layout:
        """Return the tokens of this rank: its rows are these positions, in this order."""
        return self.layouts(lengths)[Mesh(self.plan, self.rank).coordinate("cp")]

    def ring_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        lengths: Sequence[int],
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Array, Array]:
        """Return exact attention of this rank's queries to all keys of the ring. Collective.

        A row depends only on the keys that it sees, whatever the other keys contain.

        lse is the logarithm of the sum of the weights as rounded to q's dtype, by which o is
        divided, so that their roundings cancel in o. In 16 bits it is accurate to half a step of
        these weights, 2e-3 in bfloat16 and 2.5e-4 in float16; in float32 to 2e-6 times the larger
        of 1 and |lse|. A row whose visible scores are all -inf gives 0 and -inf. Where |v| times
        the sum of exp(score - largest score) exceeds 3.4e38 (6e37 with six equal scores), the
        output before that division, and so o, is infinite.

        Args:
            q: the queries `[rows, heads, head_dim]`, rows as in `layout(lengths)`; float32, float16
                or bfloat16. With backend "cuda" a CuPy array, computed, float16 or bfloat16.
            k: the keys `[rows, kv_heads, head_dim]`, of q's dtype, with at most q's number of
                heads.
            v: the values `[rows, kv_heads, v_head_dim]`, of q's dtype.
            lengths: the number of tokens of each sequence of the batch.
            causal: whether keys after the query are hidden.
            scale: the factor on q·k; None means 1/sqrt(head_dim).
            window: the distance, in positions, from which on keys are hidden; None for no window.
            softcap: the cap in softcap * tanh(score / softcap) on scores; None means no cap.

        Returns:
            o `[rows, heads, v_head_dim]` of q's dtype, lse float32 `[rows, heads]` (natural log).

        Raises:
            RefusedError: the ranks differ in their arguments.
            RuntimeError: another thread than the session's makes the call.
            ValueError: arrays do not fit each other or the layout, or ranks of the plan do not
                have whole heads.
        """
        layouts, own = self.layouts(lengths), self.layout(lengths)
        call = check_call(q, k, v, causal=causal, scale=scale, window=window, softcap=softcap)
        check_plan(self.plan)
        self.team.agree("ring_attention", f"lengths {list(lengths)}, {call.summary}")
        if len(q) != own.rows:
            raise ValueError(
                f"ring_attention: expected {own.rows} rows on rank {self.rank}; got {len(q)}"
            )
        resources = self._own_resources()
        o, lse = self._result((*q.shape[:2], v.shape[2]), q.dtype), self._result(q.shape[:2], F32)
        with resources.arena.scope():
            state = State(
                resources.arena.empty(q.shape[:2], F32),
                resources.arena.empty(q.shape[:2], F32),
                resources.arena.empty(o.shape, F32),
            )
            q = _contiguous(resources, q)
            own_block = KvBlock(_contiguous(resources, k), _contiguous(resources, v), own)
            kernels, transport = resources.kernels, resources.transports["cp"]
            ring = RingBlocks(transport, resources.arena, own_block, layouts, layouts, call.spec)
            source = sent_round_the_ring if window is None else gathered

            def fold(kv: KvBlock) -> None:
                fold_in_pieces(kernels, transport, q, own, kv, call.spec, state)

            attend(kernels, ring, source, fold, state)
            resources.kernels.finish(state, o, lse)
        if self.team.accelerator is not None:
            self.team.accelerator.device.synchronise("ring_attention")
        return o, lse

    def load(
        self,
        model: str | Path | ModelSpec | Mapping[str, Any],
        *,
        dtype: str | None = None,
        weights: Mapping[str, Any] | None = None,
        context: int | None = None,
        batch: int = 1,
        ignore_fields: Sequence[str] = (),
        progress: bool | None = None,
    ) -> LoadedModel:
        """Load a model on the ranks of the session, split by its plan. Collective.

        Everything is checked before weights are read: the configuration, names and shapes of
        tensors, the plan, and the memory of each node for all its ranks together. Then ranks share
        the cores of their node evenly, whatever number of threads computes.

        Args:
            model: a model directory as Hugging Face has it, a file of weights in one, the fields
                of a config.json, or a `ModelSpec`.
            dtype: "float32", "float16" or "bfloat16"; None means that of the files.
            weights: arrays by name instead of those of the directory: NumPy, CuPy or torch, with
                the names of the family's files, or those of `model_weights` with a `ModelSpec`. A
                `ModelSpec` without weights gets random ones.
            context: the most tokens of a sequence, by which memory is checked, and dynamic and
                longrope embeddings are chosen; None checks the weights alone, and chooses by the
                longest sequence of each call.
            batch: the number of sequences of that many tokens, by which memory is checked.
            ignore_fields: the names of unknown fields of config.json to go on without.
            progress: whether rank 0 prints how far it has come; None means on a terminal.

        Raises:
            RefusedError: a file, a field, a tensor or the plan is not allowed, a memory is too
                small, or the ranks differ.
        """
        from pympa.session.loaded_model import Declared, LoadedModel
        from pympa.session.loading import find_request

        team = self.team
        request = team.check(lambda: find_request(model, weights, ignore_fields))
        found = team.check(lambda: numpy_dtype(dtype or request.dtype or "float32"))
        declared = Declared(context, batch)
        team.check(declared.check)
        team.agree("load", f"{request}, {found.name}, context={context}, batch={batch}")
        team.check(lambda: check_whole_plan(self.plan, request.spec, self.plan.world, batch))
        shows = sys.stderr.isatty() if progress is None else progress
        return LoadedModel(
            lambda: self.team,
            self.plan,
            request,
            found,
            declared,
            shows_progress=shows and team.rank == 0,
        )

    def _refuse_singletons(self, size: int) -> None:
        """See `refuse_singletons`; if all tasks are worlds of one, only the first prints it."""
        try:
            refuse_singletons(size, os.environ)
        except RefusedError:
            self.rank = launched_tasks(os.environ).number
            sys.excepthook = refuse_once(self.rank, sys.excepthook)
            raise

    def _own_resources(self) -> RankResources:
        """Return this rank's resources for the session's plan; all calls share them."""
        if self._resources is None:
            self._resources = self.team.resources(self.plan)
        return self._resources

    def _result(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> Array:
        """Return an array that outlives the arena's scope."""
        accelerator = self.team.accelerator
        if accelerator is None:
            return np.empty(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw: Array = accelerator.device.allocate(max(size, 1))
        return raw[:size].view(dtype).reshape(shape)


def _contiguous(resources: RankResources, array: Array) -> Array:
    """Return the array, or a contiguous copy, which transports require."""
    if array.flags.c_contiguous:
        return array
    out = resources.arena.empty(array.shape, array.dtype, "messages")
    resources.kernels.copy(array, out)
    return out
