"""Does a larger tree learn more? The paper's scaling law: branch factor and number of splits.

Question    Final held-out reward and seconds an iteration for K = 2, 3, 4 with four splits, and for 3, 4, 5 splits with K = 2.
Hypothesis  More leaves learn more an update; time grows with the forwards of the tree, far below DanceGRPO at equal leaves.
Metric      Reward after the same updates, and after the same wall-clock: cheap arms take more updates, so that all are still
            training when the time is up. Wall-clock is rollout, decoding, reward and training, measured alone. Policy seconds
            (rollout and training) an iteration over DanceGRPO's at equal leaves; reward = a + b log2(leaves) for each seed,
            with the interval of b over seeds, for K, for the splits, and for all arms together. One learning rate for all.
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
SWEEPS = {  # the law is fitted to each
    "K": [name for name in ARMS if name.endswith("4 splits")],
    "splits": [name for name in ARMS if name.startswith("K = 2")],
    "all": list(ARMS),
}
UNITS = 17_000  # forwards + 3 trained parents of a prompt, that every arm may spend; the larger take a few updates more


def updates_of(args, flags: str, at_least: int) -> int:
    """How many updates an arm takes: those of all, or as many as its units allow."""
    found = count(schedule_of(common.job(args, flags)[0], 0).forest)
    return max(at_least, round(UNITS / (found["forwards"] + 3 * found["trained_parents"])))


def curve(rows: list[dict]) -> list[tuple[int, float]]:
    """Updates and held-out reward of every evaluation."""
    return [(row["iteration"], row["heldout_reward"]) for row in rows if "heldout_reward" in row]


def fitted(rows: dict, key: str, seeds: int) -> dict:
    """The law of every sweep: b and a of each seed."""
    found = {}
    for sweep, names in SWEEPS.items():
        some = [rows[n] for n in names if n in rows]
        x = np.log2([r["leaves"] for r in some])
        found[sweep] = [np.polyfit(x, [r[key][s] for r in some], 1).tolist() for s in range(seeds) if len(some) > 1]
    return {sweep: law for sweep, law in found.items() if law}


def draw(document: dict):
    """Reward against leaves, and seconds an iteration against DanceGRPO's."""
    rows, figure = list(document["rows"].values()), plt.figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    leaves = np.array([r["leaves"] for r in rows])
    for key, label, colour, shift in (
        ("reward", "equal updates", common.COLOURS[0], 0.98),
        ("reward_at_time", "equal time", common.COLOURS[1], 1.02),
    ):
        means, low, high = np.array([common.interval(r[key]) for r in rows]).T
        left.errorbar(shift * leaves, means, [means - low, high - means], fmt="o", color=colour, capsize=3, label=label)
        slope, intercept = np.mean(document["laws"][key]["all"], 0)
        left.plot(leaves, intercept + slope * np.log2(leaves), "--", color=colour, lw=1)
    left.set(xscale="log", xlabel="leaves", ylabel="held-out reward")
    left.legend()
    right.plot(leaves, [r["policy_seconds"] for r in rows], "o", color=common.COLOURS[0], label="BranchGRPO-Mix")
    right.plot(leaves, [r["dance_seconds"] for r in rows], "s", color=common.COLOURS[7], label="sequential DanceGRPO")
    right.set(xscale="log", yscale="log", xlabel="leaves", ylabel="policy seconds an iteration")
    right.legend()
    for ax in (left, right):
        ax.minorticks_off()
        ax.set_xticks(leaves, leaves)
    return figure


def main() -> None:
    """Run every arm and seed, time every arm alone; table, JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=30, help="updates of every arm at least")
    args = parser.parse_args()
    seeds, iterations = (2, 2) if args.smoke else (args.seeds, args.iterations)
    arms = dict(list(ARMS.items())[:2]) if args.smoke else ARMS
    shared = " --lr 1e-4 --lr-end 1 --prompts-per-iteration 2"
    run = f"{shared} --eval-every {max(1, iterations // 5)} --eval-size {8 if args.smoke else 128}"
    flags = {name: f"--method branchgrpo-mix --mix 0 --branch {k} --splits {s}" for name, (k, s) in arms.items()}
    many = {name: iterations if args.smoke else updates_of(args, f, iterations) for name, f in flags.items()}
    tasks = {
        f"{name} seed {s}": f"{f}{run} --iterations {many[name]} --seed {s}"
        for s in range(1, seeds + 1)
        for name, f in flags.items()
    }
    done = common.train_all(args, "scaling", tasks)
    rows, first = {}, common.prepare(args, shared, lr=1e-12)
    for name, f in flags.items():
        alone = common.variant(first, args, f + shared)

        def timed(alone=alone) -> dict:
            """Median seconds of an iteration, whole and of the policy, and DanceGRPO's at equal leaves; three after one to warm up."""
            many_leaves = f"--method flowgrpo --sde dance --leaves {alone.args.leaves}{shared}"
            dance = common.variant(first, args, many_leaves)
            mix, dance = ([loop.iterate(r, i)[0] for i in range(4)][1:] for r in (alone, dance))
            whole = [common.all_seconds(row) for row in mix]
            policy, dances = ([common.policy_seconds(row) for row in found] for found in (mix, dance))
            medians = map(float, map(np.median, (whole, policy, dances)))
            return dict(zip(("seconds", "policy_seconds", "dance_seconds"), medians))

        rows[name] = {"leaves": alone.args.leaves, "updates": many[name]} | common.kept(
            args, "scaling", f"seconds {name}", timed
        )
    time = min(r["seconds"] * r["updates"] for r in rows.values())
    for name, row in rows.items():
        row["updates_in_time"] = time / row["seconds"]
        row["curves"] = [curve(done[f"{name} seed {s}"]) for s in range(1, seeds + 1)]
        for key, updates in (("reward", iterations), ("reward_at_time", row["updates_in_time"])):
            row[key] = [float(np.interp(updates, *zip(*c))) for c in row["curves"]]
    laws = {key: fitted(rows, key, seeds) for key in ("reward", "reward_at_time")}
    slopes = {key: {sweep: common.interval([b for b, _ in law]) for sweep, law in v.items()} for key, v in laws.items()}
    print(f"{'':<18}{'leaves':>7}{'reward':>9}{'at time':>9}{'updates':>9}{'s/iter':>8}{'Dance s':>9}{'ratio':>7}")
    for name, r in rows.items():
        rewards = f"{np.mean(r['reward']):9.4f}{np.mean(r['reward_at_time']):9.4f}{r['updates_in_time']:9.0f}"
        seconds = f"{r['policy_seconds']:8.2f}{r['dance_seconds']:9.2f}{r['policy_seconds'] / r['dance_seconds']:7.3f}"
        print(f"{name:<18}{r['leaves']:7d}{rewards}{seconds}")
    for key, sweeps in slopes.items():
        for sweep, (b, low, high) in sweeps.items():
            print(f"{key}, {sweep}: {b:+.4f} [{low:+.4f}, {high:+.4f}] for each doubling of the leaves")
    common.finish(
        "scaling", args, {"rows": rows, "laws": laws, "slopes": slopes, "updates": iterations, "seconds": time}, draw
    )


if __name__ == "__main__":
    main()
