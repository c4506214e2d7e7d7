"""Does a larger tree learn more? The paper's scaling law: branch factor and number of splits.

Question    What are the final held-out reward and the seconds per iteration for K = 2, 3, 4 with four splits, and for
            3, 4, 5 splits with K = 2?
Hypothesis  More leaves learn more per update. Time grows with the forwards of the tree, and stays far below that of
            DanceGRPO at equal leaves.
Metric      Reward after the same number of updates, and after the same wall-clock time: cheap arms take more updates,
            so that all are still training when the time is up. Wall-clock time is rollout, decoding, reward and
            training, measured alone. Beside it, rollout and training time per iteration over DanceGRPO's at equal
            leaves. The law reward = a + b log2(leaves) is fitted to each seed, with the interval of b over seeds: for
            K, for the splits, and for all arms together. There is one learning rate for all arms.
Rule        The law holds where the interval of b excludes 0.

    python bench/scaling.py              # 25 minutes on 2 cores
"""

import common
import matplotlib.pyplot as plt
import numpy as np

import loop
from schedules import schedule_of
from tree import count

ARMS = {  # name -> branch, splits
    "K = 2, 3 splits": (2, "0,2,4"),
    "K = 2, 4 splits": (2, "0,1,3,4"),
    "K = 2, 5 splits": (2, "0,1,2,3,4"),
    "K = 3, 4 splits": (3, "0,1,3,4"),
    "K = 4, 4 splits": (4, "0,1,3,4"),
}
SWEEPS = {  # sweep -> the arms that the law is fitted to
    "K": [name for name in ARMS if name.endswith("4 splits")],
    "splits": [name for name in ARMS if name.startswith("K = 2")],
    "all": list(ARMS),
}
UNITS = 17_000  # per prompt; a unit is the cost of one forward. Larger arms spend a few updates more


def updates_of(args, flags: str, at_least: int) -> int:
    """Return how many updates an arm takes: `at_least`, or as many as UNITS allow; a trained parent is three units."""
    counts = count(schedule_of(common.job(args, flags)[0], 0).forest)
    return max(at_least, round(UNITS / (counts["forwards"] + 3 * counts["trained_parents"])))


def curve(rows: list[dict]) -> list[tuple[int, float]]:
    """Return (updates, held-out reward) of every evaluation."""
    return [(row["iteration"], row["heldout_reward"]) for row in rows if "heldout_reward" in row]


def fitted(rows: dict, key: str, seeds: int) -> dict:
    """Fit reward = a + b log2(leaves) for every sweep and seed: sweep -> [b, a] of each seed.

    Args:
        rows: arm -> its leaves, and under `key` its reward for each seed.
        key: which reward, that at equal updates or that at equal time.
        seeds: how many there are.
    """
    laws = {}
    for sweep, names in SWEEPS.items():
        arms = [rows[name] for name in names if name in rows]
        x = np.log2([arm["leaves"] for arm in arms])
        laws[sweep] = [np.polyfit(x, [arm[key][s] for arm in arms], 1).tolist() for s in range(seeds) if len(arms) > 1]
    return {sweep: law for sweep, law in laws.items() if law}  # a smoke run has too few arms for some


def draw(document: dict):
    """Draw reward against leaves with the fitted law, and rollout and training time beside DanceGRPO's."""
    rows, figure = list(document["rows"].values()), plt.figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    leaves = np.array([row["leaves"] for row in rows])

    # The two kinds of reward are shifted apart by 2 % to either side, so that their intervals do not overlap.
    for key, label, colour, shift in (
        ("reward", "equal updates", common.COLOURS[0], 0.98),
        ("reward_at_time", "equal time", common.COLOURS[1], 1.02),
    ):
        means, low, high = np.array([common.interval(row[key]) for row in rows]).T
        left.errorbar(shift * leaves, means, [means - low, high - means], fmt="o", color=colour, capsize=3, label=label)
        slope, intercept = np.mean(document["laws"][key]["all"], 0)
        left.plot(leaves, intercept + slope * np.log2(leaves), "--", color=colour, lw=1)
    left.set(xscale="log", xlabel="leaves", ylabel="held-out reward")
    left.legend()

    ours, dance = ([row[key] for row in rows] for key in ("policy_seconds", "dance_seconds"))
    right.plot(leaves, ours, "o", color=common.COLOURS[0], label="BranchGRPO-Mix")
    right.plot(leaves, dance, "s", color=common.COLOURS[7], label="sequential DanceGRPO")
    right.set(xscale="log", yscale="log", xlabel="leaves", ylabel="rollout and training, seconds per iteration")
    right.legend()
    for ax in (left, right):
        ax.minorticks_off()
        ax.set_xticks(leaves, leaves)
    return figure


def timed(args, first, flags: str, shared: str) -> dict[str, float]:
    """Time an arm, and sequential DanceGRPO with as many leaves, alone on the machine.

    Args:
        args: the benchmark's command line.
        first: a Run, whose policy is used.
        flags, shared: of the arm, and of all arms.

    Returns:
        Median seconds per iteration, of three that follow one to warm up: `seconds` of everything, `policy_seconds` of
        rollout and training, `dance_seconds` of DanceGRPO's rollout and training.
    """
    arm = common.variant(first, args, flags + shared)
    dance = common.variant(first, args, f"--method flowgrpo --sde dance --leaves {arm.args.leaves}{shared}")
    arm_rows, dance_rows = ([loop.iterate(run, i)[0] for i in range(4)][1:] for run in (arm, dance))

    whole = [common.all_seconds(row) for row in arm_rows]
    ours, theirs = ([common.policy_seconds(row) for row in rows] for rows in (arm_rows, dance_rows))
    medians = map(float, map(np.median, (whole, ours, theirs)))
    return dict(zip(("seconds", "policy_seconds", "dance_seconds"), medians))


def main() -> None:
    """Run every arm with every seed, time every arm alone, and write the table, the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every arm")
    parser.add_argument("--iterations", type=int, default=30, help="updates that every arm takes at least")
    args = parser.parse_args()
    seeds, iterations = (2, 2) if args.smoke else (args.seeds, args.iterations)
    arms = dict(list(ARMS.items())[:2]) if args.smoke else ARMS

    # Train. All arms have noise at the splits only.
    shared = " --lr 1e-4 --lr-end 1 --prompts-per-iteration 2"
    evaluated = f"{shared} --eval-every {max(1, iterations // 5)} --eval-size {8 if args.smoke else 128}"
    flags = {name: f"--method branchgrpo-mix --mix 0 --branch {k} --splits {s}" for name, (k, s) in arms.items()}
    updates = {name: iterations if args.smoke else updates_of(args, f, iterations) for name, f in flags.items()}
    tasks = {
        f"{name} seed {s}": f"{f}{evaluated} --iterations {updates[name]} --seed {s}"
        for s in range(1, seeds + 1)
        for name, f in flags.items()
    }
    metrics = common.train_all(args, "scaling", tasks)

    # Time. Training runs share the machine, so their own seconds do not count.
    rows, first = {}, common.prepare(args, shared, lr=1e-12)
    for name, f in flags.items():
        leaves = common.job(args, f + shared)[0].leaves
        seconds = common.kept(args, "scaling", f"seconds {name}", lambda f=f: timed(args, first, f, shared))
        rows[name] = {"leaves": leaves, "updates": updates[name]} | seconds

    # Read every curve at the same number of updates, and at the same time: that of the arm that is through first.
    time = min(row["seconds"] * row["updates"] for row in rows.values())
    for name, row in rows.items():
        row["updates_in_time"] = time / row["seconds"]
        row["curves"] = [curve(metrics[f"{name} seed {s}"]) for s in range(1, seeds + 1)]
        for key, n_updates in (("reward", iterations), ("reward_at_time", row["updates_in_time"])):
            row[key] = [float(np.interp(n_updates, *zip(*c))) for c in row["curves"]]

    laws = {key: fitted(rows, key, seeds) for key in ("reward", "reward_at_time")}
    slopes = {key: {sweep: common.interval([b for b, _ in law]) for sweep, law in v.items()} for key, v in laws.items()}

    print(f"{'':<18}{'leaves':>7}{'reward':>9}{'at time':>9}{'updates':>9}{'s/iter':>8}{'Dance s':>9}{'ratio':>7}")
    for name, r in rows.items():
        rewards = f"{np.mean(r['reward']):9.4f}{np.mean(r['reward_at_time']):9.4f}{r['updates_in_time']:9.0f}"
        seconds = f"{r['policy_seconds']:8.2f}{r['dance_seconds']:9.2f}{r['policy_seconds'] / r['dance_seconds']:7.3f}"
        print(f"{name:<18}{r['leaves']:7d}{rewards}{seconds}")
    for key, sweeps in slopes.items():
        for sweep, (b, low, high) in sweeps.items():
            print(f"{key}, {sweep}: {b:+.4f} [{low:+.4f}, {high:+.4f}] per doubling of the leaves")

    document = {"rows": rows, "laws": laws, "slopes": slopes, "updates": iterations, "seconds": time}
    common.finish("scaling", args, document, draw)


if __name__ == "__main__":
    main()
