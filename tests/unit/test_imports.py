"""What opening the library, and reading what a user wrote, does not load: a runtime, and MPI."""

import subprocess
import sys

from support.experiments import TINY
from support.jobs import ROOT

RUNTIME = ("pympa.kernels", "pympa.transport", "pympa.runtime", "pympa.session", "mpi4py")
SHOW = f"""
import sys
found = sys.modules
print(*sorted(m for m in found if any(m == r or m.startswith(r + ".") for r in {RUNTIME})))
"""
LAYERS = """
d_model = 32
vocabulary = 256
layers = [{ repeat = 2, heads = 4, head_dim = 8, mlp_hidden = 64 }]
"""


def loaded_by(code: str, *arguments: str) -> list[str]:
    """Return the modules of a runtime that a fresh process has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", code + SHOW, *arguments], capture_output=True, text=True, cwd=ROOT,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_parsing_every_packaged_experiment_loads_no_runtime():
    code = """
from pympa.bench.experiment.description import load_experiment, packaged_experiments
assert packaged_experiments()
for name in packaged_experiments():
    assert load_experiment(name).plans
"""
    assert loaded_by(code) == []


def test_parsing_a_users_experiment_loads_no_runtime(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    code = """
import sys
from pympa.bench.experiment.description import load_experiment
assert load_experiment(sys.argv[1]).title == "tiny"
"""
    assert loaded_by(code, str(path)) == []


def test_parsing_a_model_loads_no_runtime(tmp_path):
    path = tmp_path / "model.toml"
    path.write_text(LAYERS)
    code = """
import sys
from pympa.bench.experiment.description import read_description
from pympa.spec import ModelSpec
from pympa.text.toml import convert_toml, load_toml
values = load_toml(read_description(sys.argv[1]), "model")
assert len(convert_toml(values, ModelSpec, "model").blocks) == 2
"""
    assert loaded_by(code, str(path)) == []


def test_importing_the_library_loads_nothing_of_it():
    assert loaded_by("import pympa") == []


def test_the_door_starts_no_mpi():
    """Entering a session does; `mpi4py.MPI` starts MPI when it is imported."""
    loaded = loaded_by("from pympa import Session; assert Session.__name__ == 'Session'")
    assert "pympa.session.session" in loaded
    assert "mpi4py.MPI" not in loaded


def test_a_runtime_would_be_seen():
    """The lists above are empty because nothing is loaded, not because nothing is looked for."""
    assert "pympa.kernels.cpu" in loaded_by("import pympa.kernels.cpu")
