"""Files that describe hardware: the packaged ones, and what can be wrong in a user's own."""

import msgspec
import pytest

from pympa.bench.experiment.description import load_experiment
from pympa.bench.simulate.rows import simulated_row
from pympa.costs.cluster import load_cluster, packaged_clusters
from pympa.spec import SpecError

DGX = load_cluster("dgx-h100x2")


def test_clusters():
    for name in packaged_clusters():
        cluster = load_cluster(name)
        assert cluster.ranks in (16, 1024)
        near, far = (
            link.bytes_per_second / link.ranks_at_port
            for link in (cluster.link(0, 1), cluster.link(0, 15))
        )
        assert near >= far
    with pytest.raises(SpecError, match="did you mean 'dgx-h100x2'"):
        load_cluster("dgx-h100x")
    h200 = load_cluster("h200")
    assert h200.links == DGX.links
    assert h200.device.memory_bytes_per_second > DGX.device.memory_bytes_per_second
    assert h200.device.attention == DGX.device.attention
    with pytest.raises(SpecError, match="from the smallest to all 32 ranks"):
        msgspec.structs.replace(DGX, ranks=32).__post_init__()


@pytest.fixture
def own(tmp_path):
    """Load what a file of the user's says."""

    def load(text):
        path = tmp_path / "own.toml"
        path.write_text(text.replace("OWN", str(path)))
        return load_cluster(str(path))

    return load


BASED = 'based_on = "dgx-h100x2"\n'
LINK = "name = 'x'\nranks = 16\n"


def test_a_file_may_be_based_on_one_that_is_based_on_another(own):
    cluster = own('based_on = "h200"\n[device]\nwatts = 600')
    expected = msgspec.structs.replace(load_cluster("h200").device, watts=600)
    assert cluster.device == expected
    assert cluster.links == DGX.links


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('based_on = "OWN"', "expected no cycle"),
        ("based_on = 3", "expected based_on"),
        (BASED + "device = 3", r"a table \[device\]"),
        (BASED + "ranks = 0", r"`int` >= 1 - at `\$.ranks`"),
        (BASED + "[device]\nmemory_bytes_per_second = 0", r"> 0.0 - at `\$.device.memory_bytes_p"),
        (BASED + "[device]\nlinear_efficiency = 1.5", r"<= 1.0 - at `\$.device.linear_efficiency"),
        (
            f"{BASED}[[links]]\n{LINK}latency_seconds = 0.0\nbytes_per_second = 0.0",
            r"> 0.0 - at `\$.links\[0\].bytes_per_second`",
        ),
        (
            f"{BASED}[[links]]\n{LINK}latency_seconds = -1.0\nbytes_per_second = 1e9",
            r">= 0.0 - at `\$.links\[0\].latency_seconds`",
        ),
        (
            f"{BASED}[[links]]\n{LINK}latency_seconds = 0.0\nbytes_per_second = 1e9\n"
            "processors = 132",
            "fewer than the device's 132 processors, because kernels need some; got 132",
        ),
    ],
)
def test_a_field_that_cannot_be_is_named(own, text, says):
    with pytest.raises(SpecError, match=says) as refused:
        own(text)
    assert "own.toml: " in str(refused.value)


def test_a_dtype_without_figures_is_refused(own):
    cluster = own(BASED + "[device]\nflops_per_second = { float16 = 1e12 }")
    experiment = load_experiment("ring-dense")
    with pytest.raises(ValueError, match=r"dtype: expected one of float16, .*; got bfloat16"):
        simulated_row(experiment.plans[0], experiment.sizes["paper"], "bfloat16", cluster, None)
