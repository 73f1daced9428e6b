"""What one rank of a plan has at hand, whatever computes and whatever moves its messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pympa.arena import Arena
from pympa.kernels import Kernels
from pympa.loops import Loops
from pympa.mesh import Mesh
from pympa.trace import ExpertLoad, Trace
from pympa.transport import Traffic, Transport


@dataclass(frozen=True)
class Rank:
    """One rank's place, memory, kernels and transports, and the books it keeps.

    Attributes:
        mesh: the plan and the rank's place in it.
        kernels: the backend. transports: by axis.
        loops: which of their passes run. arena: memory. trace: where time goes.
        traffic: bytes sent. load: rows sent to experts.
    """

    mesh: Mesh
    kernels: Kernels
    transports: Mapping[str, Transport]
    loops: Loops
    arena: Arena
    trace: Trace
    traffic: Traffic
    load: ExpertLoad
