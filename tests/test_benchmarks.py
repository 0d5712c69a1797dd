"""The comparison of algorithms: its recipes are valid, its figures are right, and it runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ddpo.experiment import read
from tests.command import ENVIRONMENT

ROOT = Path(__file__).parent.parent
FILE = ROOT / "benchmarks" / "algorithms.py"
sys.path.insert(0, str(FILE.parent))
import algorithms  # noqa: E402
import algorithms_report as report  # noqa: E402


@pytest.mark.parametrize("model", algorithms.MODELS)
def test_every_method_of_the_comparison_is_a_recipe(model):
    seen = set()
    for name, method in algorithms.METHODS.items():
        words = [*algorithms.MODELS[model], *method.words(model), "rollout.prompts=8"]
        recipe = read(str(ROOT / "configs" / "menagerie_alignment.yaml"), words, 1).recipe
        solver = recipe.rollout.solver.build()
        assert solver.stochastic == (method.noise != "nowhere"), name
        assert method.noise != "everywhere" or getattr(solver, "min_sigma", 0) == 0, name
        seen.add(str((recipe.algorithm, recipe.rollout.solver, recipe.rollout.window)))
    assert len(seen) == len(algorithms.METHODS)  # no two are the same under two names


CURVE = [{"images": i, "spent": s, "eval/clip/delta": d} for i, s, d in ((0, 0.0, 0.0), (100, 10.0, 0.02), (200, 30.0, 0.04))]


def test_points_of_a_curve_lie_on_its_lines():
    assert report.at(CURVE, "spent", 20.0, "eval/clip/delta") == pytest.approx(0.03)
    assert report.reached(CURVE, "images", 0.03) == pytest.approx(150)
    assert report.reached(CURVE, "spent", 0.01) == pytest.approx(5.0)
    assert report.reached(CURVE, "spent", 0.05) == math.inf and math.isnan(report.at(CURVE, "spent", 31.0, "images"))


@pytest.mark.parametrize(
    ("gains", "chosen", "tried"),
    [((0.04, 0.02, 0.5, 0.5), 1e-2, 2), ((-0.1, 0.04, 0.02, 0.5), 3e-3, 3), ((math.nan, -0.2, -0.1, -0.02), 3e-4, 4)],
)
def test_learning_rates_are_tried_from_the_highest_down_until_one_is_worse(gains, chosen, tried, tmp_path, monkeypatch):
    found = dict(zip(algorithms.RATES, gains, strict=True))

    def run(job, root):
        job.folder(root).mkdir(parents=True)
        (job.folder(root) / "run.json").write_text('{"status": "finished"}')
        (job.folder(root) / "metrics.jsonl").write_text(json.dumps({"eval/win_rate": 0.5, "eval/clip/delta": found[job.rate]}))

    monkeypatch.setattr(algorithms.Job, "run", run)
    assert algorithms.search(tmp_path, "eps", "DDPO", algorithms.RATES) == chosen
    assert len(list((tmp_path / "eps").iterdir())) == tried
    row = report.search_table({"DDPO": algorithms.searched(tmp_path, "eps", "DDPO", algorithms.RATES)}).splitlines()[-1]
    assert row.startswith("| DDPO |") and row.count("0.") == sum(math.isfinite(gain) for gain in gains[:tried])


def test_seconds_are_of_drawing_scoring_and_learning_by_themselves(tmp_path):
    job = algorithms.Job("eps", "DDPO, all steps", 1e-3, 0, 16)
    assert job.folder(tmp_path).name == "DDPO-all-steps-lr0.001-seed0-16"

    def write(folder, lines):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def spent(seconds):  # by an iteration that also evaluates
        return {"seconds/rollout": seconds, "seconds/reward": 0.5, "seconds/update": 1.0, "seconds/eval": 99.0}

    evaluations = [{"iteration": i, "eval/win_rate": 0.5, **spent(50.0)} for i in (0, 8, 16)]
    write(job.folder(tmp_path), evaluations)  # beside other work: its own seconds do not count
    write(algorithms.clock(job.model, job.method, 16).folder(tmp_path), [spent(s) for s in (9.0, 9.0, 2.0, 2.0, 7.0)])
    assert [line["spent"] for line in job.curve(tmp_path)] == [0.0, 8 * 3.5, 16 * 3.5]


@pytest.mark.slow
def test_the_quick_comparison_writes_its_table_and_plots(tmp_path):
    command = [sys.executable, str(FILE), str(tmp_path), "--quick", "--methods", "DDPO", "RAFT (best of 8)", "--jobs", "1"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)
    table = (tmp_path / "table.md").read_text()
    assert table.count("| DDPO |") == table.count("| RAFT (best of 8) |") == 2
    assert (tmp_path / "learning.png").exists() and (tmp_path / "cost.png").exists()
