"""Tables as jobs show them: on terminals of any width, with rows that a job leaves out."""

import os
import pty
import subprocess
import sys

import pytest

from support.experiments import TINY
from support.jobs import ROOT, run_job
from support.lanes import FULL


@FULL
def test_a_role_from_a_file_is_shown_by_every_rank(tmp_path):
    path = tmp_path / "nasty.toml"
    nasty = r"\u001b[31m[red]\n:smile:"
    path.write_text(TINY.replace('"proposed"', f'"{nasty}"'))
    command = ("-m", "pympa.bench", str(path), "--cluster", "none", "--no-verify")
    job = run_job(2, *command, timeout=60)
    assert job.status == 0, job.err
    for text in (job.out, job.err):
        assert "\x1b" not in text
        assert r"\x1b[31m[red]\n:smile:" in text


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_on_a_terminal(columns):
    """As under a launcher whose rank 0 has a terminal of 80 columns: nothing cut, no codes."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "pympa", "footprint", "stages", "--plan", "tp=8,pp=2"]
    job = subprocess.Popen(command, stdout=theirs, env=environment, cwd=ROOT)
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 65536):
            text += piece
    except OSError:
        pass  # the other end is closed
    assert job.wait(timeout=60) == 0
    assert b"\x1b" not in text
    assert b"3,229,614,080" in text
    assert max(len(line) for line in text.decode().splitlines()) <= columns


@FULL
def test_ranks_without_tokens_are_told(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(TINY.replace("batch = 2", "batch = 1"))
    command = ("-m", "pympa.bench", str(path), "--plan", "dp=4", "--plan", "cp=4", "--no-verify")
    job = run_job(4, *command, timeout=60)
    assert job.status == 0, job.err
    assert job.out.count("hold no tokens") == 1
    assert "dp=4: 3 of 4 ranks hold no tokens; the batch has too few sequences" in job.out
    words = ["bench", str(path), "--plan", "dp=16", "--backend", "virtual", "--cluster", "a100"]
    virtual = run_job(1, "-m", "pympa", *words, timeout=60)
    assert "15 of 16 ranks hold no tokens" in virtual.out, virtual.err


@FULL
def test_a_plan_that_is_refused_leaves_the_others(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    plans = ("cp=2", "cp=3", "cp", "tp=2")
    words = [word for plan in plans for word in ("--plan", plan)]
    command = ("-m", "pympa.bench", str(path), *words, "--no-verify", "--cluster", "none")
    job = run_job(2, *command, timeout=60)
    assert job.status == 1
    assert job.err.count("pympa: plan") == 2
    assert "cp=3 needs 3 ranks" in job.err.replace("pp=1·dp=1·cp=3·tp=1·dim=1", "cp=3")
    assert "expected key=value" in job.err
    for plan in ("cp=2", "tp=2"):
        assert f"{plan} not verified" in job.err
    assert job.out.count("refused: plan") == 2
    words = ("--plan", "cp=3", "--plan", "cp")
    none = run_job(2, "-m", "pympa.bench", str(path), *words, timeout=60)
    assert (none.status, none.out) == (2, "")
    assert none.err.count("pympa: plan") == none.err.count("\n") == 2


def test_a_row_that_is_refused_leaves_the_others(tmp_path):
    path = tmp_path / "rows.toml"
    text = TINY + '[[plans]]\nrole = "wrong"\nplan = "tp=4"\nranks = 2\n'
    path.write_text(text.replace("batch = 2", "batch = 16"))
    job = run_job(2, "-m", "pympa.bench", str(path), "--no-verify", timeout=60)
    assert job.status == 1
    assert job.err.count("pympa: plan") == job.out.count("refused: plan") == 1
    assert "needs 4 ranks; this run has 2" in job.err
    words = ("--backend", "virtual", "--cluster", "a100")
    command = ("-m", "pympa.bench", str(path), *words, "--plan", "cp=99")
    assert run_job(1, *command, timeout=60).status == 2
    some = run_job(1, *command, "--plan", "cp=2", timeout=60)
    assert some.status == 1, some.err
    assert some.err.count("pympa: ") == 1
    assert "cp=2" in some.out
