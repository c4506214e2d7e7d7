"""The benchmarks: each runs in seconds with --smoke and leaves what it promises; RESULTS.md is what the JSON says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE / "bench"))

import common  # noqa: E402
import diversity  # noqa: E402
import gradient  # noqa: E402
import results  # noqa: E402
import timing  # noqa: E402


@pytest.mark.parametrize("name", ["nfe", "evaluate", "diversity", "gradient", "overhead"])
def test_smoke(name):
    done = subprocess.run(
        [sys.executable, HERE / f"bench/{name}.py", "--smoke"], capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert {"arguments", "versions", "commit", "machine"} <= set(document)
    for kind in ("json", "png", "svg"):
        assert (HERE / f"runs/smoke/{name}.{kind}").stat().st_size > 500


def test_results_are_what_the_json_says():
    assert (HERE / "RESULTS.md").read_text() == results.document()


def test_every_docstring_asks_answers_and_decides():
    for path in (HERE / "bench").glob("*.py"):
        doc = path.read_text().split('"""')[1]
        if path.stem not in ("common", "results", "run"):
            assert all(word in doc for word in ("Question", "Hypothesis", "Metric", "Rule", f"bench/{path.name}")), path


def test_the_interval_is_students():
    mean, low, high = common.interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6) and mean - low == high - mean
    assert common.interval([5.0]) == (5, 5, 5)


def test_mmd2_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 300, 4))
    same, moved = diversity.compare(x, y, 4.0, 100), diversity.compare(x, y + 0.5, 4.0, 100)
    assert same["p"] > 0.05 and moved["p"] < 0.02 and abs(same["mmd2"]) < 0.01 < moved["mmd2"]
    z = np.concatenate([x[:3], y[:3]])  # by hand on three pairs
    k = np.exp(-((z[:, None] - z[None]) ** 2).sum(2) / 8)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    by_hand = np.mean([k[i, j] + k[3 + i, 3 + j] - k[i, 3 + j] - k[3 + i, j] for i, j in pairs])
    assert diversity.compare(x[:3], y[:3], 4.0, 10)["mmd2"] == pytest.approx(by_hand)


@pytest.mark.parametrize("block", [1, 4])
def test_p_is_uniform_where_nothing_differs(block):
    """Pairs share a prompt that moves both: p stays uniform, alone and where four samples share it."""
    rng, ps = np.random.default_rng(1), []
    for _ in range(200):
        prompt = rng.normal(size=(60 // block, 1, 3)).repeat(block, 1).reshape(-1, 3) * 3
        x, y = (prompt + rng.normal(size=prompt.shape) for _ in range(2))
        ps.append(diversity.compare(x, y, 9.0, 99, block)["p"])
    assert stats.kstest(ps, "uniform").pvalue > 0.01 and abs(np.mean(np.array(ps) <= 0.05) - 0.05) < 0.05


def test_gradient_moments_are_without_bias():
    """Estimates g + noise: the signal |E g|^2, the relative noise and the cosine come out."""
    rng, truth = np.random.default_rng(0), np.array([3.0, 4.0, 0.0])
    draws = [(torch.from_numpy(truth + rng.normal(size=3) * 10), 7) for _ in range(40_000)]
    m, reference = gradient.moments(draws[:20_000]), gradient.moments(draws[20_000:])
    found = gradient.compared(m, reference)
    assert m["signal"] == pytest.approx(25, rel=0.1) and found["relative_noise"] == pytest.approx(300 / 25, rel=0.1)
    assert found["cosine"] == pytest.approx(1, abs=0.05) and found["units_to_signal"] == 7 * found["relative_noise"]


def test_leave_one_out_is_the_others_mean():
    from tree import make_forest

    out = gradient.reinforce(None, make_forest(3, 2, (), roots=4), torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    assert len(out) == 3
    assert out[0][0].tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])


def test_the_cost_model_finds_costs_it_was_made_with():
    rows = {}
    for i in range(8):
        n = {"forwards_total": 100.0 + 37 * i, "trained_parents_total": 50.0 + (i * 29) % 70}
        rows[str(i)] = n | {"policy_seconds": 0.01 * n["forwards_total"] + 0.03 * n["trained_parents_total"] + 0.2}
    model = timing.cost_model(rows)
    assert list(model["seconds_of"].values()) == pytest.approx([0.01, 0.03, 0.2], rel=1e-4)
    assert max(map(abs, model["relative_errors_on_the_other_half"])) < 1e-4
    assert sum(abs(e) < 0.07 for e in model["paper_relative_errors"].values()) == 6  # the seventh is Mix
    assert model["paper_relative_errors"]["Mix, window 4"] > 0.3
