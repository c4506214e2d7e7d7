"""How long does an iteration of each method take? The paper's Table 1, as ratios to sequential DanceGRPO.

Question    Seconds an iteration, split into rollout, training, optimiser, decoding and reward, against DanceGRPO as its authors run it.
Hypothesis  Model calls set the time: each ratio of policy seconds (rollout, training, optimiser) is at most 1.10 times what
            counting gives, (forwards + 3 trained parents) over the same of sequential DanceGRPO.
Metric      Policy seconds of a method over sequential DanceGRPO's, both from the same round. Windows visit
            every place in every round, and are averaged. Median over rounds with the interval of a bootstrap; a cost model of
            all seconds (forwards, trained parents, pictures decoded and rewarded, a constant) is fitted on half the rows and
            predicts the other half.
Rule        The medians against 1.10 times counting. Beside them what hardware.py plans from a measured curve of seconds against
            batch size; its ratios should agree within 10 %.

    python bench/timing.py               # 20 minutes on one core; run it alone
"""

import sys

import common
import matplotlib.pyplot as plt
import nfe
import numpy as np
import torch
from scipy.optimize import nnls
from tqdm import tqdm

import hardware
import loop
from branchgrpo import repeat_cond
from checkpoint import Run

POLICY = ("rollout", "training", "optimiser")
PARTS = (*POLICY, "decode", "reward")
LARGE = {  # 81 leaves
    "sequential DanceGRPO, 81": "--method flowgrpo --sde dance",
    "Mix, splits alone, flash 4, 81": "--method branchgrpo-mix --branch 3 --mix 0 --flash 4",
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # those that --micro-batch allows
BASE, LARGE_BASE = "sequential DanceGRPO", "sequential DanceGRPO, 81"


def bootstrap(values, n: int = 2000) -> list[float]:
    """The 95 % percentile interval of the median."""
    rng, values = np.random.default_rng(0), np.asarray(values)
    medians = np.median(values[rng.integers(0, len(values), (n, len(values)))], axis=1)
    return [float(x) for x in np.percentile(medians, (2.5, 97.5))]


def fit(rows: list[dict], names: tuple[str, ...]) -> np.ndarray:
    """Non-negative least squares of relative errors: seconds = sum of cost x count, the weights of `names`."""
    seconds = np.array([r["seconds"] for r in rows])
    counts = np.array([[r[k] for k in names] for r in rows]) / seconds[:, None]
    return nnls(counts, np.ones(len(rows)))[0]


def cost_model(rows: dict[str, dict]) -> dict:
    """Seconds an iteration from counts: fitted on every second row, tested on the others; the same with the paper's seconds."""
    names = ("forwards_total", "trained_parents_total", "leaves_total", "once")
    ours = {tuple(r[k] for k in names[:-1]): r for r in rows.values()}  # rows of equal counts are one
    ours = [r | {"seconds": sum(r["seconds"].values()), "once": 1.0} for r in ours.values()]
    costs = fit(ours[::2], names)
    errors = [float(sum(c * r[k] for c, k in zip(costs, names)) / r["seconds"] - 1) for r in ours[1::2]]
    document = {"seconds_of": dict(zip(names, costs.tolist())), "relative_errors_on_the_other_half": errors}
    one, theirs = hardware.paper_errors()
    return document | {"paper_seconds_a_unit": one, "paper_relative_errors": theirs}


def batch_curves(run: Run, repetitions: int) -> dict[str, list[float]]:
    """Seconds of a transformer call at each batch size, without and with gradient and backward; medians."""
    sizes = [b for b in BATCHES if b <= (run.args.micro_batch or BATCHES[-1])]
    cond, found = run.policy.encode(run.prompts[:1]), {"forward": [], "trained": []}
    for b in sizes:
        c = repeat_cond(cond, b)
        x = torch.zeros(b, *run.policy.latent_shape, device=run.accelerator.device)
        sigma = torch.full((b,), 0.5, device=x.device)
        timed = {"forward": [], "trained": []}
        for _ in range(repetitions):
            lap = loop.stopwatch(x.device)
            with torch.no_grad():
                run.policy.velocity(x, sigma, c)
            timed["forward"].append(lap())
            run.policy.velocity(x, sigma, c).sum().backward()
            timed["trained"].append(lap())
        for name, values in timed.items():
            found[name].append(float(np.median(values)))
    return found | {"batch": sizes}


def planned(options, prompts: int, curves: dict) -> float:
    """What hardware.py predicts from the curves: policy seconds an iteration, averaged over a window's slide."""
    calls = [lambda b, name=name: float(np.interp(b, curves["batch"], curves[name])) for name in ("forward", "trained")]
    return float(np.mean([hardware.seconds(options, i, prompts, *calls) for i in hardware.slide(options)]))


def watch_steps(run: Run) -> list[float]:
    """The seconds of every optimiser step to come are appended to what this returns."""
    lap, seconds = loop.stopwatch(run.accelerator.device), []
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: lap() and None)
    run.optimizer.optimizer.register_step_post_hook(lambda *_: seconds.append(lap()))
    return seconds


def draw(document: dict):
    """Stacked bars of an iteration's seconds, and measured ratios over counted ones."""
    rows, figure = document["rows"], plt.figure(figsize=(11, 4.8))
    (left, right), y = figure.subplots(1, 2, sharey=True), np.arange(len(document["rows"]))
    start = np.zeros(len(y))
    for part, colour in zip(PARTS, common.COLOURS):
        width = np.array([r["seconds"][part] for r in rows.values()])
        left.barh(y, width, 0.6, left=start, color=colour, label=part)
        start += width
    left.set_yticks(y, rows)
    left.invert_yaxis()
    left.set_xlabel("seconds an iteration (median)")
    left.legend()
    ratio = np.array([r["ratio"] for r in rows.values()])
    low, high = np.array([r["ratio_interval"] for r in rows.values()]).T
    right.errorbar(ratio, y, xerr=(ratio - low, high - ratio), fmt="o", color=common.COLOURS[1], label="measured")
    right.plot([r["ratio_counted"] for r in rows.values()], y, "k|", ms=12, label="counted")
    right.set_xlabel("policy seconds over sequential DanceGRPO's")
    right.legend()
    return figure


def main() -> None:
    """Interleave the methods, print the table; JSON, figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=4, help="an iteration")
    args = parser.parse_args()
    rounds, prompts = (1, 1) if args.smoke else (args.rounds, args.prompts)
    few, many = (8, 9) if args.smoke else (16, 81)
    arms = {name: flags for name, (flags, _, _) in hardware.METHODS.items()} | LARGE
    shared = f" --steps 20 --prompts-per-iteration {prompts} --iterations 300 --eval-size 1"
    runs, first = {}, common.prepare(args, shared, lr=1e-12)
    for name, flags in arms.items():
        leaves = many if name in LARGE else few
        runs[name] = common.variant(first, args, flags + shared + f" --leaves {leaves}")
        loop.iterate(runs[name], len(hardware.slide(runs[name].args)) // 2)  # warm
    curves, steps = batch_curves(first, 2 if args.smoke else 9), watch_steps(first)

    def a_round() -> dict[str, dict]:
        """Of each method the mean seconds of each part over the places of its window."""
        found = {}
        for name in arms:
            places = range(1) if args.smoke else hardware.slide(runs[name].args)
            steps.clear()
            rows = [loop.iterate(runs[name], j)[0] for j in places]
            row = {
                part: float(np.mean([r[f"seconds_{part}"] for r in rows])) for part in ("rollout", "decode", "reward")
            }
            optimiser = sum(steps) / len(rows)
            training = float(np.mean([r["seconds_train"] for r in rows])) - optimiser
            found[name] = row | {"training": training, "optimiser": optimiser}
        return found

    seen = [
        common.kept(args, "timing", f"round {i} of {prompts}", a_round) for i in tqdm(range(rounds), file=sys.stderr)
    ]
    raw = {name: [found[name] for found in seen] for name in arms}
    rows = {}
    for name in arms:
        found = [nfe.counted(runs[name].args, i) for i in hardware.slide(runs[name].args)]
        leaves, base = runs[name].args.leaves * prompts, LARGE_BASE if name in LARGE else BASE
        policy = [sum(r[part] for part in POLICY) for r in raw[name]]
        ratios = [p / sum(b[part] for part in POLICY) for p, b in zip(policy, raw[base])]
        totals = [sum(r.values()) / sum(b.values()) for r, b in zip(raw[name], raw[base])]
        n = {k: float(np.mean([f[k] for f in found])) for k in ("forwards", "trained_parents")}
        row = {"seconds": {part: float(np.median([r[part] for r in raw[name]])) for part in PARTS}}
        row |= {"policy_seconds": float(np.median(policy)), "ratio": float(np.median(ratios))}
        row |= {"ratio_interval": bootstrap(ratios), "ratio_of_totals": float(np.median(totals))}
        row |= {"ratio_counted": (n["forwards"] + 3 * n["trained_parents"]) / (20 + 3 * 19)}
        row["ratio_planned"] = planned(runs[name].args, prompts, curves) / planned(runs[base].args, prompts, curves)
        rows[name] = row | {f"{k}_total": v * leaves for k, v in n.items()}
        rows[name] |= {"leaves_total": leaves, "raw": raw[name]}
    print(
        f"{'':<32}{'policy s':>9}{'total s':>9}{'ratio':>8}  {'interval':<16}{'counted':>8}{'planned':>9}{'of totals':>10}"
    )
    for name, r in rows.items():
        low, high = r["ratio_interval"]
        numbers = (
            f"{r['policy_seconds']:9.3f}{sum(r['seconds'].values()):9.3f}{r['ratio']:8.3f}  [{low:.3f}, {high:.3f}]  "
        )
        print(f"{name:<32}{numbers}{r['ratio_counted']:8.3f}{r['ratio_planned']:9.3f}{r['ratio_of_totals']:10.3f}")
    paper = {name: s for name, (_, _, s) in hardware.METHODS.items() if s}
    document = {"rows": rows, "paper_seconds": paper, "cost_model": cost_model(rows), "curves": curves}
    common.finish("timing", args, document, draw)


if __name__ == "__main__":
    main()
