"""Which part of the method does the work? One change at a time, paired over seeds, losers kept.

Question    What do branch noise, split schedule, K, fusion, advantage, pruning and the kind of step each contribute?
Hypothesis  The paper's: s = 4 is best, early splits beat late ones, fusion by path probability is steadier than the mean,
            depth-wise beats group advantage, depth pruning gives the best reward. Ours: cps beats dance where few steps are noisy.
Metric      Held-out reward after the same updates, minus that of the group's first arm with the same seed.
Rule        A change counts where Student's 95 % interval of the paired difference excludes 0; its variance is pooled over all
            arms, since three seeds say little of their own. With two dozen changes one is expected to do so by chance. Most groups
            share their first arm, the default: where its runs were lucky, all of them shift together. One learning rate for all.

    python bench/ablation.py             # 55 minutes on 2 cores
"""

import common
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

MIX = "--method branchgrpo-mix --mix 0 "
ALL = "--method branchgrpo --sde cps --eta 0.7 "  # MIX's own kind of step
FULL = "--method branchgrpo --sde dance --eta 0.8 "
GROUPS = {  # group -> arm -> flags; the first arm, the one to compare with, is mostly the default, which runs once
    "branch noise s (Eq. 2)": {"s = 4": MIX} | {f"s = {s}": MIX + f"--branch-noise {s}" for s in (1, 2, 8, "inf")},
    "splits": {
        "mixed 0,1,3,4": MIX,
        "dense 0,1,2,3": MIX + "--splits 0,1,2,3",
        "sparse 0,2,4,6": MIX + "--splits 0,2,4,6",
        "late 4,5,6,7": MIX + "--splits 4,5,6,7",
    },
    "K at 16 leaves": {
        "K = 2": MIX,
        "K = 4": MIX + "--branch 4 --splits 0,4",
        "K = 16": MIX + "--branch 16 --splits 0",
    },
    "fusion beta (Eq. 3)": {"beta = 1": MIX} | {f"beta = {b}": MIX + f"--fusion-beta {b}" for b in (0, 10, 100)},
    "advantage (Eq. 4)": {"over a depth": MIX, "over a group": MIX + "--advantage group"},
    "kind of step": {
        "cps 0.7": MIX,
        "dance 0.8": MIX + "--sde dance --eta 0.8",
        "dance 1.6": MIX + "--sde dance --eta 1.6",
        "flow 0.7": MIX + "--sde flow --eta 0.7",
    },
    "the deterministic tail": {"all its steps": MIX, "flash 3": MIX + "--flash 3", "flash 2": MIX + "--flash 2"},
    "pruning, all steps noisy": {
        "none": FULL,
        "width, Parent-Top1": FULL + "--width-prune parent-top1",
        "width, Extreme-4": FULL + "--width-prune extreme-4",
        "depth": FULL + "--depth-prune",
    },
    "what is noisy": {"splits alone": MIX, "splits and a window": "--method branchgrpo-mix --mix 2", "all": ALL},
}


def draw(document: dict):
    """Paired differences with intervals, a row for each arm, a block for each group."""
    rows = [(g, arm, r) for g, arms in document["groups"].items() for arm, r in arms.items()]
    figure = plt.figure(figsize=(8, 0.27 * len(rows) + 1))
    ax, names = figure.subplots(), list(document["groups"])
    for y, (group, _, row) in enumerate(rows):
        mean, low, high = row["difference"]
        colour = common.COLOURS[names.index(group) % 7]
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
    ax.axvline(0, color="k", lw=0.8)
    ax.set_yticks(range(len(rows)), [f"{g}: {arm}" for g, arm, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("held-out reward minus that of the group's first arm, same seed")
    return figure


def main() -> None:
    """Run every arm and seed, print the table; JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="paired")
    parser.add_argument("--iterations", type=int, default=48, help="updates of every arm")
    args = parser.parse_args()
    seeds, iterations = (2, 2) if args.smoke else (args.seeds, args.iterations)
    groups = dict(list(GROUPS.items())[4:5]) if args.smoke else GROUPS
    shared = f" --leaves 16 --lr 1e-4 --lr-end 1 --iterations {iterations} --eval-every {max(1, iterations // 6)}"
    shared += " --eval-size 8 --prompts-per-iteration 1" if args.smoke else " --eval-size 128"
    tasks = {
        f"{f} seed {s}": f"{f}{shared} --seed {s}"
        for g in groups.values()
        for f in g.values()
        for s in range(1, seeds + 1)
    }
    found = {}
    for name, rows in common.train_all(args, "ablation", tasks).items():
        seconds = float(np.mean([common.policy_seconds(r) for r in rows[1:]]))
        found[name] = {"reward": common.final_reward(rows), "seconds": seconds}
    result = {}
    for group, arms in groups.items():
        result[group] = {}
        for arm, f in arms.items():
            cells = [found[f"{f} seed {s}"] for s in range(1, seeds + 1)]
            seconds = float(np.median([c["seconds"] for c in cells]))
            result[group][arm] = {"flags": f, "rewards": [c["reward"] for c in cells], "policy_seconds": seconds}
        first = next(iter(result[group].values()))["rewards"]
        for row in result[group].values():
            row["minus_first"] = np.subtract(row["rewards"], first).tolist()
    changes = [row["minus_first"] for rows in result.values() for row in list(rows.values())[1:]]
    freedom = len(changes) * (seeds - 1)
    spread = float(np.sqrt(sum(np.var(c) * seeds for c in changes) / freedom))
    for group, rows in result.items():
        print(group)
        for at, (arm, row) in enumerate(rows.items()):
            mean = float(np.mean(row["minus_first"]))
            half = stats.t.ppf(0.975, freedom) * spread / seeds**0.5 * (at > 0)
            row["difference"] = [mean, mean - half, mean + half]
            numbers = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["difference"])
            print(f"  {arm:<22} {np.mean(row['rewards']):.4f}   {numbers}   {row['policy_seconds']:.2f} s")
    common.finish(
        "ablation", args, {"groups": result, "seeds": seeds, "iterations": iterations, "spread": spread}, draw
    )


if __name__ == "__main__":
    main()
