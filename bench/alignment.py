"""How fast does each method learn? Held-out reward against policy seconds, evaluations and updates, paired over seeds.

Question    Which share of DanceGRPO's policy seconds (rollout and training) does BranchGRPO need to reach its final reward?
Hypothesis  At most a quarter: the tree shares prefixes, siblings share forwards, and credit arrives at every depth.
Metric      Policy seconds until the held-out reward (mean of the last three evaluations, linear between them) first reaches
            DanceGRPO's final one, over DanceGRPO's policy seconds; the same seed on both sides. The same over the seconds that
            DanceGRPO itself takes to its mark, which it may reach before its end (in the JSON). Seconds an update, the policy's and
            all (decoding and reward too), are measured alone, at the end. Beside it: final scores, the watched ones too, and the
            area under the curve against updates.
Rule        Same leaves, same updates, same prompts. Each arm runs at its own best eta and learning rate from one grid, chosen
            by successive halving on prompts that tuning does not train on and the test does not hold. Median over seeds and each seed's
            value are reported; a seed that never reaches the mark counts as "not reached".

    python bench/alignment.py            # 2.2 hours on 2 cores; resumes where it was stopped
    python bench/alignment.py --video --seeds 3 --iterations 48 --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4 4e-4 \\
        --flags "--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144"                                   # 1.2 hours
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import common
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

ARMS = {
    "DanceGRPO": "--method dancegrpo",
    "Flow-GRPO": "--method flowgrpo",
    "MixGRPO": "--method mixgrpo --mix",
    "BranchGRPO": "--method branchgrpo",
    "BranchGRPO + depth": "--method branchgrpo --depth-prune",
    "BranchGRPO + width": "--method branchgrpo --width-prune",
    "BranchGRPO-Mix": "--method branchgrpo-mix --mix",
    "BranchGRPO-Mix, splits alone": "--method branchgrpo-mix --mix 0",
    "BranchGRPO-Mix, splits alone, flash": "--method branchgrpo-mix --mix 0 --flash 3",
}
VIDEO_ARMS = ("BranchGRPO + depth", "BranchGRPO-Mix, splits alone", "BranchGRPO-Mix, splits alone, flash")
STEPS = "dance:0.8 dance:1.6 dance:2.4 cps:0.7"  # a wider search, dance .4 and cps .3, .5, .85 too, chose from these (LAB.md)


AXES = {  # of the curves
    "iteration": "updates",
    "nfe": "model evaluations",
    "seconds": "policy seconds: rollout, training",
    "all_seconds": "wall-clock: decoding and reward too, s",
}


def flags_of(setting: tuple) -> str:
    """A point of the grid as flags."""
    return " --sde {} --eta {} --lr {}".format(*setting)


def seconds_an_iteration(arms: list[str], tuned: dict, args, rounds: int = 3) -> dict[str, dict[str, list[float]]]:
    """Policy seconds (rollout and training) and all seconds an iteration of each arm alone, a value for each round.

    Means over its window's places but the first.
    """
    seconds = {arm: {"policy": [], "all": []} for arm in arms}
    for i in range(rounds):
        for arm in arms:
            flags = f"{ARMS[arm]}{flags_of(tuned[arm]['setting'])} --eval-size 8 --iterations 9"
            rows = common.train(args, args.out / f"time/{arm}-{i}".replace(" ", "_"), flags.split())
            seconds[arm]["policy"].append(float(np.mean([common.policy_seconds(row) for row in rows[2:]])))
            seconds[arm]["all"].append(float(np.mean([common.all_seconds(row) for row in rows[2:]])))
    return seconds


def curve(rows: list[dict], alone: dict[str, list[float]]) -> dict[str, list[float]]:
    """Every held-out score against updates, cumulated policy seconds, all seconds and model evaluations."""
    scores = [k for k in rows[0] if k.startswith("heldout_")]
    out = {k.removeprefix("heldout_"): [] for k in (*AXES, *scores)}
    policy, whole, nfe = float(np.median(alone["policy"])), float(np.median(alone["all"])), 0
    for row in rows:
        nfe += row.get("nfe", 0)
        if "heldout_reward" in row:
            n = row["iteration"]
            values = [n, nfe, n * policy, n * whole, *(row[k] for k in scores)]
            for key, value in zip(out, values):
                out[key].append(value)
    return out


def seconds_to(c: dict, mark: float) -> float | None:
    """Policy seconds until the trailing reward first reaches the mark, linear between evaluations; None if it never does."""
    reward = common.trailing(c["reward"])
    for i in range(1, len(reward)):
        a, b = reward[i - 1], reward[i]
        if b >= mark:
            share = 0.0 if a >= mark else (mark - a) / (b - a)
            return c["seconds"][i - 1] + share * (c["seconds"][i] - c["seconds"][i - 1])
    return None


def rungs(cells: int, iterations: int) -> list[tuple[int, int, int]]:
    """Successive halving by three: (cells, iterations of each, how many stay) of a fifth, two fifths and the whole length."""
    third, ninth = (min(cells, max(2, cells // n)) for n in (3, 9))
    lengths = [max(1, iterations * n // 5) for n in (1, 2, 5)]
    return [(cells, lengths[0], third), (third, lengths[1], ninth), (ninth, lengths[2], 1)]


def tune(arm: str, args, pool: ThreadPoolExecutor, bar: tqdm) -> dict:
    """The best cell of the grid on tuning prompts, by the mean of a run's last three evaluations; one that diverges is last.

    A grid of one cell is not searched.
    """
    if len(args.grid) == 1:
        return {"setting": args.grid[0], "grid": []}
    files = f"--prompts {args.out / 'tune_train.txt'} --eval-prompts {args.out / 'tune_heldout.txt'}"
    cells, record = args.grid, []
    for _, iterations, keep in rungs(len(cells), args.iterations):

        def cell(setting, iterations=iterations):
            flags = f"{ARMS[arm]}{flags_of(setting)} --seed 1000 {files} --iterations {iterations}"
            flags += f" --eval-every {max(3, iterations // 6)} --eval-size 96"
            name = "tune/{}/{}-{}-{}-{}".format(arm, iterations, *setting).replace(" ", "_")
            try:
                return common.final_reward(common.train(args, args.out / name, flags.split()))
            except common.Failed as error:
                tqdm.write(f"{arm} {setting}: {error}", file=sys.stderr)
                return None
            finally:
                bar.update()

        scores = list(pool.map(cell, cells))
        record.append({"iterations": iterations, "cells": [[*c, s] for c, s in zip(cells, scores)]})
        best = sorted(zip(scores, cells), key=lambda pair: -np.inf if pair[0] is None else pair[0], reverse=True)
        cells = [c for _, c in best[:keep]]
    return {"setting": cells[0], "grid": record}


def compare(results: dict) -> dict:
    """Each arm against DanceGRPO, the first, seed by seed: final scores, area, seconds an update, share of seconds to its mark."""
    table = {}
    for arm, arm_curves in results.items():
        row = {k: [] for k in ("final_reward", "area", "share_of_dance_seconds", "share_of_dance_to_its_mark")}
        for dance, mine in zip(results["DanceGRPO"], arm_curves):
            mark = common.trailing(dance["reward"])[-1]
            reached, its_own = seconds_to(mine, mark), seconds_to(dance, mark)
            row["share_of_dance_seconds"].append(None if reached is None else reached / dance["seconds"][-1])
            row["share_of_dance_to_its_mark"].append(reached / its_own if reached is not None and its_own else None)
            row["final_reward"].append(common.trailing(mine["reward"])[-1])
            row["area"].append(float(np.trapezoid(mine["reward"], mine["iteration"]) / mine["iteration"][-1]))
        for name, key in (("seconds_an_update", "seconds"), ("all_seconds_an_update", "all_seconds")):
            row[name] = arm_curves[0][key][-1] / arm_curves[0]["iteration"][-1]
        scores = [k for k in arm_curves[0] if k not in AXES and k != "reward"]
        row["final_scores"] = {k: [common.trailing(c[k])[-1] for c in arm_curves] for k in scores}
        median = float(np.median([x if x is not None else np.inf for x in row["share_of_dance_seconds"]]))
        table[arm] = row | {"median_share": median if np.isfinite(median) else None}
        first = table["DanceGRPO"]["final_reward"]
        table[arm]["final_minus_dance"] = common.interval(np.subtract(row["final_reward"], first))
    return table


def draw(document: dict):
    """Held-out reward, mean over seeds, against each axis; the last means minus DanceGRPO's, with their intervals."""
    figure = plt.figure(figsize=(13, 8.5))
    axes = list(figure.subplots(2, 3).flat)
    for n, (arm, curves) in enumerate(document["curves"].items()):
        look = {"color": common.COLOURS[n % len(common.COLOURS)], "ls": "-" if n < len(common.COLOURS) else "--"}
        y = np.array([c["reward"] for c in curves])
        for ax, (key, label) in zip(axes, AXES.items()):
            ax.fill_between(curves[0][key], y.min(0), y.max(0), color=look["color"], alpha=0.06, lw=0)
            ax.plot(curves[0][key], y.mean(0), **look, lw=2, label=arm)
            ax.set(xlabel=label, ylabel="held-out reward (band: range of seeds)")
        row, base = document["table"][arm], document["table"]["DanceGRPO"]
        mean, low, high = row["final_minus_dance"]
        for ax, key in zip(axes[4:], ("seconds_an_update", "all_seconds_an_update")):
            x, half = row[key] / base[key], [[mean - low], [high - mean]]
            ax.errorbar(x, mean, half, fmt="o", color=look["color"], capsize=3)
    for ax, seconds in zip(axes[4:], ("policy seconds", "wall-clock")):
        ax.set(xlabel=f"{seconds} an update, over DanceGRPO's", ylabel="final reward minus DanceGRPO's (95 %)")
        ax.set_xlim(0, None)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    return figure


def main() -> None:
    """Tune every arm, run every arm and seed, print the table; JSON, figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(flags="--leaves 8 --prompts-per-iteration 8 --lr-end 1")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds")
    parser.add_argument("--iterations", type=int, default=48, help="updates of every arm")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="DanceGRPO always; default: all, of video some")
    parser.add_argument("--steps", nargs="*", default=STEPS.split(), metavar="KIND:ETA", help="of the grid")
    parser.add_argument("--lrs", nargs="*", type=float, default=[5e-5, 1e-4, 2e-4], help="of the grid")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.iterations, args.steps, args.lrs, args.arms = 1, 2, ["cps:0.7"], [1e-4], [VIDEO_ARMS[1]]
        args.flags += " --eval-size 8 --leaves 4 --prompts-per-iteration 1"
    args.out = common.ROOT / ("runs/smoke" if args.smoke else "runs") / f"alignment{'_video' if args.video else ''}"
    args.grid = [(kind, float(eta), lr) for kind, eta in (x.split(":") for x in args.steps) for lr in args.lrs]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = (
        (common.ROOT / f"tiny/{'video' if args.video else 'prompts'}_train.txt").read_text().splitlines(keepends=True)
    )
    np.random.default_rng(0).shuffle(lines)
    n = min(256, len(lines) // 4)
    (args.out / "tune_train.txt").write_text("".join(lines[:-n]))
    (args.out / "tune_heldout.txt").write_text("".join(lines[-n:]))
    arms = list(dict.fromkeys(["DanceGRPO", *(args.arms or (VIDEO_ARMS if args.video else ARMS))]))
    total = len(arms) * (sum(n for n, *_ in rungs(len(args.grid), args.iterations) if len(args.grid) > 1) + args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=total, desc="runs", file=sys.stderr) as bar:
        tuned = {arm: tune(arm, args, pool, bar) for arm in arms}

        def final(task):
            seed, arm = task
            flags = f"{ARMS[arm]}{flags_of(tuned[arm]['setting'])} --seed {seed} --iterations {args.iterations}"
            flags += f" --eval-every {max(1, args.iterations // 12)}"
            rows = common.train(args, args.out / f"{arm}-{seed}".replace(" ", "_"), flags.split())
            bar.update()
            return rows

        tasks = [(seed, arm) for seed in range(1, args.seeds + 1) for arm in arms]
        runs = list(pool.map(final, tasks))
    alone = seconds_an_iteration(arms, tuned, args, 1 if args.smoke else 3)
    results = {arm: [curve(rows, alone[arm]) for (_, a), rows in zip(tasks, runs) if a == arm] for arm in arms}
    table = compare(results)
    table = {arm: row | {"raw_seconds_an_update": alone[arm]} for arm, row in table.items()}
    print(f"{'arm':<36} {'steps, eta, lr':>22} {'minus DanceGRPO':>28} {'s/update':>9} {'share of Dance seconds':>24}")
    for arm, row in table.items():
        share = "not reached" if row["median_share"] is None else f"{row['median_share']:.3f}"
        difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["final_minus_dance"])
        numbers = f"{difference:>28} {row['seconds_an_update']:9.3f} {share:>24}"
        print(f"{arm:<36} {' '.join(map(str, tuned[arm]['setting'])):>22} {numbers}")
    common.finish("alignment", args, {"tuned": tuned, "table": table, "curves": results}, draw)


if __name__ == "__main__":
    main()
