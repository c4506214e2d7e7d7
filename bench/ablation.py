"""Which part of the method does the work? One change at a time, paired over seeds, losers kept.

Question    What do branch noise, split schedule, K, fusion, advantage, pruning and the kind of step each contribute?
Hypothesis  The paper's: s = 4 is best, early splits beat late ones, fusion by path probability is steadier than the
            plain mean, the depth-wise advantage beats the group advantage, depth pruning gives the best reward.
            Ours: cps beats dance where few steps are noisy.
Metric      Held-out reward after the same number of updates, minus that of the group's first arm with the same seed.
Rule        A change counts where Student's 95 % interval of the paired difference excludes 0. Three seeds say little
            about a variance, so it is pooled over all arms. With two dozen changes, one is expected to count by chance.
            Most groups share their first arm, the default: where its runs were lucky, all of these groups shift
            together. There is one learning rate for all arms.

    python bench/ablation.py             # 55 minutes on 2 cores
    python bench/ablation.py --adaptive --seeds 5 --iterations 112

The second command compares what adapts during a run with its fixed counterpart, in 55 minutes, and writes
adaptive.json. It trains on 128 prompts, so that each is drawn often enough to be known as one that teaches nothing.
"""

import common
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

MIX = "--method branchgrpo-mix --mix 0 "  # the default: noise at the splits only
ALL = "--method branchgrpo --sde cps --eta 0.7 "  # every step noisy, by MIX's own kind of step
FULL = "--method branchgrpo --sde dance --eta 0.8 "

# Group -> arm -> flags. The first arm of a group, to which the others are compared, is mostly the default, which runs
# once. Names are keys of the JSON: "splits alone" is noise at the splits only, "flash 3" a deterministic tail of three
# steps.
GROUPS = {
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

# The same for --adaptive. The reward ocr alone takes few values, so that all leaves of a prompt may score alike.
ADAPTIVE = {
    "splits and edges": {
        "fixed": MIX,
        "splits where they explain most": MIX + "--splits auto",
        "half of the edges, the largest": MIX + "--size-prune 0.5",
    },
    "prompts, rewarded by ocr alone": {
        "all alike": MIX + "--reward ocr",
        "a quarter of those that teach nothing": MIX + "--reward ocr --silent-prompts 0.25",
    },
}


def minus_first_arm(groups: dict, outcomes: dict, seeds: int) -> dict:
    """Return group -> arm -> flags, rewards, seconds, units, and what differs from the group's first arm, per seed.

    Args:
        groups: group -> arm -> flags.
        outcomes: "FLAGS seed S" -> reward, seconds and units of that run.
        seeds: how many there are; they are numbered from 1.
    """
    result = {}
    for group, arms in groups.items():
        result[group] = {}
        for arm, flags in arms.items():
            cells = [outcomes[f"{flags} seed {s}"] for s in range(1, seeds + 1)]
            seconds = float(np.median([c["seconds"] for c in cells]))
            rewards, units = [c["reward"] for c in cells], float(np.mean([c["units"] for c in cells]))
            result[group][arm] = {"flags": flags, "rewards": rewards, "policy_seconds": seconds, "units": units}

        # Runs of one seed share their prompts and their noise. The difference within a seed is therefore less noisy
        # than the rewards are.
        first = next(iter(result[group].values()))["rewards"]
        for row in result[group].values():
            row["minus_first"] = np.subtract(row["rewards"], first).tolist()
    return result


def pooled_spread(groups: dict, seeds: int) -> tuple[float, int]:
    """Return the standard deviation of a paired difference, pooled over all arms, and its degrees of freedom.

    std^2 = sum over arms and seeds of (difference - its arm's mean)^2 / (arms (seeds - 1)). First arms are left out,
    since they differ from themselves by 0.
    """
    changes = [row["minus_first"] for rows in groups.values() for row in list(rows.values())[1:]]
    freedom = len(changes) * (seeds - 1)
    return float(np.sqrt(sum(np.var(c) * seeds for c in changes) / freedom)), freedom


def draw(document: dict):
    """Draw the paired differences with their intervals: a row per arm, a colour per group."""
    rows = [(group, arm, row) for group, arms in document["groups"].items() for arm, row in arms.items()]
    figure = plt.figure(figsize=(8, 0.27 * len(rows) + 1))
    ax, groups = figure.subplots(), list(document["groups"])

    for y, (group, _, row) in enumerate(rows):
        mean, low, high = row["difference"]
        colour = common.COLOURS[groups.index(group) % 7]
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)

    ax.axvline(0, color="k", lw=0.8)
    ax.set_yticks(range(len(rows)), [f"{group}: {arm}" for group, arm, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("held-out reward minus that of the group's first arm, same seed")
    return figure


def main() -> None:
    """Run every arm with every seed, and write the table, the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every arm; arms are paired over them")
    parser.add_argument("--iterations", type=int, default=48, help="updates of every arm")
    parser.add_argument("--adaptive", action="store_true", help="what adapts during a run, instead of the usual groups")
    args = parser.parse_args()
    name = "adaptive" if args.adaptive else "ablation"

    # A smoke run takes one small group, "advantage".
    seeds, iterations = (2, 2) if args.smoke else (args.seeds, args.iterations)
    groups = ADAPTIVE if args.adaptive else dict(list(GROUPS.items())[4:5]) if args.smoke else GROUPS
    shared = f" --leaves 16 --lr 1e-4 --lr-end 1 --iterations {iterations} --eval-every {max(1, iterations // 6)}"
    shared += " --eval-size 8 --prompts-per-iteration 1" if args.smoke else " --eval-size 128"

    if args.adaptive:
        common.runs(args).mkdir(parents=True, exist_ok=True)
        few = common.runs(args) / "adaptive_prompts.txt"
        few.write_text("".join((common.ROOT / "tiny/prompts_train.txt").open().readlines()[:128]))
        shared += f" --prompts {few} --eval-prompts {common.ROOT / 'tiny/prompts_heldout.txt'}"

    # Runs are named by their flags and not by their arm: an arm that stands in several groups runs once.
    tasks = {
        f"{flags} seed {s}": f"{flags}{shared} --seed {s}"
        for arms in groups.values()
        for flags in arms.values()
        for s in range(1, seeds + 1)
    }
    outcomes = {}
    for run, rows in common.train_all(args, name, tasks).items():
        seconds = float(np.mean([common.policy_seconds(row) for row in rows[1:]]))  # row 0 is the first evaluation
        units = sum(row["units"] for row in rows[1:])
        outcomes[run] = {"reward": common.final_reward(rows), "seconds": seconds, "units": units}

    # The half width of every interval is t std / sqrt(seeds), with the pooled std; a first arm has none.
    result = minus_first_arm(groups, outcomes, seeds)
    spread, freedom = pooled_spread(result, seeds)
    for group, rows in result.items():
        print(group)
        for i, (arm, row) in enumerate(rows.items()):
            mean = float(np.mean(row["minus_first"]))
            half = stats.t.ppf(0.975, freedom) * spread / seeds**0.5 * (i > 0)
            row["difference"] = [mean, mean - half, mean + half]
            numbers = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["difference"])
            print(f"  {arm:<22} {np.mean(row['rewards']):.4f}   {numbers}   {row['policy_seconds']:.2f} s/iter")

    document = {"groups": result, "seeds": seeds, "iterations": iterations, "spread": spread}
    common.finish(name, args, document, draw)


if __name__ == "__main__":
    main()
