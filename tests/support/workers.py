"""Which tests go to which worker, where there are several (pytest-xdist)."""

from __future__ import annotations

import re
from functools import cache

from xdist.scheduler import LoadScopeScheduling

from support.jobs import ROOT

_IMPORTS = re.compile(r"^from support\.(jobs|slurm) import (?!ROOT$)", re.MULTILINE)


class JobsOnOneWorker(LoadScopeScheduling):
    """Sends tests that start jobs to one worker, the first, and the others to whoever is idle.

    Jobs would find each other's processes and files left behind, and two at a time would not end
    within the seconds that users are promised.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "jobs" if _starts_jobs(nodeid.partition("::")[0]) else nodeid


@cache
def _starts_jobs(path: str) -> bool:
    return _IMPORTS.search((ROOT / path).read_text()) is not None
