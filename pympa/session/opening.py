"""Opening a session: ranks agree on the request, then on instruction sets and GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pympa.errors import RefusedError
from pympa.hardware.caches import MOST_THREADS
from pympa.hardware.cores import Placement
from pympa.hardware.device import local_index
from pympa.kernels.cpu import supported_isas
from pympa.kernels.cuda import Accelerator, open_accelerator
from pympa.plan.mesh import Plan, PlanError, parse_plan
from pympa.session.agreement import check_all, check_same
from pympa.session.instruction_set import agree_on_isa
from pympa.session.team import Team
from pympa.transport import world_transport
from pympa.transport.choice import DEVICE_TRANSPORTS, DeviceTransport, connect_devices

if TYPE_CHECKING:
    from pympa.transport.mpi import MpiEndpoint


@dataclass(frozen=True)
class Request:
    """The request for a session, which must be the same on all ranks; see `Session`."""

    threads: int | None
    isa: str | None
    timeout_seconds: float
    shares_memory: bool
    backend: str
    device_transport: DeviceTransport

    def check_same(self, others: Sequence[Request]) -> None:
        """Refuse requests that differ.

        Raises:
            RefusedError: a rank differs; the message names the argument and the first such rank.
        """
        for name in asdict(self):
            check_same(name, [getattr(other, name) for other in others])

    def check(self) -> None:
        """Refuse arguments that are never allowed.

        Raises:
            RefusedError: an argument is not allowed; the message names it.
        """
        seconds = self.timeout_seconds
        threads = 1 if self.threads is None else self.threads
        if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
            raise RefusedError(f"threads: expected 1 to {MOST_THREADS}; got {threads!r}")
        if not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
            raise RefusedError(f"timeout_seconds: expected seconds above 0; got {seconds!r}")
        if self.backend not in ("cpu", "cuda"):
            raise RefusedError(f"backend: expected cpu or cuda; got {self.backend!r}")
        if self.device_transport not in DEVICE_TRANSPORTS:
            raise RefusedError(
                f"device_transport: expected one of {', '.join(DEVICE_TRANSPORTS)}; "
                f"got {self.device_transport!r}"
            )
        if self.backend == "cuda" and threads != 1:
            raise RefusedError(f"threads: expected 1 with backend cuda; got {threads}")

    def check_accelerator(self, given: Accelerator | None) -> None:
        """Refuse a GPU together with CPU kernels.

        Raises:
            RefusedError: a GPU was given.
        """
        if self.backend == "cpu" and given is not None:
            raise RefusedError("accelerator: expected none with backend cpu; got one")


def open_team(
    endpoint: MpiEndpoint,
    placements: Sequence[Placement],
    request: Request,
    given: Accelerator | None,
    *,
    threads: int,
    mpi_library: str,
) -> Team:
    """Return the team of all ranks, with their GPUs if the backend is cuda. Collective.

    Args:
        endpoint: the endpoint of this rank.
        placements: the node and cores of each rank.
        request: the request for the session.
        given: the GPU of this rank that the caller opened; None opens one with backend cuda.
        threads: the number of threads of each kernel.
        mpi_library: the name and version of the MPI library.

    Raises:
        RefusedError: a rank has no GPU, or lacks the instruction set.
    """
    world = world_transport(endpoint)
    check_all(world, lambda: request.check_accelerator(given))
    offers = world.gather_objects(supported_isas() if request.backend == "cpu" else ["cuda"])
    nodes = [placement.node for placement in placements]
    isa, note = agree_on_isa(offers, nodes, request.isa)
    team = Team(endpoint, placements, threads, isa, mpi_library, isa_note=note)
    return _with_gpus(team, endpoint, request, given) if request.backend == "cuda" else team


def _with_gpus(
    team: Team, endpoint: MpiEndpoint, request: Request, given: Accelerator | None
) -> Team:
    """Return the team with a GPU for each rank, and an endpoint for arrays there. Collective."""
    from pympa.transport.nccl_cupy import CupyNccl

    nodes = [placement.node for placement in team.placements]
    local, seconds = local_index(team.rank, nodes), request.timeout_seconds
    accelerator = team.check(lambda: given or open_accelerator(local, timeout_seconds=seconds))
    device = accelerator.device
    try:
        connected, route = connect_devices(
            endpoint,
            device,
            nodes[team.rank],
            request.device_transport,
            CupyNccl,
            timeout_seconds=seconds,
            sleeps=endpoint.sleeps,
        )
    except RefusedError:
        if given is None:
            device.close()
        raise
    buses = team.world.gather_objects(device.bus_id)
    gpus = [Placement(node, frozenset([bus])) for node, bus in zip(nodes, buses, strict=True)]
    return replace(team, endpoint=connected, accelerator=accelerator, gpus=gpus, route=route)


def parse_session_plan(plan: Plan | str | None, ranks: int) -> Plan:
    """Return the plan of a session.

    Args:
        plan: the plan of the user; None means a ring of all ranks.
        ranks: the number of ranks of the session.

    Raises:
        PlanError: it is not a plan, or needs another number of ranks.
    """
    plan = Plan(cp=ranks) if plan is None else plan
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    if not isinstance(plan, Plan):
        raise PlanError(f"plan: expected a Plan, or text as in 'cp=4,tp=2'; got {plan!r}")
    if plan.world != ranks:
        raise PlanError(f"plan {plan} needs {plan.world} ranks; this session has {ranks}")
    return plan
