"""docs/*.md agree with the code: the numbers of method.md, the metrics of metrics.md, links, flags and commands."""

import contextlib
import io
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator

import flags
import train_image
import tree
from rewards import REWARDS
from schedules import schedule_of
from sde import branch_noise, sigma_schedule, step_moments

HERE = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in sorted((HERE / "docs").glob("*.md"))}
METHOD, METRICS = DOCS["method.md"], DOCS["metrics.md"]


# --------------------------------------------------------------------------------------------------- reading the text
def tables(text: str, header: str) -> list[list[str]]:
    """The rows, split into cells, of every Markdown table whose header line starts with `header`."""
    rows, inside = [], False
    for line in text.splitlines():
        if line.startswith(header):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert rows, header
    return rows


def numbers(cell: str) -> list[float]:
    """'-1 0.5' -> [-1, 0.5]."""
    return [float(word) for word in cell.split()]


def prose(text: str) -> str:
    """The text with every run of white space as one blank, so that a sentence is found wherever its lines break."""
    return " ".join(text.split())


def resolved(*argv: str):
    """Options of train_image.py, as a run would have them."""
    args = train_image.job(list(argv))[0]
    return args


# ---------------------------------------------------------------------------------------------------- the worked tree
@pytest.fixture(scope="module")
def worked():
    """Forest, rewards and fused rewards of the tree in method.md."""
    assert "rewards 0.2, 0.4, 0.9, 0.5" in METHOD
    forest = tree.make_forest(4, 2, (0, 1))
    rewards = torch.tensor([[0.2, 0.4, 0.9, 0.5]], dtype=torch.float64)
    return forest, rewards, tree.fuse(rewards, torch.zeros(1, 4), forest, beta=0.0)


def test_the_worked_tree_at_every_depth(worked):
    """Fused rewards, standard deviations and advantages, as printed and with eps."""
    forest, _, fused = worked
    rows = tables(METHOD, "| depth | fused")
    advantages = tree.ADVANTAGES["depth"](fused, forest)
    assert len(rows) == 5
    for d, (depth, values, std, rounded, exact, edges) in enumerate(rows):
        assert int(depth) == d
        assert numbers(values) == pytest.approx(fused[d][0].tolist(), abs=1e-9)
        assert float(std) == pytest.approx(fused[d][0].std(correction=0).item(), abs=5e-4)
        if d > 0:
            z = (fused[d][0] - fused[d][0].mean()) / fused[d][0].std(correction=0)
            assert numbers(rounded) == pytest.approx(z.tolist(), abs=5e-3)
            assert numbers(exact) == pytest.approx(advantages[d - 1][0].tolist(), abs=5e-5)
            assert edges.startswith(f"step {d - 1}") and ("not trained" in edges) != forest.stochastic(d - 1)


def test_the_worked_tree_under_the_other_rules(worked):
    forest, _, fused = worked
    rows = tables(METHOD, "| `--advantage` | depth 1 ")
    assert [name.strip("`") for name, *_ in rows] == list(tree.ADVANTAGES)
    for name, first, later in rows:
        advantages = tree.ADVANTAGES[name.strip("`")](fused, forest)
        assert numbers(first) == pytest.approx(advantages[0][0].tolist(), abs=5e-3)
        for level in advantages[1:]:
            assert numbers(later) == pytest.approx(level[0].tolist(), abs=5e-3)


def test_every_rule_of_advantages_is_described():
    rows = tables(METHOD, "| `--advantage` | baseline")
    assert [name.strip("`") for name, *_ in rows] == list(tree.ADVANTAGES)


def test_grpo_gives_the_fourth_leaf_nothing(worked):
    """GRPO on four independent pictures with these rewards; the tree's first step of the fourth leaf has +1."""
    forest, rewards, fused = worked
    flat = tree.make_forest(4, 2, (), roots=4)
    grpo = tree.ADVANTAGES["depth"](tree.fuse(rewards, torch.zeros(1, 4), flat, 0.0), flat)
    assert all(level[0, 3].item() == pytest.approx(0, abs=1e-9) for level in grpo)
    assert tree.ADVANTAGES["depth"](fused, forest)[0][0, 1].item() == pytest.approx(1, abs=1e-3)
    assert "credits its first step with +1" in prose(METHOD)


def test_the_drawing_of_the_worked_tree(worked):
    for line in tree.draw(worked[0]).splitlines():
        assert line in METHOD


def test_what_is_trained_of_the_worked_tree(worked):
    forest, rewards, _ = worked
    n = tree.count(forest)
    assert (n["nodes"], n["edges"], n["forwards"], n["trainable"], n["trained_parents"]) == (15, 14, 11, 10, 7)
    for sentence in ("15 nodes, 14 edges and 11 forwards", "2 + 4 + 4 = 10 trainable edges", "1 + 2 + 4 = 7 parents"):
        assert sentence in prose(METHOD)

    top1, extreme = tree.keep_parent_top1(forest, rewards), tree.keep_extreme(forest, rewards, 1)
    assert top1[2][0].tolist() == [False, True, True, False] and "leaves 1 and 2;" in prose(METHOD)
    assert extreme[2][0].tolist() == [True, False, True, False] and "the worst, 2 and 0." in prose(METHOD)
    for keep, expected in ((top1, (8, 5)), (extreme, (8, 5)), (tree.drop_window(forest, 2, 1), (6, 3))):
        kept = tree.count(forest, keep)
        assert (kept["trainable"], kept["trained_parents"]) == expected
    assert "Both leave 8 trainable edges of 5 parents" in prose(METHOD) and "leaves 6 of 3" in prose(METHOD)


# -------------------------------------------------------------------------------------------------- noise and the SDE
def test_the_correlation_of_siblings():
    """Eq. 2's table: of 200,000 pairs of siblings, and from the formula."""
    header, *_ = (line for line in METHOD.splitlines() if line.startswith("| $s$ | 0"))
    strengths = [float(cell) for cell in header.strip("|").split(" | ")[1:]]
    [(_, *values)] = tables(METHOD, "| $s$ | 0")
    assert strengths == [0, 1, 2, 4, 8, math.inf]
    for s, value in zip(strengths, values):
        assert float(value) == pytest.approx(1 / (1 + s**2), abs=5e-5)
        noise = branch_noise(200, 2, (1000,), s, torch.Generator().manual_seed(0)).double().view(200, 2, 1000)
        pairs = noise.transpose(0, 1).flatten(1)  # (2, 200000)
        assert torch.corrcoef(pairs)[0, 1].item() == pytest.approx(float(value), abs=0.01)
        assert pairs.mean().item() == pytest.approx(0, abs=0.01) and pairs.std().item() == pytest.approx(1, abs=0.01)


def one_step(kind: str, eta: float, levels: tuple[float, float], sigma_1: float, x=1.0, v=None) -> tuple[float, float]:
    """Mean and std of a step from x. By default the clean latent is 0 and known, so that the velocity is x / sigma."""
    sigma, sigma_next = (torch.tensor(level, dtype=torch.float64) for level in levels)
    x = torch.tensor(x, dtype=torch.float64)
    v = x / sigma if v is None else torch.tensor(v, dtype=torch.float64)
    mean, std = step_moments(kind, x, v, sigma, sigma_next, eta, sigma_1)
    return mean.item(), std.item()


def test_the_step_by_hand():
    mean, std = one_step("dance", 1.0, (0.5, 0.4), 0.9, v=2.0)
    assert (mean, std) == (pytest.approx(0.6), pytest.approx(0.316, abs=5e-4))
    assert one_step("ode", 1.0, (0.5, 0.4), 0.9, v=2.0)[0] == pytest.approx(0.8)
    assert "the mean is 0.6," in prose(METHOD) and r"$\sqrt{0.1} = 0.316$" in METHOD and "1 - 0.2 = 0.8" in METHOD


def test_the_variance_after_one_step():
    """The formula, with dt = sigma' - sigma, and its value in the example by hand; cps is exact."""
    assert r"\sigma'^2 + g^2 dt^2/\sigma + g^4 dt^2/(4 \sigma^2)" in METHOD and "0.19 instead of 0.16" in METHOD
    for kind, eta, sigma, after in (("dance", 1.0, 0.5, 0.4), ("dance", 0.3, 0.9, 0.7), ("flow", 0.7, 0.6, 0.5)):
        # x = sigma * noise with a clean latent of 0: the old noise keeps its part mean / x of x, the new one adds std.
        mean, std = one_step(kind, eta, (sigma, after), 0.9)
        g, dt = std / math.sqrt(sigma - after), after - sigma
        excess = g**2 * dt**2 / sigma + g**4 * dt**2 / (4 * sigma**2)
        assert (mean * sigma) ** 2 + std**2 == pytest.approx(after**2 + excess)
    mean, std = one_step("dance", 1.0, (0.5, 0.4), 0.9)
    assert (mean * 0.5) ** 2 + std**2 == pytest.approx(0.19)
    mean, std = one_step("cps", 0.7, (0.5, 0.4), 0.9)
    assert (mean * 0.5) ** 2 + std**2 == pytest.approx(0.16)


def test_the_noise_before_the_last_step():
    """Its standard deviation over the noise level, all steps but the last noisy, shift 3."""
    for kind, eta, *values in tables(METHOD, "| kind | $\\eta$ | T = 10 | T = 20 | T = 40 |"):
        for steps, value in zip((10, 20, 40), values):
            sigmas, noise = sigma_schedule(steps).tolist(), 1.0
            for levels in zip(sigmas[:-2], sigmas[1:-1]):
                mean, std = one_step(kind, float(eta), levels, sigmas[1])
                noise = math.hypot(mean * noise, std)
            assert float(value) == pytest.approx(noise / sigmas[-2], abs=5e-3), (kind, eta, steps)


def test_the_tuned_strengths():
    """As the text says: of dance, with few and with all steps noisy."""
    assert "`--sde dance` 1.6 where few steps are noisy (Mix), 0.7 where all are" in prose(METHOD)
    assert resolved("--sde", "dance").eta == 1.6
    assert resolved("--method", "branchgrpo", "--sde", "dance").eta == 0.7


# -------------------------------------------------------------------------------------------------------------- counts
def test_the_counts_of_the_papers_tree():
    forest = tree.make_forest(20, 2, (0, 3, 6, 9))
    n, variants = tree.count(forest), tree.count_variants(20, 2, (0, 3, 6, 9))
    assert f"{n['nodes']} nodes, {n['edges']} edges, {n['forwards']} forwards" in prose(METHOD)
    assert forest.sizes == (1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 11)
    variants["splits"] = tree.count(tree.make_forest(20, 2, (0, 3, 6, 9), chosen=()))

    names = {
        "the whole tree": "all",
        "Parent-Top1": "parent_top1",
        "Extreme-4": "extreme_4",
        "depth, window of 5": "depth_5",
        "depth, window of 4": "depth_4",
        "Mix, window of 4, mean of its 17 places": "mix_4_mean",
        "Mix, noise at the splits only": "splits",
    }
    rows = tables(METHOD, "| variant | edges kept")
    assert [row[0] for row in rows] == list(names)
    for name, kept, per_leaf, trainable, parents, cost in rows:
        counted = variants[names[name]]
        assert float(kept) == pytest.approx(counted["kept"], abs=5e-3)
        assert float(per_leaf) == pytest.approx(counted["kept"] / 16, abs=5e-4)
        assert float(trainable) == pytest.approx(counted["trainable"], abs=5e-3)
        assert float(parents) == pytest.approx(counted["trained_parents"], abs=5e-3)
        units = n["forwards"] + 3 * counted["trained_parents"]
        assert float(cost) == pytest.approx(units / 1232, abs=5e-4)

    flat = tree.count(tree.make_forest(20, 2, (), roots=16))
    assert flat["forwards"] + 3 * flat["trained_parents"] == 1232 == 16 * (20 + 3 * 19)
    assert sum(forest.sizes[10:20]) == 160 and "160 of the 203 forwards" in prose(METHOD)


def counts_of(*argv: str) -> tuple[int, int]:
    """trained_edges and nfe of an iteration with these flags."""
    args = resolved(*argv)
    schedule = schedule_of(args, 0)
    keep = tree.keep_chosen(schedule.forest, 1)
    if args.width_prune:
        keep = tree.intersect(keep, tree.keep_parent_top1(schedule.forest, torch.zeros(1, schedule.forest.leaves)))
    n = tree.count(schedule.forest, keep)
    return n["trainable"] * args.prompts_per_iteration, (
        n["forwards"] + n["trained_parents"]
    ) * args.prompts_per_iteration


def test_the_counts_in_the_tables_of_metrics():
    """Of the commands A, B and C."""
    branchgrpo = ("--method", "branchgrpo")
    assert [counts_of(), counts_of(*branchgrpo), counts_of(*branchgrpo, "--width-prune")] == [
        (120, 456),
        (392, 728),
        (264, 600),
    ]
    assert "4 x 30 = 120 (A), 4 x 98 = 392 (B), 4 x 66 = 264 (C)" in METRICS
    assert "4 x (99 + 15) = 456 (A), 728 (B), 600 (C)" in METRICS


# ------------------------------------------------------------------------------------------------------------- metrics
TINY = "--iterations 1 --leaves 4 --prompts-per-iteration 1 --eval-size 2"
NOTHING_TO_TRAIN = "--method branchgrpo --branch 4 --steps 4 --splits 0 --timestep-fraction 0.01 --depth-prune 2"


def run(out: Path, *argv: str) -> tuple[list[dict], dict, Path]:
    """The rows of a tiny run, its final document, and its folder."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train_image.main([*TINY.split(), *argv, "--out", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads(printed.getvalue().splitlines()[-1]), out


def documented(key: str) -> str:
    """reward_ocr -> reward_NAME, ocr_before -> NAME_before, variance_step_3 -> variance_step_N; others as they are."""
    for name in REWARDS:
        for pattern in ("reward_{}", "heldout_{}", "{}_before", "{}_after"):
            if key == pattern.format(name):
                return pattern.format("NAME")
    return re.sub(r"^variance_step_\d+$", "variance_step_N", key)


def rows_of(section: str) -> set[str]:
    """The keys in the first column of the tables in a section of metrics.md."""
    text = METRICS.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return {key for row in tables(text, "| key |") for key in re.findall(r"`(\w+)`", row[0])}


COLUMNS = ("Rewards while training", "Held-out scores", "Learning", "The tree", "Time and memory")


@pytest.fixture(scope="module")
def with_kl(tmp_path_factory):
    """A run that computes everything."""
    return run(tmp_path_factory.mktemp("docs") / "kl", "--kl", "0.1")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run without ocr and without --kl, whose one trained step lies in the depth window."""
    argv = NOTHING_TO_TRAIN.split()
    schedules = {seed: schedule_of(resolved(*TINY.split(), *argv, "--seed", str(seed)), 0) for seed in range(20)}
    seed = next(seed for seed, schedule in schedules.items() if 0 not in schedule.trained_steps)
    argv += ["--seed", str(seed), "--reward", "colour", "--watch", "jpeg"]
    return run(tmp_path_factory.mktemp("docs") / "untrained", *argv)


def test_every_metric_has_a_row(with_kl):
    """The columns of a run that computes everything are those of the tables, no more and no fewer."""
    rows, _, _ = with_kl
    written = {documented(key) for row in rows for key in row}
    described = {key for section in COLUMNS for key in rows_of(section)}
    assert written == described


def test_what_was_not_computed_is_absent(with_kl, untrained):
    """kl without --kl, the learning columns without anything to train, heldout_exact without ocr."""
    learning = rows_of("Learning") - {"lr"}
    row = untrained[0][1]
    assert row["trained_edges"] == 0 and not learning & set(row) and "lr" in row
    assert "heldout_exact" not in row and "heldout_jpeg" in row and "reward_jpeg" in row
    assert learning <= set(with_kl[0][1]) and "heldout_exact" in with_kl[0][1]
    held_out = rows_of("Held-out scores") | {"iteration", "seconds_eval"}
    assert {documented(key) for key in with_kl[0][0]} == held_out


def test_kl_is_absent_without_its_flag(tmp_path):
    """The other learning columns are there; one iteration on-policy has ratios of 1, so nothing is clipped."""
    rows, _, _ = run(tmp_path / "plain", "--watch", "jpeg")
    assert rows_of("Learning") - set(rows[1]) == {"kl"}
    assert rows[1]["ratio_dev"] < 1e-6 and rows[1]["clip_frac"] == 0 and abs(rows[1]["loss"]) < 1e-7
    assert 1 <= rows[1]["effective_leaves"] <= rows[1]["leaves"] == 4
    assert rows[1]["prompts_without_spread"] in (0, 1)


def test_the_final_document_is_described(with_kl, untrained):
    described = rows_of("The last line on stdout")
    assert {documented(key) for key in with_kl[1]} == described
    assert described - {documented(key) for key in untrained[1]} == {"exact_before", "exact_after"}


def test_the_histograms_are_described(with_kl):
    tags = event_accumulator.EventAccumulator(str(with_kl[2] / "tensorboard")).Reload().Tags()
    assert set(tags["histograms"]) == rows_of("Histograms")
    columns = {key for section in COLUMNS for key in rows_of(section)} - {"iteration"}
    assert {documented(tag) for tag in tags["scalars"]} == columns


def test_every_row_has_all_cells():
    """Meaning, unit, healthy range, what to do: none is empty."""
    for section in COLUMNS:
        text = METRICS.split(f"\n## {section}\n")[1].split("\n## ")[0]
        for row in tables(text, "| key |"):
            assert len(row) == 5 and all(row), row


# ----------------------------------------------------------------------------------------------- links, flags, commands
def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings: lower case, words joined by hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCS)
def test_links_point_at_files_and_headings(name):
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", DOCS[name]):
        path, _, anchor = link.partition("#")
        target = (HERE / "docs" / path).resolve() if path else HERE / "docs" / name
        assert target.exists(), link
        assert target.is_relative_to(HERE), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", DOCS)
def test_linked_names_exist(name):
    """`name`](../file.py): the file defines a function, a class or a table of that name."""
    for linked, file in re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", DOCS[name]):
        text = (HERE / file).read_text()
        assert re.search(rf"^((def|class) {linked}\b|{linked}\b.*=)", text, re.M), (linked, file)


def test_the_method_links_many_names():
    """Every public name of the method is linked at least once."""
    linked = set(re.findall(r"\[`(\w+)`\]", METHOD))
    names = "sigma_schedule step_moments gaussian_logp_mean branch_noise second_order Forest fuse effective_leaves"
    names += " ADVANTAGES keep_parent_top1 keep_extreme drop_window window_start intersect count rollout credit prune"
    names += " flatten_edges surrogate clipped_loss update schedule_of"
    assert set(names.split()) - linked == set()


@pytest.mark.parametrize("name", ["method.md", "metrics.md"])
def test_flags_exist(name):
    """Every --flag in the text is one of a script, of tree.py or of tensorboard."""
    parsers = [flags.parser("", video=video) for video in (False, True)]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", DOCS[name]))
    assert mentioned - known <= {"--logdir"}


@pytest.mark.parametrize("name", ["method.md", "metrics.md"])
def test_commands_parse(name):
    """Every `python train_image.py ...` and `python tree.py ...` is accepted."""
    commands = re.findall(r"`python (train_image|tree)\.py([^`]*)`", DOCS[name])
    assert commands or name != "method.md"
    for script, argv in commands:
        if script == "tree":
            with contextlib.redirect_stdout(io.StringIO()):
                tree.main(shlex.split(argv))
        else:
            resolved(*shlex.split(argv))
