"""What does each method make of the same time? Held-out reward after equal rollout and training time, paired seeds.

Question    A tree saves time in every iteration. What does it learn with the time that it saves, and does another
            objective learn more from the same leaves?
Hypothesis  The endpoint objective on one split into eight, at a random step, reaches DanceGRPO's final reward in a
            tenth of its time, and ends above it when both have used the same time.
Metric      Time is the seconds of rollout, training and optimiser, measured alone on the machine before any run. The
            budget is that of --iterations iterations of DanceGRPO. For each seed: the held-out reward (mean of the last
            three evaluations) at the end of the budget; the same when decoding and rewards are counted too; the
            fraction of the budget until the reward first reaches DanceGRPO's final reward, and two thirds of its gain.
            An arm that stops early keeps its last reward from then on.
Rule        Same leaves, same prompts per iteration, one optimiser step per iteration, a rate that falls to 0 over the
            budget. Every arm takes as many iterations as fit into the budget. The kind of step is the one that
            alignment.py chose for that arm, from twelve; arms that it does not have take that of the nearest one. The
            learning rate is chosen here, for this budget: after a third of it (after all of it, if an arm stops
            early), on prompts that tuning does not train on and the test does not hold, with a seed that the test does
            not have. The median over seeds and the value of each seed are reported; a seed that never reaches the mark
            is "not reached". Rewards are told apart where the interval of their paired difference excludes 0.

    python bench/equal_time.py           # 3 hours on 2 cores; resumes where it was stopped
    python bench/equal_time.py --arms all

The second command takes all arms, 6.3 hours. A cheaper star with a warm-up, 50 minutes; and the comparison of video,
1.5 hours:

    python bench/equal_time.py --name equal_time_warmup \\
        --arms "DanceGRPO, warm-up" "endpoint, star, two-step tail, warm-up"
    python bench/equal_time.py --video --seeds 3 \\
        --arms "Mix, noise at the splits, flash" "endpoint, star at a random step" "nft, ODE"
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from alignment import seconds_to, tuning_prompts
from tqdm import tqdm

# Name -> flags of the forest and the objective. A star is one split into all leaves; its tail takes three second-order
# steps. Where nothing is random, in the walk of an ODE, no kind of step is given.
STAR = "--method branchgrpo-mix --mix 0 --splits 0 --branch 8 --flash 3 --sde cps --eta 0.7"
TREE = "--method branchgrpo-mix --mix 0 --flash 3 --sde cps --eta 0.7"
ARMS = {
    "DanceGRPO": "--method dancegrpo --sde dance --eta 0.8",
    "Flow-GRPO": "--method flowgrpo --sde dance --eta 0.8",
    "MixGRPO": "--method mixgrpo --mix --sde dance --eta 1.6",
    "BranchGRPO": "--method branchgrpo --sde dance --eta 1.6",
    "BranchGRPO + width": "--method branchgrpo --width-prune --sde cps --eta 0.7",
    "BranchGRPO + depth": "--method branchgrpo --depth-prune --sde dance --eta 0.8",
    "BranchGRPO-Mix": "--method branchgrpo-mix --mix --sde dance --eta 1.6",
    "Mix, noise at the splits, flash": TREE,
    "endpoint, star": f"{STAR} --objective endpoint",
    "endpoint, tree": f"{TREE} --objective endpoint",
    "endpoint, star at a random step": "--method tempflow --flash 3 --sde cps --eta 0.7 --objective endpoint",
    "elbo, ODE": "--method ode --flash 4 --objective elbo",
    "nft, ODE": "--method ode --flash 4 --objective nft",
    "elbo, tree": f"{TREE} --objective elbo",
    "nft, tree": f"{TREE} --objective nft",
    # A cheaper star whose rate rises first, beside DanceGRPO with the same rise.
    "DanceGRPO, warm-up": "--method dancegrpo --sde dance --eta 0.8 --lr-warmup 8",
    "endpoint, star, two-step tail, warm-up": "--method tempflow --flash 2 --sde cps --eta 0.7 --objective endpoint"
    " --lr-warmup 8",
}

# Arms that stop early, with a rate that is 0 by then: name -> the arm whose flags they have, fraction of the budget.
SHORTER = {
    "endpoint, star, a tenth of the time": ("endpoint, star at a random step", 1 / 10),
    "endpoint, star, a fifteenth of the time": ("endpoint, star at a random step", 1 / 15),
}
ARMS |= {arm: ARMS[whole] for arm, (whole, _) in SHORTER.items()}

# Those that are compared unless others are asked for: a baseline of each kind, each objective on its cheapest forest.
USUAL = ("MixGRPO", "BranchGRPO", "Mix, noise at the splits, flash", "endpoint, tree")
USUAL += ("endpoint, star at a random step", "elbo, ODE", "nft, ODE", *SHORTER)

# The figure shows these, where they were measured: arm -> index into common.COLOURS, line style, marker.
PANEL = {
    "DanceGRPO": (6, "-", "o"),
    "BranchGRPO": (0, "-.", "^"),
    "Mix, noise at the splits, flash": (1, (0, (6, 1, 1, 1, 1, 1)), "D"),
    "endpoint, star at a random step": (2, "--", "s"),
    "nft, ODE": (3, ":", "v"),
    "endpoint, star, a tenth of the time": (4, "-", "*"),
}


def evaluated_every(iterations: int) -> str:
    """At least twelve evaluations, and one every eight iterations, so that fast arms show when they reach the mark."""
    return f" --eval-every {max(1, min(8, iterations // 12))}"


# ----------------------------------------------------------------------------------------------------------------- time
def seconds_alone(arms: list[str], args) -> dict[str, dict[str, float]]:
    """Seconds per iteration of each arm, with nothing else running: medians of nine, see `common.in_turn`.

    Returns:
        arm -> "policy": rollout, training and optimiser; "all": decoding and rewards too.
    """
    rows = common.in_turn(args, {arm: f"{ARMS[arm]} --iterations 48" for arm in arms})
    kinds = {"policy": common.policy_seconds, "all": common.all_seconds}
    return {arm: {kind: float(np.median([*map(of, own)])) for kind, of in kinds.items()} for arm, own in rows.items()}


def horizons(seconds: dict[str, dict[str, float]], iterations: int) -> dict[str, int]:
    """Iterations that fit into the rollout and training time of DanceGRPO's `iterations`, or into a fraction of it."""
    budget = iterations * seconds["DanceGRPO"]["policy"]
    fraction = {arm: SHORTER[arm][1] if arm in SHORTER else 1 for arm in seconds}
    return {arm: max(1, int(fraction[arm] * budget / row["policy"])) for arm, row in seconds.items()}


# --------------------------------------------------------------------------------------------------------------- tuning
def tune(arm: str, n: int, args, pool: ThreadPoolExecutor, bar: tqdm) -> dict:
    """The best learning rate of an arm after a third of its n iterations, or after all if it stops early.

    Trials train and are evaluated on the tuning prompts.

    Returns:
        "lr", "iterations" of each trial, and "trials": (rate, reward), the reward None for one that diverged.
    """
    length = n if arm in SHORTER else max(1, n // 3)
    files = f"--prompts {args.out / 'tune_train.txt'} --eval-prompts {args.out / 'tune_heldout.txt'}"

    def reward_with(lr: float) -> float | None:
        flags = f"{ARMS[arm]} --lr {lr} --seed 1000 {files} --iterations {length} --eval-every {max(1, length // 6)}"
        return common.tried(args, args.out / common.file_name(f"tune/{arm}/{length}-{lr}"), flags, bar)

    trials = list(zip(args.lrs, pool.map(reward_with, args.lrs)))
    best = max(trials, key=lambda trial: -np.inf if trial[1] is None else trial[1])
    return {"lr": best[0], "iterations": length, "trials": trials}


# ----------------------------------------------------------------------------------------------------------- comparison
def curve(rows: list[dict], seconds: dict[str, float]) -> dict[str, list[float]]:
    """Held-out scores of one run at each evaluation, beside iteration, units, and both kinds of seconds."""
    scores = [k.removeprefix("heldout_") for k in rows[0] if k.startswith("heldout_")]
    out = {k: [] for k in ("iteration", "units", "seconds", "all_seconds", *scores)}
    units = 0
    for row in rows:
        units += row.get("units", 0)
        if "heldout_reward" in row:
            n = row["iteration"]
            values = [n, units, n * seconds["policy"], n * seconds["all"], *(row[f"heldout_{k}"] for k in scores)]
            for key, value in zip(out, values):
                out[key].append(value)
    return out


def reward_at(c: dict, axis: str, limit: float) -> float:
    """The reward, a mean of three evaluations, where an axis reaches `limit`; linear between evaluations."""
    return float(np.interp(limit, c[axis], common.trailing(c["reward"])))


def compare(curves: dict[str, list[dict]]) -> dict:
    """Each arm against DanceGRPO, seed by seed.

    Args:
        curves: arm -> one `curve` per seed, the same seeds in the same order for every arm.

    Returns:
        arm -> per seed "final" (reward at the end of the budget), "wall" (reward when as much time has passed as
        DanceGRPO's run took with decoding and rewards), "equal_updates" (reward after as many iterations as DanceGRPO
        makes), "to_final" and "to_two_thirds" (fractions of the budget, None where the mark is never reached), and of
        the first three the difference from DanceGRPO's with its 95 % interval; also the final value of every score.
    """
    table = {}
    for arm, own_curves in curves.items():
        keys = ("final", "wall", "equal_updates", "to_final", "to_two_thirds")
        row = {k: [] for k in keys}
        for dance, own in zip(curves["DanceGRPO"], own_curves):
            budget, last = dance["seconds"][-1], common.trailing(dance["reward"])[-1]
            row["final"].append(reward_at(own, "seconds", budget))
            row["wall"].append(reward_at(own, "all_seconds", dance["all_seconds"][-1]))
            row["equal_updates"].append(reward_at(own, "iteration", dance["iteration"][-1]))
            for key, mark in (("to_final", last), ("to_two_thirds", dance["reward"][0] / 3 + last * 2 / 3)):
                reached = seconds_to(own, mark)
                row[key].append(None if reached is None else reached / budget)
        scores = [k for k in own_curves[0] if k not in ("iteration", "units", "seconds", "all_seconds", "reward")]
        row["scores"] = {k: [common.trailing(c[k])[-1] for c in own_curves] for k in scores}
        table[arm] = row

    for row in table.values():
        for key in ("final", "wall", "equal_updates"):
            row[f"{key}_minus_dance"] = common.interval(np.subtract(row[key], table["DanceGRPO"][key]))
        for key in ("to_final", "to_two_thirds"):
            median = float(np.median([np.inf if x is None else x for x in row[key]]))
            row[f"median_{key}"] = median if np.isfinite(median) else None
    return table


def draw(document: dict):
    """Held-out reward against rollout and training time, mean over seeds; the band is its standard error."""
    figure = plt.figure(figsize=(8, 5))
    ax = figure.subplots()
    for arm, (colour, style, marker) in PANEL.items():
        if arm not in document["curves"]:
            continue
        curves = document["curves"][arm]
        rewards = np.array([common.trailing(c["reward"]) for c in curves])  # (seeds, evaluations)
        error = rewards.std(0, ddof=1) / len(rewards) ** 0.5 if len(rewards) > 1 else np.zeros(rewards.shape[1])
        mean, seconds = rewards.mean(0), curves[0]["seconds"]
        ax.fill_between(seconds, mean - error, mean + error, color=common.COLOURS[colour], alpha=0.15, lw=0)
        ax.plot(seconds, mean, ls=style, marker=marker, ms=4, lw=2, color=common.COLOURS[colour], label=arm)
    ax.set_xlabel("rollout and training time, in seconds")
    ax.set_ylabel("held-out reward, mean of three evaluations\n(mean over seeds, band: standard error)")
    ax.set_xlim(0, None)
    ax.legend(loc="lower right", handlelength=4)
    return figure


def show(table: dict, document: dict) -> None:
    """Print per arm its setting and its figures."""
    for arm, row in table.items():
        reached = [row["median_to_final"], row["median_to_two_thirds"]]
        shown = ["not reached" if x is None else f"{x:.3f}" for x in reached]
        difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["final_minus_dance"])
        print(
            f"{arm:<34}{document['tuned'][arm]['lr']:>8}{np.mean(row['final']):8.3f}{difference:>28}",
            *(f"{x:>12}" for x in shown),
        )


def main() -> None:
    """Time every arm alone, tune it for the budget, run every seed; print the table, write the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(flags="--leaves 8 --prompts-per-iteration 8 --lr-end 0 --eval-size 128")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds")
    parser.add_argument("--iterations", type=int, default=48, help="of DanceGRPO, whose time is the budget")
    parser.add_argument("--arms", nargs="*", choices=[*ARMS, "all"], default=USUAL, help="beside DanceGRPO")
    parser.add_argument("--lrs", nargs="*", type=float, default=[5e-5, 1e-4, 2e-4], help="to choose from")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.iterations, args.lrs, args.arms = 1, 2, [1e-4], ["endpoint, star"]
        args.flags = "--leaves 8 --prompts-per-iteration 1 --lr-end 0 --eval-size 8"

    args.out = common.ROOT / ("runs/smoke" if args.smoke else "runs") / f"equal_time{'_video' if args.video else ''}"
    args.out.mkdir(parents=True, exist_ok=True)
    tuning_prompts(args)
    torch.set_num_threads(args.threads)

    # DanceGRPO is always there, and first: its time is the budget.
    arms = list(dict.fromkeys(["DanceGRPO", *(ARMS if "all" in args.arms else args.arms)]))
    timed = list(dict.fromkeys(SHORTER[arm][0] if arm in SHORTER else arm for arm in arms))
    seconds = common.kept(args, "equal_time", f"seconds of {', '.join(timed)}", lambda: seconds_alone(timed, args))
    seconds |= {arm: seconds[SHORTER[arm][0]] for arm in arms if arm in SHORTER}
    n = horizons(seconds, args.iterations)
    for arm in arms:
        print(f"{arm:<34}{seconds[arm]['policy']:8.3f} s per iteration, {n[arm]} iterations", flush=True)

    total = len(arms) * (args.seeds + len(args.lrs))
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=total, desc="runs", file=sys.stderr) as bar:
        tuned = {arm: tune(arm, n[arm], args, pool, bar) for arm in arms}

        def final(task) -> list[dict]:
            # One run of the comparison.
            seed, arm = task
            flags = f"{ARMS[arm]} --lr {tuned[arm]['lr']} --seed {seed} --iterations {n[arm]}"
            flags += evaluated_every(n[arm])
            rows = common.train(args, args.out / common.file_name(f"{arm}-{seed}"), flags.split())
            bar.update()
            return rows

        tasks = [(seed, arm) for seed in range(1, args.seeds + 1) for arm in arms]
        runs = list(pool.map(final, tasks))

    curves = {arm: [curve(rows, seconds[arm]) for (_, a), rows in zip(tasks, runs) if a == arm] for arm in arms}
    document = {"tuned": tuned, "seconds": seconds, "iterations": n, "table": compare(curves), "curves": curves}
    show(document["table"], document)
    common.finish("equal_time", args, document, draw)


if __name__ == "__main__":
    main()
