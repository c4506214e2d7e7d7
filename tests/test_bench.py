"""The benchmarks: each runs in seconds with --smoke and leaves what it promises; RESULTS.md is what the JSON says."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE / "bench"))

import alignment  # noqa: E402
import common  # noqa: E402
import diversity  # noqa: E402
import equal_time  # noqa: E402
import gradient  # noqa: E402
import results  # noqa: E402
import speedrun  # noqa: E402
import timing  # noqa: E402

import train_image  # noqa: E402
import train_video  # noqa: E402

QUICK = ("nfe", "evaluate", "early")
LONG = ("timing", "diversity", "gradient", "overhead", "alignment", "ablation", "scaling", "equal_time", "speedrun")
LONG += ("spread",)  # up to minutes each


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)])
def test_smoke(name, monkeypatch, capsys):
    """The command `python bench/NAME.py --smoke`, in this process, where the libraries are loaded already."""
    monkeypatch.setattr(sys, "argv", [str(HERE / f"bench/{name}.py"), "--smoke"])
    importlib.import_module(name).main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"arguments", "versions", "commit", "machine"} <= set(document)
    for kind in ("json", "png", "svg"):
        assert (HERE / f"runs/smoke/{name}.{kind}").stat().st_size > 500


def test_results_are_what_the_json_says():
    assert (HERE / "RESULTS.md").read_text() == results.document()


def test_the_docs_say_what_results_say():
    """docs/benchmarks.md has every benchmark's finding and command, word for word and number for number."""
    text = " ".join((HERE / "docs/benchmarks.md").read_text().replace("\\\n", "").split())
    for name, (_, _, show) in results.SECTIONS.items():
        d = results.loaded(name)
        assert show(d).finding in text, name
        assert " ".join(d["command"].split()) in text, name


def test_results_are_easy_to_read():
    """At most six columns, one sentence per finding, lines of 120 columns, leading zeros, no words of our own."""
    text = (HERE / "RESULTS.md").read_text()
    for line in text.splitlines():
        assert line.startswith(("|", "![")) or len(line) <= 120, line
        assert line.count(" | ") <= 5, line
        assert not re.search(r"(^|[^\w.])[-+]?\.\d", line), line
    for name, (_, _, show) in results.SECTIONS.items():
        finding = show(results.loaded(name)).finding
        assert finding.endswith(".") and not re.search(r"\. [A-Z]", finding), finding
    docs = (HERE / "docs/benchmarks.md").read_text().partition("Some names inside are older")[0]
    for word in ("splits alone", "policy seconds", "the same,", "seconds an ", "units to signal"):
        assert word not in text and word not in docs, word


def test_links_to_headings_point_at_headings():
    """Every link of RESULTS.md and docs/benchmarks.md goes to a file that exists and a heading that it has."""
    for path in (HERE / "RESULTS.md", HERE / "docs/benchmarks.md"):
        for link in re.findall(r"\]\(((?!http)[^)]+)\)", path.read_text()):
            file, _, fragment = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if fragment else []
            assert not fragment or f"#{fragment}" in map(results.anchor, titles), link


def test_verdicts_follow_from_intervals():
    """By hand: above 0, across it, below it; the same for a claim that a value lies below 0."""
    above, across, below = (2, 1, 3), (0.5, -1, 2), (-2, -3, -1)
    assert [results.verdict(x) for x in (above, across, below)] == ["seen", "not told apart", "contradicted"]
    assert [results.verdict(x, -1) for x in (above, across, below)] == ["contradicted", "not told apart", "seen"]

    # A time of 0.45 may be a tenth above, 0.495; counts may be half a per cent off.
    rows = {"a": {"ratio": 0.5, "ratio_interval": [0.496, 0.51]}, "MixGRPO, window 5": {"ratio": 1.0}}
    assert results.claim_time("a", 0.45)({"rows": rows})[1] == "contradicted"
    rows["a"] = {"ratio": 0.45, "ratio_interval": [0.44, 0.49]}
    assert results.claim_time("a", 0.45)({"rows": rows})[1] == "seen"


def test_the_verdicts_are_these():
    """What the documents decide today: a new measurement that changes a verdict must be noticed."""
    lines = [line.strip("| ").split(" | ") for line in results.claims().splitlines()[2:]]
    found = {re.match(r"\[(.*?)\]\(", claim)[1]: said for claim, _, said in lines}
    assert len(found) == len(results.CLAIMS)
    kinds = {
        "seen": ("Model evaluations", "BranchGRPO takes", "BranchGRPO with width pruning takes")
        + ("BranchGRPO with depth pruning takes", "Early splits", "Leaves of trees", "Reward rises with K")
        + ("Training raises",),
        "contradicted": ("BranchGRPO-Mix takes", "BranchGRPO with width pruning ends"),
        "not told apart": ("BranchGRPO ends", "BranchGRPO with depth pruning ends", "BranchGRPO-Mix ends")
        + ("Depth pruning gives", "Branch noise s = 4", "The advantage per depth", "Reward rises with 3, 4, 5"),
        "not measured": ("With 81 leaves", "Fusion", "FLUX.1-dev with", "FLUX.1-dev: MMD^2", "Wan2.1"),
    }
    for kind, starts in kinds.items():
        claimed = {claim for claim, said in found.items() if said == kind}
        assert len(claimed) == len(starts) and all(claim.startswith(starts) for claim in claimed), kind


def test_the_words_around_the_numbers_hold():
    """What RESULTS.md says in words that are not computed: within a tenth, in every seed, nothing else is biased."""
    found = {name: results.loaded(name) for name in results.SECTIONS}

    # timing: counting is right within a tenth; Table 1's NFE are of 219 nodes over 16 leaves.
    over = [round(r["ratio"] / r["ratio_counted"], 2) for r in found["timing"]["rows"].values()]
    assert min(over) >= 0.9 and max(over) <= 1.1
    assert found["nfe"]["rows"]["BranchGRPO"]["nodes"] == 219 / 16
    kept = {n: found["nfe"]["rows"][n]["kept"] for n in ("+ width (Parent-Top1)", "+ width (Extreme-4)")}
    assert {*kept.values(), found["nfe"]["rows"]["+ depth, window 5"]["kept"]} == {8.625}

    # alignment: depth pruning is not the best arm.
    final = {arm: np.mean(r["final_reward"]) for arm, r in found["alignment"]["table"].items()}
    assert max(final, key=final.get) != "BranchGRPO + depth"

    # scaling: at equal time 8 and 256 leaves end lower than 16 in every seed, and no doubling helps.
    at_time = {r["leaves"]: np.array(r["reward_at_time"]) for r in found["scaling"]["rows"].values()}
    assert all((at_time[n] < at_time[16]).all() for n in (8, 256))
    _, low, high = found["scaling"]["slopes"]["reward_at_time"]["all"]
    assert low < 0 < high

    # gradient: of the estimates of Eq. 5 one is biased, of the others all; the trees are those of the benchmark.
    cosines = {name: r["one prompt"]["cosine"] for name, r in found["gradient"]["rows"].items()}
    others = [name for name, arm in gradient.ARMS.items() if arm[5:6] not in ((), ("surrogate",))]
    biased = [name for name, (_, low, high) in cosines.items() if not low < 1 < high]
    assert sorted(biased) == sorted(["the same, width-pruned", *others]) and len(others) == 5
    assert (results.TREE, results.SPLITS_TREE) == (gradient.TREE, gradient.SPLITS)
    assert gradient.PAIRS[results.ENDPOINT_PAIR] == (gradient.ENDPOINT, gradient.SPLITS)
    units = {name: r["units"] for name, r in found["gradient"]["rows"].items()}
    assert units["the same, width-pruned"] == units["the same, depth-pruned"]

    # diversity: one leaf per tree is not told apart, both controls are; all leaves lie beyond the quantile.
    for rows in found["diversity"]["features"].values():
        for name, r in rows.items():
            if "one leaf" in name or "control" in name:
                assert (r["p"] < 0.05) == name.startswith("control"), name
            assert "all 16" not in name or r["null_95"] < r["mmd2"] < 0.019, name

    # ablation: the advantage per group is at the edge, and chance makes one in twenty.
    changes = sum(len(arms) - 1 for arms in found["ablation"]["groups"].values())
    assert round(0.05 * changes) == 1
    assert 0 < found["ablation"]["groups"]["advantage (Eq. 4)"]["over a group"]["difference"][2] < 0.0015


def test_every_row_has_a_name_that_explains_itself():
    """No row of RESULTS.md refers to the row above it, and every name that is translated occurs in a document."""
    text = "".join((HERE / f"bench/results/{name}.json").read_text() for name in results.SECTIONS)
    assert [name for name in results.NAMES if json.dumps(name) not in text] == []
    assert "| the same" not in (HERE / "RESULTS.md").read_text()


def test_wrapped_commands_are_the_same_commands():
    for command in (results.ALIGNMENT_VIDEO, f'FLUX="{results.PLACES["FLUX"]}" {results.EVALUATE}'):
        wrapped = results.shell(command)
        assert "\n" in wrapped and max(map(len, wrapped.splitlines())) <= 120
        assert [w.split() for w in shlex.split(wrapped.replace("\\\n", ""))] == [
            w.split() for w in shlex.split(command)
        ]


def test_the_commands_for_gpus_parse(monkeypatch):
    """RESULTS.md's script: every flag is known and goes with the others. The checkpoints themselves are not here."""
    for script in (train_image, train_video):
        monkeypatch.setattr(script, "policy_of", lambda model, kinds: kinds[0])
        monkeypatch.setattr(script, "checkpoint_values", lambda kind, args: {})
    script = results.on_gpus().partition("```sh\n")[2].partition("```")[0]
    files = {
        "hpdv2_train.txt": "prompts_train.txt",
        "hpdv2_test.txt": "prompts_heldout.txt",
        "PROMPTS": "video_train.txt",
    }
    files = {name: str(HERE / "tiny" / ours) for name, ours in files.items()}

    # The first three commands define what the others have in common; long ones go on after a backslash.
    definitions, commands = script.replace("\\\n", "").splitlines()[:3], script.replace("\\\n", "").splitlines()[3:]
    places = dict(line.split("=", 1) for line in definitions)
    for line in commands:
        for name, flags in places.items():
            line = line.replace(f"${name}", flags.strip('"'))
        _, program, *argv = shlex.split(line)

        # A benchmark gets the flags of its runs in one argument and writes a document of its own name.
        if program.startswith("bench/"):
            assert (HERE / program).exists() and argv[-2] == "--name" and argv[-1] in results.GPU
            argv = shlex.split(argv[argv.index("--flags") + 1]) + ["--video"] * ("--video" in argv)
        train = train_video if "--video" in argv else train_image
        assert train.job([files.get(a, a) for a in argv if a != "--video"])
    assert len(commands) == 2 * 8 - 1 + 3


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
    """Samples share a prompt that moves them: p stays uniform, alone, with four per prompt and for three pairs."""
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
    """Of prompts (3, 4, 0) + their own (0, 0, +-5) and noise: every estimate comes out.

    The intervals hold the truth as often as they say.
    """
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


@pytest.mark.parametrize("name", ["alignment", "alignment_video"])
def test_the_table_of_the_json_follows_from_its_curves(name):
    d = results.loaded(name)
    table = json.loads(json.dumps(alignment.compare(d["curves"])))
    assert {
        arm: row | {"raw_seconds_an_update": d["table"][arm]["raw_seconds_an_update"]} for arm, row in table.items()
    } == d["table"]


@pytest.mark.parametrize("name", ["alignment", "alignment_video"])
def test_the_figure_shows_four_arms_that_differ(name):
    """One panel; every line has a label, a colour, a style and a marker of its own, and goes through the means."""
    d = results.loaded(name)
    (ax,) = (figure := alignment.draw(d)).axes
    assert len(ax.lines) == 4 == len({line.get_label() for line in ax.lines})
    styles = [alignment.PANEL[arm][1:] for arm in alignment.PANEL if arm in d["curves"]][:4]
    assert all(len(set(kind)) == 4 for kind in zip(*styles))
    dance = d["curves"]["DanceGRPO"]
    assert ax.lines[0].get_ydata() == pytest.approx(np.mean([c["reward"] for c in dance], 0))
    assert ax.lines[0].get_xdata() == pytest.approx(dance[0]["seconds"])
    alignment.plt.close(figure)


def test_halving_ends_with_one():
    for cells in (1, 2, 9, 18, 24):
        plan = alignment.rungs(cells, 60)
        assert (
            plan[0][0] == cells and [n for n, *_ in plan[1:]] == [keep for *_, keep in plan[:-1]] and plan[-1][2] == 1
        )
        assert [length for _, length, _ in plan] == [12, 24, 60]


def test_equal_time_by_hand():
    """An arm at half of DanceGRPO's seconds makes twice its iterations in the budget; marks and rewards by hand."""
    seconds = {"DanceGRPO": {"policy": 2.0, "all": 3.0}, "cheap": {"policy": 1.0, "all": 2.0}}
    tenth = "endpoint, star, a tenth of the time"
    assert equal_time.horizons(seconds | {tenth: seconds["cheap"]}, 10) == {"DanceGRPO": 10, "cheap": 20, tenth: 2}

    def rows(rewards, every):
        first, *later = [{"iteration": i * every, "heldout_reward": r} for i, r in enumerate(rewards)]
        return [first, *(row | {"units": 5} for row in later)]

    # Means of three: DanceGRPO 0, 1.5, 2, 3 at 0, 20/3, 40/3, 20 s; the cheap arm 0, 3, 4, 6 at the same times.
    dance = equal_time.curve(rows([0.0, 3.0, 3.0, 3.0], 10 / 3), seconds["DanceGRPO"])
    cheap = equal_time.curve(rows([0.0, 6.0, 6.0, 6.0], 20 / 3), seconds["cheap"])
    assert dance["units"] == [0, 5, 10, 15] and dance["seconds"][-1] == pytest.approx(20)
    assert dance["all_seconds"][-1] == pytest.approx(30) and cheap["all_seconds"][-1] == pytest.approx(40)
    row = equal_time.compare({"DanceGRPO": [dance] * 2, "cheap": [cheap] * 2})["cheap"]
    assert row["final"] == pytest.approx([6, 6]) and row["final_minus_dance"][0] == pytest.approx(3)
    assert row["to_final"] == pytest.approx([1 / 3] * 2) and row["to_two_thirds"] == pytest.approx([2 / 9] * 2)
    assert row["median_to_final"] == pytest.approx(1 / 3)

    # After 30 s in all the cheap arm has made 15 iterations, 15 s of its own: a quarter of the way from 4 to 6.
    assert row["wall"] == pytest.approx([4.5] * 2) and row["equal_updates"] == pytest.approx([3.5] * 2)


def test_every_arm_of_equal_time_is_accepted():
    """Each arm resolves; the forests have eight leaves."""
    args = SimpleNamespace(video=False, flags="--leaves 8 --prompts-per-iteration 8 --lr-end 0")
    for arm, flags in equal_time.ARMS.items():
        assert common.job(args, f"{flags} --iterations 48")[0].leaves == 8, arm


def test_the_speedruns_mark_by_hand():
    """Means of three 0, 0.3, 0.4, 0.7: a mark of 0.5 lies a third of the way from the third to the fourth."""
    exact = [0.0, 0.6, 0.6, 0.9]
    rows = [{"iteration": 10 * i, "heldout_exact": e, "units": 30 * (i > 0)} for i, e in enumerate(exact)]
    assert speedrun.reached(rows, 0.5) == pytest.approx({"iterations": 70 / 3, "units": 70})
    assert speedrun.reached(rows, 0.8) is None


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
