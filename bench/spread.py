"""What does training do to diversity? Spread of the pictures of one prompt, per objective, at equal reward.

Question    A policy that is rewarded grows more alike: part of what goes is mistakes, part is diversity. Does one
            objective spend more diversity on the same reward than another?
Hypothesis  The endpoint objective pulls towards the children that scored best, so it spends more than Eq. 5.
Metric      Spread: the mean distance between two pictures of one prompt, over that of the untrained model, from the
            same noises. It is measured in pixels (means over blocks of 4 x 4) and in the OCR model's outputs; and once
            more between pictures whose words are both read exactly, where no mistake is left that could vanish.
            Reward: that of the held-out pairs.
Rule        The objectives are compared at equal reward: at the highest mark that every run reaches, where the reward,
            a mean of three evaluations, first crosses it; linear between evaluations. Three paired seeds.

    python bench/spread.py               # 1 hour on 2 cores; resumes where it was stopped
"""

import sys

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from diversity import KEY, distances, ocr_features, pixel_features
from equal_time import ARMS as TIMED
from tqdm import tqdm

import loop
from branchgrpo import generators, sample_ode

ARMS = {  # name -> flags, those of equal_time.py
    "Eq. 5, tree": TIMED["Mix, noise at the splits, flash"],
    "endpoint, star": TIMED["endpoint, star at a random step"],
    **{arm: TIMED[arm] for arm in ("endpoint, tree", "elbo, ODE", "nft, ODE")},
}


@torch.no_grad()
def spread(run, prompts: list[str], samples: int) -> dict[str, float]:
    """Mean distance between pictures of one prompt, from noises that are always the same.

    Returns:
        "pixels", "OCR outputs", and each of them with ", exact": between pictures whose words are both read exactly,
        over the prompts that have two of those.
    """
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    rngs = generators(KEY, 0, range(len(prompts)))
    noise = torch.stack([torch.randn(run.policy.latent_shape, generator=rng) for rng in rngs])
    cond = run.policy.encode(prompts)
    pictures = run.policy.decode(sample_ode(run.policy, cond, run.sampler(), noise, run.args.micro_batch))

    exact = (run.rewards["ocr"](pictures, prompts) == 1).numpy().reshape(-1, samples)
    result = {}
    for space, features_of in (("pixels", pixel_features), ("OCR outputs", ocr_features(run))):
        groups = features_of(pictures, prompts).reshape(len(exact), samples, -1)  # (prompts, samples, d)
        result[space] = float(np.mean([distances(group).mean() for group in groups]))
        right = [group[chosen] for group, chosen in zip(groups, exact) if chosen.sum() > 1]
        result[f"{space}, exact"] = float(np.mean([distances(group).mean() for group in right])) if right else None
    return result


def learn(args, arm: str, seed: int, iterations: int, measured: int) -> list[dict]:
    """Train an arm, and measure reward and spread `measured` times after the start."""
    run = common.prepare(args, f"{ARMS[arm]} --seed {seed} --iterations {iterations}")
    prompts, samples = run.heldout[: 2 if args.smoke else 16], 3 if args.smoke else 12

    rows = []
    for i in range(iterations + 1):
        if i % (iterations // measured) == 0:
            rows.append({"iteration": i} | loop.evaluate(run, 1)[0] | {"spread": spread(run, prompts, samples)})
        if i < iterations:
            loop.iterate(run, i)
            run.iteration = i + 1
    return rows


def at_reward(rows: list[dict], mark: float) -> dict[str, float] | None:
    """Each spread over its start, where the reward, a mean of three, first reaches the mark; linear in between."""
    crossed = common.crossing(common.trailing([row["heldout_reward"] for row in rows]), mark)
    if crossed is None:
        return None
    i, w = crossed
    start, before, after = (rows[j]["spread"] for j in (0, i - 1, i))
    known = [k for k in start if start[k] and before[k] and after[k]]  # a prompt may have no two exact pictures
    return {k: ((1 - w) * before[k] + w * after[k]) / start[k] for k in known}


def draw(document: dict):
    """Spread against reward, a line per run; left all pictures, right those read exactly."""
    figure = plt.figure(figsize=(11, 4))
    for ax, space in zip(figure.subplots(1, 2, sharey=True), ("pixels", "pixels, exact")):
        for j, (arm, runs) in enumerate(document["runs"].items()):
            for k, rows in enumerate(runs):
                x = common.trailing([row["heldout_reward"] for row in rows])
                y = np.array([row["spread"][space] for row in rows], dtype=float) / rows[0]["spread"][space]
                ax.plot(x, y, "osD^v"[j] + "-", ms=4, color=common.COLOURS[j], label=arm if k == 0 else None)
        ax.axvline(document["mark"], color="k", lw=0.8, ls=":")
        ax.set(xlabel="held-out reward, mean of three evaluations", title=space)
    figure.axes[0].set_ylabel("distance between two pictures of a prompt,\nover the untrained model's")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right center")
    return figure


def main() -> None:
    """Train every arm and seed, print spread at equal reward, write the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(threads=2)
    parser.set_defaults(flags="--leaves 8 --prompts-per-iteration 8 --lr 1e-4 --lr-end 0 --eval-size 128")
    parser.add_argument("--seeds", type=int, nargs="*", default=[21, 22, 23], help="paired seeds")
    parser.add_argument("--iterations", type=int, default=128, help="of every run")
    args = parser.parse_args()
    arms, iterations, measured = ARMS, args.iterations, 8
    if args.smoke:
        args.seeds, iterations, measured = [0], 2, 2
        args.flags = "--leaves 8 --prompts-per-iteration 1 --lr 1e-4 --eval-size 4"
        arms = {arm: ARMS[arm] for arm in ("Eq. 5, tree", "endpoint, star")}

    runs = {arm: [] for arm in arms}
    with tqdm(total=len(arms) * len(args.seeds), desc="runs", file=sys.stderr) as bar:
        for seed in args.seeds:
            for arm in arms:
                key, work = f"{arm}, seed {seed}, {iterations}", (args, arm, seed, iterations, measured)
                runs[arm].append(common.kept(args, "spread", key, lambda work=work: learn(*work)))
                bar.update()

    # The mark: the highest reward that every run reaches.
    mark = min(max(common.trailing([row["heldout_reward"] for row in rows])) for own in runs.values() for rows in own)
    table, spaces = {}, ("pixels", "pixels, exact", "OCR outputs", "OCR outputs, exact")
    for arm, own in runs.items():
        reached = [at_reward(rows, mark) or {} for rows in own]
        table[arm] = {"per_seed": reached, "final_reward": [common.final_reward(rows) for rows in own]}
        table[arm]["minus_first"] = {}
        first = next(iter(table.values()))["per_seed"]  # Eq. 5's, which is subtracted seed by seed
        for space in spaces:
            values = [r[space] for r in reached if space in r]
            changes = [r[space] - f[space] for r, f in zip(reached, first) if space in r and space in f]
            table[arm][space] = common.interval(values) if values else None
            table[arm]["minus_first"][space] = common.interval(changes) if changes else None
            if values:
                print(f"{arm:<18}{space:<20}" + "{:.3f} [{:.3f}, {:.3f}]".format(*table[arm][space]), flush=True)
    common.finish("spread", args, {"mark": mark, "table": table, "runs": runs}, draw)


if __name__ == "__main__":
    main()
