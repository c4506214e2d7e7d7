"""What does the tree do to learning? Noise and bias of the gradient estimate, for the model evaluations it costs.

Question    How noisy is one iteration's gradient, and does it point where the raw reward rises?
Hypothesis  A tree costs less an estimate but its leaves are correlated; noise between splits, which no advantage of Eq. 4 can tell
            apart, adds variance, so that noise at the splits alone gives more signal for a model evaluation.
Metric      For a frozen policy, over many rollouts of one prompt each: relative noise tr Cov(g) / |E g|^2; the same times the cost
            in units (a forward; a backward is 2): units to a signal-to-noise ratio of 1; the cosine of E g with the reference,
            corrected for what noise remains in both. The reference is REINFORCE on the raw reward with a
            leave-one-out baseline, under independent rollouts with the same noisy steps.
Rule        Fewer units is better; a cosine well below 1 is a bias.

    python bench/gradient.py             # 25 minutes on one core
"""

import sys
from types import SimpleNamespace

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from branchgrpo import Sampler, gather, generators, rollout, update
from rewards import score, weighted_sum
from sde import sigma_schedule
from tree import count, depth_advantages, fuse, keep_chosen, make_forest

STEPS, LEAVES, SPLITS = 10, 16, (0, 1, 3, 4)
TREE, FLAT = {"branch": 2, "splits": SPLITS}, {"branch": 2, "splits": (), "roots": LEAVES}
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


ARMS = {  # name -> forest, credit, loss weight, the reference it estimates
    "independent, all steps noisy": (FLAT, group, "path", "all"),
    "tree, all steps noisy": (TREE, branch, "path", "all"),
    "  every edge the same weight (Eq. 5)": (TREE, branch, "edge", "all"),
    "  group advantage": (TREE, group, "path", "all"),
    "  no fusion": (TREE, unfused, "path", "all"),
    "independent, splits noisy": (FLAT, group, "path", "splits"),
    "tree, splits noisy": (TREE, branch, "path", "splits"),
    "  every edge the same weight": (TREE, branch, "edge", "splits"),
    "  group advantage ": (TREE, group, "path", "splits"),
}


def gradients(run, shape: dict, credit, weight: str, noisy: str, trials: range, kind: str, eta: float, bar):
    """One gradient (parameters,) for each trial, and its cost in units."""
    forest = make_forest(STEPS, **shape, chosen=SPLITS if noisy == "splits" else None)
    sampler = Sampler(sigma_schedule(STEPS, 3.0), kind, eta, 4.0 if forest.splits else float("inf"))
    still = SimpleNamespace(zero_grad=lambda set_to_none: run.policy.transformer.zero_grad(), step=lambda: None)
    o = SimpleNamespace(clip=1e9, kl=0.0, micro_batch=64, max_grad_norm=0.0)
    units = count(forest)["forwards"] + 3 * count(forest)["trained_parents"]
    for trial in trials:
        prompt = run.prompts[trial % 64]
        cond = run.policy.encode([prompt])
        out = rollout(run.policy, cond, forest, sampler, generators(KEY, trial, range(1)), 64)
        pictures = run.policy.decode(out.latents[-1].flatten(0, 1))
        rewards = weighted_sum(score(run.rewards, pictures, [prompt] * forest.leaves), run.weights)[None]
        keep = keep_chosen(forest, 1)
        edges = gather(out, forest, keep, credit(out, forest, rewards), torch.arange(1), weight)
        update(run.policy, still, run.accelerator, edges, cond, sampler, o)
        bar.update()
        yield torch.cat([p.grad.flatten() for p in run.policy.trainable()]).double(), units


def moments(estimates) -> dict:
    """Mean gradient, mean square length, and |E g|^2 without bias: the mean product of two different trials."""
    total, square, n, units = 0.0, 0.0, 0, 0
    for g, cost in estimates:
        total, square, n, units = total + g, square + float(g @ g), n + 1, cost
    signal = (float(total @ total) - square) / (n * (n - 1))
    return {"mean": total / n, "square": square / n, "signal": signal, "n": n, "units": units}


def compared(m: dict, reference: dict) -> dict:
    """Relative noise, its cost, and the cosine of the true means; None where no signal rises above the noise."""
    if m["signal"] <= 0 or reference["signal"] <= 0:
        return dict.fromkeys(("relative_noise", "units_to_signal", "cosine"))
    noise = (m["square"] - m["signal"]) / m["signal"]
    cosine = float(m["mean"] @ reference["mean"]) / (m["signal"] * reference["signal"]) ** 0.5
    return {"relative_noise": noise, "units_to_signal": m["units"] * noise, "cosine": cosine}


def draw(document: dict):
    """Units to a signal-to-noise ratio of 1, and the cosine with the reference."""
    rows, figure = document["rows"], plt.figure(figsize=(11, 4))
    (left, right), y = figure.subplots(1, 2, sharey=True), np.arange(len(document["rows"]))
    colours = [common.COLOURS[r["noisy"] == "splits"] for r in rows.values()]
    units = np.array([r["units_to_signal"] or np.nan for r in rows.values()])
    left.barh(y, units, 0.6, color=colours)
    left.set_yticks(y, rows)
    left.invert_yaxis()
    left.set(
        xscale="log" if np.isfinite(units).any() else "linear",
        xlabel="model evaluations (backward counts 2) until signal equals noise",
    )
    right.plot([r["cosine"] or np.nan for r in rows.values()], y, "ko")
    right.axvline(1, color="k", lw=0.8)
    right.set_xlabel("cosine of the mean gradient with the reference")
    return figure


def main() -> None:
    """Estimate, compare; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--trials", type=int, default=192, help="of every arm; the references take four times as many")
    parser.add_argument("--sde", default="cps", help="kind of step")
    parser.add_argument("--eta", type=float, default=0.7)
    o = parser.parse_args()
    n = 2 if o.smoke else o.trials
    run = common.prepare(o, "")
    rows, references = {}, {}
    with tqdm(total=n * (len(ARMS) + 8), desc="gradients", file=sys.stderr) as bar:
        for noisy in ("all", "splits"):
            trials = range(10**6, 10**6 + 4 * n)
            found = gradients(run, FLAT, reinforce, "path", noisy, trials, o.sde, o.eta, bar)
            references[noisy] = moments(found)
        print(f"{'':<40}{'units':>7}{'noise':>10}{'units to signal':>17}{'cosine':>9}")
        for name, (shape, credit, weight, noisy) in ARMS.items():
            m = moments(gradients(run, shape, credit, weight, noisy, range(n), o.sde, o.eta, bar))
            row = {"noisy": noisy, "units": m["units"], "signal": m["signal"], "mean_square": m["square"], "n": m["n"]}
            row |= compared(m, references[noisy])
            rows[name] = row
            numbers = f"{row['units']:7d}"
            if row["cosine"] is not None:
                numbers += f"{row['relative_noise']:10.2f}{row['units_to_signal']:17.0f}{row['cosine']:9.3f}"
            print(f"{name:<40}{numbers}", flush=True)
    sizes = {k: {"signal": r["signal"], "mean_square": r["square"], "n": r["n"]} for k, r in references.items()}
    common.finish("gradient", o, {"rows": rows, "references": sizes}, draw)


if __name__ == "__main__":
    main()
