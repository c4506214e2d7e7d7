"""How fast does each method learn? Held-out reward against rollout and training time, paired over seeds.

Question    Which fraction of DanceGRPO's rollout and training time does BranchGRPO need to reach DanceGRPO's final
            reward?
Hypothesis  At most a quarter: the tree shares prefixes, siblings share forwards, and credit arrives at every depth.
Metric      Rollout and training time is the seconds of rollout, training and optimiser; decoding and reward are
            apart. For each seed: the time until the held-out reward (mean of the last three evaluations, linear
            between them) first reaches the final reward of DanceGRPO with the same seed, over the time of DanceGRPO's
            whole run. The JSON also has it over the time at which DanceGRPO itself first reached that mark, which may
            be before its end. Beside it stand the final reward and every watched score, the area under the curve of
            reward against iterations, and the seconds per iteration, with and without decoding and reward. Those
            seconds are measured alone on the machine, after all runs.
Rule        Same leaves, same number of iterations (one optimiser update per iteration), same prompts. Each arm runs
            at its own best noise strength eta and learning rate from one grid. They are chosen by successive halving
            on prompts that tuning does not train on and that the test does not hold. The median over seeds and the
            value of each seed are reported; a seed that never reaches the mark counts as "not reached". Final rewards
            are told apart where the interval of their paired difference excludes 0.

    python bench/alignment.py            # 2.2 hours on 2 cores; resumes where it was stopped

The comparison of video methods, 1.1 hours:

    python bench/alignment.py --video --seeds 3 --iterations 48 \\
        --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4 4e-4 \\
        --flags "--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144"
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import common
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# Name -> flags. The names are keys of the JSON, so they stay as they were when it was measured: "splits alone" means
# noise at the splits only, "flash" a tail of second-order steps, "depth" and "width" the two kinds of pruning.
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

# A wider search, with dance at 0.4 and cps at 0.3, 0.5 and 0.85 too, chose these (LAB.md).
STEPS = "dance:0.8 dance:1.6 dance:2.4 cps:0.7"

# What a curve is measured against: iterations, model evaluations, rollout and training time, time of everything.
AXES = ("iteration", "nfe", "seconds", "all_seconds")

# The figure shows the first four of these that were measured: more cannot be told apart in one panel.
# Arm -> label, index into common.COLOURS, line style and marker, so that the lines differ without their colours too.
LONG_NAME = "BranchGRPO-Mix, noise at the splits only"
PANEL = {
    "DanceGRPO": ("DanceGRPO", 6, "-", "o"),
    "MixGRPO": ("MixGRPO", 2, "--", "s"),
    "BranchGRPO": ("BranchGRPO", 0, "-.", "^"),
    "BranchGRPO-Mix, splits alone, flash": (f"{LONG_NAME}, flash tail", 1, (0, (6, 1, 1, 1, 1, 1)), "D"),
    "BranchGRPO-Mix, splits alone": (LONG_NAME, 3, ":", "v"),
    "BranchGRPO + depth": ("BranchGRPO, depth pruning", 0, "-.", "^"),
}


def flags_of(setting: tuple) -> str:
    """The flags of one point of the grid: kind of step, noise strength eta, learning rate."""
    return " --sde {} --eta {} --lr {}".format(*setting)


def seconds_an_iteration(arms: list[str], tuned: dict, args, rounds: int = 3) -> dict[str, dict[str, list[float]]]:
    """Seconds per iteration of each arm, measured with nothing else running.

    Args:
        arms: names in ARMS.
        tuned: arm -> what `tune` returned; the arm runs at its own best setting.
        args: of the command line.
        rounds: how often every arm is timed.

    Returns:
        arm -> "policy" (rollout, training and optimiser) and "all" (decoding and reward too) -> one value per round.
    """
    seconds = {arm: {"policy": [], "all": []} for arm in arms}

    # The arms take turns, so that a slow spell of the machine falls on all of them and not on one.
    for i in range(rounds):
        for arm in arms:
            # In nine iterations a sliding window visits all its places, which do not cost the same.
            flags = f"{ARMS[arm]}{flags_of(tuned[arm]['setting'])} --eval-size 8 --iterations 9"
            rows = common.train(args, args.out / f"time/{arm}-{i}".replace(" ", "_"), flags.split())

            # Row 0 is the evaluation before training, row 1 the iteration that warms caches up.
            seconds[arm]["policy"].append(float(np.mean([common.policy_seconds(row) for row in rows[2:]])))
            seconds[arm]["all"].append(float(np.mean([common.all_seconds(row) for row in rows[2:]])))
    return seconds


def curve(rows: list[dict], alone: dict[str, list[float]]) -> dict[str, list[float]]:
    """The learning curve of one run: every held-out score against each of AXES.

    Args:
        rows: the run's metrics.
        alone: seconds per iteration of its arm, from `seconds_an_iteration`.

    Returns:
        Name of an axis or a score -> one value per evaluation.
    """
    scores = [k for k in rows[0] if k.startswith("heldout_")]
    out = {k.removeprefix("heldout_"): [] for k in (*AXES, *scores)}

    # The runs shared the machine with each other, so their own clocks say little; time is what it is alone.
    policy, whole, nfe = float(np.median(alone["policy"])), float(np.median(alone["all"])), 0

    for row in rows:
        # Model evaluations are counted in every iteration, also where nothing is evaluated.
        nfe += row.get("nfe", 0)

        if "heldout_reward" in row:
            # The order is that of AXES, then that of the scores.
            n = row["iteration"]
            values = [n, nfe, n * policy, n * whole, *(row[k] for k in scores)]
            for key, value in zip(out, values):
                out[key].append(value)
    return out


def seconds_to(c: dict, mark: float) -> float | None:
    """Rollout and training time until the reward first reaches the mark; None if it never does.

    The reward is the mean of the last three evaluations, so that a lucky one does not count, and linear between two
    evaluations: from 1.0 at 10 s to 2.0 at 20 s, a mark of 1.5 is reached at 15 s.
    """
    crossed = common.crossing(common.trailing(c["reward"]), mark)
    if crossed is None:
        return None
    i, fraction = crossed
    return c["seconds"][i - 1] + fraction * (c["seconds"][i] - c["seconds"][i - 1])


def rungs(cells: int, iterations: int) -> list[tuple[int, int, int]]:
    """The plan of successive halving, which keeps a third of the cells twice: bad ones are dropped after short runs.

    Of 12 cells and 48 iterations: all 12 run for 9, the best 4 for 19, the best 2 for 48.

    Returns:
        Three rungs of (cells that run, iterations of each, cells that stay).
    """
    third, ninth = (min(cells, max(2, cells // n)) for n in (3, 9))
    lengths = [max(1, iterations * n // 5) for n in (1, 2, 5)]
    return [(cells, lengths[0], third), (third, lengths[1], ninth), (ninth, lengths[2], 1)]


def tune(arm: str, args, pool: ThreadPoolExecutor, bar: tqdm) -> dict:
    """The best cell of the grid for one arm, by its final reward on tuning prompts. A grid of one cell is not searched.

    Returns:
        "setting": (kind of step, eta, learning rate); "grid": per rung its iterations and its cells with their rewards,
        None for a run that diverged.
    """
    if len(args.grid) == 1:
        return {"setting": args.grid[0], "grid": []}

    # Tuning prompts are neither trained on nor tested on: an arm must not choose its setting on the test.
    files = f"--prompts {args.out / 'tune_train.txt'} --eval-prompts {args.out / 'tune_heldout.txt'}"
    cells, record = args.grid, []

    for _, iterations, keep in rungs(len(cells), args.iterations):

        def cell(setting, iterations=iterations):
            # One seed, which no run of the comparison has.
            flags = f"{ARMS[arm]}{flags_of(setting)} --seed 1000 {files} --iterations {iterations}"
            flags += f" --eval-every {max(3, iterations // 6)} --eval-size 96"
            name = "tune/{}/{}-{}-{}-{}".format(arm, iterations, *setting).replace(" ", "_")

            # A setting that diverges is no error of the benchmark: it ranks last.
            return common.tried(args, args.out / name, flags, bar)

        # All cells of the rung, several at once.
        scores = list(pool.map(cell, cells))
        record.append({"iterations": iterations, "cells": [[*c, s] for c, s in zip(cells, scores)]})

        # The best go on to longer runs.
        best = sorted(zip(scores, cells), key=lambda pair: -np.inf if pair[0] is None else pair[0], reverse=True)
        cells = [c for _, c in best[:keep]]
    return {"setting": cells[0], "grid": record}


def compare(results: dict) -> dict:
    """Each arm against DanceGRPO, seed by seed.

    Args:
        results: arm -> one `curve` per seed, the same seeds in the same order for every arm; DanceGRPO is the first.

    Returns:
        arm -> final rewards, areas and times per seed, seconds per iteration, and the final reward minus DanceGRPO's
        with its 95 % interval. "share_of_dance_seconds" is the time to DanceGRPO's final reward over the time of
        DanceGRPO's whole run, "share_of_dance_to_its_mark" the same over the time at which DanceGRPO first reached it;
        both are None where the arm never reaches it.
    """
    table = {}
    for arm, arm_curves in results.items():
        row = {k: [] for k in ("final_reward", "area", "share_of_dance_seconds", "share_of_dance_to_its_mark")}

        for dance, own in zip(results["DanceGRPO"], arm_curves):
            # The mark is DanceGRPO's final reward with the same seed: prompts and noises are the same on both sides.
            mark = common.trailing(dance["reward"])[-1]
            reached, dance_reached = seconds_to(own, mark), seconds_to(dance, mark)
            row["share_of_dance_seconds"].append(None if reached is None else reached / dance["seconds"][-1])
            row["share_of_dance_to_its_mark"].append(
                reached / dance_reached if reached is not None and dance_reached else None
            )

            # The final reward, and the mean reward over the iterations, which also sees how fast it came.
            row["final_reward"].append(common.trailing(own["reward"])[-1])
            row["area"].append(float(np.trapezoid(own["reward"], own["iteration"]) / own["iteration"][-1]))

        # Every seed of an arm has the same seconds per iteration, so the first curve gives them.
        for name, key in (("seconds_an_update", "seconds"), ("all_seconds_an_update", "all_seconds")):
            row[name] = arm_curves[0][key][-1] / arm_curves[0]["iteration"][-1]

        # Each score that the reward is made of or that is only watched.
        scores = [k for k in arm_curves[0] if k not in AXES and k != "reward"]
        row["final_scores"] = {k: [common.trailing(c[k])[-1] for c in arm_curves] for k in scores}

        # A seed that never reaches the mark counts as infinitely late, so the median may not exist.
        median = float(np.median([x if x is not None else np.inf for x in row["share_of_dance_seconds"]]))
        table[arm] = row | {"median_share": median if np.isfinite(median) else None}

        # Paired by seed: what two arms of one seed have in common falls out of the difference.
        first = table["DanceGRPO"]["final_reward"]
        table[arm]["final_minus_dance"] = common.interval(np.subtract(row["final_reward"], first))
    return table


def draw(document: dict):
    """One panel: held-out reward against rollout and training time, mean over seeds; the band is its standard error."""
    figure = plt.figure(figsize=(8, 5))
    ax = figure.subplots()
    arms = [arm for arm in PANEL if arm in document["curves"]][:4]

    for arm in arms:
        label, colour, style, marker = PANEL[arm]
        curves = document["curves"][arm]

        # The axis holds the same seconds for every seed, so rewards are averaged point by point.
        seconds = np.array(curves[0]["seconds"])
        rewards = np.array([c["reward"] for c in curves])  # (seeds, evaluations)
        mean = rewards.mean(0)

        # The spread of the mean; of one seed there is none.
        error = rewards.std(0, ddof=1) / len(rewards) ** 0.5 if len(rewards) > 1 else np.zeros_like(mean)

        look = {"color": common.COLOURS[colour], "zorder": 3 + len(arms) - arms.index(arm)}
        ax.fill_between(seconds, mean - error, mean + error, color=common.COLOURS[colour], alpha=0.15, lw=0)
        ax.plot(seconds, mean, ls=style, marker=marker, ms=4, lw=2, label=label, **look)

    # All arms take the same number of iterations, so a curve that ends further left was cheaper.
    seeds, iterations = len(curves), curves[0]["iteration"][-1]
    ax.set_xlabel(f"rollout and training time of {iterations} iterations, in seconds")
    ax.set_ylabel(f"held-out reward\n(mean of {seeds} seeds, band: standard error)")
    ax.set_xlim(0, None)
    ax.legend(loc="lower right", handlelength=4)
    return figure


def tuning_prompts(args) -> None:
    """Splits the training prompts, shuffled, into those that tuning trains on and those that it evaluates on."""
    path = common.ROOT / f"tiny/{'video' if args.video else 'prompts'}_train.txt"
    lines = path.read_text().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(lines)

    n = min(256, len(lines) // 4)
    (args.out / "tune_train.txt").write_text("".join(lines[:-n]))
    (args.out / "tune_heldout.txt").write_text("".join(lines[-n:]))


def show(table: dict, tuned: dict) -> None:
    """Prints per arm its best setting, final reward minus DanceGRPO's, seconds per iteration and time to the mark."""
    print(f"{'arm':<36} {'step, eta, lr':>22} {'minus DanceGRPO':>28} {'s/iter':>9} {'fraction of Dance time':>24}")
    for arm, row in table.items():
        fraction = "not reached" if row["median_share"] is None else f"{row['median_share']:.3f}"
        difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["final_minus_dance"])
        numbers = f"{difference:>28} {row['seconds_an_update']:9.3f} {fraction:>24}"
        print(f"{arm:<36} {' '.join(map(str, tuned[arm]['setting'])):>22} {numbers}")


def main() -> None:
    """Tunes every arm, runs every arm and seed, times every arm; prints the table, writes the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(flags="--leaves 8 --prompts-per-iteration 8 --lr-end 1")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds")
    parser.add_argument("--iterations", type=int, default=48, help="of every arm")
    parser.add_argument(
        "--arms", nargs="*", choices=list(ARMS), help="arms beside DanceGRPO; default: all, of video three"
    )
    parser.add_argument("--steps", nargs="*", default=STEPS.split(), metavar="KIND:ETA", help="of the grid")
    parser.add_argument("--lrs", nargs="*", type=float, default=[5e-5, 1e-4, 2e-4], help="of the grid")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.iterations, args.steps, args.lrs, args.arms = 1, 2, ["cps:0.7"], [1e-4], [VIDEO_ARMS[1]]
        args.flags += " --eval-size 8 --leaves 4 --prompts-per-iteration 1"

    # Where runs are kept, the grid, and the prompts that tuning may see.
    args.out = common.ROOT / ("runs/smoke" if args.smoke else "runs") / f"alignment{'_video' if args.video else ''}"
    args.grid = [(kind, float(eta), lr) for kind, eta in (x.split(":") for x in args.steps) for lr in args.lrs]
    args.out.mkdir(parents=True, exist_ok=True)
    tuning_prompts(args)

    # DanceGRPO is always there, and first: `compare` measures the others by it.
    arms = list(dict.fromkeys(["DanceGRPO", *(args.arms or (VIDEO_ARMS if args.video else ARMS))]))
    total = len(arms) * (sum(n for n, *_ in rungs(len(args.grid), args.iterations) if len(args.grid) > 1) + args.seeds)

    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=total, desc="runs", file=sys.stderr) as bar:
        # One arm after the other; the cells of a rung run at once.
        tuned = {arm: tune(arm, args, pool, bar) for arm in arms}

        def final(task):
            # One run of the comparison, evaluated a dozen times.
            seed, arm = task
            flags = f"{ARMS[arm]}{flags_of(tuned[arm]['setting'])} --seed {seed} --iterations {args.iterations}"
            flags += f" --eval-every {max(1, args.iterations // 12)}"
            rows = common.train(args, args.out / f"{arm}-{seed}".replace(" ", "_"), flags.split())
            bar.update()
            return rows

        tasks = [(seed, arm) for seed in range(1, args.seeds + 1) for arm in arms]
        runs = list(pool.map(final, tasks))

    # Seconds are measured last, when nothing else runs, and give every curve its axes of time.
    alone = seconds_an_iteration(arms, tuned, args, 1 if args.smoke else 3)
    results = {arm: [curve(rows, alone[arm]) for (_, a), rows in zip(tasks, runs) if a == arm] for arm in arms}
    table = compare(results)
    table = {arm: row | {"raw_seconds_an_update": alone[arm]} for arm, row in table.items()}

    show(table, tuned)
    common.finish("alignment", args, {"tuned": tuned, "table": table, "curves": results}, draw)


if __name__ == "__main__":
    main()
