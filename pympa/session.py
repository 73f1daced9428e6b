"""The door for programs: a context manager that makes MPI ranks a mesh, and ends a job cleanly.

    with Session("cp=4") as session:
        o, lse = session.ring_attention(q, k, v, lengths=[4096])

No rank waits for ever: whatever ends one rank early inside the `with` (an exception, sys.exit, a
message that never comes) prints one message and ends the whole job. A session on a communicator of
your own leaves that to you: see `Session`.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pympa._start import unlink_shared_files
from pympa.arena import Array
from pympa.attention_call import check_call, check_lengths, check_plan
from pympa.caches import MOST_THREADS
from pympa.device import local_index
from pympa.ending import end_job, one_voice
from pympa.errors import RefusedError
from pympa.kernels import KvBlock, State
from pympa.kernels.cpu import supported_isas
from pympa.kernels.cuda import Accelerator, open_accelerator
from pympa.launch import launched_tasks, mpi_library_name, refuse_singletons
from pympa.layout import Layout, split_batch, split_tokens
from pympa.mesh import Mesh, Plan, PlanError, parse_plan
from pympa.parallel.ring import ring_attention
from pympa.rank import Rank
from pympa.team import Team, check_same, count_processors, even_threads, own_place
from pympa.transport import Transport
from pympa.transport.choice import WISHES, Wish, connect_devices

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint

F32 = np.float32


class Session(Team):
    """Ranks of an MPI communicator as a mesh. Collective to enter and to leave.

    A session belongs to the thread that entered it, and takes one call at a time. Calls of other
    threads are refused: ranks would pair them in the order in which each happens to make them.

    Args:
        plan: how the ranks split the work, as `Plan` or text; None means a ring of all ranks.
        comm: mpi4py communicator; None means all ranks of the job, and then a failure inside the
            `with` ends the job. With one of your own an exception is raised where it happens, and
            the other ranks wait for `timeout_seconds`: whoever owns the job ends it, as by
            `comm.Abort`.
        isa: instruction set of the kernels; None means the best that every rank has.
        threads: threads of each kernel; None means an even share of the cores that ranks may use.
            1 or None with the backend "cuda", whose kernels have none.
        timeout_seconds: the longest any rank waits for a message.
        shares_memory: ranks of one node read each other's keys and values in place of messages,
            where the system lets them.
        backend: "cpu", or "cuda": ranks take the GPUs of their node in turn.
        device_transport: between GPUs, "nccl" or "staged" (MPI through memory of the host); "auto"
            takes NCCL unless ranks share a GPU or it is missing.
        accelerator: this rank's GPU and its kernels; None opens one, where the backend is "cuda".

    Raises:
        RefusedError: the ranks differ in their arguments, or an argument is not allowed; or a
            launcher started several tasks and each is a world of one rank.
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
        device_transport: Wish = "auto",
        accelerator: Accelerator | None = None,
    ) -> None:
        self._plan = plan
        self._comm = comm
        self._asked_isa = isa
        self._asked_threads = threads
        super().__init__(1 if threads is None else threads)
        self.timeout_seconds = timeout_seconds
        self._shares_memory = shares_memory
        self._owns_job = comm is None
        self._asked_backend, self._asked_route = backend, device_transport
        self._given_accelerator = accelerator
        self._rank: Rank | None = None
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
            sys.excepthook = one_voice(self.rank, self._usual_hook)
        places, asked = zip(*self._comm.allgather((own_place(), self._asked())), strict=True)
        for what in asked[0]:
            check_same(what, [of_rank[what] for of_rank in asked])
        self._check_asked()  # the same on all ranks
        if self._asked_threads is None and self._asked_backend == "cpu":
            self.threads = even_threads(places)
        _, crowded = count_processors(places, self.threads)
        if self._owns_job:
            unlink_shared_files()  # every rank is past MPI_Init: it has told its cores
        self.mpi_library = mpi_library_name(MPI.Get_library_version())
        endpoint = MpiEndpoint(
            self._comm,
            timeout_seconds=self.timeout_seconds,
            naps=crowded,
            shares_memory=self._shares_memory and self._asked_backend == "cpu",
        )
        self.gather(endpoint, places)
        self._thread = threading.current_thread()
        try:
            self.check(self._check_accelerator)
            if self._asked_backend == "cuda":
                self._open_devices(endpoint, [node for node, _ in places], naps=crowded)
            self.isa = self._common_isa()
            self.plan = self.check(self._parsed_plan)
            self.agree("plan", str(self.plan))
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
            if self._rank is not None:
                self._rank.arena.close()
            self._rank, self._thread = None, None
            self._endpoint.close()
            if error is None and self._owns_job:
                sys.excepthook = self._usual_hook
            if self.accelerator is not None and self._given_accelerator is None:
                self.accelerator.device.synchronise("the session")
                self.accelerator.device.close()
        elif self._owns_job:
            end_job(self.rank, error, self._abort)

    def layouts(self, lengths: Sequence[int]) -> list[Layout]:
        """Return which tokens each rank of this rank's ring holds.

        Args:
            lengths: tokens of each sequence of the batch.
        """
        self._owner()
        groups = split_batch(check_lengths(lengths), self.plan.dp)
        mine = groups[Mesh(self.plan, self.rank).coordinate("dp")]
        return split_tokens(mine, self.plan.cp, self.plan.balance)

    def layout(self, lengths: Sequence[int]) -> Layout:
        """Return which tokens this rank holds: its rows are these positions, in this order."""
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

        A row depends on the keys that it sees alone, whatever is in the others.

        lse is the logarithm of the sum of weights as rounded to q's dtype, by which o is divided,
        so that their roundings cancel in o. In 16 bits it is good to half a step of these weights,
        2e-3 in bfloat16 and 2.5e-4 in float16; in float32 to 2e-6 times the larger of 1 and |lse|.
        A row whose visible scores are all -inf gives 0 and -inf. Where |v| times the sum of
        exp(score - largest score) passes 3.4e38 (6e37 with six equal scores), the output before
        that division, and so o, is infinite.

        Args:
            q: `[rows, heads, head_dim]`, rows as `layout(lengths)`; float32, float16 or bfloat16.
                With the backend "cuda" a CuPy array, finished, of the latter two.
            k: `[rows, kv_heads, head_dim]`, of q's dtype, with no more heads than q.
            v: `[rows, kv_heads, v_head_dim]`, of q's dtype.
            lengths: tokens of each sequence of the batch.
            causal: hide keys after the query.
            scale: factor on q·k; None means 1/sqrt(head_dim).
            window: hide keys `window` or more positions away; None hides none.
            softcap: scores become softcap * tanh(score / softcap); None means no cap.

        Returns:
            o `[rows, heads, v_head_dim]` of q's dtype, lse float32 `[rows, heads]` (natural log).

        Raises:
            RefusedError: the ranks differ in their arguments.
            RuntimeError: another thread than the session's makes the call.
            ValueError: arrays that fit neither each other nor the layout, or a window with the
                zigzag order, which undoes it.
        """
        layouts, own = self.layouts(lengths), self.layout(lengths)
        call = check_call(q, k, v, causal=causal, scale=scale, window=window, softcap=softcap)
        check_plan(self.plan, window)
        self.agree("ring_attention", f"lengths {list(lengths)}, {call.told}")
        if len(q) != own.rows:
            raise ValueError(
                f"ring_attention: expected {own.rows} rows on rank {self.rank}; got {len(q)}"
            )
        rank = self._own_rank()
        o, lse = self._result((*q.shape[:2], v.shape[2]), q.dtype), self._result(q.shape[:2], F32)
        with rank.arena.scope():
            state = State(
                rank.arena.empty(q.shape[:2], F32),
                rank.arena.empty(q.shape[:2], F32),
                rank.arena.empty(o.shape, F32),
            )
            ring_attention(
                rank.kernels,
                rank.transports["cp"],
                rank.arena,
                _contiguous(rank, q),
                KvBlock(_contiguous(rank, k), _contiguous(rank, v), own),
                layouts,
                layouts,
                call.spec,
                state,
            )
            rank.kernels.finish(state, o, lse)
        if self.accelerator is not None:
            self.accelerator.device.synchronise("ring_attention")
        return o, lse

    @property
    def world(self) -> Transport:
        """Transport between all ranks.

        Raises:
            RuntimeError: another thread than the session's asks for it.
        """
        owner, caller = self._owner(), threading.current_thread()
        if caller is not owner:
            raise RuntimeError(
                "session: expected one call at a time, by the thread that entered it "
                f"({owner.name}); got one by {caller.name}: let one thread make all calls, in the "
                "same order on all ranks"
            )
        return self._world

    def _owner(self) -> threading.Thread:
        """Return the thread that entered the session.

        Raises:
            RuntimeError: none is inside.
        """
        if self._thread is None:
            raise RuntimeError("session: expected to be used inside its with block")
        return self._thread

    def _refuse_singletons(self, size: int) -> None:
        """See `refuse_singletons`; of the tasks that are worlds of one, the first speaks."""
        try:
            refuse_singletons(size, os.environ)
        except RefusedError:
            self.rank = launched_tasks(os.environ).number
            sys.excepthook = one_voice(self.rank, sys.excepthook)
            raise

    def _own_rank(self) -> Rank:
        """Return what this rank has at hand for the session's plan; all calls share its memory."""
        if self._rank is None:
            self._rank = self.on(self.plan)
        return self._rank

    def _open_devices(self, endpoint: MpiEndpoint, nodes: Sequence[str], *, naps: bool) -> None:
        """Take a device each, and let arrays on it travel. Collective."""
        from pympa.transport.nccl_cupy import CupyNccl

        local = local_index(self.rank, nodes)
        given = self._given_accelerator
        self.accelerator = self.check(
            lambda: given or open_accelerator(local, timeout_seconds=self.timeout_seconds)
        )
        device = self.accelerator.device
        connected, self.route = connect_devices(
            endpoint,
            device,
            nodes[self.rank],
            self._asked_route,
            CupyNccl,
            timeout_seconds=self.timeout_seconds,
            naps=naps,
        )
        buses = self.world.gather_objects(device.bus_id)
        devices = [(node, {bus}) for node, bus in zip(nodes, buses, strict=True)]
        self.gather(connected, self._places, devices)

    def _asked(self) -> dict[str, Any]:
        """Return what all ranks must ask for alike."""
        return {
            "threads": self._asked_threads,
            "isa": self._asked_isa,
            "timeout_seconds": self.timeout_seconds,
            "shares_memory": self._shares_memory,
            "backend": self._asked_backend,
            "device_transport": self._asked_route,
        }

    def _check_asked(self) -> None:
        """Refuse arguments that no rank can take.

        Raises:
            RefusedError: names the argument.
        """
        backend, route, seconds = self._asked_backend, self._asked_route, self.timeout_seconds
        if type(self.threads) is not int or not 1 <= self.threads <= MOST_THREADS:
            raise RefusedError(f"threads: expected 1 to {MOST_THREADS}; got {self.threads!r}")
        if not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
            raise RefusedError(f"timeout_seconds: expected seconds above 0; got {seconds!r}")
        if backend not in ("cpu", "cuda"):
            raise RefusedError(f"backend: expected cpu or cuda; got {backend!r}")
        if route not in WISHES:
            raise RefusedError(
                f"device_transport: expected one of {', '.join(WISHES)}; got {route!r}"
            )
        if backend == "cuda" and self.threads != 1:
            raise RefusedError(f"threads: expected 1 with backend cuda; got {self.threads}")

    def _check_accelerator(self) -> None:
        if self._asked_backend == "cpu" and self._given_accelerator is not None:
            raise RefusedError("accelerator: expected none with backend cpu; got one")

    def _parsed_plan(self) -> Plan:
        plan = Plan(cp=self.size) if self._plan is None else self._plan
        plan = parse_plan(plan) if isinstance(plan, str) else plan
        if not isinstance(plan, Plan):
            raise PlanError(f"plan: expected a Plan, or text as in 'cp=4,tp=2'; got {plan!r}")
        if plan.world != self.size:
            raise PlanError(f"plan {plan} takes {plan.world} ranks; this session has {self.size}")
        return plan

    def _result(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type[Any]) -> Array:
        """Return an array that outlives the arena."""
        if self.accelerator is None:
            return np.empty(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw: Array = self.accelerator.device.allocate(max(size, 1))
        return raw[:size].view(dtype).reshape(shape)

    def _common_isa(self) -> str:
        offered = supported_isas() if self.accelerator is None else ["cuda"]
        offers = self.world.gather_objects(offered)
        common = [isa for isa in offers[0] if all(isa in offer for offer in offers)]
        if self._asked_isa is not None and self._asked_isa not in common:
            raise RefusedError(f"isa: expected one of {', '.join(common)}; got {self._asked_isa!r}")
        return self._asked_isa or str(common[0])


def _contiguous(rank: Rank, array: Array) -> Array:
    """Return an array that can travel, which is a copy if it must."""
    if array.flags.c_contiguous:
        return array
    out = rank.arena.empty(array.shape, array.dtype, "messages")
    rank.kernels.copy(array, out)
    return out
