"""How fast does each method learn? Held-out reward against policy seconds, evaluations and updates, paired over seeds.

Question    Which share of DanceGRPO's policy seconds (rollout and training) does BranchGRPO need to reach its final reward?
Hypothesis  At most a quarter: the tree shares prefixes, siblings share forwards, and credit arrives at every depth.
Metric      Policy seconds until the held-out reward (linear between evaluations) first reaches DanceGRPO's final one, over
            DanceGRPO's policy seconds; the same seed on both sides. DanceGRPO's final reward is the mean of its last
            three evaluations of that seed, so that one lucky evaluation does not set the mark. Seconds an update are measured
            alone, at the end. Beside it: final scores, the watched ones too, and the area under the curve against updates.
Rule        Same leaves, same updates, same prompts. Each arm runs at its own best eta and learning rate from one grid, chosen
            by successive halving on prompts that are neither trained on nor tested on. Median over seeds and each seed's
            value are reported; a seed that never reaches the mark counts as "not reached".

    python bench/alignment.py            # 1.5 hours on 2 cores; resumes where it was stopped
    python bench/alignment.py --video --seeds 3 --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4 4e-4 --finalists 2 \\
        --flags "--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144"                                   # 1.5 hours
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import common
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

ARMS = {
    "DanceGRPO": "--method dancegrpo",
    "BranchGRPO": "--method branchgrpo",
    "BranchGRPO + depth": "--method branchgrpo --depth-prune",
    "BranchGRPO + width": "--method branchgrpo --width-prune",
    "BranchGRPO-Mix": "--method branchgrpo-mix --mix",
    "BranchGRPO-Mix, splits alone": "--method branchgrpo-mix --mix 0",
    "BranchGRPO-Mix, splits alone, flash": "--method branchgrpo-mix --mix 0 --flash 3",
}
CHOSEN = ("BranchGRPO + depth", "BranchGRPO-Mix", "BranchGRPO-Mix, splits alone", "BranchGRPO-Mix, splits alone, flash")
STEPS = "dance:0.4 dance:0.8 dance:1.6 dance:2.4 cps:0.3 cps:0.5 cps:0.7 cps:0.85"


def flags_of(setting: tuple) -> str:
    """A point of the grid as flags."""
    return " --sde {} --eta {} --lr {}".format(*setting)


def seconds_an_iteration(arms: list[str], tuned: dict, o, rounds: int = 3) -> dict[str, float]:
    """Policy seconds (rollout and training) an iteration of each arm alone, over a whole sweep of its window; median of rounds."""
    seconds = {arm: [] for arm in arms}
    for i in range(rounds):
        for arm in arms:
            flags = f"{ARMS[arm]}{flags_of(tuned[arm]['setting'])} --eval-size 8 --iterations 9"
            rows = common.train(o, o.out / f"time/{arm}-{i}".replace(" ", "_"), flags.split())
            seconds[arm].append(np.mean([common.policy_seconds(row) for row in rows[2:]]))
    return {arm: float(np.median(values)) for arm, values in seconds.items()}


def curve(rows: list[dict], an_iteration: float = 0.0) -> dict[str, list[float]]:
    """Every held-out score against cumulated policy seconds, model evaluations and updates."""
    scores = [k for k in rows[0] if k.startswith("heldout_")]
    out = {k.removeprefix("heldout_"): [] for k in ("iteration", "seconds", "nfe", *scores)}
    nfe = 0
    for row in rows:
        nfe += row.get("nfe", 0)
        if "heldout_reward" in row:
            values = [row["iteration"], row["iteration"] * an_iteration, nfe, *(row[k] for k in scores)]
            for key, value in zip(out, values):
                out[key].append(value)
    return out


def seconds_to(c: dict, mark: float) -> float | None:
    """Policy seconds until the reward first reaches the mark, linear between evaluations; None if it never does."""
    for i in range(1, len(c["reward"])):
        a, b = c["reward"][i - 1], c["reward"][i]
        if b >= mark:
            share = 0.0 if a >= mark else (mark - a) / (b - a)
            return c["seconds"][i - 1] + share * (c["seconds"][i] - c["seconds"][i - 1])
    return None


def tune(arm: str, o, pool: ThreadPoolExecutor, bar: tqdm) -> dict:
    """Successive halving over the grid on tuning prompts: all cells for a third, the best at full length."""
    files = f"--prompts {o.out / 'tune_train.txt'} --eval-prompts {o.out / 'tune_heldout.txt'}"
    cells, record = o.grid, []
    for iterations, keep in ((max(1, o.iterations // 3), o.finalists), (o.iterations, 1)):

        def cell(setting, iterations=iterations):
            flags = f"{ARMS[arm]}{flags_of(setting)} --seed 1000 {files} --iterations {iterations}"
            flags += f" --eval-every {max(1, iterations // 2)}"
            name = "tune/{}/{}-{}-{}-{}".format(arm, iterations, *setting).replace(" ", "_")
            rows = common.train(o, o.out / name, flags.split())
            bar.update()
            return curve(rows)["reward"][-1]

        scores = list(pool.map(cell, cells))
        record.append({"iterations": iterations, "cells": [[*c, s] for c, s in zip(cells, scores)]})
        cells = [c for _, c in sorted(zip(scores, cells), reverse=True)[:keep]]
    return {"setting": cells[0], "grid": record}


def compare(results: dict, seeds: list[int]) -> dict:
    """Each arm against DanceGRPO, seed by seed: final scores, area, seconds an update, share of seconds to its mark."""
    table = {}
    for arm, arm_curves in results.items():
        shares, finals, per_update, areas = [], [], [], []
        for s in range(len(seeds)):
            dance, mine = results["DanceGRPO"][s], arm_curves[s]
            reached = seconds_to(mine, float(np.mean(dance["reward"][-3:])))
            shares.append(None if reached is None else reached / dance["seconds"][-1])
            finals.append(float(np.mean(mine["reward"][-3:])))
            per_update.append(mine["seconds"][-1] / mine["iteration"][-1])
            areas.append(float(np.trapezoid(mine["reward"], mine["iteration"]) / mine["iteration"][-1]))
        found = [x if x is not None else np.inf for x in shares]
        median = float(np.median(found))
        table[arm] = {
            "final_reward": finals,
            "final_scores": {k: [float(np.mean(c[k][-3:])) for c in arm_curves] for k in list(arm_curves[0])[4:]},
            "area": areas,
            "seconds_an_update": per_update,
            "share_of_dance_seconds": shares,
            "median_share": median if np.isfinite(median) else None,
        }
    return table


def draw(document: dict):
    """Held-out reward against updates, model evaluations and policy seconds: mean over seeds, and their range."""
    figure = plt.figure(figsize=(13, 4))
    axes = figure.subplots(1, 3, sharey=True)
    for ax, key, label in zip(
        axes, ("iteration", "nfe", "seconds"), ("updates", "model evaluations", "policy seconds")
    ):
        for (arm, curves), colour in zip(document["curves"].items(), common.COLOURS):
            x, y = curves[0][key], np.array([c["reward"] for c in curves])
            ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
            ax.plot(x, y.mean(0), color=colour, label=arm)
        ax.set_xlabel(label)
    axes[0].set_ylabel("held-out reward (mean and range of seeds)")
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Tune every arm, run every arm and seed, print the table; JSON, figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(flags="--leaves 8 --prompts-per-iteration 8 --lr-end 1")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds")
    parser.add_argument("--iterations", type=int, default=60, help="updates of every arm")
    parser.add_argument("--arms", nargs="*", default=list(CHOSEN), choices=list(ARMS), help="DanceGRPO is always run")
    parser.add_argument("--steps", nargs="*", default=STEPS.split(), metavar="KIND:ETA", help="of the grid")
    parser.add_argument("--lrs", nargs="*", type=float, default=[5e-5, 1e-4, 2e-4], help="of the grid")
    parser.add_argument("--finalists", type=int, default=4, help="cells of the grid that run at full length")
    o = parser.parse_args()
    if o.smoke:
        o.seeds, o.iterations, o.steps, o.lrs, o.arms = 1, 2, ["cps:0.7"], [1e-4], [CHOSEN[2]]
        o.flags += " --eval-size 8 --leaves 4 --prompts-per-iteration 1"
    o.out = common.ROOT / ("runs/smoke" if o.smoke else "runs") / f"alignment{'_video' if o.video else ''}"
    o.grid = [(kind, float(eta), lr) for kind, eta in (x.split(":") for x in o.steps) for lr in o.lrs]
    o.out.mkdir(parents=True, exist_ok=True)
    lines = (common.ROOT / f"tiny/{'video' if o.video else 'prompts'}_train.txt").read_text().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(lines)
    n = min(256, len(lines) // 4)
    (o.out / "tune_train.txt").write_text("".join(lines[:-n]))
    (o.out / "tune_heldout.txt").write_text("".join(lines[-n:]))
    arms = list(dict.fromkeys(["DanceGRPO", *o.arms]))
    total = len(arms) * (len(o.grid) + min(o.finalists, len(o.grid)) + o.seeds)
    with ThreadPoolExecutor(o.jobs) as pool, tqdm(total=total, desc="runs", file=sys.stderr) as bar:
        tuned = {arm: tune(arm, o, pool, bar) for arm in arms}

        def final(task):
            seed, arm = task
            flags = f"{ARMS[arm]}{flags_of(tuned[arm]['setting'])} --seed {seed} --iterations {o.iterations}"
            flags += f" --eval-every {max(1, o.iterations // 12)}"
            rows = common.train(o, o.out / f"{arm}-{seed}".replace(" ", "_"), flags.split())
            bar.update()
            return rows

        tasks = [(seed, arm) for seed in range(1, o.seeds + 1) for arm in arms]
        runs = list(pool.map(final, tasks))
    alone = seconds_an_iteration(arms, tuned, o, 1 if o.smoke else 3)
    results = {arm: [curve(rows, alone[arm]) for (_, a), rows in zip(tasks, runs) if a == arm] for arm in arms}
    table = compare(results, list(range(o.seeds)))
    print(f"{'arm':<36} {'steps, eta, lr':>22} {'reward':>8} {'s/update':>9} {'share of Dance seconds':>24}")
    for arm, row in table.items():
        share = "not reached" if row["median_share"] is None else f"{row['median_share']:.3f}"
        numbers = f"{np.mean(row['final_reward']):8.3f} {np.mean(row['seconds_an_update']):9.3f} {share:>24}"
        print(f"{arm:<36} {' '.join(map(str, tuned[arm]['setting'])):>22} {numbers}")
    common.finish("alignment", o, {"tuned": tuned, "table": table, "curves": results}, draw)


if __name__ == "__main__":
    main()
