"""What does the tree do to learning? Noise and bias of the gradient estimate, for the model evaluations that it costs.

Question    How noisy is one iteration's gradient, and does it point where the raw reward rises?
Hypothesis  A tree costs less per estimate, but its leaves are correlated. Noise at steps between the splits adds
            variance, since no advantage of Eq. 4 can tell such steps apart; noise at the splits only should therefore
            give more signal per model evaluation. Pruning saves units. By depth it drops a part of the signal. By
            width it keeps edges because of their rewards, which biases. The endpoint objective takes the ends of the
            children in place of the noises, most of which does nothing to the reward: less noise, and some bias.
Metric      For a frozen policy, over trials, each the rollout of one prompt:
            1. Relative noise tr Cov(g) / |E g|^2. For one prompt, numerator and denominator are averaged over prompts.
               For all prompts, E runs over prompts too: that is what training follows, and Cov then holds how prompts
               differ.
            2. Units to a signal-to-noise ratio of 1: relative noise times the units of one estimate. A unit is the
               cost of one forward; a backward costs two.
            3. The cosine of E g with the reference. The reference is REINFORCE on the raw reward, with a leave-one-out
               baseline, under independent rollouts of the same prompts with the same noisy steps. The cosine of the
               two references, all steps noisy and splits noisy, is shown too.
            |E g|^2 and the cosine are products of different trials, and for all prompts those of different prompts,
            so that noise biases neither. Intervals of 95 % come from a jackknife over prompts drawn at random.
Rule        Fewer units are better. An interval of the cosine that lies below 1 is a bias. The policy is the untrained
            one. Lengths are Euclidean, though training divides by the root of AdamW's second moments.

    python bench/gradient.py             # 1.2 hours on one core
"""

import itertools
import sys
from types import SimpleNamespace

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from branchgrpo import Sampler, generators, prune, rollout, update
from objectives import OBJECTIVES, rows_per_prompt
from rewards import score, weighted_sum
from sde import sigma_schedule
from tree import advantages, count, depth_window_range, fuse, make_forest

KEY = 2**31 + 2  # of the noises: no training run and no other benchmark has them
SCOPES = ("one prompt", "all prompts")


# -------------------------------------------------------------------------------------------------------------- credit
# Each of these functions returns the advantages of all edges, T tensors (1, n_{i+1}), from leaf rewards (1, leaves).
def reinforce(out, forest, rewards):
    """Credit each leaf with its raw reward minus the mean of the prompt's other leaves, on every edge of its path.

    The baseline of a leaf does not contain its own reward, so the estimate has no bias. Rollouts must be independent.
    """
    n = rewards.shape[1]
    centred = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (n - 1)).double()
    return [centred] * forest.steps


def branch(out, forest, rewards):
    """Credit by Eq. 3 and 4, as BranchGRPO does, with beta = 1."""
    return advantages(fuse(rewards, out.path_logp(forest), forest, 1.0), forest)


def group(out, forest, rewards):
    """Credit by Eq. 3, then normalise over the leaves and not over the depth: GRPO on a tree."""
    return advantages(fuse(rewards, out.path_logp(forest), forest, 1.0), forest, "group")


def unfused(out, forest, rewards):
    """Credit by Eq. 4 without Eq. 3: a node takes the reward of the first leaf below it."""
    return advantages([rewards[:, :: forest.leaves // n].double() for n in forest.sizes], forest)


TREE = "all steps noisy, tree, every edge the same weight (Eq. 5)"
SPLITS = "splits noisy, tree, every edge the same weight"
ENDPOINT = "splits noisy, tree, endpoint"
ARMS = {  # name -> is it a tree? credit, loss weight, which steps are noisy (this names the reference), pruning
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
    # Other objectives. The last two of a tuple: the objective, and whether the tree is one split into all leaves.
    ENDPOINT: (True, branch, "edge", "splits", {}, "endpoint"),
    "splits noisy, star": (True, branch, "edge", "splits", {}, "surrogate", True),
    "splits noisy, star, endpoint": (True, branch, "edge", "splits", {}, "endpoint", True),
    "no noise, independent, elbo": (False, group, "edge", "none", {}, "elbo"),
    "no noise, independent, nft": (False, group, "edge", "none", {}, "nft"),
    "splits noisy, tree, elbo": (True, group, "edge", "splits", {}, "elbo"),
}
PAIRS = {  # question -> the two arms whose units are divided
    "the endpoint objective instead of Eq. 5, splits noisy": (ENDPOINT, SPLITS),
    "the endpoint objective instead of Eq. 5, star": ("splits noisy, star, endpoint", "splits noisy, star"),
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


# ----------------------------------------------------------------------------------------------------------- gradients
def gradients(
    run,
    prompts: list[str],
    trials: range,
    bar,
    tree: bool,
    credit,
    loss_weight: str,
    noisy: str,
    pruning: dict | None = None,
    objective: str = "surrogate",
    star: bool = False,
):
    """Yield the gradient (parameters,) of each trial of each prompt, prompt by prompt within a trial, and its units.

    Args:
        run: whose policy, rewards and options are used.
        prompts: one rollout of each belongs to a trial.
        trials: their numbers, which are the keys of the noises.
        bar: of progress.
        tree: the run's tree, or as many independent rollouts as it has leaves.
        credit: one of the functions above.
        loss_weight: "edge" or "path", see branchgrpo.flatten_edges.
        noisy: "all" steps, the "splits" only, or "none".
        pruning: width as in `prune`; depth as a fraction of the T steps. A depth window takes its places in turn.
        objective: a name in objectives.OBJECTIVES.
        star: the tree is one split at step 0 into all leaves.
    """
    options, pruning = run.args, pruning or {}
    width, depth = pruning.get("width"), round(pruning.get("depth", 0) * options.steps)

    # The forest, and the steps' kind as in training.
    shape = {"splits": options.splits} if tree else {"splits": (), "roots": options.leaves}
    shape, k = ({"splits": (0,)}, options.leaves) if star else (shape, options.branch)
    steps = {"all": None, "none": (), "splits": (0,) if star else options.splits}[noisy]
    forest = make_forest(options.steps, k, **shape, chosen=steps)
    noise = options.branch_noise if tree else float("inf")
    sampler = Sampler(sigma_schedule(options.steps, options.shift), options.sde, options.eta, noise)
    first, last = depth_window_range(forest, depth) if depth else (0, 0)

    # `update` computes the gradient. Its optimiser does nothing, so that the policy stays frozen and the gradient can
    # be read; nothing is clipped, neither ratios (which are 1 here) nor the gradient.
    idle = SimpleNamespace(zero_grad=lambda set_to_none: run.policy.transformer.zero_grad(), step=lambda: None)
    update_options = SimpleNamespace(clip=1e9, kl=0.0, micro_batch=options.micro_batch, max_grad_norm=0.0)
    make_rows, loss = OBJECTIVES[objective]
    row_options = SimpleNamespace(loss_weight=loss_weight, noise_draws=2, shift=options.shift, adv_clip=5.0)
    row_options.objective = objective

    for trial, (number, prompt) in itertools.product(trials, enumerate(prompts)):
        # Roll out and score one forest.
        cond, rng = run.policy.encode([prompt]), generators(KEY, trial, range(number, number + 1))
        out = rollout(run.policy, cond, forest, sampler, rng, options.micro_batch)
        pictures = run.policy.decode(out.latents[-1].flatten(0, 1))
        rewards = weighted_sum(score(run.rewards, pictures, [prompt] * forest.leaves), run.weights)[None]  # (1, leaves)

        # What is trained, and what the estimate costs: a forward per node, and three units per trained parent.
        window = (first + trial % (last - first + 1), depth) if depth else None
        keep = prune(forest, rewards, width, window)
        units = count(forest)["forwards"] + 3 * rows_per_prompt(row_options, forest, keep)

        # The gradient, in double precision, since sums of many will be subtracted from each other.
        credits = credit(out, forest, rewards.to(run.accelerator.device))
        rows = make_rows(out, forest, keep, credits, rewards, torch.arange(1), rng, row_options)
        update(run.policy, idle, run.accelerator, rows, cond, sampler, update_options, loss)
        bar.update()
        yield torch.cat([p.grad.flatten() for p in run.policy.trainable()]).double().cpu(), units


# ------------------------------------------------------------------------------------------------------------- moments
def sums(estimates_and_units, prompts: int) -> dict:
    """Reduce gradients to what their moments need; there are too many to keep.

    Args:
        estimates_and_units: pairs of a gradient and its units; prompts follow each other in turn.
        prompts: P.

    Returns:
        sums: of each prompt's gradients (P, parameters). squares: of their square lengths (P,). n: how many each prompt
        has. units: of the last estimate.
    """
    total, squares, n, units = None, torch.zeros(prompts).double(), 0, 0
    for g, cost in estimates_and_units:
        total = torch.zeros(prompts, len(g)).double() if total is None else total
        total[n % prompts] += g
        squares[n % prompts] += g @ g
        n, units = n + 1, cost
    return {"sums": total, "squares": squares, "n": n // prompts, "units": units}


def together(sets: list[dict]) -> dict:
    """Add the `sums` of several sets of trials of the same prompts."""
    return {k: sum(m[k] for m in sets) for k in ("sums", "squares", "n")} | {"units": sets[0]["units"]}


def products(m: dict, reference: dict) -> dict:
    """Compute from two `sums` all that `compared` needs.

    |E g_p|^2 is the mean product of two different trials: (|sum_t g_t|^2 - sum_t |g_t|^2) / (n (n - 1)). The square of
    the mean gradient would contain the noise of each trial times itself, and would be too large.

    Returns:
        squares: E |g_p|^2 (P,). own: E g_p . E g_q of all pairs of prompts (P, P). cross: the same with the reference's
        g_q. units.
    """
    n = m["n"]
    own, cross = m["sums"] @ m["sums"].T / n**2, m["sums"] @ reference["sums"].T / (n * reference["n"])
    own.diagonal().copy_((own.diagonal() * n**2 - m["squares"]) / (n * (n - 1)))
    return {"squares": m["squares"] / n, "own": own, "cross": cross, "units": m["units"]}


def estimates(m: dict, reference: dict, left_out: int | None) -> np.ndarray:
    """Return relative noise and cosine of one prompt's gradient, then of all prompts', without one of the prompts.

    Both are not a number where no signal rises above the noise, which shows as a square below 0.
    """
    stay = [p for p in range(len(m["own"])) if p != left_out]
    same_prompt = torch.eye(len(stay), dtype=torch.bool)
    squares, result = float(m["squares"][stay].mean()), []

    # |E g_p|^2 of one prompt is on the diagonal. Off it, E g_p . E g_q of two prompts averages to |E g|^2 over all.
    for pairs in (same_prompt, ~same_prompt):
        matrices = (m["own"], reference["own"], m["cross"])
        signal, signal_of_reference, cross = (float(x[stay][:, stay][pairs].mean()) for x in matrices)

        # tr Cov(g) = E |g|^2 - |E g|^2, so the relative noise is E |g|^2 / |E g|^2 - 1.
        if min(signal, signal_of_reference) > 0:
            result += [squares / signal - 1, cross / (signal * signal_of_reference) ** 0.5]
        else:
            result += [np.nan, np.nan]
    return np.array(result)


def compared(m: dict, reference: dict, base: dict, base_reference: dict) -> dict:
    """Compare an arm with its reference and with another arm, for one prompt and for all; each with its interval.

    Args:
        m, reference: `products` of the arm and of its reference.
        base, base_reference: the same of the arm to compare with.

    Returns:
        Scope -> relative_noise, units_to_signal, units_over_base, cosine: (value, low, high), None without a signal.
    """

    def values_without(left_out: int | None) -> list[float]:
        row, other, values = estimates(m, reference, left_out), estimates(base, base_reference, left_out), []
        for i in (0, 2):  # where the noise of each scope lies in `estimates`; its cosine is next to it
            values += [row[i], m["units"] * row[i], m["units"] * row[i] / (base["units"] * other[i]), row[i + 1]]
        return values

    # Prompts are the independent units, so one of them is left out at a time.
    rows, result = np.stack(common.jackknife(values_without, len(m["own"])), 1), {}
    keys = ("relative_noise", "units_to_signal", "units_over_base", "cosine")
    for (scope, key), row in zip(itertools.product(SCOPES, keys), rows):
        result.setdefault(scope, {})[key] = row.tolist() if np.isfinite(row).all() else None
    return result


# -------------------------------------------------------------------------------------------------------------- report
def shown(result: dict) -> list[str]:
    """Format noise, units over the first arm's, and cosine of one scope."""
    values = [result[key] for key in ("relative_noise", "units_over_base", "cosine")]
    return ["{:.3g} [{:.3g}, {:.3g}]".format(*v) if v else "no signal found" for v in values]


def draw(document: dict):
    """Draw units to a signal-to-noise ratio of 1 over the first arm's, and the cosine with the reference."""
    figure = plt.figure(figsize=(11, 5))
    axes, y = figure.subplots(1, 2, sharey=True), np.arange(len(document["rows"]))
    for ax, key in zip(axes, ("units_over_base", "cosine")):
        # A row per arm. Its colour says which steps are noisy, its marker for which scope the value is.
        for (j, scope), (i, row) in itertools.product(enumerate(SCOPES), enumerate(document["rows"].values())):
            if row[scope][key]:
                mean, low, high = row[scope][key]
                low = max(low, 1e-3) if key == "units_over_base" else low  # on a log axis nothing is below 0
                look = {"color": common.COLOURS[row["noisy"] == "splits"], "mfc": "w" if j == 0 else None, "capsize": 3}
                ax.errorbar(mean, i + 0.25 * j, xerr=[[mean - low], [high - mean]], fmt="so"[j], **look)
        ax.axvline(1, color="k", lw=0.8)

    axes[0].set_yticks(y + 0.12, document["rows"])
    axes[0].invert_yaxis()
    axes[0].set(
        xlabel="model evaluations until signal equals noise,\nover the first row's", xscale="log", xlim=(1e-3, 2)
    )
    axes[1].set_xlabel("cosine of the mean gradient\nwith the reference")
    for j, scope in enumerate(SCOPES):
        axes[1].plot([], [], "so"[j], color="#777777", mfc="w" if j == 0 else None, label=f"of {scope}")
    axes[1].legend(fontsize=8)
    return figure


def main() -> None:
    """Estimate, compare, and write the table, the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--trials", type=int, default=32, help="trials of every prompt and arm; a reference takes twice as many"
    )
    parser.add_argument("--prompts", type=int, default=8, help="how many are drawn from the training prompts")
    args = parser.parse_args()

    n, n_prompts = (2, 2) if args.smoke else (args.trials, args.prompts)
    run = common.prepare(args, "--leaves 4 --steps 6" if args.smoke else "")
    prompts = [run.prompts[i] for i in np.random.default_rng(0).permutation(len(run.prompts))[:n_prompts]]
    rows, reference_sums, references, arms = {}, {}, {}, {}

    with tqdm(total=n * n_prompts * (len(ARMS) + 4), desc="gradients", file=sys.stderr) as bar:

        def kept(name: str, trials: range, *arm, reduce=lambda m: m) -> dict:
            """Return an arm's sums, or what `reduce` makes of them; from a file if it was done before."""
            key = f"{name}, {len(trials)} of {n_prompts}"
            return common.kept(
                args, "gradient", key, lambda: reduce(sums(gradients(run, prompts, trials, bar, *arm), n_prompts))
            )

        # The references: 2 n trials from noises that no arm has, in two halves, so that a stop costs less.
        for noisy in ("all", "splits"):
            arm = (False, reinforce, "path", noisy)
            halves = [kept(f"reference {noisy} from {start}", range(start, start + n), *arm) for start in (n, 2 * n)]
            reference_sums[noisy] = m = together(halves)
            references[noisy] = m | products(m, m)

        # The arms, each against the reference with the same noisy steps, and against the first arm.
        print(f"{'units; of one prompt, of all: noise, units over the first arm, cosine':<70}")
        for name, arm in ARMS.items():
            reference = references["all" if arm[3] == "all" else "splits"]
            m = kept(name, range(n), *arm, reduce=lambda m, reference=reference: products(m, reference))
            arms[name] = m, reference
            result = compared(m, reference, *arms[next(iter(ARMS))])
            raw = {key: m[key].tolist() for key in ("squares", "own", "cross")}
            rows[name] = {"noisy": arm[3], "units": m["units"]} | result | {"products": raw}
            print(f"{name:<58}{m['units']:5d}", *("   ".join(shown(result[scope])) for scope in SCOPES), flush=True)

    # The pairs of arms that answer one question each.
    pairs = {question: compared(*arms[a], *arms[b]) for question, (a, b) in PAIRS.items()}
    pairs = {question: {s: result[s]["units_over_base"] for s in SCOPES} for question, result in pairs.items()}
    for question, ratios in pairs.items():
        print(f"units, {question}:", {scope: [round(x, 3) for x in v] for scope, v in ratios.items() if v})

    # The two references share the noises of each prompt, so their cosine is taken over different prompts alone.
    splits_and_all = products(reference_sums["splits"], reference_sums["all"])
    same = compared(splits_and_all, references["all"], splits_and_all, references["all"])["all prompts"]["cosine"]
    print("cosine of the two references:", same)

    document = {"rows": rows, "pairs": pairs, "references_cosine": same, "trials": n, "prompts": prompts}
    document["reference_products"] = {noisy: r["own"].tolist() for noisy, r in references.items()}
    common.finish("gradient", args, document, draw)


if __name__ == "__main__":
    main()
