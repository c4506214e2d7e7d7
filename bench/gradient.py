"""What does the tree do to learning? Noise and bias of the gradient estimate, for the model evaluations it costs.

Question    How noisy is one iteration's gradient, and does it point where the raw reward rises?
Hypothesis  A tree costs less an estimate but its leaves are correlated; noise between splits, which no advantage of Eq. 4 can tell
            apart, adds variance, so that noise at the splits alone gives more signal for a model evaluation. Pruning saves
            units; by depth it drops a part of the signal, by width it keeps edges because of their rewards, which biases.
Metric      For a frozen policy, over many trials, each a rollout of a prompt of its own: relative noise tr Cov(g) / |E g|^2; the
            same times the cost in units (a forward; a backward is 2): units to a signal-to-noise ratio of 1; the cosine of E g with
            the reference, from products of different trials alone, so that noise biases neither. The reference is REINFORCE on
            the raw reward with a leave-one-out baseline, under independent rollouts with the same noisy steps, on other prompts.
            Intervals of 95 % by a jackknife over eight blocks of trials.
Rule        Fewer units is better; an interval of the cosine below 1 is a bias.

    python bench/gradient.py             # 25 minutes on one core
"""

import sys
from types import SimpleNamespace

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from branchgrpo import Sampler, gather, generators, prune, rollout, update
from rewards import score, weighted_sum
from sde import sigma_schedule
from tree import count, depth_advantages, depth_window_range, fuse, make_forest

KEY, BLOCKS = 2**31 + 2, 8  # of the noises; of trials, for the jackknife


def reinforce(out, forest, rewards):
    """Raw rewards minus the mean of the prompt's other leaves, on every edge of a leaf's path."""
    n = rewards.shape[1]
    centred = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (n - 1)).double()
    return [centred] * forest.steps


def branch(out, forest, rewards):
    """Eq. 3 and 4."""
    return depth_advantages(fuse(rewards, out.path_logp(forest), forest, 1.0))


def group(out, forest, rewards):
    """Eq. 3, normalised by the leaves: GRPO on a tree."""
    return depth_advantages(fuse(rewards, out.path_logp(forest), forest, 1.0), group=True)


def unfused(out, forest, rewards):
    """Eq. 4 without Eq. 3: the first leaf below a node speaks for it."""
    return depth_advantages([rewards[:, :: forest.leaves // n].double() for n in forest.sizes])


ARMS = {  # name -> is it a tree? credit, loss weight, the reference it estimates, pruning
    "all steps noisy, independent": (False, group, "path", "all"),
    "all steps noisy, tree": (True, branch, "path", "all"),
    "all steps noisy, tree, every edge the same weight (Eq. 5)": (True, branch, "edge", "all"),
    "the same, width-pruned": (True, branch, "edge", "all", {"width": "parent-top1"}),
    "the same, depth-pruned": (True, branch, "edge", "all", {"depth": 0.25}),
    "all steps noisy, tree, group advantage": (True, group, "path", "all"),
    "all steps noisy, tree, no fusion": (True, unfused, "path", "all"),
    "splits noisy, independent": (False, group, "path", "splits"),
    "splits noisy, tree": (True, branch, "path", "splits"),
    "splits noisy, tree, every edge the same weight": (True, branch, "edge", "splits"),
    "splits noisy, tree, group advantage": (True, group, "path", "splits"),
}


def gradients(run, trials: range, bar, tree: bool, credit, weight: str, noisy: str, pruning: dict | None = None):
    """One gradient (parameters,) for each trial, and its cost in units; a depth window, a share of T, takes its places in turn."""
    options, width, depth = run.o, (pruning or {}).get("width"), round((pruning or {}).get("depth", 0) * run.o.steps)
    shape = {"splits": options.splits} if tree else {"splits": (), "roots": options.leaves}
    forest = make_forest(options.steps, options.branch, **shape, chosen=options.splits if noisy == "splits" else None)
    noise = options.branch_noise if tree else float("inf")
    sampler = Sampler(sigma_schedule(options.steps, options.shift), options.sde, options.eta, noise)
    still = SimpleNamespace(zero_grad=lambda set_to_none: run.policy.transformer.zero_grad(), step=lambda: None)
    o = SimpleNamespace(clip=1e9, kl=0.0, micro_batch=options.micro_batch, max_grad_norm=0.0)
    first, last = depth_window_range(forest, depth) if depth else (0, 0)
    for trial in trials:
        prompt = run.prompts[trial % len(run.prompts)]
        cond = run.policy.encode([prompt])
        out = rollout(run.policy, cond, forest, sampler, generators(KEY, trial, range(1)), options.micro_batch)
        pictures = run.policy.decode(out.latents[-1].flatten(0, 1))
        rewards = weighted_sum(score(run.rewards, pictures, [prompt] * forest.leaves), run.weights)[None]
        window = (first + trial % (last - first + 1), depth) if depth else None
        keep = prune(forest, rewards, width, window)
        units = count(forest, keep)["forwards"] + 3 * count(forest, keep)["trained_parents"]
        edges = gather(out, forest, keep, credit(out, forest, rewards), torch.arange(1), weight)
        update(run.policy, still, run.accelerator, edges, cond, sampler, o)
        bar.update()
        yield torch.cat([p.grad.flatten() for p in run.policy.trainable()]).double(), units


def sums(estimates, n: int) -> dict:
    """Of each of B blocks of n trials: the sum of its gradients (B, parameters), of their square lengths, how many."""
    size = min(BLOCKS, n)
    blocks, squares, counts, units = None, torch.zeros(size).double(), torch.zeros(size).double(), 0
    for trial, (g, cost) in enumerate(estimates):
        blocks = torch.zeros(size, len(g)).double() if blocks is None else blocks
        b, units = trial * size // n, cost
        blocks[b] += g
        squares[b] += g @ g
        counts[b] += 1
    return {"sums": blocks, "squares": squares, "counts": counts, "units": units}


def products(m: dict, reference: dict) -> dict:
    """All that `compared` needs of two `sums`: products of their blocks (B, B) instead of the blocks."""
    both = {"own": m["sums"] @ m["sums"].T, "cross": m["sums"] @ reference["sums"].T}
    return both | {k: m[k] for k in ("squares", "counts", "units")}


def estimates(m: dict, reference: dict, left_out: int | None) -> np.ndarray:
    """Relative noise and cosine, without one block of both; not a number where no signal rises above the noise.

    |E g|^2 is the mean product of two different trials, which noise does not bias.
    """
    stay = [b for b in range(len(m["counts"])) if b != left_out]

    def signal(x: dict) -> float:
        n = x["counts"][stay].sum()
        return float((x["own"][stay][:, stay].sum() - x["squares"][stay].sum()) / (n * (n - 1)))

    n, n_reference = m["counts"][stay].sum(), reference["counts"][stay].sum()
    mine, theirs = signal(m), signal(reference)
    if mine <= 0 or theirs <= 0:
        return np.array([np.nan, np.nan])
    cross = float(m["cross"][stay][:, stay].sum() / (n * n_reference))
    return np.array([float(m["squares"][stay].sum() / n) / mine - 1, cross / (mine * theirs) ** 0.5])


def compared(m: dict, reference: dict) -> dict:
    """Relative noise, its cost, and the cosine of the true means, each with its interval; None where no signal was found."""
    whole, blocks = estimates(m, reference, None), len(m["counts"])
    parts = np.array([estimates(m, reference, b) for b in range(blocks)])
    if not np.isfinite(whole).all() or not np.isfinite(parts).all():
        return dict.fromkeys(("relative_noise", "units_to_signal", "cosine"))
    half = stats.t.ppf(0.975, blocks - 1) * ((blocks - 1) * parts.var(0)) ** 0.5
    noise, cosine = ([float(v), float(v - h), float(v + h)] for v, h in zip(whole, half))
    return {"relative_noise": noise, "units_to_signal": [m["units"] * v for v in noise], "cosine": cosine}


def draw(document: dict):
    """Units to a signal-to-noise ratio of 1, and the cosine with the reference."""
    rows = {name: r for name, r in document["rows"].items() if r["cosine"]}
    figure = plt.figure(figsize=(11, 4))
    (left, right), y = figure.subplots(1, 2, sharey=True), np.arange(len(rows))
    for ax, key in ((left, "units_to_signal"), (right, "cosine")):
        for at, row in enumerate(rows.values()):
            mean, low, high = row[key]
            colour = common.COLOURS[row["noisy"] == "splits"]
            ax.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
    left.set_yticks(y, rows)
    left.invert_yaxis()
    left.set(xlabel="model evaluations (backward counts 2) until signal equals noise", xlim=(0, None))
    right.axvline(1, color="k", lw=0.8)
    right.set_xlabel("cosine of the mean gradient with the reference")
    return figure


def main() -> None:
    """Estimate, compare; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--trials", type=int, default=192, help="of every arm; the references take four times as many")
    o = parser.parse_args()
    n = 3 if o.smoke else o.trials
    run, rows, references = common.prepare(o, "--leaves 4" if o.smoke else ""), {}, {}
    with tqdm(total=n * (len(ARMS) + 8), desc="gradients", file=sys.stderr) as bar:

        def kept(name: str, trials: range, *arm, of=lambda m: m) -> dict:
            """An arm's sums, or what `of` makes of them."""
            return common.kept(
                o,
                "gradient",
                f"{name}, {len(trials)}",
                lambda: of(sums(gradients(run, trials, bar, *arm), len(trials))),
            )

        for noisy in ("all", "splits"):  # on prompts that no arm has
            m = kept(f"reference {noisy}", range(n, 5 * n), False, reinforce, "path", noisy)
            references[noisy] = m | products(m, m)
        print(f"{'':<58}{'units':>7}{'noise':>10}{'units to signal':>17}{'cosine':>9}")
        for name, arm in ARMS.items():
            reference = references[arm[3]]
            m = kept(name, range(n), *arm, of=lambda m, reference=reference: products(m, reference))
            rows[name] = {"noisy": arm[3], "units": m["units"], "trials": n} | compared(m, reference)
            numbers = f"{m['units']:7d}"
            if row := rows[name]["cosine"]:
                noise, units = rows[name]["relative_noise"][0], rows[name]["units_to_signal"][0]
                numbers += f"{noise:10.2f}{units:17.0f}{row[0]:9.3f} [{row[1]:.3f}, {row[2]:.3f}]"
            print(f"{name:<58}{numbers}", flush=True)
    common.finish("gradient", o, {"rows": rows}, draw)


if __name__ == "__main__":
    main()
