"""README.md prints what the simulator says of the papers' claims today."""

import re

import pytest

from pympa.bench.experiment.description import load_experiment, packaged_experiments
from pympa.bench.simulate.rows import fastest, simulated_row
from pympa.costs.cluster import load_cluster
from pympa.sim.predict import predict
from support.jobs import ROOT
from support.lanes import lanes

CLUSTERS = ("dgx-h100x2", "h100-nvswitch16")


def printed():
    """Return the two simulated cells of each row of the table, by experiment."""
    header = re.escape("| experiment (seed) | plan | published |")
    (table,) = re.findall(
        rf"^{header}.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M
    )
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    rows, experiment = {}, ""
    for name, _, _, *simulated in cells:
        experiment = name.partition(" ")[0] or experiment
        rows.setdefault(experiment, []).append(tuple(simulated))
    return rows


PRINTED = printed()


def simulated(experiment, cluster):
    """Return the simulated tokens/s of each plan of an experiment, with the ratio to the first."""
    size, dtype, cluster = experiment.sizes["paper"], experiment.dtype, load_cluster(cluster)
    texts, baseline = [], None
    for planned in experiment.plans:
        row = simulated_row(planned, size, dtype, cluster, None)

        def run(plan, row=row):
            return predict(size.model, size.lengths, plan, dtype, cluster, stages=row.stages)

        tps = sum(size.lengths) / fastest(run, row, dtype, cluster).step_seconds
        texts.append(f"{tps:,.0f}" + (f" ({tps / baseline:.2f})" if baseline else ""))
        baseline = baseline or tps
    return texts


def test_every_experiment_with_a_baseline_is_printed():
    names = packaged_experiments()
    roles = {name: {planned.role for planned in load_experiment(name).plans} for name in names}
    assert sorted(PRINTED) == [name for name in names if "baseline" in roles[name]]


@pytest.mark.parametrize("cluster", range(2), ids=CLUSTERS)
@pytest.mark.parametrize("name", lanes(PRINTED, [1]))
def test_the_readme_prints_what_is_simulated(name, cluster):
    cells = [row[cluster] for row in PRINTED[name]]
    assert cells == simulated(load_experiment(name), CLUSTERS[cluster])
