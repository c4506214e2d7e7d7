"""What does the method cost beyond the model? Iteration time over bare model calls, over one node at a time, and how it grows.

Question    How much time do tree, noise, credit and loss add to the transformer calls they need? What do leaves, steps and
            prompts cost in seconds and memory?
Hypothesis  Rollout at most 1.10 times the bare calls at the same batch shapes, training at most 1.15 times bare forward and
            backward (optimiser step included on our side only), an iteration at least 8 times faster than one node at a time.
            Two processes on two cores score at least 1.7 times as many leaves a second as one on one. Seconds grow with the
            forwards and trained parents that are counted; memory hardly grows, in micro-batches.
Metric      Ratios of seconds, measured in turn in one process, median and range over repetitions. Growth: median policy seconds
            (rollout and training) of three iterations and the peak memory of a process of its own for each size.
Rule        The medians against the three bounds.

    python bench/overhead.py             # 12 minutes on 2 cores, alone; the paper's tree: T = 20, 16 leaves, all stochastic
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
BOUNDS = {  # ratio -> what is hoped for
    "rollout over bare calls": "at most 1.10",
    "training over bare forward and backward": "at most 1.15",
    "one node at a time, model calls": "for comparison",
    "one node at a time, iteration": "at least 8",
}
GROWTH = {  # what grows -> value -> flags
    "leaves": {n: f"--leaves {n}" for n in (4, 8, 16, 32, 64)},
    "leaves, no micro-batch": {n: f"--leaves {n} --micro-batch 0" for n in (4, 8, 16, 32, 64)},
    "steps": {n: f"--steps {n}" for n in (10, 20, 40)},
    "prompts": {n: f"--prompts-per-iteration {n}" for n in (1, 2, 4, 8)},
}
SWITCHES = {  # what none of them changes is the result; see the tests
    "none": "",
    "--micro-batch 8": "--micro-batch 8",
    "--micro-batch 0": "--micro-batch 0",
    "--gradient-checkpointing": "--gradient-checkpointing",
    "--tree-offload": "--tree-offload",
    "--text-offload": "--text-offload",
    "--compile": "--compile",
}


def seconds(run, work) -> float:
    """Wall-clock of one call, the device's queue drained."""
    lap = loop.stopwatch(run.accelerator.device)
    work()
    return lap()


def empty(run, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n latents and noise levels, as the policy takes them."""
    device = run.accelerator.device
    return torch.zeros(n, *run.policy.latent_shape, device=device), torch.full((n,), 0.5, device=device)


def bare_rollout(run, cond, forest) -> None:
    """The rollout's transformer calls and nothing else: the same batch shapes on fixed inputs."""
    prompts = len(next(iter(cond.values())))
    with torch.no_grad():
        for n in forest.sizes[:-1]:
            for part in torch.arange(prompts * n).split(run.args.micro_batch):
                run.policy.velocity(*empty(run, len(part)), take_cond(cond, part % prompts))


def bare_training(run, cond, forest) -> None:
    """Forward and backward of every trained parent, at the update's batch shapes, with a plain sum as the loss."""
    prompts = len(next(iter(cond.values())))
    for part in torch.arange(prompts * count(forest)["trained_parents"]).split(run.args.micro_batch):
        run.policy.velocity(*empty(run, len(part)), take_cond(cond, part % prompts)).sum().backward()


def one_node_at_a_time(run, cond, forest, prompts: list[str]) -> tuple[float, float]:
    """The same forest as the published code walks it: batch 1 for calls, decoding, rewards, and edges instead of parents.

    Its optimiser steps every 12 edges, as there; tree, noise, credit and loss are left out, in its favour. Returns the
    seconds of its model calls, and of everything.
    """
    n, (x, sigma) = count(forest), empty(run, 1)
    calls = rest = 0.0
    for p, prompt in enumerate(prompts):
        c = {k: v[p : p + 1] for k, v in cond.items()}
        with torch.no_grad():
            calls += seconds(run, lambda c=c: [run.policy.velocity(x, sigma, c) for _ in range(n["forwards"])])
        for _ in range(forest.leaves):
            rest += seconds(run, lambda prompt=prompt: score(run.rewards, run.policy.decode(x), [prompt]))
        for edge in range(n["edges"]):
            calls += seconds(run, lambda c=c: run.policy.velocity(x, sigma, c).sum().backward())
            if edge % 12 == 11:
                rest += seconds(run, lambda: (run.optimizer.step(), run.optimizer.zero_grad()))
    return calls, calls + rest


def ratios(args, repetitions: int) -> dict[str, list[float]]:
    """The four ratios, a value for each repetition."""
    run = common.prepare(args, BASE + (" --prompts-per-iteration 1 --leaves 4" if args.smoke else ""), lr=1e-12)
    run.args.micro_batch = run.args.micro_batch or 10**9
    forest, prompts = schedule_of(run.args, 0).forest, run.prompts[: run.args.prompts_per_iteration]
    cond, found = run.policy.encode(prompts), {name: [] for name in BOUNDS}
    loop.iterate(run, 0), bare_rollout(run, cond, forest)  # warm
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
        for name, value in zip(found, values):
            found[name].append(value)
    return found


def grow(args) -> dict[str, dict]:
    """What grows -> value -> policy seconds, those that counting predicts from the row of 16 leaves, peak memory in GiB."""
    cells = {f"{what} {n}": f"{BASE} {flags}" for what, row in GROWTH.items() for n, flags in row.items()}
    if args.smoke:
        cells = {name: f + " --leaves 4 --prompts-per-iteration 1" for name, f in cells.items() if name == "steps 10"}
    found = {}
    for name, rows in common.train_all(args, "overhead", cells).items():
        what, _, n = name.rpartition(" ")
        options = common.job(args, cells[name])[0]
        counted = count(schedule_of(options, 0).forest)
        units = (counted["forwards"] + 3 * counted["trained_parents"]) * options.prompts_per_iteration
        policy = float(np.median([common.policy_seconds(row) for row in rows[1:]]))
        memory = {"memory_gib": rows[-1]["peak_gib"]}
        found.setdefault(what, {})[n] = {"policy_seconds": policy, "seconds_a_unit": policy / units} | memory
    return found


def switched(args) -> dict[str, dict]:
    """Switches of memory and speed: policy seconds and peak memory with each."""
    cells = {name: f"{BASE} --iterations 5 {flags}" for name, flags in SWITCHES.items()}
    if args.smoke:
        cells = {"none": cells["none"] + " --leaves 4 --prompts-per-iteration 1"}
    found = common.train_all(args, "switches", cells)
    policy = {name: float(np.median([common.policy_seconds(r) for r in rows[3:]])) for name, rows in found.items()}
    return {name: {"policy_seconds": policy[name], "memory_gib": rows[-1]["peak_gib"]} for name, rows in found.items()}


def processes(args) -> dict[str, float]:
    """Leaves a second of one process on one core, and of two on two: each the same prompts, so twice as many in all."""
    flags = f"{BASE} --method branchgrpo-mix --iterations {2 if args.smoke else 8} --prompts-per-iteration"
    rates = {}
    for n in (1, 2):
        where = common.runs(args) / f"processes_{n}"
        rows = common.train(args, where, f"{flags} {4 * n}".split(), processes=n, threads=1)
        whole = [common.all_seconds(row) for row in rows[1:]]
        rates[str(n)] = 4 * n * rows[-1]["leaves"] / float(np.median(whole[1:]))
    return rates


def draw(document: dict):
    """The ratios with their range; policy seconds, seconds a unit of counting and memory against what grows."""
    figure, growth = plt.figure(figsize=(14, 4)), document["growth"]
    first, *axes = figure.subplots(1, 4, width_ratios=(1.3, 1, 1, 1))
    for y, (values, bound) in enumerate(zip(document["ratios"].values(), document["bounds"].values())):
        middle = np.median(values)
        span = [[middle - min(values)], [max(values) - middle]]
        first.errorbar(middle, y, xerr=span, fmt="o", color=common.COLOURS[y], capsize=3)
        if bound[-1].isdigit():
            first.plot(float(bound.split()[-1]), y, "k|", ms=14)
    first.set_yticks(range(4), [name.replace(" over ", "\nover ").replace(", ", ",\n") for name in document["ratios"]])
    first.set(xlim=(0, None), xlabel="ratio of seconds (median, range; |: hoped for)")
    first.invert_yaxis()
    labels = ("policy seconds an iteration", "milliseconds a unit (forward 1, backward 2)", "peak memory, GiB")
    for ax, key, label, scale in zip(axes, ("policy_seconds", "seconds_a_unit", "memory_gib"), labels, (1, 1000, 1)):
        for (what, row), colour, marker in zip(growth.items(), common.COLOURS, "osD^"):
            y = [scale * cell[key] for cell in row.values()]
            ax.plot([int(n) for n in row], y, marker=marker, color=colour, label=what)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="how many", ylabel=label, ylim=(0, None))
        ax.xaxis.set_major_formatter("{x:.0f}")
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylim(0.5, None)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure in turn, print the tables; JSON, figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(threads=2, jobs=1)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    args.threads = 1 if args.smoke else args.threads  # two beside another busy process wait for each other
    found = ratios(args, 1 if args.smoke else args.repetitions)
    for (name, values), bound in zip(found.items(), BOUNDS.values()):
        print(f"{name:<42} {np.median(values):6.2f}  [{min(values):.2f}, {max(values):.2f}]   {bound}")
    growth, switches, rates = grow(args), switched(args), processes(args)
    print(f"{'':<30}{'policy s':>9}{'ms a unit':>11}{'GiB':>7}")
    for what, row in growth.items():
        for n, c in row.items():
            print(
                f"{what + ' ' + n:<30}{c['policy_seconds']:9.2f}{1000 * c['seconds_a_unit']:11.2f}{c['memory_gib']:7.2f}"
            )
    for name, c in switches.items():
        print(f"{name:<30}{c['policy_seconds']:9.2f}{c['memory_gib']:18.2f}")
    print(
        f"leaves a second: one process {rates['1']:.1f}, two {rates['2']:.1f}, {rates['2'] / rates['1']:.2f} times as many"
    )
    document = {"ratios": found, "bounds": BOUNDS, "growth": growth, "switches": switches, "leaves_a_second": rates}
    common.finish("overhead", args, document, draw)


if __name__ == "__main__":
    main()
