"""Is stopping branches early worth anything? How well the reward of a clean estimate foretells the final one.

Question    At every node of a rollout there is a clean estimate x0hat, which can be decoded and scored. Does it say
            which paths will end well, early enough to stop the others?
Hypothesis  Late in the walk yes, where little is saved; at the noisy end, where much would be saved, hardly.
Metric      Spearman's rank correlation, over the paths of one prompt, of the reward at x0hat at depth d with the reward
            of the path's leaf; the mean over prompts with its 95 % interval. Beside it the fraction of a path's
            forwards that are still to come at that depth: what stopping there would save.
Rule        Worth trying where the correlation is above 0.7 and at least half of the path is still to come. The policy
            is the untrained one; paths are independent or leave one split (a star).

    python bench/early.py                # 10 minutes on one core
"""

import sys

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from branchgrpo import generators, rollout
from rewards import score, weighted_sum
from schedules import schedule_of

KEY = 2**31 + 3  # of the noises: no training run and no other benchmark has them
ARMS = {
    "independent, all steps noisy": "--method flowgrpo --leaves 16",
    "star, noise at the split only": "--method branchgrpo-mix --mix 0 --splits 0 --branch 16",
}

SMALL = {arm: flags.replace("16", "4") + " --steps 6" for arm, flags in ARMS.items()}  # of a smoke run


def correlations(run, prompt: str, number: int) -> list[float]:
    """Rank correlation at each depth 0..T-1 of one prompt's rollout; not a number where all rewards are equal."""
    options, schedule = run.args, schedule_of(run.args, 0)
    forest, sampler, cond = schedule.forest, run.sampler(schedule.sigmas), run.policy.encode([prompt])
    rng = generators(KEY, 0, range(number, number + 1))
    out = rollout(run.policy, cond, forest, sampler, rng, options.micro_batch, keep_x0hat=True)

    def rewards_of(latents) -> torch.Tensor:
        pictures = run.policy.decode(latents.flatten(0, 1))
        return weighted_sum(score(run.rewards, pictures, [prompt] * len(pictures)), run.weights)

    # A leaf's estimate at depth d is that of its ancestor there, which it may share with others.
    final, result = rewards_of(out.latents[-1]), []
    for d in range(forest.steps):
        early = rewards_of(out.x0hat[d])[forest.ancestors(d, forest.steps)]
        constant = float(early.std()) == 0 or float(final.std()) == 0
        result.append(np.nan if constant else float(stats.spearmanr(early, final).statistic))
    return result


def draw(document: dict):
    """Correlation against the fraction of the path that is still to come."""
    figure = plt.figure(figsize=(7, 4))
    ax = figure.subplots()
    for i, (arm, rows) in enumerate(document["arms"].items()):
        rows = [row for row in rows if row["correlation"]]
        mean, low, high = np.array([row["correlation"] for row in rows]).T
        left = [row["still_to_come"] for row in rows]
        ax.errorbar(left, mean, yerr=[mean - low, high - mean], fmt="so"[i] + "-", color=common.COLOURS[i], label=arm)
    ax.invert_xaxis()
    ax.set(xlabel="fraction of the path that is still to come", ylabel="rank correlation with the final reward")
    ax.axhline(0.7, color="k", lw=0.8, ls=":")
    ax.legend()
    return figure


def main() -> None:
    """Estimate, print the table, write the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=64, help="how many are drawn from the training prompts")
    args = parser.parse_args()
    n = 3 if args.smoke else args.prompts
    run = common.prepare(args, "")
    prompts = [run.prompts[i] for i in np.random.default_rng(1).permutation(len(run.prompts))[:n]]

    arms = {}
    with tqdm(total=n * len(ARMS), desc="rollouts", file=sys.stderr) as bar:
        for arm, flags in ARMS.items():
            own, values = common.variant(run, args, flags if not args.smoke else SMALL[arm]), []
            for number, prompt in enumerate(prompts):
                values.append(correlations(own, prompt, number))
                bar.update()
            steps, table = own.args.steps, np.array(values)  # (prompts, T)
            arms[arm] = []
            for d in range(steps):
                known = table[:, d][np.isfinite(table[:, d])]
                row = {"depth": d, "still_to_come": 1 - (d + 1) / steps, "prompts": len(known)}
                arms[arm].append(row | {"correlation": common.interval(known) if len(known) > 1 else None})
                shown = "{:.2f} [{:.2f}, {:.2f}]".format(*arms[arm][-1]["correlation"]) if len(known) > 1 else "none"
                print(f"{arm:<32} depth {d:2d}  {row['still_to_come']:.2f} to come  {shown}", flush=True)
    common.finish("early", args, {"arms": arms, "prompts": prompts}, draw)


if __name__ == "__main__":
    main()
