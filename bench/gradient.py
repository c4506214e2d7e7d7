"""What does the tree do to learning? Noise and bias of the gradient estimate, for the model evaluations it costs.

Question    How noisy is one iteration's gradient, and does it point where the raw reward rises?
Hypothesis  A tree costs less an estimate but its leaves are correlated; noise between splits, which no advantage of Eq. 4 can tell
            apart, adds variance, so that noise at the splits alone gives more signal for a model evaluation. Pruning saves
            units; by depth it drops a part of the signal, by width it keeps edges because of their rewards, which biases.
Metric      For a frozen policy, over trials, each a rollout of one prompt: relative noise tr Cov(g) / |E g|^2, for one prompt (numerator and
            denominator averaged over prompts) and for all (E over prompts too: what training follows; Cov holds how prompts differ);
            the same times the cost in units (a forward; a backward is 2): units to a signal-to-noise ratio of 1; the cosine of E g
            with the reference. |E g|^2 and the cosine are products of different trials, for all prompts of different prompts, so
            that noise biases neither. The reference is REINFORCE on the raw reward with a leave-one-out baseline, under
            independent rollouts of the same prompts with the same noisy steps; the cosine of the two references, all steps
            noisy and splits noisy, is shown too. Intervals of 95 % by a jackknife over prompts drawn at random.
Rule        Fewer units is better; an interval of the cosine below 1 is a bias. The policy is the untrained one, lengths are Euclidean
            (training divides by AdamW's second moments).

    python bench/gradient.py             # 35 minutes on one core
"""

import itertools
import sys
from types import SimpleNamespace

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from branchgrpo import Sampler, flatten_edges, generators, prune, rollout, update
from rewards import score, weighted_sum
from sde import sigma_schedule
from tree import count, depth_advantages, depth_window_range, fuse, make_forest

KEY = 2**31 + 2  # of the noises
SCOPES = ("one prompt", "all prompts")


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


TREE = "all steps noisy, tree, every edge the same weight (Eq. 5)"
SPLITS = "splits noisy, tree, every edge the same weight"
ARMS = {  # name -> is it a tree? credit, loss weight, the reference it estimates, pruning
    "all steps noisy, independent": (False, group, "path", "all"),
    "all steps noisy, tree": (True, branch, "path", "all"),
    TREE: (True, branch, "edge", "all"),
    "the same, width-pruned": (True, branch, "edge", "all", {"width": "parent-top1"}),
    "the same, depth-pruned": (True, branch, "edge", "all", {"depth": 0.25}),
    "all steps noisy, tree, group advantage": (True, group, "path", "all"),
    "all steps noisy, tree, no fusion": (True, unfused, "path", "all"),
    "splits noisy, independent": (False, group, "path", "splits"),
    "splits noisy, tree": (True, branch, "path", "splits"),
    SPLITS: (True, branch, "edge", "splits"),
    "splits noisy, tree, group advantage": (True, group, "path", "splits"),
    "the same, every edge the same weight": (True, group, "edge", "splits"),
}
PAIRS = {  # question -> the arms whose units are divided
    "width pruning": ("the same, width-pruned", TREE),
    "depth pruning": ("the same, depth-pruned", TREE),
    "no fusion, all steps noisy": ("all steps noisy, tree, no fusion", "all steps noisy, tree"),
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
    options, width, depth = (
        run.args,
        (pruning or {}).get("width"),
        round((pruning or {}).get("depth", 0) * run.args.steps),
    )
    shape = {"splits": options.splits} if tree else {"splits": (), "roots": options.leaves}
    forest = make_forest(options.steps, options.branch, **shape, chosen=options.splits if noisy == "splits" else None)
    noise = options.branch_noise if tree else float("inf")
    sampler = Sampler(sigma_schedule(options.steps, options.shift), options.sde, options.eta, noise)
    still = SimpleNamespace(zero_grad=lambda set_to_none: run.policy.transformer.zero_grad(), step=lambda: None)
    args = SimpleNamespace(clip=1e9, kl=0.0, micro_batch=options.micro_batch, max_grad_norm=0.0)
    first, last = depth_window_range(forest, depth) if depth else (0, 0)
    for trial, (number, prompt) in itertools.product(trials, enumerate(prompts)):
        cond, rng = run.policy.encode([prompt]), generators(KEY, trial, range(number, number + 1))
        out = rollout(run.policy, cond, forest, sampler, rng, options.micro_batch)
        pictures = run.policy.decode(out.latents[-1].flatten(0, 1))
        rewards = weighted_sum(score(run.rewards, pictures, [prompt] * forest.leaves), run.weights)[None]
        window = (first + trial % (last - first + 1), depth) if depth else None
        keep = prune(forest, rewards, width, window)
        units = count(forest, keep)["forwards"] + 3 * count(forest, keep)["trained_parents"]
        advantages = credit(out, forest, rewards.to(run.accelerator.device))
        edges = flatten_edges(out, forest, keep, advantages, torch.arange(1), weight)
        update(run.policy, still, run.accelerator, edges, cond, sampler, args)
        bar.update()
        yield torch.cat([p.grad.flatten() for p in run.policy.trainable()]).double().cpu(), units


def sums(found, prompts: int) -> dict:
    """Of each of P prompts: the sum of its gradients (P, parameters), of their square lengths (P,), how many each has."""
    total, squares, n, units = None, torch.zeros(prompts).double(), 0, 0
    for g, cost in found:
        total = torch.zeros(prompts, len(g)).double() if total is None else total
        total[n % prompts] += g
        squares[n % prompts] += g @ g
        n, units = n + 1, cost
    return {"sums": total, "squares": squares, "n": n // prompts, "units": units}


def together(parts: list[dict]) -> dict:
    """The sums of further trials of the same prompts, added."""
    return {k: sum(m[k] for m in parts) for k in ("sums", "squares", "n")} | {"units": parts[0]["units"]}


def products(m: dict, reference: dict) -> dict:
    """All that `compared` needs of two `sums`: E g_p . E g_q of all prompts (P, P), the same with the reference, E|g_p|^2 (P,).

    |E g_p|^2 is the mean product of two different trials, which noise does not bias.
    """
    n = m["n"]
    own, cross = m["sums"] @ m["sums"].T / n**2, m["sums"] @ reference["sums"].T / (n * reference["n"])
    own.diagonal().copy_((own.diagonal() * n**2 - m["squares"]) / (n * (n - 1)))
    return {"squares": m["squares"] / n, "own": own, "cross": cross, "units": m["units"]}


def estimates(m: dict, reference: dict, left_out: int | None) -> np.ndarray:
    """Relative noise and cosine of one prompt's gradient, then of all prompts', without one prompt.

    Not a number where no signal rises above the noise.
    """
    stay = [p for p in range(len(m["own"])) if p != left_out]
    same = torch.eye(len(stay), dtype=torch.bool)
    squares, found = float(m["squares"][stay].mean()), []
    for pairs in (same, ~same):  # |E g_p|^2 of a prompt; E g_p . E g_q of two prompts is |E g|^2 over all
        mine, theirs, cross = (float(x[stay][:, stay][pairs].mean()) for x in (m["own"], reference["own"], m["cross"]))
        seen = min(mine, theirs) > 0
        found += [squares / mine - 1, cross / (mine * theirs) ** 0.5] if seen else [np.nan, np.nan]
    return np.array(found)


def compared(m: dict, reference: dict, base: dict, base_reference: dict) -> dict:
    """Of one prompt and of all: relative noise, its cost, that over another arm's, the cosine of the true means, with intervals.

    None where no signal was found.
    """

    def found(left_out: int | None) -> list[float]:
        row, other, values = estimates(m, reference, left_out), estimates(base, base_reference, left_out), []
        for i in (0, 2):
            values += [row[i], m["units"] * row[i], m["units"] * row[i] / (base["units"] * other[i]), row[i + 1]]
        return values

    rows, result = np.stack(common.jackknife(found, len(m["own"])), 1), {}
    keys = ("relative_noise", "units_to_signal", "units_over_base", "cosine")
    for (scope, key), row in zip(itertools.product(SCOPES, keys), rows):
        result.setdefault(scope, {})[key] = row.tolist() if np.isfinite(row).all() else None
    return result


def shown(found: dict) -> list[str]:
    """Noise, units over the first arm's and cosine, of one scope, as text."""
    values = [found[key] for key in ("relative_noise", "units_over_base", "cosine")]
    return ["{:.3g} [{:.3g}, {:.3g}]".format(*v) if v else "no signal found" for v in values]


def draw(document: dict):
    """Units to a signal-to-noise ratio of 1 over the first arm's, and the cosine with the reference."""
    figure = plt.figure(figsize=(11, 5))
    axes, y = figure.subplots(1, 2, sharey=True), np.arange(len(document["rows"]))
    for ax, key in zip(axes, ("units_over_base", "cosine")):
        for (j, scope), (at, row) in itertools.product(enumerate(SCOPES), enumerate(document["rows"].values())):
            if row[scope][key]:
                mean, low, high = row[scope][key]
                look = {"color": common.COLOURS[row["noisy"] == "splits"], "mfc": "w" if j == 0 else None, "capsize": 3}
                ax.errorbar(mean, at + 0.25 * j, xerr=[[mean - low], [high - mean]], fmt="so"[j], **look)
        ax.axvline(1, color="k", lw=0.8)
    axes[0].set_yticks(y + 0.12, document["rows"])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="model evaluations until signal equals noise,\nover the first row's", xlim=(0, None))
    axes[1].set_xlabel("cosine of the mean gradient\nwith the reference")
    for j, scope in enumerate(SCOPES):
        axes[1].plot([], [], "so"[j], color="#777777", mfc="w" if j == 0 else None, label=f"of {scope}")
    axes[1].legend(fontsize=8)
    return figure


def main() -> None:
    """Estimate, compare; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--trials", type=int, default=32, help="of every prompt and arm; the references take twice as many"
    )
    parser.add_argument("--prompts", type=int, default=8, help="drawn from the training prompts")
    args = parser.parse_args()
    n, many = (2, 2) if args.smoke else (args.trials, args.prompts)
    run, rows, drawn, references, arms = common.prepare(args, "--leaves 4" if args.smoke else ""), {}, {}, {}, {}
    prompts = [run.prompts[i] for i in np.random.default_rng(0).permutation(len(run.prompts))[:many]]
    with tqdm(total=n * many * (len(ARMS) + 4), desc="gradients", file=sys.stderr) as bar:

        def kept(name: str, trials: range, *arm, of=lambda m: m) -> dict:
            """An arm's sums, or what `of` makes of them."""
            return common.kept(
                args,
                "gradient",
                f"{name}, {len(trials)} of {many}",
                lambda: of(sums(gradients(run, prompts, trials, bar, *arm), many)),
            )

        for noisy in ("all", "splits"):  # from noises that no arm has
            how = (False, reinforce, "path", noisy)
            halves = [kept(f"reference {noisy} from {i}", range(i, i + n), *how) for i in (n, 2 * n)]
            drawn[noisy] = m = together(halves)
            references[noisy] = m | products(m, m)
        print(f"{'units; of one prompt, of all: noise, units over the first arm, cosine':<70}")
        for name, arm in ARMS.items():
            reference = references[arm[3]]
            m = kept(name, range(n), *arm, of=lambda m, reference=reference: products(m, reference))
            arms[name] = m, reference
            found = compared(m, reference, *arms[next(iter(ARMS))])
            raw = {k: m[k].tolist() for k in ("squares", "own", "cross")}
            rows[name] = {"noisy": arm[3], "units": m["units"]} | found | {"products": raw}
            print(f"{name:<58}{m['units']:5d}", *("   ".join(shown(found[scope])) for scope in SCOPES), flush=True)
    pairs = {name: compared(*arms[a], *arms[b]) for name, (a, b) in PAIRS.items()}
    pairs = {name: {scope: found[scope]["units_over_base"] for scope in SCOPES} for name, found in pairs.items()}
    for name, ratios in pairs.items():
        print(f"units, {name}:", {scope: [round(x, 3) for x in v] for scope, v in ratios.items() if v})
    both = products(drawn["splits"], drawn["all"])  # of different prompts: those of one prompt share their noises
    same = compared(both, references["all"], both, references["all"])["all prompts"]["cosine"]
    print("cosine of the two references:", same)
    document = {"rows": rows, "pairs": pairs, "references_cosine": same, "trials": n, "prompts": prompts}
    document["reference_products"] = {noisy: r["own"].tolist() for noisy, r in references.items()}
    common.finish("gradient", args, document, draw)


if __name__ == "__main__":
    main()
