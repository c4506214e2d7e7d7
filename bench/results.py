"""Writes RESULTS.md from bench/results/*.json, the paper's figure beside ours; `--check` fails where the two differ.

python bench/results.py              # writes
python bench/results.py --check      # exit code 1 if RESULTS.md is not what the JSON says

1. CLAIMS     the paper's claims; each verdict follows from an interval of the JSON by the rules that RESULTS.md prints
2. SECTIONS   one function per benchmark: from its JSON document to a finding in one sentence, tables and notes
3. GPU        what needs a GPU: one script that measures it, a row per figure, and what bench/gpu.py measured on a card
4. APPENDIX   columns that few readers need, with every measured number

Numbers are read from the JSON. Written out here are only the paper's figures and the words around the numbers, and
tests/test_bench.py checks that those words still hold.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120  # columns of every line outside tables
SPLITS_ONLY = "noise at the splits only"

# What RESULTS.md calls the rows of the documents, whose own names stay as they were when they were measured.
NAMES = {
    # alignment
    "BranchGRPO + depth": "BranchGRPO, depth pruning",
    "BranchGRPO + width": "BranchGRPO, width pruning",
    "BranchGRPO-Mix, splits alone": f"BranchGRPO-Mix, {SPLITS_ONLY}",
    "BranchGRPO-Mix, splits alone, flash": f"BranchGRPO-Mix, {SPLITS_ONLY}, flash tail",
    # equal_time
    "Mix, noise at the splits, flash": f"BranchGRPO-Mix, {SPLITS_ONLY}, flash tail",
    "endpoint, tree": "endpoint on trees with a flash tail",
    "endpoint, star at a random step": "endpoint on a star that splits at a random step",
    "endpoint, star, a tenth of the time": "endpoint on such a star for a tenth of the time",
    "endpoint, star, a fifteenth of the time": "endpoint on such a star for a fifteenth of the time",
    "elbo, ODE": "elbo on leaves of ODEs",
    "nft, ODE": "nft on leaves of ODEs",
    # nfe and timing
    "+ width (Parent-Top1)": "BranchGRPO, width pruning (Parent-Top1)",
    "+ width (Extreme-4)": "BranchGRPO, width pruning (Extreme-4)",
    "+ depth, window 5": "BranchGRPO, depth pruning, window of 5",
    "Mix, window 4": "BranchGRPO-Mix, window of 4",
    "Mix, splits alone": f"BranchGRPO-Mix, {SPLITS_ONLY}",
    "Mix, splits alone, flash 4": f"BranchGRPO-Mix, {SPLITS_ONLY}, flash tail of 4 steps",
    "Mix, splits alone, flash 4, 81": f"BranchGRPO-Mix, {SPLITS_ONLY}, flash tail of 4 steps, 81 leaves",
    "sequential DanceGRPO, 81": "sequential DanceGRPO, 81 leaves",
    "MixGRPO, window 5": "MixGRPO, window of 5",
    "Flow-GRPO-Fast, window 2": "Flow-GRPO-Fast, window of 2",
    # ablation
    "splits": "steps of the splits",
    "mixed 0,1,3,4": "mixed splits: 0, 1, 3, 4",
    "dense 0,1,2,3": "dense splits: 0, 1, 2, 3",
    "sparse 0,2,4,6": "sparse splits: 0, 2, 4, 6",
    "late 4,5,6,7": "late splits: 4, 5, 6, 7",
    "s = inf": "s = infinity: independent siblings",
    "over a depth": "per depth",
    "over a group": "per group",
    "cps 0.7": "cps, eta 0.7",
    "dance 0.8": "dance, eta 0.8",
    "dance 1.6": "dance, eta 1.6",
    "flow 0.7": "flow, eta 0.7",
    "flash 3": "flash tail of 3 steps",
    "flash 2": "flash tail of 2 steps",
    "pruning, all steps noisy": "pruning, noise at all steps",
    "what is noisy": "where noise is added",
    "splits alone": SPLITS_ONLY,
    "splits and a window": "noise at the splits and in a window of 2",
    "all": "noise at all steps",
    # diversity
    "tree, one leaf of each": "trees, one leaf of each",
    "control: split noise x 4": "control: noise at splits times 4",
    "control: eta x 1.2": "control: eta times 1.2",
    "for scale: eta x 1.03": "for scale: eta times 1.03",
    "16 sequential for each prompt": "sequential, 16 samples per prompt",
    # gradient
    "all steps noisy, independent": "independent rollouts, noise at all steps",
    "all steps noisy, tree": "tree, noise at all steps",
    "all steps noisy, tree, every edge the same weight (Eq. 5)": "tree, noise at all steps, equal edge weights (Eq. 5)",
    "the same, width-pruned": "tree, noise at all steps, equal edge weights, width pruning",
    "the same, depth-pruned": "tree, noise at all steps, equal edge weights, depth pruning",
    "all steps noisy, tree, group advantage": "tree, noise at all steps, group advantage",
    "all steps noisy, tree, no fusion": "tree, noise at all steps, no fusion",
    "splits noisy, independent": f"independent rollouts, {SPLITS_ONLY}",
    "splits noisy, tree": f"tree, {SPLITS_ONLY}",
    "splits noisy, tree, every edge the same weight": f"tree, {SPLITS_ONLY}, equal edge weights",
    "splits noisy, tree, group advantage": f"tree, {SPLITS_ONLY}, group advantage",
    "the same, every edge the same weight": f"tree, {SPLITS_ONLY}, group advantage, equal edge weights",
    "splits noisy, tree, endpoint": f"endpoint, tree, {SPLITS_ONLY}",
    "splits noisy, star": f"star, {SPLITS_ONLY}, equal edge weights",
    "splits noisy, star, endpoint": f"endpoint, star, {SPLITS_ONLY}",
    "no noise, independent, elbo": "elbo, independent rollouts, no noise",
    "no noise, independent, nft": "nft, independent rollouts, no noise",
    "splits noisy, tree, elbo": f"elbo, tree, {SPLITS_ONLY}",
    "the endpoint objective instead of Eq. 5, splits noisy": f"endpoint, against Eq. 5, tree, {SPLITS_ONLY}",
    "the endpoint objective instead of Eq. 5, star": f"endpoint, against Eq. 5, star, {SPLITS_ONLY}",
    "width pruning": "width pruning, against no pruning",
    "depth pruning": "depth pruning, against no pruning",
    "no fusion, all steps noisy": "no fusion, against fusion, noise at all steps",
    "a tree instead of independent rollouts, splits noisy": f"a tree, against independent rollouts, {SPLITS_ONLY}",
    "equal depths instead of equal edges, splits noisy": (
        f"equal depth weights, against equal edge weights, {SPLITS_ONLY}"
    ),
    "group instead of depth-wise advantage, equal depths, splits noisy": (
        f"group advantage, against depth-wise, equal depth weights, {SPLITS_ONLY}"
    ),
    "group instead of depth-wise advantage, equal edges, splits noisy": (
        f"group advantage, against depth-wise, equal edge weights, {SPLITS_ONLY}"
    ),
    # overhead
    "rollout over bare calls": "our rollout, over its forwards alone",
    "training over bare forward and backward": "our training, over its forwards and backwards alone",
    "one node at a time, model calls": "forwards and backwards of one node at a time, over our rollout and training",
    "one node at a time, iteration": "iteration of one node at a time, over our whole iteration",
    "leaves": "leaves per prompt",
    "leaves, no micro-batch": "leaves per prompt, no micro-batches",
    "steps": "denoising steps",
    "prompts": "prompts per iteration",
}

# The two trees of gradient.py with the loss of Eq. 5: noise at all steps, noise at the splits only. Endpoint beside it.
TREE = "all steps noisy, tree, every edge the same weight (Eq. 5)"
SPLITS_TREE = "splits noisy, tree, every edge the same weight"
ENDPOINT_PAIR = "the endpoint objective instead of Eq. 5, splits noisy"


class Section(NamedTuple):
    """What a benchmark's document says: a finding in one sentence, Markdown tables, notes."""

    finding: str
    tables: str
    notes: list[str]


# ----------------------------------------------------------------------------------------------- from values to text


def shown(name: str) -> str:
    """The name under which RESULTS.md shows a row."""
    return NAMES.get(name, name)


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table; None is an empty cell, floats have three decimals."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else "" if c is None else str(c) for c in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]]
    return "\n".join(lines)


def interval(triple, form: str = ".2f") -> str:
    """A mean with its interval, as in 0.62 [0.61, 0.68]; None says that the noise hid it."""
    if triple is None:
        return "no signal found"
    mean, low, high = (f"{value:{form}}" for value in triple)
    return f"{mean} [{low}, {high}]"


def interval_or_empty(triple, form: str = ".2f") -> str | None:
    """The same for a cell that stays empty where there is no mean."""
    return interval(triple, form) if triple else None


def difference(triple) -> str:
    """A difference with its interval and signs, as in +0.0045 [-0.0324, +0.0415]."""
    return interval(triple, "+.4f")


def number_word(n: int) -> str:
    """The number as prose writes it: none, one, two."""
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[n] if n < len(words) else str(n)


def paragraph(text: str, first: str = "", rest: str = "") -> str:
    """Text wrapped at WIDTH, its first line and the others indented; code and equations stay on one line."""
    # Blanks in `code`, "Eq. 2", "p = 0.5" and "0.5 [0.4, 0.6]" become a character that no line breaks at.
    whole = r"`[^`]*`|Eq\. \d|\w+ = [\d.]+|\S+ \[[-+.,\d ]+\]"
    text = re.sub(whole, lambda match: match[0].replace(" ", "\0"), text)
    wrapped = textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return wrapped.replace("\0", " ")


def bullets(notes: list[str]) -> str:
    """A Markdown list."""
    return "\n".join(paragraph(note, "- ", "  ") for note in notes)


def shell(command: str) -> str:
    """A shell command wrapped at WIDTH with backslashes, never within single quotes, where they would be kept."""
    # A word has no blank outside single quotes: `--flags '--leaves 8'` is two. A flag keeps its value beside it.
    words: list[str] = []
    for word in re.findall(r"(?:'[^']*'|[^\s'])+", command):
        if words and words[-1].startswith("--") and " " not in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)

    # Two columns are kept for the blank and the backslash at the end of a line.
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > WIDTH - 2:
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)


def code_block(commands: list[str]) -> str:
    """Shell commands as a Markdown block."""
    return "\n".join(["```sh", *map(shell, commands), "```"])


def anchor(title: str) -> str:
    """The fragment by which Markdown links to a heading."""
    return "#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def loaded(name: str) -> dict | None:
    """A benchmark's document; None where it was not measured."""
    path = ROOT / f"bench/results/{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# ------------------------------------------------------------------------------------------------------- the sections


def nfe(d: dict) -> Section:
    """Counts of model evaluations."""
    rows = [
        [shown(name), r["paper_old"], r["edges"], r["paper_new"], r["kept"]]
        + [f"{r['forwards']:.3f} + {r['trained_parents']:.3f}"]
        for name, r in d["rows"].items()
    ]
    head = ["method", "NFE old, paper", "NFE old, ours", "NFE new, paper", "NFE new, ours"]
    head += ["forwards: rollout + training"]

    tree, mix = d["rows"]["BranchGRPO"], d["rows"]["Mix, window 4"]
    pruned = d["rows"]["+ width (Parent-Top1)"]["kept"]
    finding = (
        f"The counts of the paper follow from its trees: 219 nodes over 16 leaves are {tree['nodes']:.4f} model"
        f" evaluations per picture (the paper prints 13.68), either pruning keeps {pruned:.3f}, and BranchGRPO-Mix"
        f" keeps {mix['kept']:.3f} (the paper prints 4.25); hooks on a real run agree exactly with every count."
    )
    notes = [
        "All figures are per picture, with T = 20 steps and 16 leaves. A window is averaged over all its places.",
        "NFE old is the number of edges of the tree over its leaves, NFE new the number of edges that are trained. Both"
        " count the last, deterministic step, as the paper does; it prints nodes, we print edges.",
        "Siblings share their parent's forward, so there are fewer forwards than edges. The last column counts them:"
        " those of the rollout, and those of training, each with a backward (trained parents).",
        "DanceGRPO with the fraction 0.6 trains 12 of its 19 stochastic steps; the deterministic step is counted too.",
        "MixGRPO shares one chain before its window, which the paper does not count.",
        "Flow-GRPO-Fast and TempFlow-GRPO split at a random step; their figures are means of 16 draws of it.",
    ]
    return Section(finding, table(head, rows), notes)


PAPER_LARGE = 680 / 2400  # of 81 samples: seconds per iteration over DanceGRPO's


def timing(d: dict) -> Section:
    """The paper's Table 1."""
    base = max(d["paper_seconds"].values())
    paper = {name: seconds / base for name, seconds in d["paper_seconds"].items()}
    paper["Mix, splits alone, flash 4, 81"] = PAPER_LARGE
    ratio = {name: (r["ratio"], *r["ratio_interval"]) for name, r in d["rows"].items()}

    head = ["method", "paper", "ours: rollout and training time", "counted", "ours: whole iteration"]
    rows = [
        [shown(name), paper.get(name), interval(ratio[name], ".3f"), r["ratio_counted"], r["ratio_of_totals"]]
        for name, r in d["rows"].items()
    ]
    finding = (
        f"BranchGRPO takes {interval(ratio['BranchGRPO'])} of the rollout and training time per iteration of sequential"
        f" DanceGRPO, with width pruning {interval(ratio['+ width (Parent-Top1)'])}, with depth pruning"
        f" {interval(ratio['+ depth, window 5'])}, and BranchGRPO-Mix {interval(ratio['Mix, window 4'])}"
        f" ({d['arguments']['rounds']} rounds)."
    )
    return Section(finding, table(head, rows), timing_notes(d))


def timing_notes(d: dict) -> list[str]:
    """What the columns are, how well counting predicts them, and where the paper differs."""
    over = {name: r["ratio"] / r["ratio_counted"] for name, r in d["rows"].items()}
    farthest = max(over, key=lambda name: abs(over[name] - 1))
    model, errors = d["cost_model"], d["cost_model"]["relative_errors_on_the_other_half"]
    theirs = ", ".join(f"{shown(name)} {100 * e:+.0f} %" for name, e in model["paper_relative_errors"].items())
    return [
        "Every figure is the time per iteration over DanceGRPO's with as many leaves. Ours is over sequential"
        " DanceGRPO, where each leaf has a noise of its own and nothing is shared; with shared noise all leaves of a"
        " prompt start from one noise.",
        "The whole iteration has decoding and reward too.",
        "Counted: forwards of the rollout plus 3 times trained parents (a forward with its backward costs three"
        f" forwards). The time is within a tenth of it; farthest off is {shown(farthest)}, {over[farthest]:.2f} times.",
        "A cost model of the whole iteration (forwards, trained parents, pictures, a constant), fitted on every second"
        f" row, predicts the other rows with errors of {100 * min(errors):+.0f} to {100 * max(errors):+.0f} %.",
        f"The paper's seconds are about {model['paper_seconds_a_unit']:.2f} times the sum of NFE old and 3 times NFE"
        f" new. The errors of that rule: {theirs}.",
        "BranchGRPO-Mix is where ours and the paper's differ: the script that the paper's authors published trains half"
        " the edges that their text counts, hence their smaller ratio.",
        "With 81 leaves the paper's figure is of its fastest variant, which keeps a window and all its Euler steps."
        f" Ours has {SPLITS_ONLY} and a flash tail, so it does less.",
    ]


# Arm -> the paper's seconds per iteration over DanceGRPO's, HPS-v2.1 (Table 1).
PAPER_REWARD = {
    "DanceGRPO": (1, 0.360),
    "MixGRPO": (0.41, 0.359),
    "BranchGRPO": (0.71, 0.363),
    "BranchGRPO + depth": (0.45, 0.369),
    "BranchGRPO + width": (0.45, 0.364),
    "BranchGRPO-Mix": (0.21, 0.363),
}


def alignment(d: dict) -> Section:
    """Reward against rollout and training time."""
    video, dance, rows = d["arguments"]["video"], d["table"]["DanceGRPO"], []
    time = {arm: r["seconds_an_update"] / dance["seconds_an_update"] for arm, r in d["table"].items()}
    for arm, r in d["table"].items():
        # The paper's figures of video are one ratio, of a variant that it does not name.
        seconds, hps = (None, None) if video else PAPER_REWARD.get(arm, (None, None))
        theirs = None if seconds is None else f"{seconds}; {hps:.3f}"

        # A median exists where at least half of the seeds reach the mark.
        fractions = r["share_of_dance_seconds"]
        median = "not reached" if r["median_share"] is None else f"{r['median_share']:.2f}"
        reached = f"{median} ({sum(x is not None for x in fractions)} of {len(fractions)} seeds)"
        rewards = [f"{np.mean(r['final_reward']):.3f}", difference(r["final_minus_dance"])]
        rows.append([shown(arm), theirs, f"{time[arm]:.2f}", *rewards, reached])

    head = ["arm", "paper: time; HPS-v2.1", "ours: time per iteration", "final reward", "minus DanceGRPO's"]
    head += ["time to DanceGRPO's final reward"]
    if video:  # a column without a figure says nothing
        head, rows = [head[0], *head[2:]], [[row[0], *row[2:]] for row in rows]
    notes = alignment_notes(d) + (VIDEO_NOTES if video else PICTURE_NOTES)
    return Section(alignment_finding(d, time), table(head, rows), notes)


def alignment_finding(d: dict, time: dict[str, float]) -> str:
    """How many arms end above and below DanceGRPO, and what the cheapest one does."""
    others = {arm: r["final_minus_dance"] for arm, r in d["table"].items() if arm != "DanceGRPO"}
    above = [shown(arm) for arm, (_, low, _) in others.items() if low > 0]
    below = [shown(arm) for arm, (_, _, high) in others.items() if high < 0]
    named = [f" ({'; '.join(names)})" if names else "" for names in (above, below)]

    cheapest, size = min(others, key=time.get), d["arguments"]
    median = d["table"][cheapest]["median_share"]
    reaches = "does not reach DanceGRPO's final reward"
    if median is not None:
        reaches = f"reaches DanceGRPO's final reward in {median:.2f} of DanceGRPO's time"
    return (
        f"After {size['iterations']} iterations ({size['seeds']} paired seeds) {number_word(len(above))}{named[0]} of"
        f" the {number_word(len(others))} other arms ends above DanceGRPO by more than its interval and"
        f" {number_word(len(below))}{named[1]} below; the cheapest ({shown(cheapest)}) takes {time[cheapest]:.2f} of"
        f" DanceGRPO's rollout and training time per iteration, ends {interval(others[cheapest], '+.3f')} away and, in"
        f" the median over seeds, {reaches}."
    )


def alignment_notes(d: dict) -> list[str]:
    """What both comparisons have in common."""
    dance, mix = d["table"]["DanceGRPO"], d["table"].get("MixGRPO")
    baseline = []
    if mix:
        ratio = mix["seconds_an_update"] / dance["seconds_an_update"]
        away = interval(mix["final_minus_dance"], "+.3f")
        baseline = [f"MixGRPO, a baseline, takes {ratio:.2f} of DanceGRPO's time per iteration and ends {away} away."]
    return [
        "Time per iteration is rollout and training time over DanceGRPO's, which is"
        f" {dance['seconds_an_update']:.2f} seconds per iteration here.",
        "The final reward is the mean of the last three evaluations. Two arms are told apart only where the interval of"
        " their difference excludes 0.",
        "The last column is the rollout and training time until the arm reaches the reward with which DanceGRPO ends on"
        " the same seed, over the time of DanceGRPO's whole run: the median over seeds, and how many seeds reach it."
        " The paper does not give it.",
        "Each arm runs at its own best kind of step, eta and learning rate from one grid. These, each seed's time and"
        " the single scores stand in the appendix. The figure shows four arms; they all take the same number of"
        " iterations.",
        *baseline,
    ]


PICTURE_NOTES = [
    "The paper: seconds per iteration over DanceGRPO's, on 16 GPUs; HPS-v2.1 of FLUX.1-dev after 300 iterations at one"
    " learning rate for all. It does not say how many seeds. There every variant of BranchGRPO ends above DanceGRPO.",
    "Our reward is that of an embedded model: how well the word is spelt (ocr) plus the colour of its ink.",
]
VIDEO_NOTES = [
    "These are videos: clips of the embedded Wan, rewarded for motion (optical flow as the prompt says) and for"
    " colour.",
    "The paper trains Wan2.1-1.3B on VideoAlign's motion quality. It shows the rewards of videos as curves without"
    " figures and gives one time, about 8 minutes per iteration against DanceGRPO's 20 (0.40), without naming the"
    " variant of BranchGRPO, frames, resolution or group size.",
]


def ablation(d: dict) -> Section:
    """One change at a time."""
    theirs = {"s = 4": "best of 1, 2, 4, 8", "late 4,5,6,7": "worse", "beta = 0": "less steady", "depth": "best"}
    rows = [
        [shown(group), shown(arm), float(np.mean(r["rewards"])), difference(r["difference"]), theirs.get(arm)]
        + [r["policy_seconds"]]
        for group, arms in d["groups"].items()
        for arm, r in arms.items()
    ]
    head = ["group", "arm", "held-out reward", "minus the group's first arm", "paper"]
    head += ["rollout and training time, seconds per iteration"]

    # The first arm of a group is what the others are compared with; `apart` are those whose interval excludes 0.
    changes = [change for arms in d["groups"].values() for change in list(arms.items())[1:]]
    apart = [(arm, r) for arm, r in changes if not r["difference"][1] < 0 < r["difference"][2]]
    lower = [f"{r['difference'][0]:+.3f} with {shown(arm)}" for arm, r in apart if r["difference"][0] < 0]
    higher = len(apart) - len(lower)
    finding = (
        f"Of {len(changes)} changes {number_word(len(lower))} end lower beyond their interval ({'; '.join(lower)}) and"
        f" {number_word(higher)} higher, where chance alone makes about one ({d['seeds']} paired seeds,"
        f" {d['iterations']} iterations)."
    )
    notes = [
        "The paper gives these findings as curves, without figures, on FLUX.1-dev.",
        "One learning rate for all. The intervals come from a spread pooled over all arms"
        f" ({d['spread']:.3f}), since few seeds say little of their own.",
        "Most groups share their first arm: where its runs were lucky, all their differences shift together.",
        "The advantage per group in place of per depth is at the edge:"
        f" {interval(d['groups']['advantage (Eq. 4)']['over a group']['difference'], '+.3f')}.",
        "Seconds were measured with two runs at once, so they are only for comparison within this table.",
    ]
    return Section(finding, table(head, rows), notes)


def adaptive(d: dict) -> Section:
    """What adapts during a run, beside what stays fixed."""
    rows, changes = [], []
    for arms in d["groups"].values():
        first = next(iter(arms.values()))
        for arm, r in arms.items():
            cells = [f"{np.mean(r['rewards']):.3f}", difference(r["difference"]), f"{r['units'] / first['units']:.2f}"]
            rows.append([arm, f"`{r['flags'].strip()}`", *cells])
            if r is not first:
                changes.append(f"{interval(r['difference'], '+.3f')} with {arm}")
    finding = (
        f"What adapts ends, against its fixed counterpart, {'; '.join(changes)} ({d['seeds']} paired seeds,"
        f" {d['iterations']} iterations)."
    )
    notes = [
        "Trained on 128 prompts, so that each is drawn often enough. Intervals come from a spread pooled over all"
        " arms.",
        "The last column is rollout and training in policy units, over that of the group's first arm.",
        "The paper names dynamic branching and pruning as future work and has no such figures.",
    ]
    head = ["arm", "flags", "held-out reward", "minus the group's first arm", "policy units"]
    return Section(finding, table(head, rows), notes)


def diversity(d: dict) -> Section:
    """MMD^2 to sequential samples, distances within a prompt, and the flash tail."""
    # All leaves of a tree are not independent, so their p says nothing and is left out.
    rows = [
        [space, shown(name), f"{r['mmd2']:.5f}", f"{r['null_95']:.5f}"]
        + [None if name.startswith("tree, all") else f"{r['p']:.4f}"]
        for space, comparisons in d["features"].items()
        for name, r in comparisons.items()
    ]
    head = ["features", "compared with sequential samples", "MMD^2", "95 % quantile where nothing differs", "p"]

    # Distances of the leaves of one tree, a row per branch noise s.
    strengths = next(iter(d["within"].values()))
    within = [[s, *(interval(d["within"][space][s], ".3f") for space in d["within"])] for s in strengths]
    distances = table(["branch noise s", *(f"distance of leaves, {space}" for space in d["within"])], within)

    one = ", ".join(f"p = {f['tree, one leaf of each']['p']:.2f} with {space}" for space, f in d["features"].items())
    controls = [r for f in d["features"].values() for name, r in f.items() if name.startswith("control")]
    missed = sum(r["p"] > 0.05 for r in controls)
    told = "both controls are rejected" if not missed else f"{number_word(missed)} of the controls is not rejected"
    finding = (
        f"One leaf from each of many trees cannot be told from sequential samples ({one};"
        f" {d['arguments']['repeats']} pairs of sets of {d['n']} samples), while {told}."
    )
    tables = "\n\n".join([table(head, rows), distances, tails(d)])
    return Section(finding, tables, diversity_notes(d))


def tails(d: dict) -> str:
    """The table of flash tails."""
    rows = [
        [name, r["model_calls"], *(f"{v:.3f}" for v in r["distance"].values())]
        + [*map(difference, r["reward_minus_euler"].values())]
        for name, r in d["tails"].items()
    ]
    first = next(iter(d["tails"].values()))
    head = [
        "tail",
        "model evaluations per picture",
        *(f"distance to the exact picture, {space}" for space in first["distance"]),
    ]
    return table([*head, *(f"{reward} minus Euler's" for reward in first["reward_minus_euler"])], rows)


def diversity_notes(d: dict) -> list[str]:
    """How the three tables are to be read."""
    each = ", ".join(
        f"{space} {' '.join(f'{p:.2f}' for p in comparisons['tree, one leaf of each']['each_p'])}"
        for space, comparisons in d["features"].items()
    )
    null = " and ".join(f"{f['sequential, other noises']['p']:.3f} ({space})" for space, f in d["features"].items())
    return [
        "MMD^2 is a distance between two sets of samples, about 0 where both have one distribution; p is the"
        " probability of such a distance, or a larger one, where nothing differs.",
        f"{d['n']} samples per side. The first two rows of each kind of features are means of"
        f" {d['arguments']['repeats']} independent pairs of sets. The p of each pair, one leaf of each tree: {each}.",
        "The controls are samples that must be told apart; the row for scale shows how small a difference is still"
        f" seen. Two sets of sequential samples, which do not differ, have p = {null}.",
        "The paper, of all leaves, with 4,096 samples per side: MMD^2 of about 0.019 (project page), 0.0067 (Inception"
        " features) and 0.0149 (CLIP features).",
        "All 16 leaves of a tree do differ from sequential samples, since they share ancestors. They are not"
        " independent, so these rows have no p. Only pairs of leaves of one tree make the difference, so MMD^2 falls"
        " as trees are added; the mean over these pairs alone stands in the appendix.",
        "Second table: mean distance between the leaves of a tree, over that between as many sequential samples of the"
        " same prompt. 1 is no loss of diversity.",
        "Third table: the deterministic steps after the last split, from the same noises. A flash tail takes its first"
        " and last step with Euler's method and those between with a second-order one. The exact picture is that of 50"
        " second-order steps; the distance to it is over that between two pictures of one prompt.",
    ]


def scaling(d: dict) -> Section:
    """More leaves."""
    theirs, slopes = {81: PAPER_LARGE}, d["slopes"]
    rows = [
        [name, r["leaves"], float(np.mean(r["reward"])), float(np.mean(r["reward_at_time"]))]
        + [r["policy_seconds"] / r["dance_seconds"], theirs.get(r["leaves"])]
        for name, r in d["rows"].items()
    ]
    head = ["arm", "leaves", f"reward after {d['updates']} iterations", f"reward after {d['seconds']:.0f} seconds"]
    head += ["ours: time over DanceGRPO's", "paper: time over DanceGRPO's"]

    names = {"K": "K = 2, 3, 4 with 4 splits", "splits": "3, 4, 5 splits with K = 2", "all": "all five arms"}
    law = [[names[k], difference(slopes["reward"][k]), difference(slopes["reward_at_time"][k])] for k in names]
    laws = table(["reward gained per doubling of the leaves", "at equal iterations", "at equal time"], law)

    leaves = [r["leaves"] for r in d["rows"].values()]
    finding = (
        f"At equal iterations each doubling of the leaves, {min(leaves)} to {max(leaves)}, adds"
        f" {interval(slopes['reward']['all'], '+.3f')} of reward, and at equal time nothing that can be told from 0,"
        f" {interval(slopes['reward_at_time']['all'], '+.3f')} ({d['arguments']['seeds']} seeds)."
    )
    notes = [
        f"BranchGRPO-Mix with {SPLITS_ONLY}, T = 10, one learning rate for all. Time over DanceGRPO's is rollout and"
        " training time per iteration over that of sequential DanceGRPO with as many leaves.",
        "Equal time is the time of the whole iteration, decoding and reward too. At equal time 8 and 256 leaves end"
        " lower than 16 in every seed.",
        "The paper: 680 seconds against DanceGRPO's 2,400 at 81 samples. At equal iterations reward rises with K and"
        " with the number of splits; it shows curves without figures.",
    ]
    return Section(finding, f"{table(head, rows)}\n\n{laws}", notes)


NOISE = "noise over signal, tr Cov(g) / length(E g)^2"
WORTH = "evaluations until signal equals noise, over the first row's"


def gradient(d: dict) -> Section:
    """Noise and bias of one prompt's gradient."""
    own = {name: r["one prompt"] for name, r in d["rows"].items()}
    rows = [
        [shown(name), r["units"], interval(own[name]["relative_noise"], ".0f")]
        + [interval(own[name]["units_over_base"], ".3f"), interval(own[name]["cosine"])]
        for name, r in d["rows"].items()
    ]
    head = ["estimate of the gradient", "model evaluations per rollout", NOISE, WORTH, "cosine with REINFORCE"]
    pairs = table(
        ["change", "evaluations until signal equals noise, with the change over without"],
        [[shown(name), interval(r["one prompt"], ".3f")] for name, r in d["pairs"].items()],
    )

    finding = (
        "Until signal equals noise, a tree with noise at all steps needs"
        f" {interval(own[TREE]['units_over_base'])} of the model evaluations of independent rollouts, and a tree with"
        f" {SPLITS_ONLY} {interval(own[SPLITS_TREE]['units_over_base'])}; on the latter's leaves the endpoint objective"
        f" needs {interval(d['pairs'][ENDPOINT_PAIR]['one prompt'])} of what Eq. 5 does ({len(d['prompts'])} prompts,"
        f" {d['trials']} rollouts each)."
    )
    noise = {name: r["relative_noise"][0] / own[TREE]["relative_noise"][0] for name, r in own.items()}
    width, depth = (noise[f"the same, {kind}-pruned"] for kind in ("width", "depth"))
    saved = 1 - d["rows"]["the same, width-pruned"]["units"] / d["rows"][TREE]["units"]
    biased = "; ".join(f"{shown(n)}, {interval(r['cosine'])}" for n, r in own.items() if r["cosine"][2] < 1)
    notes = [
        "How well does one rollout estimate the gradient of its own prompt, at the untrained policy? A model"
        " evaluation is one forward; a backward counts as two.",
        "The third column times the second is the number of evaluations after which the mean of many rollouts has as"
        f" much signal as noise. {WORTH[0].upper()}{WORTH[1:]}: so much dearer or cheaper than independent rollouts"
        " with noise at all steps. Less is better.",
        "Where a row does not say equal edge weights, every depth of the tree has the same weight in the loss.",
        f"Pruning makes the noise {width:.1f} (width) and {depth:.1f} times (depth) as large and saves"
        f" {100 * saved:.0f} % of the evaluations.",
        "REINFORCE on the raw reward has no bias, so a cosine below 1 is a bias. The interval lies below 1 for"
        f" {biased}.",
        "An interval of a ratio may reach below 0, which no ratio can: it is symmetric, and eight prompts are few.",
        "The cosine of the two references, noise at all steps and at the splits only, is"
        f" {interval(d['references_cosine'])}.",
        "The gradient over all prompts, which training follows, is mostly hidden by noise here: see the appendix.",
        "The paper has no such figures.",
    ]
    return Section(finding, f"{table(head, rows)}\n\n{pairs}", notes)


def overhead(d: dict) -> Section:
    """What the method costs beyond the model."""
    ratio = {name: (float(np.median(v)), min(v), max(v)) for name, v in d["ratios"].items()}
    rows = [[shown(name), d["bounds"][name], interval(ratio[name])] for name in ratio]
    ratios = table(["ratio of seconds", "hoped for", "ours, median [range]"], rows)

    head = ["switch", "rollout and training time, seconds per iteration", "peak memory, GiB"]
    switches = [
        ["none" if name == "none" else f"`{name}`", c["policy_seconds"], f"{c['memory_gib']:.2f}"]
        for name, c in d["switches"].items()
    ]
    finding = (
        f"The rollout takes {interval(ratio['rollout over bare calls'])} times its forwards alone, training"
        f" {interval(ratio['training over bare forward and backward'])} times its forwards and backwards alone, and"
        f" walking the tree one node at a time takes {interval(ratio['one node at a time, iteration'], '.1f')} times"
        f" as long, where at least 8 was hoped for (median and range of {d['arguments']['repetitions']} repetitions)."
    )
    rates = d["leaves_a_second"]
    notes = [
        "One node at a time is how the published code walks the tree: one forward per node, and every edge trained by"
        " itself.",
        f"Two processes on two cores make {rates['2'] / rates['1']:.2f} times as many leaves per second as one process"
        f" on one core: {rates['2']:.1f} against {rates['1']:.1f}.",
        "The switches change no result, only time and memory. Measured with T = 20, 16 leaves, 4 prompts,"
        " micro-batches of 64 nodes and noise at all steps. On a CPU the two off-loading switches have nowhere to"
        " move anything: they show what their bookkeeping costs.",
        "How time and memory grow with leaves, steps and prompts stands in the appendix. The paper has no such"
        " figures.",
    ]
    return Section(finding, f"{ratios}\n\n{table(head, switches)}", notes)


def evaluate(d: dict) -> Section:
    """A checkpoint before and after training."""
    rows = []
    for name, r in d["rows"].items():
        gain = r.get("relative_gain")
        cells = [interval_or_empty(r.get(k), ".4f") for k in ("before", "after")]
        cells += [difference(r["gain"]) if "gain" in r else None, None if gain is None else f"{100 * gain:+.1f} %"]
        rows.append([name, *cells])

    gains = [f"{name} by {interval(r['gain'], '+.3f')}" for name, r in d["rows"].items() if "gain" in r]
    train = d["arguments"]["train"]
    what = f"Training with `{train}`" if train else "The second checkpoint"
    size = d["arguments"]["size"]
    finding = f"{what} changes {' and '.join(gains)} on held-out prompts ({size} pairs of prompt and noise)."
    notes = [
        "The same prompts and noises before and after; intervals are over the pairs.",
        "The paper, FLUX.1-dev with depth pruning: HPS-v2.1 0.313 before, 0.369 after (+18 %).",
    ]
    return Section(finding, table(["reward", "before", "after", "gain", "relative gain"], rows), notes)


def early(d: dict) -> Section:
    """How well a clean estimate's reward foretells the final one."""
    head = ["path still to come at the node", *d["arms"]]
    depths = zip(*d["arms"].values())
    rows = [
        [f"{100 * row[0]['still_to_come']:.0f} %", *(interval_or_empty(r["correlation"]) for r in row)]
        for row in depths
    ]

    # The earliest depth at which stopping would be worth trying, of each arm.
    worth = {
        arm: [r["still_to_come"] for r in rows_ if r["correlation"] and r["correlation"][0] > 0.7]
        for arm, rows_ in d["arms"].items()
    }
    parts = [f"at most {100 * max(left, default=0):.0f} % ({arm})" for arm, left in worth.items()]
    finding = (
        "The reward of the clean estimate ranks the paths of a prompt much as their final rewards do (correlation above"
        f" 0.7) only where little of the path is still to come: {' and '.join(parts)}."
    )
    notes = [
        f"Spearman's rank correlation over the paths of one prompt, mean over {len(d['prompts'])} prompts with its 95 %"
        " interval, untrained policy. Stopping a branch early can save no more than what is still to come.",
        "On a star the paths are one until the split, so at the first node there is nothing to rank.",
        "The paper names dynamic branching and pruning as future work and has no such figures.",
    ]
    return Section(finding, table(head, rows), notes)


def speedrun(d: dict) -> Section:
    """Records of units and seconds until a fraction of the words is exact."""
    rows, parts, first = [], [], next(iter(d["recipes"].values()))
    for name, recipe in d["recipes"].items():
        n = f"{sum(bool(s['reached']) for s in recipe['seeds'])} of {len(recipe['seeds'])}"
        units = interval([x / 1000 for x in recipe["units"]], ".0f") if recipe["units"] else None
        seconds = interval_or_empty(recipe["seconds"], ".0f")
        rows.append([f"{recipe['date']}: {name}", units, seconds, n, recipe["commit"], f"`{recipe['flags']}`"])

        # The first recipe in units, the others against it.
        if not units:
            parts.append(f"{name} gets there in {n} seeds only")
        elif recipe is first or not first["units"]:
            parts.append(f"{name} takes {units} thousand policy units")
        else:
            fewer, faster = (first[key][0] / recipe[key][0] for key in ("units", "seconds"))
            parts.append(f"{name} takes {fewer:.1f} times fewer, and {faster:.1f} times fewer seconds")
    head = ["record", "thousand policy units", "seconds", "seeds that reach it", "commit"]
    head.append("flags of `python train_image.py`")
    finding = f"Until {100 * d['mark']:.0f} % of the held-out words are read exactly, {'; '.join(parts)}."
    colour = [
        f"{name}: {np.mean([s['colour'][1] - s['colour'][0] for s in r['seeds']]):+.3f}"
        for name, r in d["recipes"].items()
    ]
    per_unit = [f"{1000 * r['seconds_per_unit']:.2f} ms" for r in d["recipes"].values()]
    notes = [
        "A policy unit is one forward; a backward counts as two; evaluations are not counted. Mean over seeds with its"
        " 95 % interval, where the mean of three evaluations first reaches the mark.",
        "Seconds are these units times the seconds of a unit (two threads, nothing else running, recipes in turn,"
        f" medians): {', '.join(per_unit)}.",
        f"The colour reward over the whole run, from its start: {'; '.join(colour)}.",
        "A recipe that does not get there in every seed has no mean. A new record needs an interval that excludes the"
        " old one.",
        "Without `--only` the command runs all recipes anew; with it the other records are those of their own commits.",
    ]
    return Section(finding, table(head, rows), notes)


def equal_time(d: dict) -> Section:
    """Reward after equal rollout and training time."""
    rows = []
    for arm, r in d["table"].items():
        reached = []
        for key in ("to_final", "to_two_thirds"):
            n = sum(x is not None for x in r[key])
            median = "not reached" if r[f"median_{key}"] is None else f"{r[f'median_{key}']:.3f}"
            reached.append(f"{median} ({n} of {len(r[key])} seeds)")
        rows.append([shown(arm), f"{np.mean(r['final']):.3f}", difference(r["final_minus_dance"]), *reached])
    head = ["arm", "reward at equal time", "minus DanceGRPO's", "time to DanceGRPO's final reward"]
    head += ["time to two thirds of its gain"]
    best = max(d["table"], key=lambda arm: np.mean(d["table"][arm]["final"]))
    r = d["table"][best]
    finding = (
        f"After the rollout and training time of {d['arguments']['iterations']} iterations of DanceGRPO, {shown(best)}"
        f" ends highest, {interval(r['final_minus_dance'], '+.3f')} from DanceGRPO's reward, which it reaches in"
        f" {r['median_to_final']:.2f} of the time ({len(r['final'])} paired seeds; median)."
    )
    evaluations = []
    for own, dance, time in zip(d["curves"][best], d["curves"]["DanceGRPO"], r["to_final"]):
        units = np.interp(time * dance["seconds"][-1], own["seconds"], own["units"]) if time is not None else np.inf
        evaluations.append(units / dance["units"][-1])
    notes = [
        "Each arm makes as many iterations as fit into that time; the learning rate is chosen for that many."
        " Times are fractions of DanceGRPO's; a seed that never reaches the mark counts as never. An arm that stops"
        " early keeps its last reward from then on.",
        "Endpoint, elbo and nft are other losses on the same leaves ([objectives.py](objectives.py)); all other arms"
        " take Eq. 5. A star is one split into all leaves. An ODE has no noise, so its leaves start apart.",
        f"In model evaluations, a backward counted as two, {shown(best)} reaches DanceGRPO's final reward after"
        f" {np.median(evaluations):.3f} of DanceGRPO's, in the median over seeds.",
        "Counted with decoding and rewards, and after equal numbers of iterations: see the appendix.",
        "The paper has no such comparison.",
    ]
    return Section(finding, table(head, rows), notes)


def more_equal_time(d: dict) -> tuple[str, list[str]]:
    """Settings, wall-clock and equal updates."""
    rows = []
    for arm, r in d["table"].items():
        lr = d["tuned"][arm]["lr"]
        cells = [interval(r["wall_minus_dance"], "+.3f"), interval(r["equal_updates_minus_dance"], "+.3f")]
        rows.append([shown(arm), lr, d["iterations"][arm], f"{d['seconds'][arm]['policy']:.3f}", *cells])
    head = ["arm", "learning rate", "iterations", "seconds per iteration"]
    head += ["minus DanceGRPO's, decoding and rewards counted", "after equal iterations"]
    return table(head, rows), ["All are differences of the held-out reward, paired by seed, with 95 % intervals."]


def spread(d: dict) -> Section:
    """Diversity that each objective spends on the same reward."""
    spaces = ("pixels", "pixels, exact", "OCR outputs", "OCR outputs, exact")
    first, seeds = next(iter(d["table"])), len(d["arguments"]["seeds"])
    rows, minus_rows, changes = [], [], []
    for arm, r in d["table"].items():
        rows.append([arm, *(interval_or_empty(r[s]) for s in spaces), f"{np.mean(r['final_reward']):.3f}"])
        if arm != first:
            minus_rows.append([arm, *(interval(r["minus_first"][s], "+.3f") for s in spaces)])
            changes.append(f"{interval(r['minus_first'][spaces[0]], '+.2f')} ({arm})")

    finding = (
        f"When the held-out reward first reaches {d['mark']:.3f}, the distance between two pictures of a prompt is"
        f" {interval(d['table'][first][spaces[0]])} of the untrained model's with {first}, and the others differ from"
        f" that by {'; '.join(changes)} (pixels, {seeds} seeds)."
    )
    notes = [
        f"{d['mark']:.3f} is the highest reward that every run reaches. The last column is the reward at the end.",
        "Exact: between pictures whose words are both read without a mistake, where no mistake is left that could"
        " vanish.",
        "The second table is paired by seed. Trees have noise at the splits only and a flash tail; the star is one"
        " split into eight at a random step; elbo and nft learn from leaves of ODEs.",
        "The paper has no such figures.",
    ]
    tables = table(["objective", *spaces, "final reward"], rows)
    return Section(finding, f"{tables}\n\n{table([f'minus {first}', *spaces], minus_rows)}", notes)


IN_THE_PLANE = {  # arm of toy.py --gradient -> the same of gradient.py
    "independent": "all steps noisy, independent",
    "every depth the same weight": "all steps noisy, tree",
    "BranchGRPO": TREE,
    "width pruning, Parent-Top1": "the same, width-pruned",
    "depth pruning": "the same, depth-pruned",
    "noise at the splits only": SPLITS_TREE,
    "noise at the splits only, endpoint": "splits noisy, tree, endpoint",
    "star, endpoint": "splits noisy, star, endpoint",
    "ODE, elbo": "no noise, independent, elbo",
    "ODE, nft": "no noise, independent, nft",
}


def toy_gradient(d: dict) -> Section:
    """Noise and bias in two dimensions, beside those of the embedded FLUX."""
    flux, rows, arms = loaded("gradient")["rows"], [], d["arms"]
    for arm, r in arms.items():
        beside = flux.get(IN_THE_PLANE.get(arm), {}).get("one prompt", {})
        cells = [beside.get("relative_noise"), beside.get("cosine")]
        own = [f"{r['units']:.0f}", f"{r['noise']:.1f}", plus_minus(r["cosine"][-1])]
        rows.append([arm, *own, *map(interval_or_empty, cells)])
    head = ["estimate", "model evaluations per rollout", "noise over signal", "cosine with the known gradient"]
    head += ["embedded FLUX: noise over signal", "embedded FLUX: cosine"]

    whole, splits, ends = (arms[a] for a in ("BranchGRPO", "noise at the splits only", "star, endpoint"))
    beside = [flux[name]["one prompt"]["relative_noise"][0] for name in (TREE, SPLITS_TREE)]
    smaller = beside[0] / whole["noise"], beside[1] / splits["noise"]
    finding = (
        "In two dimensions noise at the splits only needs"
        f" {splits['units_to_1'] / whole['units_to_1']:.3f} of the model evaluations of noise at all steps until signal"
        " equals noise, and the endpoint objective on a star pulls along the known gradient of its split: cosine"
        f" {ends['cosine'][1][0]:.3f}."
    )
    notes = [
        f"{d['rollouts']:,} rollouts of 16 leaves for each row, untrained policy. The known gradient is that of the"
        " expected reward through 100,000 whole paths (see [toy.py](toy.py)); ± is two standard errors.",
        "The cosine is with the part of the known gradient that acts at the noisy steps, where there are any. Log-probs"
        " do not know how the deterministic steps depend on the weights: see the appendix for the whole gradient.",
        "The columns of the embedded FLUX are those of the section above: one prompt, and the cosine with REINFORCE.",
        "What carries over from 2 dimensions to 512: which steps are noisy decides most; width pruning biases; fusion"
        " weights change nothing. What does not: in the plane nearly all of a noise reaches the reward, so there is"
        f" {smaller[0]:.0f} times (noise at all steps) and {smaller[1]:.0f} times (at the splits) less noise over"
        " signal than in 512 dimensions. The endpoint objective, which looks past the noise, has little left to win.",
    ]
    return Section(finding, table(head, rows), notes)


def plus_minus(value_and_error: list[float]) -> str:
    """A value with two of its standard errors."""
    return f"{value_and_error[0]:.3f} ± {2 * value_and_error[1]:.3f}"


def more_toy_gradient(d: dict) -> tuple[str, list[str]]:
    """Cosines with the whole known gradient."""
    rows = [
        [arm, *map(plus_minus, r["cosine"]), *[None] * (2 - len(r["cosine"])), f"{r['units_to_1']:.0f}"]
        for arm, r in d["arms"].items()
    ]
    head = ["estimate", "cosine with the known gradient, all steps", "of the noisy steps"]
    notes = ["Without noise there is no such part. A model evaluation is one forward; a backward counts as two."]
    return table([*head, "model evaluations until signal equals noise"], rows), notes


ALIGNMENT_VIDEO = (
    "python bench/alignment.py --video --seeds 3 --iterations 48 --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4"
    " 4e-4 --flags '--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144'"
)
SECTIONS = {  # name of the JSON -> title, command, how it is shown
    "nfe": ("Model evaluations", "python bench/nfe.py", nfe),
    "timing": ("Time per iteration", "python bench/timing.py", timing),
    "equal_time": ("Reward after equal time", "python bench/equal_time.py", equal_time),
    "speedrun": ("Speed-run", "python bench/speedrun.py", speedrun),
    "alignment": ("Reward against time, pictures", "python bench/alignment.py", alignment),
    "alignment_video": ("Reward against time, video", ALIGNMENT_VIDEO, alignment),
    "ablation": ("Ablations", "python bench/ablation.py", ablation),
    "diversity": ("Diversity", "python bench/diversity.py", diversity),
    "spread": ("What training does to diversity", "python bench/spread.py", spread),
    "scaling": ("Scaling", "python bench/scaling.py", scaling),
    "gradient": ("Noise and bias of the gradient", "python bench/gradient.py", gradient),
    "toy_gradient": ("The gradient in the plane", "python toy.py --gradient", toy_gradient),
    "early": ("Stopping early", "python bench/early.py", early),
    "overhead": ("Overhead", "python bench/overhead.py", overhead),
    "evaluate": ("A trained checkpoint", "python bench/evaluate.py --train '--iterations 200'", evaluate),
}


# --------------------------------------------------------------------------------------------------- what needs a GPU

LORA = "--steps 20 --dtype bf16 --lora 64 --micro-batch 1 --gradient-checkpointing --text-offload"
LORA += " --iterations 300 --lr-end 1 --ema 0.995"  # the paper's recipe, but for the LoRA and its learning rate
PLACES = {  # what the commands of the rows below have in common
    "FLUX": f"--model black-forest-labs/FLUX.1-dev --height 720 --width 720 --shift 3 {LORA}",
    "WAN": f"--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --frames 33 --guidance 5 {LORA}",
    "DATA": "--prompts hpdv2_train.txt --eval-prompts hpdv2_test.txt --reward hpsv2 --watch pickscore,imagereward,clip",
}
TRAINED = {  # arm -> flags, the paper's HPS-v2.1, PickScore, ImageReward (its README's, and its text's)
    "dance": ("--method dancegrpo --eta 0.3", "0.360, 0.229 to 0.234, 1.189 or 1.612"),
    "dance_fraction": ("--method dancegrpo --timestep-fraction 0.6 --eta 0.3", "0.353, 0.228, 1.219 or 1.517"),
    "mixgrpo": ("--method mixgrpo --mix 5", "0.359, 0.228, 1.211 or 1.594"),
    "branch": ("--method branchgrpo --eta 0.3", "0.363, 0.229, 1.233 or 1.603"),
    "width": ("--method branchgrpo --width-prune --eta 0.3", "0.364, 0.230, 1.300 or 1.609"),
    "depth": ("--method branchgrpo --depth-prune 5 --eta 0.3", "0.369, 0.231, 1.319 or 1.625"),
    "mix": ("--method branchgrpo-mix --mix 4 --sde dance --eta 0.3", "0.363, 0.230, 1.290 or 1.598"),
}
EVALUATE = 'python bench/evaluate.py --size 400 --flags "$FLUX $DATA"'


def rewards_of(d: dict) -> str:
    """HPS-v2.1, PickScore as the cosine that the paper prints, ImageReward; after training where there was any."""
    hps, pick, image = (
        d["rows"][k].get("after", d["rows"][k]["before"])[0] for k in ("hpsv2", "pickscore", "imagereward")
    )
    return f"{hps:.3f}, {pick / 100:.3f}, {image:.3f}"


def ratios_of(d: dict) -> str:
    """The ratios of the methods that the paper timed, and of 81 leaves."""
    names = [*d["paper_seconds"], "Mix, splits alone, flash 4, 81"][1:]
    return ", ".join(f"{d['rows'][name]['ratio']:.3f}" for name in names)


GPU = {  # name of the JSON -> what, the paper's figure, the commands, ours from the JSON
    "evaluate_flux": (
        "FLUX.1-dev untrained: HPS-v2.1, PickScore, ImageReward",
        "0.313, 0.227, 1.112",
        [EVALUATE],
        rewards_of,
    ),
    **{
        f"evaluate_flux_{arm}": (
            f"FLUX.1-dev trained with `{flags}`: HPS-v2.1, PickScore, ImageReward",
            paper,
            [
                f"python train_image.py $FLUX $DATA {flags} --out runs/{arm}",
                f"{EVALUATE} --after-lora runs/{arm}/model",
            ],
            rewards_of,
        )
        for arm, (flags, paper) in TRAINED.items()
    },
    "timing_flux": (
        "FLUX.1-dev: seconds per iteration over DanceGRPO's, of DanceGRPO with the fraction 0.6, MixGRPO, BranchGRPO,"
        " with width pruning, with depth pruning, BranchGRPO-Mix; of 81 leaves",
        "0.672, 0.414, 0.706, 0.450, 0.450, 0.212; 0.28",
        ['python bench/timing.py --rounds 3 --prompts 1 --flags "$FLUX $DATA"'],
        ratios_of,
    ),
    "timing_wan": (
        "Wan2.1-T2V-1.3B: minutes per iteration, BranchGRPO over DanceGRPO",
        "8 / 20 = 0.40",
        [
            "python bench/timing.py --video --rounds 3 --prompts 1"
            ' --flags "$WAN --prompts PROMPTS --reward videoalign-mq"'
        ],
        lambda d: f"{d['rows']['BranchGRPO']['ratio']:.2f}",
    ),
    "diversity_flux": (
        "FLUX.1-dev: MMD^2 of all leaves of trees and sequential samples, CLIP features, s = 4",
        "0.0149",
        ['python bench/diversity.py --n 4096 --repeats 1 --flags "$FLUX $DATA --sde dance --eta 0.3"'],
        lambda d: f"{d['features']['clip']['tree, all 16 leaves, s = 4']['mmd2']:.4f}",
    ),
}


def on_gpus() -> str:
    """The rows that need a GPU, and one script that fills them."""
    rows, lines = [], [f'{name}="{flags}"' for name, flags in PLACES.items()]
    for name, (what, paper, commands, ours) in GPU.items():
        d = loaded(name)
        rows.append([what, paper, ours(d) if d else "not measured"])
        lines += [*commands[:-1], f"{commands[-1]} --name {name}"]

    before = (
        "This script measures every row on one GPU of 80 GB, in about ten days of an H100 at 40 % of its peak"
        " (`python train_image.py --plan flux1-dev --gpu h100`): six days of training, three for the diversity."
    )
    after = (
        "The paper shows its ablations, its scaling of rewards and its rewards of videos as curves without figures,"
        " so they have no rows here. `bench/ablation.py`, `bench/scaling.py` and `bench/alignment.py` take the same"
        " `--flags`. The paper's repository and its text print different figures of ImageReward; both are shown."
    )
    text = [table(["figure", "paper", "ours"], rows), paragraph(before), code_block(lines), paragraph(after)]
    return "\n\n".join([*text, *map(on_card, cards())])


# What bench/gpu.py measures beside scripts and methods: step -> its rows of figure, bound or None, and what is shown.
OF_A_CARD = {
    "ratios": lambda values: (
        [
            [f"max abs(ratio - 1), bf16, unchanged policy, micro-batch {b}", None, f"{v['ratio_dev']:.2g}"]
            for b, v in values.items()
        ]
        + [["fraction of those ratios that is clipped", "0", f"{max(v['clip_frac'] for v in values.values()):g}"]]
    ),
    "over_bare_calls": lambda values: [
        [f"{name}, over its bare calls", bound, ", ".join(f"{v[key]:.2f}" for v in values.values())]
        for name, key, bound in (("rollout", "rollout", "at most 1.10"), ("training", "train", "at most 1.15"))
    ],
    "micro_batches": lambda values: [
        [f"seconds per row at micro-batch {b}: forward, with backward", None, f"{f / b:.4f}, {t / b:.4f}"]
        for b, f, t in zip(values["batch"], values["forward"], values["trained"])
    ],
    "resume": lambda values: [
        [
            "largest difference of a resumed run's metrics",
            "0",
            f"{values['largest_difference']:g}" + f" ({values['of']})" * (not values["equal"]),
        ]
    ],
    "demo": lambda values: [
        [
            "`python train_image.py`: seconds and iterations until 65 % of the words are exact",
            None,
            f"{values['seconds']:.0f}, {values['iterations']}" + " (not reached)" * (not values["reached"]),
        ]
    ],
    "tests": lambda values: [["`pytest -m gpu`", None, values["summary"]]],
}


def cards() -> list[dict]:
    """The documents of bench/gpu.py, one per card."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "bench/results").glob("gpu_*.json"))]


def on_card(d: dict) -> str:
    """What bench/gpu.py measured on a card with random weights; a step that did not end is named with its reason."""
    steps = {name: entry["values"] for name, entry in d["steps"].items() if entry["values"]}
    text = [f"### {d['card']}, random weights", code_block([d["command"]])]
    text += [
        paragraph(
            "The architectures of FLUX.1-dev and Wan2.1-T2V-1.3B at true size with random weights, and small text"
            " encoders. Memory, seconds and rounding hardly depend on the weights; rewards do, and are not shown. One"
            " iteration each, so there are no intervals."
        )
    ]

    # Scripts beside their plan. The plan assumes a fraction of the card's peak rate.
    def beside(values: dict, planned, measured) -> str:
        return f"{planned(values['plan']):.2f}, {measured(values):.2f}"

    rows = [
        [f"`configs/{name}.sh`", beside(v, lambda p: p["peak_gib"], lambda v: v["peak_gib"])]
        + [beside(v, lambda p, k=k: p[k], lambda v, k=k: v["seconds"][k]) for k in ("rollout", "training")]
        + [f"{v['seconds']['optimiser']:.2f}"]
        for name, v in steps.items()
        if "peak_gib" in v
    ]
    if rows:
        head = ["script, one prompt per iteration", "peak GiB: planned, measured", "rollout, s: planned, measured"]
        text += [table([*head, "training, s: planned, measured", "optimiser, s"], rows)]

    # Table 1. The paper's seconds are those of its own table, over the same row.
    paper = (loaded("timing") or {}).get("paper_seconds", {})
    rows = [
        [shown(name), paper[name] / paper["sequential DanceGRPO"] if name in paper else None]
        + [v["ratio_counted"], v["ratio_planned"], v["ratio"]]
        for name, v in steps.get("table", {}).items()
        if "ratio" in v
    ]
    if rows:
        head = ["FLUX.1-dev, 256 x 256: rollout and training time over sequential DanceGRPO's", "paper", "counted"]
        text += [table([*head, "from single calls", "measured"], rows)]

    rows = [row for name, show in OF_A_CARD.items() if name in steps for row in show(steps[name])]
    text += [table(["figure", "bound", "measured"], rows)] * bool(rows)
    ended = [f"`{name}`: {e['status']} ({e['why']})." for name, e in d["steps"].items() if "why" in e]
    return "\n\n".join([*text, *[bullets(ended)] * bool(ended)])


# --------------------------------------------------------------------------------------------------------- the claims


def verdict(triple, sign: int = 1) -> str:
    """What an interval says of the claim that a value is above 0, or below it with sign -1."""
    low, high = sorted(sign * bound for bound in triple[1:])
    return "seen" if low > 0 else "contradicted" if high < 0 else "not told apart"


def claim_counts(d: dict) -> tuple[str, str]:
    """Seen where every count is within half a per cent of what the paper prints."""
    r = d["rows"]
    ours = [r["BranchGRPO"]["nodes"], r["+ width (Parent-Top1)"]["kept"], r["+ depth, window 5"]["kept"]]
    ours += [r["Mix, window 4"]["kept"]]
    close = all(abs(count / paper - 1) < 0.005 for count, paper in zip(ours, (13.68, 8.625, 8.625, 4.25)))
    text = "{:.4f}; {:.3f} with width and {:.3f} with depth pruning; {:.3f}. Counted, and confirmed by hooks".format(
        *ours
    )
    return text, "seen" if close else "contradicted"


def claim_large(d: dict) -> tuple[str, str]:
    """The paper's variant was not timed at 81 leaves; a cheaper one was."""
    r = d["rows"]["Mix, splits alone, flash 4, 81"]
    triple = interval((r["ratio"], *r["ratio_interval"]), ".3f")
    return f"only a cheaper variant was timed, {SPLITS_ONLY} with a flash tail: {triple}", "not measured"


def claim_time(name: str, paper: float, more: str = ""):
    """Seen where a row of timing.py takes at most a tenth more than the paper's ratio."""

    def judged(d: dict) -> tuple[str, str]:
        r = d["rows"][name]
        triple = (r["ratio"], *r["ratio_interval"])
        extra = more.format(mixgrpo=d["rows"]["MixGRPO, window 5"]["ratio"])
        return f"{interval(triple, '.3f')}{extra}", verdict([1.1 * paper - ratio for ratio in triple])

    return judged


def claim_reward(arm: str):
    """Seen where an arm of alignment.py ends above DanceGRPO."""

    def judged(d: dict) -> tuple[str, str]:
        triple = d["table"][arm]["final_minus_dance"]
        return f"{difference(triple)}, {d['arguments']['seeds']} paired seeds", verdict(triple)

    return judged


def claim_change(group: str, arm: str, sign: int, words: str):
    """Seen where a change of ablation.py lies on the claimed side of the group's first arm."""

    def judged(d: dict) -> tuple[str, str]:
        triple = d["groups"][group][arm]["difference"]
        return f"{difference(triple)} {words}", verdict(triple, sign)

    return judged


def claim_branch_noise(d: dict) -> tuple[str, str]:
    """Seen where s = 1, 2 and 8 all end below s = 4, contradicted where one ends above."""
    arms = {arm: d["groups"]["branch noise s (Eq. 2)"][arm]["difference"] for arm in ("s = 1", "s = 2", "s = 8")}
    verdicts = {arm: verdict(triple, -1) for arm, triple in arms.items()}
    text = "; ".join(f"{arm}: {difference(triple)}" for arm, triple in arms.items())
    if "contradicted" in verdicts.values():
        return text, "contradicted"
    return text, "seen" if set(verdicts.values()) == {"seen"} else "not told apart"


def claim_fusion(d: dict) -> tuple[str, str]:
    """How steady training is was not measured; what was is shown."""
    triple = d["groups"]["fusion beta (Eq. 3)"]["beta = 0"]["difference"]
    return f"steadiness was not measured; by final reward beta = 0 is {difference(triple)} away", "not measured"


def claim_diversity(d: dict) -> tuple[str, str]:
    """Seen where MMD^2 of all leaves, s = 4, is at most the paper's, in every space of features."""
    ours = {space: rows["tree, all 16 leaves, s = 4"]["mmd2"] for space, rows in d["features"].items()}
    text = ", ".join(f"{mmd2:.5f} with {space}" for space, mmd2 in ours.items())
    return f"{text} (other features than the paper's)", "seen" if max(ours.values()) <= 0.019 else "contradicted"


def claim_scaling(sweep: str):
    """Seen where reward rises with the leaves at equal iterations."""

    def judged(d: dict) -> tuple[str, str]:
        triple = d["slopes"]["reward"][sweep]
        return f"{difference(triple)} per doubling of the leaves, {d['arguments']['seeds']} seeds", verdict(triple)

    return judged


def claim_gain(reward: str):
    """Seen where a reward of evaluate.py rose."""

    def judged(d: dict) -> tuple[str, str]:
        r = d["rows"][reward]
        return f"{reward} {difference(r['gain'])} ({100 * r['relative_gain']:+.1f} %)", verdict(r["gain"])

    return judged


def claim_clip(d: dict) -> tuple[str, str]:
    """Seen where MMD^2 with CLIP features is at most the paper's."""
    mmd2 = d["features"]["clip"]["tree, all 16 leaves, s = 4"]["mmd2"]
    return f"{mmd2:.4f} with CLIP features", "seen" if mmd2 <= 0.0149 else "contradicted"


MIX_TIME = "; less than DanceGRPO is seen, 0.212 is not, and MixGRPO takes {mixgrpo:.3f}"
NO_PRUNING = "away from no pruning; nor is it the best of the arms that are compared with DanceGRPO"
CLAIMS = [  # the paper's claim, name of the JSON, what judges it
    ("Model evaluations per picture: BranchGRPO 13.68, pruned 8.625, BranchGRPO-Mix 4.25", "nfe", claim_counts),
    ("BranchGRPO takes 0.706 of DanceGRPO's time per iteration", "timing", claim_time("BranchGRPO", 0.706)),
    (
        "BranchGRPO with width pruning takes 0.450 of DanceGRPO's time",
        "timing",
        claim_time("+ width (Parent-Top1)", 0.450),
    ),
    ("BranchGRPO with depth pruning takes 0.450 of DanceGRPO's time", "timing", claim_time("+ depth, window 5", 0.450)),
    (
        "BranchGRPO-Mix takes 0.212 of DanceGRPO's time, half of MixGRPO's 0.414",
        "timing",
        claim_time("Mix, window 4", 0.212, MIX_TIME),
    ),
    ("With 81 leaves BranchGRPO takes 0.28 of DanceGRPO's time", "timing", claim_large),
    ("BranchGRPO ends above DanceGRPO (HPS-v2.1 0.363 against 0.360)", "alignment", claim_reward("BranchGRPO")),
    ("BranchGRPO with width pruning ends above DanceGRPO (0.364)", "alignment", claim_reward("BranchGRPO + width")),
    ("BranchGRPO with depth pruning ends above DanceGRPO (0.369)", "alignment", claim_reward("BranchGRPO + depth")),
    ("BranchGRPO-Mix ends above DanceGRPO (0.363)", "alignment", claim_reward("BranchGRPO-Mix")),
    (
        "Depth pruning gives the best final reward",
        "ablation",
        claim_change("pruning, all steps noisy", "depth", 1, NO_PRUNING),
    ),
    ("Branch noise s = 4 is the best of 1, 2, 4, 8", "ablation", claim_branch_noise),
    (
        "Early splits are better than late ones",
        "ablation",
        claim_change("splits", "late 4,5,6,7", -1, "with late splits"),
    ),
    ("Fusion with beta = 1 is steadier than with beta = 0", "ablation", claim_fusion),
    (
        "The advantage per depth is better than per group",
        "ablation",
        claim_change("advantage (Eq. 4)", "over a group", -1, "with the advantage per group"),
    ),
    ("Leaves of trees stay close to sequential samples: MMD^2 at most 0.019", "diversity", claim_diversity),
    ("Reward rises with K = 2, 3, 4 at equal iterations", "scaling", claim_scaling("K")),
    ("Reward rises with 3, 4, 5 splits at equal iterations", "scaling", claim_scaling("splits")),
    ("Training raises the reward (HPS-v2.1 by 18 %)", "evaluate", claim_gain("ocr")),
    (
        "FLUX.1-dev with depth pruning: HPS-v2.1 0.313 to 0.369, PickScore 0.227 to 0.231, ImageReward 1.112 to 1.625",
        "evaluate_flux_depth",
        claim_gain("hpsv2"),
    ),
    ("FLUX.1-dev: MMD^2 0.0067 with Inception and 0.0149 with CLIP features", "diversity_flux", claim_clip),
    (
        "Wan2.1-1.3B: 8 minutes per iteration against DanceGRPO's 20 (0.40)",
        "timing_wan",
        claim_time("BranchGRPO", 0.40),
    ),
]
RULES = [
    "**seen**: our interval lies on the side that the paper claims. A claim of a time is seen where our interval lies"
    " below the paper's ratio plus a tenth of it, a claim of a count where ours is within half a per cent, a claim of a"
    " bound where every value keeps it.",
    "**not told apart**: our interval reaches to both sides, so our runs cannot decide.",
    "**contradicted**: our interval lies on the other side.",
    "**not measured**: it needs a GPU, or no benchmark here measures it.",
]


def claims() -> str:
    """The table of claims, ours and verdict; each claim links to its section."""
    rows = []
    for claim, name, judge in CLAIMS:
        d = loaded(name)
        ours, said = judge(d) if d else ("needs a GPU" if name in GPU else "", "not measured")
        title = SECTIONS[name][0] if name in SECTIONS else "What needs a GPU"
        rows.append([f"[{claim}]({anchor(title)})", ours, said])
    return table(["the paper's claim", "ours", "verdict"], rows)


# ------------------------------------------------------------------------------------------------------- the appendix


def more_timing(d: dict) -> tuple[str, list[str]]:
    """Where the seconds go, and what hardware.py plans."""
    rows = [
        [shown(name), r["ratio_planned"], *(f"{r['seconds'][k]:.2f}" for k in ("rollout", "training", "optimiser"))]
        for name, r in d["rows"].items()
    ]
    head = [
        "method",
        "rollout and training time as planned, over DanceGRPO's",
        "rollout, s",
        "training, s",
        "optimiser, s",
    ]
    notes = [
        "Planned: by hardware.py, from a measured curve of seconds against batch size.",
        f"Seconds per iteration of {d['arguments']['prompts']} prompts, median of {d['arguments']['rounds']} rounds.",
    ]
    return table(head, rows), notes


def more_alignment(d: dict) -> tuple[str, list[str]]:
    """Best settings, single scores, areas, the time of each seed."""
    rows, dance = [], d["table"]["DanceGRPO"]
    scores = list(dance["final_scores"])
    for arm, r in d["table"].items():
        each = " ".join("never" if x is None else f"{x:.2f}" for x in r["share_of_dance_seconds"])
        means = " ".join(f"{np.mean(r['final_scores'][k]):.3f}" for k in scores)
        whole = r["all_seconds_an_update"] / dance["all_seconds_an_update"]
        setting = "{} {}, {}".format(*d["tuned"][arm]["setting"])
        rows.append([shown(arm), setting, means, f"{np.mean(r['area']):.3f}", f"{whole:.2f}", each])
    head = ["arm", "best step and eta, learning rate", f"final scores: {', '.join(scores)}", "area under the curve"]
    head += ["time of the whole iteration", "time to DanceGRPO's final reward, each seed"]
    notes = [
        "The area under the curve is the mean reward over the iterations.",
        "Times are over DanceGRPO's. That of the whole iteration has decoding and reward too; that to DanceGRPO's final"
        " reward is rollout and training time.",
    ]
    return table(head, rows), notes


def more_diversity(d: dict) -> tuple[str, list[str]]:
    """KID, and MMD^2 over the pairs of one tree."""
    rows = [
        [space, shown(name), f"{r['kid']:.4g}", r["same_prompt"]]
        for space, comparisons in d["features"].items()
        for name, r in comparisons.items()
    ]
    notes = [
        "KID is the same distance with a cubic polynomial kernel; its scale depends on the features.",
        "The last column is the mean over pairs of leaves of one tree alone, which does not fall as trees are added.",
    ]
    head = ["features", "compared with sequential samples", "KID", "MMD^2 over pairs of one tree"]
    return table(head, rows), notes


def more_scaling(d: dict) -> tuple[str, list[str]]:
    """Iterations within the time, seconds per iteration."""
    rows = [[name, round(r["updates_in_time"]), r["policy_seconds"]] for name, r in d["rows"].items()]
    head = ["arm", f"iterations in {d['seconds']:.0f} seconds", "rollout and training time, seconds per iteration"]
    return table(head, rows), ["The time is that of the arm that needs least for all its iterations."]


def more_gradient(d: dict) -> tuple[str, list[str]]:
    """The gradient over all prompts."""
    rows = [
        [shown(name), interval(r["all prompts"]["relative_noise"], ".0f")]
        + [interval(r["all prompts"]["units_over_base"]), interval(r["all prompts"]["cosine"])]
        for name, r in d["rows"].items()
    ]
    head = ["estimate of the gradient", NOISE, WORTH, "cosine with REINFORCE"]
    pairs = table(
        ["change", "evaluations until signal equals noise, with the change over without"],
        [[shown(name), interval(r["all prompts"])] for name, r in d["pairs"].items()],
    )
    notes = [
        "How well does one rollout of one prompt estimate the gradient over all prompts, which training follows? At"
        " equal iterations the noise decides, at equal time the evaluations.",
        "No signal found: the estimated signal is not above 0, so that nothing can be divided by it. This holds for the"
        " first row, hence for the whole third column.",
    ]
    return f"{table(head, rows)}\n\n{pairs}", notes


def more_overhead(d: dict) -> tuple[str, list[str]]:
    """How time and memory grow."""
    rows = [
        [f"{shown(what)}: {n}", c["policy_seconds"], f"{1000 * c['seconds_a_unit']:.2f}", f"{c['memory_gib']:.2f}"]
        for what, sizes in d["growth"].items()
        for n, c in sizes.items()
    ]
    head = ["what grows", "rollout and training time, seconds per iteration", "milliseconds per model evaluation"]
    notes = [
        "From T = 20, 16 leaves, 4 prompts, micro-batches of 64 nodes, noise at all steps. A forward is one model"
        " evaluation, a backward two."
    ]
    return table([*head, "peak memory, GiB"], rows), notes


APPENDIX = {  # name of the JSON -> title, how it is shown
    "timing": ("seconds of each part of an iteration", more_timing),
    "equal_time": ("settings, wall-clock and equal updates", more_equal_time),
    "alignment": ("settings, scores and seeds, pictures", more_alignment),
    "alignment_video": ("settings, scores and seeds, video", more_alignment),
    "diversity": ("KID, and pairs of one tree", more_diversity),
    "scaling": ("iterations and seconds", more_scaling),
    "gradient": ("the gradient over all prompts", more_gradient),
    "toy_gradient": ("the whole gradient in the plane", more_toy_gradient),
    "overhead": ("growth with leaves, steps and prompts", more_overhead),
}


# -------------------------------------------------------------------------------------------------------- the document

HEAD = [
    "**Our figures are of embedded models on a CPU: a small FLUX and a small Wan. Nothing was measured on FLUX.1-dev"
    " or on Wan2.1-1.3B, because no GPU was available.** The paper's figures are of those two, on GPUs. Ratios and"
    " directions can be compared; seconds and rewards cannot.",
    "`python bench/results.py` generates this page from `bench/results/*.json`; each section names the command that"
    " measures it. [docs/benchmarks.md](docs/benchmarks.md) says how to run them. Intervals are of 95 %.",
]
TERMS = [
    "**iteration**: one rollout of some prompts, their rewards, and one update of the policy.",
    "**rollout and training time**: the seconds of rollout, training and optimiser. Decoding and reward are apart,"
    " since they do not depend on the method.",
    "**leaf**: a picture or video at the end of a tree, one of the samples of its prompt. A **split** is a step at"
    " which every node of the tree gets K children. Siblings share a part of their noise, which is smaller the larger"
    " s is (Eq. 2).",
    "**noise at the splits only**: all other steps are deterministic, so only the edges at splits are trained. It is"
    " our variant, BranchGRPO-Mix without a window; the paper's adds noise in a window that slides over the steps.",
    "**model evaluation** (the paper's NFE): one sample through the transformer once, a forward. A backward takes as"
    " long as two.",
    "**flash tail**: the deterministic steps after the last split are replaced by fewer steps of second order.",
    "**width pruning**, **depth pruning**: after the last split only some of the leaves are trained, or all but the"
    " steps in a sliding window. The rollout stays whole.",
    "**eta**: strength of the noise of a step; **dance**, **flow** and **cps** are kinds of steps"
    " ([sde.py](sde.py) has the formulas).",
]


def head() -> list[str]:
    """The limits of these figures; which cards were measured, where any was."""
    measured = ", ".join(d["card"] for d in cards())
    there = f".** Random weights of their size were, on {measured}: see [What needs a GPU](#what-needs-a-gpu)."
    return [text.replace(", because no GPU was available.**", there) if measured else text for text in HEAD]


def section(name: str) -> str:
    """One benchmark: heading, command, finding, tables, notes, figure."""
    title, command, show = SECTIONS[name]
    d = loaded(name)
    if d is None:
        return "\n\n".join([f"## {title}", code_block([command]), "Not measured yet."])
    finding, tables, notes = show(d)
    parts = [f"## {title}", paragraph(finding), code_block([d.get("command", command)]), tables, bullets(notes)]
    drawn = (ROOT / f"bench/results/{name}.png").exists()
    return "\n\n".join([*parts, f"![{title}](bench/results/{name}.png)"] if drawn else parts)


def appendix(name: str) -> str:
    """The columns of a benchmark that few readers need."""
    title, show = APPENDIX[name]
    tables, notes = show(loaded(name))
    return "\n\n".join([f"## Appendix: {title}", tables, bullets(notes)])


def document() -> str:
    """RESULTS.md."""
    # What a reader looks for first: the limits of these figures, then the verdicts.
    parts = ["# Results", *map(paragraph, head()), "## What the paper claims, and what we measured", claims()]
    parts += [bullets(RULES), "## Terms", bullets(TERMS)]

    # The benchmarks, what is missing, and what few readers need.
    parts += [section(name) for name in SECTIONS]
    parts += [f"## What needs a GPU\n\n{on_gpus()}"]
    parts += [appendix(name) for name in APPENDIX if loaded(name)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes RESULTS.md, or checks it with --check."""
    path, text = ROOT / "RESULTS.md", document()
    if "--check" in sys.argv[1:]:
        if not path.exists() or path.read_text() != text:
            sys.exit("RESULTS.md is not what bench/results/*.json say: run python bench/results.py")
        return
    path.write_text(text)


if __name__ == "__main__":
    main()
