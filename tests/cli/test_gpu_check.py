"""bench/gpu_check.sh as far as it goes without a GPU: its parts run, and its table says so."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from support.jobs import ROOT, run_command
from support.lanes import FULL

SCRIPT = str(ROOT / "bench" / "gpu_check.sh")


def run(*arguments, first_on_path=""):
    """Run the script with the Python that runs this."""
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join([*filter(None, [first_on_path]), own, os.environ["PATH"]])
    command = ("env", f"PATH={path}", "bash", SCRIPT, *arguments)
    return run_command(*command, timeout=300)


@pytest.fixture(autouse=True)
def with_bash():
    if shutil.which("bash") is None:
        pytest.skip("no bash")


@FULL
def test_dry_run_of_all_parts(tmp_path):
    job = run("--dry", "--out", str(tmp_path / "logs"))
    assert job.status == 0, job.out + job.err
    table = job.out[job.out.index("part ") :].splitlines()
    parts = [re.match(r"(\w+) +(ok) +(\d+)  (.+)", row) for row in table[1:]]
    assert all(parts), table
    names = [part[1] for part in parts]
    assert len(names) == 11
    assert {f"{name}.log" for name in names} == {p.name for p in (tmp_path / "logs").iterdir()}


@FULL
def test_a_part_that_fails_hides_no_other(tmp_path):
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "mpirun").write_text("#!/bin/sh\necho no ranks here; exit 3\n")
    (broken / "mpirun").chmod(0o755)
    out = str(tmp_path / "logs")
    job = run("--dry", "--only", "plans,prefill", "--out", out, first_on_path=str(broken))
    assert job.status == 1
    assert re.search(r"^plans +FAILED: status 3", job.out, re.M), job.out
    assert re.search(r"^prefill +ok", job.out, re.M)
    assert "no ranks here" in job.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only: expected some of build tests"),
        (["--wheels"], "bash bench/gpu_check.sh"),
        (["--nonsense"], "bash bench/gpu_check.sh"),
    ],
)
def test_other_requests_are_refused(arguments, message):
    job = run(*arguments)
    assert job.status == 2
    assert message in job.err
