"""What does the tree do to learning? Noise and bias of the gradient estimate, for the model evaluations it costs.

Question    How noisy is one iteration's gradient, and does it point where the raw reward rises?
Hypothesis  A tree costs less an estimate but its leaves are correlated; noise between splits, which no advantage of Eq. 4 can tell
            apart, adds variance, so that noise at the splits alone gives more signal for a model evaluation. Pruning saves
            units; by depth it drops a part of the signal, by width it keeps edges because of their rewards, which biases.
Metric      For a frozen policy and a prompt, over many trials, each a rollout: relative noise tr Cov(g) / |E g|^2, numerator and
            denominator summed over prompts; the same times the cost in units (a forward; a backward is 2): units to a
            signal-to-noise ratio of 1; the cosine of E g with the reference, from products of different trials alone, so that
            noise biases neither. The reference is REINFORCE on the raw reward with a leave-one-out baseline, under independent
            rollouts of the same prompts with the same noisy steps. Intervals of 95 % by a jackknife over the prompts.
            How prompts differ is left out: it is the same for every arm, and so large (a relative noise of 2,000 instead of 80)
            that it would hide the rest (LAB.md).
Rule        Fewer units is better; an interval of the cosine below 1 is a bias.

    python bench/gradient.py             # 25 minutes on one core
"""

import itertools
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

KEY = 2**31 + 2  # of the noises


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
    "the same, every edge the same weight": (True, group, "edge", "splits"),
}
TREE = "all steps noisy, tree, every edge the same weight (Eq. 5)"
SPLITS = "splits noisy, tree, every edge the same weight"
PAIRS = {  # question -> the arms whose units are divided
    "width pruning": ("the same, width-pruned", TREE),
    "depth pruning": ("the same, depth-pruned", TREE),
    "a tree instead of independent rollouts, splits noisy": ("splits noisy, tree", "splits noisy, independent"),
    "equal depths instead of equal edges, splits noisy": ("splits noisy, tree", SPLITS),
    "group instead of depth-wise advantage, equal depths, splits noisy": (
        "splits noisy, tree, group advantage",
        "splits noisy, tree",
    ),
    "group instead of depth-wise advantage, equal edges, splits noisy": (
        "the same, every edge the same weight",
        SPLITS,
    ),
}


def gradients(
    run,
    prompts: list[str],
    trials: range,
    bar,
    tree: bool,
    credit,
    weight: str,
    noisy: str,
    pruning: dict | None = None,
):
    """One gradient (parameters,) for each trial of each prompt, and its cost in units.

    A depth window, a share of T, takes its places in turn.
    """
    options, width, depth = run.o, (pruning or {}).get("width"), round((pruning or {}).get("depth", 0) * run.o.steps)
    shape = {"splits": options.splits} if tree else {"splits": (), "roots": options.leaves}
    forest = make_forest(options.steps, options.branch, **shape, chosen=options.splits if noisy == "splits" else None)
    noise = options.branch_noise if tree else float("inf")
    sampler = Sampler(sigma_schedule(options.steps, options.shift), options.sde, options.eta, noise)
    still = SimpleNamespace(zero_grad=lambda set_to_none: run.policy.transformer.zero_grad(), step=lambda: None)
    o = SimpleNamespace(clip=1e9, kl=0.0, micro_batch=options.micro_batch, max_grad_norm=0.0)
    first, last = depth_window_range(forest, depth) if depth else (0, 0)
    for trial, (number, prompt) in itertools.product(trials, enumerate(prompts)):
        cond, rng = run.policy.encode([prompt]), generators(KEY, trial, range(number, number + 1))
        out = rollout(run.policy, cond, forest, sampler, rng, options.micro_batch)
        pictures = run.policy.decode(out.latents[-1].flatten(0, 1))
        rewards = weighted_sum(score(run.rewards, pictures, [prompt] * forest.leaves), run.weights)[None]
        window = (first + trial % (last - first + 1), depth) if depth else None
        keep = prune(forest, rewards, width, window)
        units = count(forest, keep)["forwards"] + 3 * count(forest, keep)["trained_parents"]
        edges = gather(out, forest, keep, credit(out, forest, rewards), torch.arange(1), weight)
        update(run.policy, still, run.accelerator, edges, cond, sampler, o)
        bar.update()
        yield torch.cat([p.grad.flatten() for p in run.policy.trainable()]).double(), units


def sums(found, prompts: int) -> dict:
    """Of each of P prompts: the sum of its gradients (P, parameters), of their square lengths (P,), how many each has."""
    total, squares, n, units = None, torch.zeros(prompts).double(), 0, 0
    for g, cost in found:
        total = torch.zeros(prompts, len(g)).double() if total is None else total
        total[n % prompts] += g
        squares[n % prompts] += g @ g
        n, units = n + 1, cost
    return {"sums": total, "squares": squares, "n": n // prompts, "units": units}


def products(m: dict, reference: dict) -> dict:
    """All that `compared` needs of two `sums`: for each prompt (P,) E|g|^2, |E g|^2, and E g times the reference's E g.

    |E g|^2 is the mean product of two different trials, which noise does not bias.
    """
    n, own = m["n"], (m["sums"] ** 2).sum(1)
    cross = (m["sums"] * reference["sums"]).sum(1) / (n * reference["n"])
    return {
        "squares": m["squares"] / n,
        "own": (own - m["squares"]) / (n * (n - 1)),
        "cross": cross,
        "units": m["units"],
    }


def estimates(m: dict, reference: dict, left_out: int | None) -> np.ndarray:
    """Relative noise and cosine, without one prompt; not a number where no signal rises above the noise."""
    stay = [p for p in range(len(m["own"])) if p != left_out]
    squares, mine, theirs, cross = (
        float(x[stay].sum()) for x in (m["squares"], m["own"], reference["own"], m["cross"])
    )
    return np.array([squares / mine - 1, cross / (mine * theirs) ** 0.5] if min(mine, theirs) > 0 else [np.nan] * 2)


def compared(m: dict, reference: dict, base: dict, base_reference: dict) -> dict:
    """Relative noise, its cost, that over another arm's, and the cosine of the true means, each with its interval.

    All are None where no signal was found.
    """

    def found(left_out: int | None) -> list[float]:
        (noise, cosine), other = estimates(m, reference, left_out), estimates(base, base_reference, left_out)[0]
        return [noise, m["units"] * noise, m["units"] * noise / (base["units"] * other), cosine]

    whole, prompts = found(None), len(m["own"])
    parts = np.array([found(p) for p in range(prompts)])
    keys = ("relative_noise", "units_to_signal", "units_over_base", "cosine")
    if not np.isfinite(whole).all() or not np.isfinite(parts).all():
        return dict.fromkeys(keys)
    half = stats.t.ppf(0.975, prompts - 1) * ((prompts - 1) * parts.var(0)) ** 0.5
    return {k: [float(v), float(v - h), float(v + h)] for k, v, h in zip(keys, whole, half)}


def draw(document: dict):
    """Units to a signal-to-noise ratio of 1 over the first arm's, and the cosine with the reference."""
    rows = {name: r for name, r in document["rows"].items() if r["cosine"]}
    figure = plt.figure(figsize=(11, 4))
    (left, right), y = figure.subplots(1, 2, sharey=True), np.arange(len(rows))
    for ax, key in ((left, "units_over_base"), (right, "cosine")):
        for at, row in enumerate(rows.values()):
            mean, low, high = row[key]
            colour = common.COLOURS[row["noisy"] == "splits"]
            ax.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
    left.set_yticks(y, rows)
    left.invert_yaxis()
    left.axvline(1, color="k", lw=0.8)
    left.set(xlabel="model evaluations until signal equals noise,\nover the first row's", xlim=(0, None))
    right.axvline(1, color="k", lw=0.8)
    right.set_xlabel("cosine of the mean gradient\nwith the reference")
    return figure


def main() -> None:
    """Estimate, compare; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--trials", type=int, default=32, help="of every prompt and arm; the references take twice as many"
    )
    parser.add_argument("--prompts", type=int, default=8, help="evenly from the training prompts")
    o = parser.parse_args()
    n, many = (2, 2) if o.smoke else (o.trials, o.prompts)
    run, rows, references, arms = common.prepare(o, "--leaves 4" if o.smoke else ""), {}, {}, {}
    prompts = run.prompts[:: len(run.prompts) // many][:many]
    with tqdm(total=n * many * (len(ARMS) + 4), desc="gradients", file=sys.stderr) as bar:

        def kept(name: str, trials: range, *arm, of=lambda m: m) -> dict:
            """An arm's sums, or what `of` makes of them."""
            return common.kept(
                o,
                "gradient",
                f"{name}, {len(trials)} of {many}",
                lambda: of(sums(gradients(run, prompts, trials, bar, *arm), many)),
            )

        for noisy in ("all", "splits"):  # from noises that no arm has
            m = kept(f"reference {noisy}", range(n, 3 * n), False, reinforce, "path", noisy)
            references[noisy] = m | products(m, m)
        print(f"{'':<58}{'units':>7}{'noise':>8}{'units to signal':>17}{'over the first':>23}{'cosine':>9}")
        for name, arm in ARMS.items():
            reference = references[arm[3]]
            m = kept(name, range(n), *arm, of=lambda m, reference=reference: products(m, reference))
            arms[name] = m, reference
            row = rows[name] = {"noisy": arm[3], "units": m["units"]} | compared(m, reference, *arms[next(iter(ARMS))])
            numbers = f"{m['units']:7d}"
            if row["cosine"]:
                numbers += f"{row['relative_noise'][0]:8.1f}{row['units_to_signal'][0]:17.0f}"
                for key in ("units_over_base", "cosine"):
                    numbers += "{:9.3f} [{:.3f}, {:.3f}]".format(*row[key])
            print(f"{name:<58}{numbers}", flush=True)
    pairs = {name: compared(*arms[a], *arms[b])["units_over_base"] for name, (a, b) in PAIRS.items()}
    for name, ratio in pairs.items():
        print(f"units, {name}: " + ("{:.2f} [{:.2f}, {:.2f}]".format(*ratio) if ratio else "no signal found"))
    common.finish("gradient", o, {"rows": rows, "pairs": pairs, "trials": n, "prompts": prompts}, draw)


if __name__ == "__main__":
    main()
