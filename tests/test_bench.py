"""The benchmarks: each runs in seconds with --smoke and leaves what it promises; RESULTS.md is what the JSON says."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE / "bench"))

import alignment  # noqa: E402
import common  # noqa: E402
import diversity  # noqa: E402
import gradient  # noqa: E402
import results  # noqa: E402
import timing  # noqa: E402

import train_image  # noqa: E402
import train_video  # noqa: E402

QUICK = ("nfe", "timing", "evaluate", "diversity", "gradient")
LONG = ("overhead", "alignment", "ablation", "scaling")  # they train, up to a minute each


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)])
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


def test_the_figures_of_the_readme_are_the_benchmarks():
    """Whatever README takes from a benchmark is what its JSON says."""
    text = " ".join((HERE / "README.md").read_text().split())
    found = {
        name: results.loaded(name) for name in ("timing", "overhead", "alignment", "diversity", "gradient", "scaling")
    }
    ratio = {name: f"{r['ratio']:.2f}".lstrip("0") for name, r in found["timing"]["rows"].items()}
    flash, many = ratio["Mix, splits alone, flash 4"], ratio["Mix, splits alone, flash 4, 81"]
    cost = {name: np.median(values) for name, values in found["overhead"]["ratios"].items()}
    rate, arms = found["overhead"]["leaves_a_second"], found["alignment"]["table"]
    best, width = arms["BranchGRPO-Mix, splits alone, flash"], arms["BranchGRPO + width"]
    per_update = best["seconds_an_update"] / arms["DanceGRPO"]["seconds_an_update"]
    spaces = found["diversity"]["features"]
    one = {space: f"{rows['tree, one leaf of each']['p']:.2f}".lstrip("0") for space, rows in spaces.items()}
    estimates = {name: r["one prompt"] for name, r in found["gradient"]["rows"].items()}
    worth = {
        n: "{:.2f} [{:.2f}, {:.2f}]".format(*r["units_over_base"]).replace("0.", ".") for n, r in estimates.items()
    }
    pruned = [worth[f"the same, {kind}-pruned"].split()[0] for kind in ("width", "depth")]
    tails = found["diversity"]["tails"]
    euler, four, three = (
        f"{tails[name]['distance']['pixels']:.3f}"[1:] for name in ("Euler, 5 steps", "--flash 4", "--flash 3")
    )
    changed = {n: tails[f"--flash {n}"]["reward_minus_euler"] for n in (3, 4)}
    law = found["scaling"]["slopes"]["reward"]["all"]
    largest, mixgrpo = list(found["scaling"]["rows"].values())[-1], arms["MixGRPO"]
    within = [found["diversity"]["within"][space]["4"][0] for space in ("OCR outputs", "pixels")]
    ablated = {
        arm: r["difference"] for arms in results.loaded("ablation")["groups"].values() for arm, r in arms.items()
    }
    lower = ("dance 0.8", "flow 0.7", "s = 2", "splits and a window", "late 4,5,6,7")
    at = [f"({ablated[arm][0]:+.3f})" for arm in lower]
    for words in (
        f"the steps dance .8 {at[0]} and flow .7 {at[1]}, branch noise s = 2 {at[2]}, noisy steps beside the splits {at[3]}, late splits {at[4]}",
        "is at the edge, {:+.3f} [{:+.3f}, {:+.3f}]".format(*ablated["over a group"]),
        f"closer to the ODE's picture than five of Euler ({four} against {euler} of the distance",
        f"pixels; ocr reward {changed[4]['ocr'][0]:.3f})".replace("-0.", "-."),
        f"three a little farther ({three}; ocr +-.004, colour {changed[3]['colour'][0]:.3f})".replace("-0.", "-."),
        "adds {:+.3f} [{:+.3f}, {:+.3f}] of reward".format(*law),
        f"{largest['policy_seconds'] / largest['dance_seconds']:.2f} of DanceGRPO's policy seconds at {largest['leaves']}"[
            1:
        ],
        "{:.2f} of the seconds, {:+.3f} [{:+.3f}, {:+.3f}] away".format(
            mixgrpo["seconds_an_update"] / arms["DanceGRPO"]["seconds_an_update"], *mixgrpo["final_minus_dance"]
        )[1:],
        f"lie {within[0]:.2f} and {within[1]:.2f} times".replace(" 0.", " ."),
        f"the tree {worth[gradient.TREE]}, width-pruned {pruned[0]}, depth-pruned {pruned[1]}, the tree with its splits alone noisy {worth[gradient.SPLITS]}",
        f"BranchGRPO {ratio['BranchGRPO']}, with width pruning {ratio['+ width (Parent-Top1)']}, with depth pruning"
        f" {ratio['+ depth, window 5']}, Mix {ratio['Mix, window 4']}, its splits alone {ratio['Mix, splits alone']},"
        f" with a flash tail {flash}; of 81 leaves {many}.",
        f"costs {cost['rollout over bare calls']:.2f} times the bare model calls in rollout and"
        f" {cost['training over bare forward and backward']:.2f} times in training",
        f"an iteration is {cost['one node at a time, iteration']:.1f} times faster",
        f"takes {per_update:.2f}".replace("0.", ".") + " of the policy seconds an update",
        "and ends {:+.3f} [{:+.3f}, {:+.3f}] away".format(*best["final_minus_dance"]),
        f"final reward in {best['median_share']:.2f}".replace("0.", ".") + " of its",
        "ends lower, {:+.3f} [{:+.3f}, {:+.3f}]".format(*width["final_minus_dance"]),
        f"p = {one['OCR outputs']} with OCR outputs and {one['pixels']} with pixels",
        f"score {rate['2'] / rate['1']:.2f} times as many leaves a second",
    ):
        assert words in text, words


def test_the_benchmarks_keep_what_readme_says_of_them():
    """What README says in words: unchanged, nothing gained, not told apart, within a tenth."""
    found = {name: results.loaded(name) for name in ("timing", "diversity", "gradient", "scaling")}
    estimates = {name: r["one prompt"]["cosine"] for name, r in found["gradient"]["rows"].items()}
    assert [name for name, (_, low, high) in estimates.items() if not low < 1 < high] == ["the same, width-pruned"]
    assert max(map(abs, found["diversity"]["tails"]["--flash 3"]["reward_minus_euler"]["ocr"][1:])) < 0.0045
    groups = results.loaded("ablation")["groups"].values()
    ablated = {arm: r["difference"] for arms in groups for arm, r in list(arms.items())[1:]}
    apart = {arm for arm, (_, low, high) in ablated.items() if not low < 0 < high}
    assert len(ablated) == 23 and apart == {"dance 0.8", "flow 0.7", "s = 2", "splits and a window", "late 4,5,6,7"}
    _, low, high = found["scaling"]["slopes"]["reward_at_time"]["all"]
    assert low < 0 < high
    at_time = {r["leaves"]: np.array(r["reward_at_time"]) for r in found["scaling"]["rows"].values()}
    assert all((at_time[n] < at_time[16]).all() for n in (8, 256))  # every seed
    sequential = [found["diversity"]["features"][s]["sequential, other noises"]["p"] for s in ("OCR outputs", "pixels")]
    assert [f"{p:.2f}"[1:] for p in sequential[:1]] + [f"{p:.3f}"[1:] for p in sequential[1:]] == [".24", ".045"]
    for rows in found["diversity"][
        "features"
    ].values():  # the rule of diversity.py, and the bound of the paper's project page
        assert all(
            (r["p"] < 0.05) == name.startswith("control")
            for name, r in rows.items()
            if "one leaf" in name or "control" in name
        )
        assert all(r["mmd2"] < 0.019 for name, r in rows.items() if "all 16" in name)
    over = {name: round(r["ratio"] / r["ratio_counted"], 2) for name, r in found["timing"]["rows"].items()}
    assert max(over.values()) == over["Mix, splits alone, flash 4"] == 1.10


def test_the_commands_for_gpus_parse():
    """RESULTS.md's script: every flag is known and goes with the others."""
    script = results.on_gpus().partition("```sh\n")[2].partition("```")[0]
    names = {
        "hpdv2_train.txt": "prompts_train.txt",
        "hpdv2_test.txt": "prompts_heldout.txt",
        "PROMPTS": "video_train.txt",
    }
    text, files = script, {name: str(HERE / "tiny" / ours) for name, ours in names.items()}
    places = dict(line.split("=", 1) for line in text.splitlines()[:3])
    seen = 0
    for line in text.splitlines()[3:]:
        for name, flags in places.items():
            line = line.replace(f"${name}", flags.strip('"'))
        _, program, *argv = shlex.split(line)
        if program.startswith("bench/"):
            assert (HERE / program).exists() and argv[-2] == "--name" and argv[-1] in results.GPU
            argv = shlex.split(argv[argv.index("--flags") + 1]) + ["--video"] * ("--video" in argv)
        video = "--video" in argv
        script = {True: train_video, False: train_image}[video]
        argv = [a for a in argv if a != "--video"]
        assert script.job([files.get(a, a) for a in argv])
        seen += 1
    assert seen == 2 * 8 - 1 + 3


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
    same, moved = diversity.compare([(x, y)], 2.0, 100), diversity.compare([(x, y + 0.5)], 2.0, 100)
    assert same["p"] > 0.05 and moved["p"] < 0.02 and abs(same["mmd2"]) < 0.01 < moved["mmd2"]
    z = np.concatenate([x[:3], y[:3]])  # by hand on three pairs
    k = np.exp(-((z[:, None] - z[None]) ** 2).sum(2) / 8)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    by_hand = np.mean([k[i, j] + k[3 + i, 3 + j] - k[i, 3 + j] - k[3 + i, j] for i, j in pairs])
    assert diversity.compare([(x[:3], y[:3])], 2.0, 10)["mmd2"] == pytest.approx(by_hand)


@pytest.mark.parametrize("share, repeats", [(1, 1), (4, 1), (1, 3)])
def test_p_is_uniform_where_nothing_differs(share, repeats):
    """Samples share a prompt that moves them: p stays uniform, alone, where four samples share it, and for three pairs of sets."""
    rng, ps = np.random.default_rng(1), []
    for _ in range(200):
        prompt = rng.normal(size=(60 // share, 1, 3)).repeat(share, 1).reshape(-1, 3) * 3
        pairs = [[prompt + rng.normal(size=prompt.shape) for _ in range(2)] for _ in range(repeats)]
        ps.append(diversity.compare(pairs, 3.0, 99)["p"])
    assert stats.kstest(ps, "uniform").pvalue > 0.01 and abs(np.mean(np.array(ps) <= 0.05) - 0.05) < 0.05


def test_siblings_that_are_all_alike_are_rejected():
    """Sixteen equal samples for each prompt against sixteen independent ones: the same marginals, and a p near 0."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(512, 3)), rng.normal(size=(32, 1, 3)).repeat(16, 1).reshape(-1, 3)
    assert diversity.compare([(x, y)], 3.0, 200)["p"] < 0.01


def test_gradient_moments_are_without_bias():
    """Of prompts (3, 4, 0) + their own (0, 0, +-5) and noise: every estimate comes out, and intervals hold the truth as often as they say."""
    rng, inside, found_all = np.random.default_rng(0), [], []
    for _ in range(60):
        own = np.concatenate([np.tile([3.0, 4.0], (24, 1)), rng.choice([-5.0, 5.0], size=(24, 1))], 1)
        draws = [[(torch.from_numpy(own[i % 24] + rng.normal(size=3)), 7) for i in range(24 * n)] for n in (4, 8)]
        m, reference = (gradient.sums(d, 24) for d in draws)
        reference |= gradient.products(reference, reference)
        m = gradient.products(m, reference)
        found = gradient.compared(m, reference, m | {"units": 14}, reference)
        wanted = {
            ("one prompt", "relative_noise"): 3 / 50,
            ("one prompt", "cosine"): 1.0,
            ("all prompts", "cosine"): 1.0,
        }
        wanted[("all prompts", "relative_noise")] = (25 + 3) / 25
        assert all(found[scope]["units_over_base"] == pytest.approx([0.5] * 3) for scope in gradient.SCOPES)
        for (scope, key), value in wanted.items():
            mean, low, high = found[scope][key]
            assert found[scope]["units_to_signal"] == pytest.approx([7 * x for x in found[scope]["relative_noise"]])
            inside.append(((scope, key), low < value < high))
            found_all.append(((scope, key), mean))
    for name, value in wanted.items():
        assert np.median([v for k, v in found_all if k == name]) == pytest.approx(value, rel=0.25), name
        assert np.mean([i for k, i in inside if k == name]) > 0.8, name


def test_seconds_to_a_mark_by_hand():
    """The mean of the last three evaluations, linear between them; DanceGRPO against itself needs all it needs."""
    c = {
        "iteration": [0, 1, 2, 3],
        "seconds": [0.0, 10.0, 20.0, 30.0],
        "all_seconds": [0.0, 12.0, 24.0, 36.0],
        "nfe": [0, 1, 2, 3],
        "reward": [0.0, 3.0, 3.0, 3.0],
    }
    assert common.trailing(c["reward"]) == [0, 1.5, 2, 3]
    assert (
        alignment.seconds_to(c, 1.75) == 15 and alignment.seconds_to(c, 2) == 20 and alignment.seconds_to(c, 9) is None
    )
    faster = c | {"seconds": [0.0, 2.0, 4.0, 6.0], "ocr": c["reward"]}
    slower = c | {"reward": [0.0, 1.0, 1.0, 1.0], "ocr": c["reward"]}
    table = alignment.compare(
        {"DanceGRPO": [c | {"ocr": c["reward"]}] * 2, "faster": [faster] * 2, "slower": [slower, faster]}
    )
    assert table["DanceGRPO"]["share_of_dance_seconds"] == [1, 1] and table["faster"]["median_share"] == 0.2
    assert table["slower"]["share_of_dance_seconds"] == [None, 0.2] and table["slower"]["median_share"] is None
    assert table["slower"]["final_minus_dance"][0] == -1 and table["faster"]["seconds_an_update"] == 2
    assert table["faster"]["all_seconds_an_update"] == 12 and list(table["faster"]["final_scores"]) == ["ocr"]
    assert table["faster"]["area"][0] == 2.5


def test_halving_ends_with_one():
    for cells in (1, 2, 9, 18, 24):
        plan = alignment.rungs(cells, 60)
        assert (
            plan[0][0] == cells and [n for n, *_ in plan[1:]] == [keep for *_, keep in plan[:-1]] and plan[-1][2] == 1
        )
        assert [length for _, length, _ in plan] == [12, 24, 60]


def test_leave_one_out_is_the_others_mean():
    from tree import make_forest

    out = gradient.reinforce(None, make_forest(3, 2, (), roots=4), torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    assert len(out) == 3
    assert out[0][0].tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])


def test_the_cost_model_finds_costs_it_was_made_with():
    rows = {}
    for i in range(8):
        n = {
            "forwards_total": 100.0 + 37 * i,
            "trained_parents_total": 50.0 + (i * 29) % 70,
            "leaves_total": 16.0 + i * i,
        }
        train = 0.03 * n["trained_parents_total"] + 0.2
        parts = {"rollout": 0.01 * n["forwards_total"], "train": train, "reward": 0.05 * n["leaves_total"]}
        rows[str(i)] = n | {"seconds": parts}
    rows["the same"] = rows["3"]
    model = timing.cost_model(rows)
    assert list(model["seconds_of"].values()) == pytest.approx([0.01, 0.03, 0.05, 0.2], rel=1e-4)
    assert max(map(abs, model["relative_errors_on_the_other_half"])) < 1e-4
    assert sum(abs(e) < 0.07 for e in model["paper_relative_errors"].values()) == 6  # the seventh is Mix
    assert model["paper_relative_errors"]["Mix, window 4"] > 0.3
