"""What does the method cost beyond the model? Its time over bare model calls and over one node at a time; its growth.

Question    How much time do tree, noise, credit and loss add to the transformer calls that they need? What do leaves,
            steps and prompts cost in seconds and in memory?
Hypothesis  The rollout takes at most 1.10 times the bare calls at the same batch shapes. Training takes at most 1.15
            times bare forwards and backwards (the optimiser's step is included on our side only). An iteration is at
            least 8 times faster than one node at a time. Two processes on two cores score at least 1.7 times as many
            leaves per second as one process on one core. Seconds grow with the forwards and trained parents that are
            counted; memory hardly grows, since nodes go through the model in micro-batches.
Metric      Ratios of seconds, measured in turn in one process, as median and range over repetitions. For growth, a
            process of its own for each size: the median rollout and training time, and its peak memory.
Rule        The medians are held against the bounds.

    python bench/overhead.py      # 12 minutes on 2 cores, alone; the paper's tree: T = 20, 16 leaves, all stochastic
"""

import sys

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import loop
from branchgrpo import take_cond
from rewards import score
from schedules import schedule_of
from tree import count

BASE = "--method branchgrpo --steps 20 --eval-size 1 --iterations 3"
SMALL = " --leaves 4 --prompts-per-iteration 1"  # what --smoke adds
EDGES_PER_UPDATE = 12  # after so many edges the published code steps its optimiser
BOUNDS = {  # ratio -> its bound
    "rollout over bare calls": "at most 1.10",
    "training over bare forward and backward": "at most 1.15",
    "one node at a time, model calls": "for comparison",
    "one node at a time, iteration": "at least 8",
}
GROWTH = {  # what grows -> its value -> flags
    "leaves": {n: f"--leaves {n}" for n in (4, 8, 16, 32, 64)},
    "leaves, no micro-batch": {n: f"--leaves {n} --micro-batch 0" for n in (4, 8, 16, 32, 64)},
    "steps": {n: f"--steps {n}" for n in (10, 20, 40)},
    "prompts": {n: f"--prompts-per-iteration {n}" for n in (1, 2, 4, 8)},
}
SWITCHES = {  # name -> flags; no switch changes the result of training, as the tests show
    "none": "",
    "--micro-batch 8": "--micro-batch 8",
    "--micro-batch 0": "--micro-batch 0",
    "--gradient-checkpointing": "--gradient-checkpointing",
    "--tree-offload": "--tree-offload",
    "--text-offload": "--text-offload",
    "--compile": "--compile",
}


# -------------------------------------------------------------------------------------------------------------- ratios
def seconds(run, work) -> float:
    """Time one call of `work`, until the device has done all that was asked of it."""
    lap = loop.stopwatch(run.accelerator.device)
    work()
    return lap()


def empty(run, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make n latents (n, *latent) and noise levels (n,) as the policy takes them; their values do not matter."""
    device = run.accelerator.device
    return torch.zeros(n, *run.policy.latent_shape, device=device), torch.full((n,), 0.5, device=device)


def bare_rollout(run, cond, forest) -> None:
    """Do the rollout's transformer calls and nothing else: the same batch shapes, on fixed inputs."""
    prompts = len(next(iter(cond.values())))
    with torch.no_grad():
        for n in forest.sizes[:-1]:
            for rows in torch.arange(prompts * n).split(run.args.micro_batch):
                run.policy.velocity(*empty(run, len(rows)), take_cond(cond, rows % prompts))


def bare_training(run, cond, forest) -> None:
    """Do forward and backward of every trained parent, at the update's batch shapes, with a plain sum as the loss."""
    prompts = len(next(iter(cond.values())))
    for rows in torch.arange(prompts * count(forest)["trained_parents"]).split(run.args.micro_batch):
        run.policy.velocity(*empty(run, len(rows)), take_cond(cond, rows % prompts)).sum().backward()


def one_node_at_a_time(run, cond, forest, prompts: list[str]) -> tuple[float, float]:
    """Walk the same forest as the published code does: calls, decoding and rewards in batches of 1, and edges trained.

    Each edge is trained by a forward of its own, where we train parents, whose children share one. The optimiser steps
    after every 12 edges. Tree, noise, credit and loss are left out, in favour of that code.

    Returns:
        The seconds of its model calls, and of everything.
    """
    counts, (x, sigma) = count(forest), empty(run, 1)
    calls = rest = 0.0
    for p, prompt in enumerate(prompts):
        # Rollout: a transformer call for each node that has children.
        one_cond = {name: value[p : p + 1] for name, value in cond.items()}
        with torch.no_grad():
            nodes = range(counts["forwards"])
            calls += seconds(run, lambda c=one_cond, nodes=nodes: [run.policy.velocity(x, sigma, c) for _ in nodes])

        # Rewards: each leaf is decoded and scored alone.
        for _ in range(forest.leaves):
            rest += seconds(run, lambda prompt=prompt: score(run.rewards, run.policy.decode(x), [prompt]))

        # Training: a forward and a backward for each edge.
        for edge in range(counts["edges"]):
            calls += seconds(run, lambda c=one_cond: run.policy.velocity(x, sigma, c).sum().backward())
            if edge % EDGES_PER_UPDATE == EDGES_PER_UPDATE - 1:
                rest += seconds(run, lambda: (run.optimizer.step(), run.optimizer.zero_grad()))
    return calls, calls + rest


def ratios(args, repetitions: int) -> dict[str, list[float]]:
    """Measure the four ratios of BOUNDS, each as one value per repetition."""
    # The learning rate is so small that the policy stays as it is. A `split` into micro-batches needs a size above 0.
    run = common.prepare(args, BASE + (SMALL if args.smoke else ""), lr=1e-12)
    run.args.micro_batch = run.args.micro_batch or 10**9
    forest, prompts = schedule_of(run.args, 0).forest, run.prompts[: run.args.prompts_per_iteration]
    cond = run.policy.encode(prompts)

    # The first calls allocate memory and choose kernels. They are not measured.
    loop.iterate(run, 0)
    bare_rollout(run, cond, forest)

    # Whatever else the machine does at a moment slows both sides of a ratio, since they are measured in turn.
    measured = {name: [] for name in BOUNDS}
    for _ in tqdm(range(repetitions), desc="repetitions", file=sys.stderr):
        row = loop.iterate(run, 0)[0]
        ours = common.policy_seconds(row)
        calls, everything = one_node_at_a_time(run, cond, forest, prompts)
        values = (
            row["seconds_rollout"] / seconds(run, lambda: bare_rollout(run, cond, forest)),
            row["seconds_train"] / seconds(run, lambda: bare_training(run, cond, forest)),
            calls / ours,
            everything / (ours + row["seconds_decode"] + row["seconds_reward"]),
        )
        for name, value in zip(measured, values):
            measured[name].append(value)
    return measured


# ------------------------------------------------------------------------------------------ growth, switches, processes
def grow(args) -> dict[str, dict]:
    """Return what grows -> its value -> rollout and training seconds, the same per unit of counting, and peak GiB.

    A unit is the cost of one forward. A backward costs about two, so a trained parent is three units. If seconds grow
    as counting says, the seconds per unit are the same in every row.
    """
    cells = {f"{what} {n}": f"{BASE} {flags}" for what, row in GROWTH.items() for n, flags in row.items()}
    if args.smoke:
        cells = {name: flags + SMALL for name, flags in cells.items() if name == "steps 10"}

    growth = {}
    for name, rows in common.train_all(args, "overhead", cells).items():
        what, _, n = name.rpartition(" ")
        options = common.job(args, cells[name])[0]
        counts = count(schedule_of(options, 0).forest)
        units = (counts["forwards"] + 3 * counts["trained_parents"]) * options.prompts_per_iteration

        policy = float(np.median([common.policy_seconds(row) for row in rows[1:]]))  # row 0 is the first evaluation
        memory = {"memory_gib": rows[-1]["peak_gib"]}
        growth.setdefault(what, {})[n] = {"policy_seconds": policy, "seconds_a_unit": policy / units} | memory
    return growth


def switched(args) -> dict[str, dict]:
    """Return switch of memory or speed -> median rollout and training seconds, and peak GiB."""
    cells = {name: f"{BASE} --iterations 5 {flags}" for name, flags in SWITCHES.items()}
    if args.smoke:
        cells = {"none": cells["none"] + SMALL}

    # Two iterations are left out beside the first evaluation: in them --compile compiles.
    runs = common.train_all(args, "switches", cells)
    policy = {name: float(np.median([common.policy_seconds(row) for row in rows[3:]])) for name, rows in runs.items()}
    return {name: {"policy_seconds": policy[name], "memory_gib": rows[-1]["peak_gib"]} for name, rows in runs.items()}


def processes(args) -> dict[str, float]:
    """Return the leaves per second of one process on one core, and of two processes on two.

    Each process has the same number of prompts, so two of them have twice as many in all.
    """
    flags = f"{BASE} --method branchgrpo-mix --device cpu --iterations {2 if args.smoke else 8} --prompts-per-iteration"
    rates = {}
    for n in (1, 2):
        folder = common.runs(args) / f"processes_{n}"
        rows = common.train(args, folder, f"{flags} {4 * n}".split(), processes=n, threads=1)
        whole = [common.all_seconds(row) for row in rows[1:]]
        rates[str(n)] = 4 * n * rows[-1]["leaves"] / float(np.median(whole[1:]))  # the first iteration warms up
    return rates


# --------------------------------------------------------------------------------------------------------------- report
def draw(document: dict):
    """Draw the ratios with their range, and beside them seconds, seconds per unit and memory against what grows."""
    figure, growth = plt.figure(figsize=(14, 4)), document["growth"]
    first, *axes = figure.subplots(1, 4, width_ratios=(1.3, 1, 1, 1))

    # The ratios. A bound that is a number ends with a digit.
    for y, (values, bound) in enumerate(zip(document["ratios"].values(), document["bounds"].values())):
        middle = np.median(values)
        span = [[middle - min(values)], [max(values) - middle]]
        first.errorbar(middle, y, xerr=span, fmt="o", color=common.COLOURS[y], capsize=3)
        if bound[-1].isdigit():
            first.plot(float(bound.split()[-1]), y, "k|", ms=14)
    first.set_yticks(range(4), [name.replace(" over ", "\nover ").replace(", ", ",\n") for name in document["ratios"]])
    first.set(xlim=(0, None), xlabel="ratio of seconds (median, range; |: bound)")
    first.invert_yaxis()

    # The growth.
    panels = (
        ("policy_seconds", "rollout and training, seconds per iteration", 1),
        ("seconds_a_unit", "milliseconds per unit (forward 1, backward 2)", 1000),
        ("memory_gib", "peak memory, GiB", 1),
    )
    for ax, (key, label, scale) in zip(axes, panels):
        for (what, row), colour, marker in zip(growth.items(), common.COLOURS, "osD^"):
            y = [scale * cell[key] for cell in row.values()]
            ax.plot([int(n) for n in row], y, marker=marker, color=colour, label=what)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="how many", ylabel=label, ylim=(0, None))
        ax.xaxis.set_major_formatter("{x:.0f}")

    # With both axes logarithmic, seconds that grow in proportion are a straight line.
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylim(0.5, None)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure in turn, and write the tables, the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(threads=2, jobs=1)
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of every ratio")
    args = parser.parse_args()
    args.threads = 1 if args.smoke else args.threads  # beside another busy process two threads wait for each other

    measured = ratios(args, 1 if args.smoke else args.repetitions)
    for (name, values), bound in zip(measured.items(), BOUNDS.values()):
        print(f"{name:<42} {np.median(values):6.2f}  [{min(values):.2f}, {max(values):.2f}]   {bound}")

    growth, switches, rates = grow(args), switched(args), processes(args)
    print(f"{'rollout and training':<30}{'s/iter':>9}{'ms/unit':>11}{'GiB':>7}")
    for what, row in growth.items():
        for n, cell in row.items():
            cost = f"{cell['policy_seconds']:9.2f}{1000 * cell['seconds_a_unit']:11.2f}{cell['memory_gib']:7.2f}"
            print(f"{what + ' ' + n:<30}{cost}")
    for name, cell in switches.items():
        print(f"{name:<30}{cell['policy_seconds']:9.2f}{cell['memory_gib']:18.2f}")

    one, two = rates["1"], rates["2"]
    print(f"leaves per second: one process {one:.1f}, two {two:.1f}, {two / one:.2f} times as many")
    document = {"ratios": measured, "bounds": BOUNDS, "growth": growth, "switches": switches, "leaves_a_second": rates}
    common.finish("overhead", args, document, draw)


if __name__ == "__main__":
    main()
