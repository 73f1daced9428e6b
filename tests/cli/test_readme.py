"""What the README shows works as printed."""

import re
import subprocess
import sys
from pathlib import Path

from pympa.spec import ModelSpec
from pympa.text.toml import parse_toml
from support.jobs import ROOT, run_job
from support.model_files import write_family

README = (ROOT / "README.md").read_text()


LOADING, PROGRAM = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_program_runs(tmp_path: Path):
    program = PROGRAM
    assert len(program.strip().splitlines()) <= 11
    path = tmp_path / "ring.py"
    path.write_text(program)
    job = run_job(4, str(path))
    assert job.status == 0, job.err
    for rank in range(4):  # lines of several ranks may run into each other
        assert job.out.count(f"rank {rank}: (Range(") == 1
    assert job.out.count("(1024, 8, 64)") == 4


def test_the_program_on_another_number_of_ranks_says_so_once(tmp_path: Path):
    path = tmp_path / "ring.py"
    path.write_text(PROGRAM)
    job = run_job(3, str(path))
    assert job.status != 0
    assert job.err.count("pympa: plan cp=4 needs 4 ranks; this session has 3") == 1
    assert "Traceback" not in job.err


def test_the_program_that_loads_a_model_runs(tmp_path: Path):
    write_family("llama", tmp_path / "model")
    path = tmp_path / "load.py"
    path.write_text(LOADING.replace("DIR", str(tmp_path / "model")))
    job = run_job(4, str(path))
    assert job.status == 0, job.err
    assert "[(3, 99), (2, 99)]" in job.out


def test_the_reference_of_keys_is_what_the_specs_say():
    script = ROOT / "bench" / "model_keys.py"
    printed = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed.strip() in README, "put the output of bench/model_keys.py into the README"


def test_the_pattern_of_layers():
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    spec = parse_toml(f"d_model = 1152\nvocabulary = 100\n{text}".encode(), ModelSpec, "README")
    windows = [layer.window for layer in spec.blocks]
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2


def test_the_table_of_what_works_is_what_the_rules_say():
    script = ROOT / "bench" / "supported.py"
    printed = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed.strip() in README, "put the output of bench/supported.py into the README"


def test_options_are_listed():
    helped = run_job(1, "-m", "pympa.bench", "--help")
    options = set(re.findall(r"--[a-z-]+", helped.out)) - {"--help"}
    listed = re.search(r"Options: `(.*?)`;", README, re.S)[1].split()
    assert options == set(listed)
