"""Files that users name may be anything: pipes, devices, a gigabyte, a million brackets."""

import os
import socket
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pympa.bench.experiment.description import Size, load_experiment
from pympa.bench.experiment.input import load_ids
from pympa.bench.measure.truth import Job
from pympa.bench.records.file import RecordFile
from pympa.costs.cluster import load_cluster
from pympa.model.random_weights import random_weights
from pympa.spec import ModelSpec, SpecError
from pympa.text.files import open_to_append, read_file, refuse_special
from pympa.text.toml import parse_toml
from support.experiments import TINY
from support.jobs import run_job
from support.lanes import FULL, lanes
from support.records import make_record

KINDS = ("pipe", "device", "directory", "socket")


@pytest.fixture(params=KINDS)
def special(request, tmp_path) -> Path:
    """Return something that is no regular file, and would keep a reader waiting, or reading."""
    path = tmp_path / "special.toml"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "directory":
        path.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    return path


def test_reading_what_is_no_file(special):
    start = time.process_time()
    size = load_experiment("ring-dense").sizes["local"]
    readers = (
        lambda path: read_file(path, 10),
        load_experiment,
        load_cluster,
        RecordFile.load,
        lambda path: load_ids(path, size),
    )
    for read in readers:
        with pytest.raises((OSError, SpecError), match="expected a regular file; got a "):
            read(str(special))
    assert time.process_time() - start < 1


def test_writing_to_what_is_no_file(special):
    if special.resolve() == Path("/dev/zero"):
        file = RecordFile(str(special))  # takes what is written, as /dev/null does
        file.write(make_record())
        file.end_line()
        with pytest.raises(OSError, match="expected a regular file; got a character device"):
            file.read()
    else:
        with pytest.raises(OSError, match=r"--output .*expected a new or a regular file, or a dev"):
            RecordFile(str(special))
    with pytest.raises(OSError, match="expected a new file or a regular one to replace"):
        refuse_special(special)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("special", ["pipe"], indirect=True)
@pytest.mark.parametrize(
    "words",
    lanes([
        ["bench", "--list", "FILE"],
        ["bench", "FILE"],
        ["bench", "ring-dense", "--input", "FILE"],
        ["bench", "ring-dense", "--output", "FILE"],
        ["bench", "ring-dense", "--output", "FILE", "--resume"],
        ["bench", "ring-dense", "--trace", "FILE"],
        ["bench", "ring-dense", "--cluster", "FILE"],
        ["bench", "ring-dense", "--backend", "virtual", "--cluster", "FILE"],
        ["bench", "experts", "--backend", "virtual", "--cluster", "h200", "--routing-from", "FILE"],
        ["compare", "FILE", "FILE"],
        ["footprint", "FILE", "--plan", "tp=2"],
        ["kernels", "--output", "FILE"],
        ["calibrate", "--output", "FILE"],
    ], [1, 3, 9, 11]),
    ids=" ".join,
)  # fmt: skip
def test_every_command_refuses_a_pipe(special, words):
    ranks = 1 if words[0] in ("footprint", "kernels") else 2
    words = [str(special) if word == "FILE" else word for word in words]
    job = run_job(ranks, "-m", "pympa", *words, timeout=30)
    assert job.status == 2
    assert job.err.count("\n") == job.err.count("pympa: ") == 1, job.err
    assert "got a pipe" in job.err


def test_how_much_is_read(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(b"x" * 100)
    assert read_file(path, 100) == b"x" * 100
    assert read_file(path, 7, start=True) == b"x" * 7
    with pytest.raises(OSError, match="expected at most 99 bytes; the file has more"):
        read_file(path, 99)
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="expected at most"):
        read_file(path, 1 << 20)
    with pytest.raises(OSError, match="null byte"):
        read_file("a\0b", 1)
    with pytest.raises(OSError, match="No such file"):
        open_to_append(str(tmp_path / "nowhere" / "r.jsonl"), os.O_WRONLY | os.O_CREAT)


DEEP = 100_000
TEXTS = {
    "brackets": "title = " + "[" * DEEP,
    "closed brackets": "title = " + "[" * DEEP + "]" * DEEP,
    "tables": "a = " + "{ a = " * 20_000,
    "dotted": ".".join("a" * 200_000) + " = 1",
    "quoted": ".".join(['"a"'] * 100_000) + " = 1",
    "header": "[" + ".".join("a" * 200_000) + "]",
    "quotes": 'title = "' + '\\"' * 400_000,
    "digits": "title = " + "9" * 5000,
    "hexadecimal": "title = 0x" + "F" * 5000,
    "beyond 64 bits": f"title = {2**63}",
    "infinite": "title = 1e400",
}


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("load", [load_experiment, load_cluster])
def test_toml_that_no_parser_should_see(what, load, tmp_path):
    path, start = tmp_path / "broken.toml", time.process_time()
    path.write_text(TEXTS[what])
    with pytest.raises(SpecError) as error:
        load(str(path))
    assert time.process_time() - start < 2
    assert str(error.value).startswith(str(path)), "the message names the file"
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert "sys." not in str(error.value)


def test_toml_that_looks_deep_and_is_not(tmp_path):
    brackets = "[" * 50
    text = f'''title = "{brackets}" # {brackets}
dtype = """
{brackets} {"." * 50}"""
[sizes."a.b"]
batch = 1
tokens = 2
model = {{ d_model = 4, vocabulary = 4, layers = [{{ heads = 1, head_dim = 4, mlp_hidden = 4 }}] }}
[[plans]]
role = '{"." * 50}\\'
family = "ring"
'''
    path = tmp_path / "fine.toml"
    path.write_text(text.replace("\n", "\r\n"), newline="")
    assert load_experiment(str(path)).title == brackets


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("batch = 2", ["2e400", "inf", "nan", "-1", str(2**62), "9" * 30, "9" * 5000]),
        ("tokens = 32", ["1e400", "[1, inf]", str(2**62), "9" * 30, "9" * 5000]),
        ("d_model = 32", ["1e400", "nan", str(2**62), "9" * 30, "9" * 5000]),
        ("head_dim = 8", ["8, norm_eps = 1e400", "8, softcap = nan", f"8, window = {2**62}"]),
        ('role = "proposed"', [f'role = "x"\ngrow = {2**62}', f'role = "x"\nranks = {"9" * 99}']),
    ],
)
def test_numbers_that_are_slips(where, numbers, tmp_path):
    path = tmp_path / "slip.toml"
    for number in numbers:
        name = where.partition(" = ")[0]
        new = number if number.startswith("role") else f"{name} = {number}"
        path.write_text(TINY.replace(where, new))
        with pytest.raises(SpecError, match=str(path)) as error:
            load_experiment(str(path))
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e400", str(2**63), "9" * 5000])
def test_numbers_of_a_cluster(value, tmp_path):
    path = tmp_path / "cluster.toml"
    for field in ("ranks", "device.memory_bytes", "device.processors", "device.linear_efficiency"):
        path.write_text(f'based_on = "dgx-h100x2"\ntitle = "t"\n{field} = {value}\n')
        with pytest.raises(SpecError, match=str(path)):
            load_cluster(str(path))


def test_files_based_on_files(tmp_path):
    names = [tmp_path / f"{n}.toml" for n in range(1500)]
    for path, base in zip(names, [*names[1:], Path("dgx-h100x2")], strict=True):
        path.write_text(f'based_on = "{base}"\n')
    with pytest.raises(SpecError, match=r"0\.toml: based_on: expected a chain of at most 16 files"):
        load_cluster(str(names[0]))
    assert load_cluster(str(names[-10])).ranks == 16


LINE = msgspec.json.encode(make_record()).decode()
BROKEN = {
    "plan": (LINE.replace('"plan":"tp=2"', '"plan":"garbage"'), "expected key=value"),
    "searched": (LINE.replace('"searched":{}', '"searched":{"x":1}'), "expected key=value"),
    "deep": (LINE[:-1] + ',"x":' + "[" * DEEP + "]" * DEEP + "}", "nested too deeply"),
    "digits": (LINE.replace('"ranks":2', f'"ranks":{"9" * 5000}'), "out of range"),
    "long": (LINE.replace('"ranks":2', f'"ranks":{"9" * 300}'), "at most 18 digits"),
    "huge": (LINE.replace('"tps":100.0', '"tps":1e400'), "out of range"),
    "flops": (LINE.replace('"flops_per_token":1.0', '"flops_per_token":0'), "flops_per_token"),
    "error": (LINE.replace('"error":null', '"error":0.5'), "expected both or neither"),
}


@pytest.mark.parametrize("what", lanes(BROKEN, [0, 4]))
def test_records_that_are_none(what, tmp_path):
    path, (line, says) = tmp_path / "r.jsonl", BROKEN[what]
    assert line != LINE
    path.write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(ValueError, match="line 2 is not a record") as error:
        RecordFile.load(str(path))
    assert str(path) in str(error.value)
    assert says in str(error.value)
    job = run_job(1, "-m", "pympa", "compare", str(path), str(path), timeout=30)
    assert job.status == 2
    assert job.err.count("pympa: ") == job.err.count("\n") == 1
    assert says in job.err


def test_rope_can_be_switched_off():
    layer = "heads = 2, head_dim = 4, mlp_hidden = 8"
    text = f"d_model = 8\nvocabulary = 16\nlayers = [{{ {layer}, rope = false }}, {{ {layer} }}]\n"
    spec = parse_toml(text.encode(), ModelSpec, "m.toml")
    assert [layer.rotated_dim for layer in spec.blocks] == [0, 4]
    assert spec.layers[0].rope is None
    digests = {
        Job("e", "local", Size(model=parse_toml(t.encode(), ModelSpec, "m"), batch=1, tokens=2),
            np.dtype("float32"), (), random_weights(spec)).digest()
        for t in (text, text.replace(", rope = false", ""))
    }  # fmt: skip
    assert len(digests) == 2, "--resume tells the models apart"
    with pytest.raises(SpecError, match=r"got `bool` - at `\$\.layers\[0\]\.rope`"):
        parse_toml(text.replace("false", "true").encode(), ModelSpec, "m.toml")


@FULL
def test_a_model_without_rope_runs(tmp_path):
    path = tmp_path / "nope.toml"
    path.write_text(TINY.replace("head_dim = 8", "head_dim = 8, rope = false"))
    job = run_job(2, "-m", "pympa.bench", str(path), "--plan", "cp=2", timeout=60)
    assert job.status == 0, job.err
    assert "cp=2 verified" in job.err
    words = ("footprint", str(path), "--plan", "tp=2")
    assert run_job(1, "-m", "pympa", *words, timeout=60).status == 0
