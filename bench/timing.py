"""How long does an iteration of each method take? The paper's Table 1, as ratios to sequential DanceGRPO.

Question    How many seconds does an iteration take, split into rollout, training, optimiser, decoding and reward, over
            those of DanceGRPO as its authors run it?
Hypothesis  Model calls set the time: each ratio of rollout and training time (the optimiser included) is at most 1.10
            times what counting gives, (forwards + 3 trained parents) over the same of sequential DanceGRPO.
Metric      Rollout and training time of a method over sequential DanceGRPO's, both from the same round. Windows visit
            every place in every round, and are averaged. The median over rounds, with the interval of a bootstrap.
            A cost model of all seconds (forwards, trained parents, pictures decoded and rewarded, a constant) is
            fitted on half the rows and predicts the other half.
Rule        The medians are held against 1.10 times counting. Beside them stands what hardware.py plans from a measured
            curve of seconds against batch size; its ratios should agree within 10 %.

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

POLICY = ("rollout", "training", "optimiser")  # the parts that the method changes
PARTS = (*POLICY, "decode", "reward")

# Two methods with 81 leaves. Names are keys of the JSON: "splits alone" is noise at the splits only, "flash 4" a
# deterministic tail of four steps.
LARGE = {
    "sequential DanceGRPO, 81": "--method flowgrpo --sde dance",
    "Mix, splits alone, flash 4, 81": "--method branchgrpo-mix --branch 3 --mix 0 --flash 4",
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # those that --micro-batch allows are measured
BASE, LARGE_BASE = "sequential DanceGRPO", "sequential DanceGRPO, 81"


# ---------------------------------------------------------------------------------------------------------- statistics
def bootstrap(values, n: int = 2000) -> list[float]:
    """Return the 95 % percentile interval of the median of `values`, from n resamples with replacement."""
    rng, values = np.random.default_rng(0), np.asarray(values)
    medians = np.median(values[rng.integers(0, len(values), (n, len(values)))], axis=1)
    return [float(x) for x in np.percentile(medians, (2.5, 97.5))]


def fit(rows: list[dict], names: tuple[str, ...]) -> np.ndarray:
    """Fit seconds = sum of cost x count by non-negative least squares of relative errors; return the costs of `names`.

    Both sides are divided by the seconds, so that a row of 10 seconds weighs no more than one of 1.
    """
    seconds = np.array([row["seconds"] for row in rows])
    counts = np.array([[row[name] for name in names] for row in rows]) / seconds[:, None]
    return nnls(counts, np.ones(len(rows)))[0]


def cost_model(rows: dict[str, dict]) -> dict:
    """Explain seconds per iteration by counts: fit on every second row, test on the others; the same for the paper.

    Args:
        rows: method -> seconds by part, and its total counts.
    """
    # Rows with equal counts are one, lest a method that was fitted be tested under another name.
    names = ("forwards_total", "trained_parents_total", "leaves_total", "once")
    distinct = {tuple(row[name] for name in names[:-1]): row for row in rows.values()}
    ours = [row | {"seconds": sum(row["seconds"].values()), "once": 1.0} for row in distinct.values()]

    costs = fit(ours[::2], names)
    errors = [float(sum(c * row[k] for c, k in zip(costs, names)) / row["seconds"] - 1) for row in ours[1::2]]
    document = {"seconds_of": dict(zip(names, costs.tolist())), "relative_errors_on_the_other_half": errors}

    # The paper gives too few figures for four costs: one cost is fitted to its seconds.
    paper_cost, paper_errors = hardware.paper_errors()
    return document | {"paper_seconds_a_unit": paper_cost, "paper_relative_errors": paper_errors}


# ------------------------------------------------------------------------------------------------------------ the plan
def batch_curves(run: Run, repetitions: int) -> dict[str, list[float]]:
    """Measure a transformer call at each batch size: median seconds without gradient, and with a backward."""
    sizes = [b for b in BATCHES if b <= (run.args.micro_batch or BATCHES[-1])]
    cond, curves = run.policy.encode(run.prompts[:1]), {"forward": [], "trained": []}
    for b in sizes:
        batch_cond = repeat_cond(cond, b)
        x = torch.zeros(b, *run.policy.latent_shape, device=run.accelerator.device)
        sigma = torch.full((b,), 0.5, device=x.device)

        # Both kinds of call in turn, so that whatever else the machine does slows both.
        timed = {"forward": [], "trained": []}
        for _ in range(repetitions):
            lap = loop.stopwatch(x.device)
            with torch.no_grad():
                run.policy.velocity(x, sigma, batch_cond)
            timed["forward"].append(lap())
            run.policy.velocity(x, sigma, batch_cond).sum().backward()
            timed["trained"].append(lap())
        for name, values in timed.items():
            curves[name].append(float(np.median(values)))
    return curves | {"batch": sizes}


def planned(options, prompts: int, curves: dict) -> float:
    """Return the rollout and training seconds per iteration that hardware.py predicts from the curves.

    They are averaged over the places of a sliding window. Between two measured batch sizes the curves are linear.
    """
    calls = [lambda b, name=name: float(np.interp(b, curves["batch"], curves[name])) for name in ("forward", "trained")]
    return float(np.mean([hardware.seconds(options, i, prompts, *calls) for i in hardware.slide(options)]))


def watch_steps(run: Run) -> list[float]:
    """Return a list to which the seconds of every optimiser step to come are appended."""
    lap, seconds = loop.stopwatch(run.accelerator.device), []

    # The first hook starts the lap. It must return None: anything else would replace the step's arguments.
    def before_step(*_) -> None:
        lap()

    def after_step(*_) -> None:
        seconds.append(lap())

    run.optimizer.optimizer.register_step_pre_hook(before_step)
    run.optimizer.optimizer.register_step_post_hook(after_step)
    return seconds


# -------------------------------------------------------------------------------------------------------------- report
def table_row(options, seconds: list[dict], base: list[dict], prompts: int, plan: float) -> dict:
    """Return a method's row of the document: seconds by part, ratios, counts.

    Args:
        options: of the method.
        seconds, base: for each round the seconds by part, of the method and of DanceGRPO with as many leaves.
        prompts: per iteration.
        plan: the ratio that hardware.py predicts.
    """
    # A ratio is taken within a round: a machine that is slow for a while slows both sides of it.
    policy = [sum(parts[part] for part in POLICY) for parts in seconds]
    ratios = [p / sum(parts[part] for part in POLICY) for p, parts in zip(policy, base)]
    totals = [sum(parts.values()) / sum(parts_of_base.values()) for parts, parts_of_base in zip(seconds, base)]

    row = {"seconds": {part: float(np.median([parts[part] for parts in seconds])) for part in PARTS}}
    row |= {"policy_seconds": float(np.median(policy)), "ratio": float(np.median(ratios))}
    row |= {"ratio_interval": bootstrap(ratios), "ratio_of_totals": float(np.median(totals))}

    # By counting, per picture: DanceGRPO has T = 20 forwards and 19 trained parents, whatever its leaves.
    by_formula = [nfe.counted(options, i) for i in hardware.slide(options)]
    counts = {k: float(np.mean([c[k] for c in by_formula])) for k in ("forwards", "trained_parents")}
    leaves = options.leaves * prompts
    row |= {"ratio_counted": (counts["forwards"] + 3 * counts["trained_parents"]) / (20 + 3 * 19)}
    row["ratio_planned"] = plan
    return row | {f"{k}_total": count * leaves for k, count in counts.items()} | {"leaves_total": leaves}


def draw(document: dict):
    """Draw stacked bars of an iteration's seconds, and the measured ratios beside the counted ones."""
    rows, figure = document["rows"], plt.figure(figsize=(11, 4.8))
    (left, right), y = figure.subplots(1, 2, sharey=True), np.arange(len(document["rows"]))

    start = np.zeros(len(y))
    for part, colour in zip(PARTS, common.COLOURS):
        width = np.array([row["seconds"][part] for row in rows.values()])
        left.barh(y, width, 0.6, left=start, color=colour, label=part)
        start += width
    left.set_yticks(y, rows)
    left.invert_yaxis()
    left.set_xlabel("seconds per iteration (median)")
    left.legend()

    ratio = np.array([row["ratio"] for row in rows.values()])
    low, high = np.array([row["ratio_interval"] for row in rows.values()]).T
    right.errorbar(ratio, y, xerr=(ratio - low, high - ratio), fmt="o", color=common.COLOURS[1], label="measured")
    right.plot([row["ratio_counted"] for row in rows.values()], y, "k|", ms=12, label="counted")
    right.set_xlabel("rollout and training time over sequential DanceGRPO's")
    right.legend()
    return figure


def main() -> None:
    """Run the methods in turn, and write the table, the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=7, help="iterations of every method, at every place of its window"
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts per iteration")
    args = parser.parse_args()
    rounds, prompts = (1, 1) if args.smoke else (args.rounds, args.prompts)
    few_leaves, many_leaves = (8, 9) if args.smoke else (16, 81)

    # All methods share one policy, whose learning rate is so small that it stays as it is. The first iteration of each
    # allocates memory and is not measured.
    arms = {name: flags for name, (flags, _, _) in hardware.METHODS.items()} | LARGE
    shared = f" --steps {10 if args.smoke else 20} --prompts-per-iteration {prompts} --iterations 300 --eval-size 1"
    runs, first = {}, common.prepare(args, shared, lr=1e-12)
    for name, flags in arms.items():
        leaves = many_leaves if name in LARGE else few_leaves
        runs[name] = common.variant(first, args, flags + shared + f" --leaves {leaves}")
        loop.iterate(runs[name], len(hardware.slide(runs[name].args)) // 2)
    curves, step_seconds = batch_curves(first, 2 if args.smoke else 9), watch_steps(first)

    def a_round() -> dict[str, dict]:
        """Measure each method once: mean seconds of each part, over the places of its window."""
        seconds = {}
        for name in arms:
            places = range(1) if args.smoke else hardware.slide(runs[name].args)
            step_seconds.clear()
            rows = [loop.iterate(runs[name], place)[0] for place in places]
            parts = ("rollout", "decode", "reward")
            row = {part: float(np.mean([r[f"seconds_{part}"] for r in rows])) for part in parts}

            # The metrics count the optimiser's step as training. No method makes it faster, so it is shown apart.
            optimiser = sum(step_seconds) / len(rows)
            training = float(np.mean([r["seconds_train"] for r in rows])) - optimiser
            seconds[name] = row | {"training": training, "optimiser": optimiser}
        return seconds

    measured = []
    for i in tqdm(range(rounds), file=sys.stderr):
        measured.append(common.kept(args, "timing", f"round {i} of {prompts}", a_round))
    raw = {name: [seconds[name] for seconds in measured] for name in arms}

    rows = {}
    for name in arms:
        options, base = runs[name].args, LARGE_BASE if name in LARGE else BASE
        plan = planned(options, prompts, curves) / planned(runs[base].args, prompts, curves)
        rows[name] = table_row(options, raw[name], raw[base], prompts, plan) | {"raw": raw[name]}

    ratio_columns = f"{'ratio':>8}  {'interval':<16}{'counted':>8}{'planned':>9}{'of totals':>10}"
    print(f"{'rollout and training':<32}{'s/iter':>9}{'total s':>9}{ratio_columns}")
    for name, r in rows.items():
        low, high = r["ratio_interval"]
        seconds = f"{r['policy_seconds']:9.3f}{sum(r['seconds'].values()):9.3f}"
        ratios = f"{r['ratio']:8.3f}  [{low:.3f}, {high:.3f}]  {r['ratio_counted']:8.3f}{r['ratio_planned']:9.3f}"
        print(f"{name:<32}{seconds}{ratios}{r['ratio_of_totals']:10.3f}")

    paper = {name: s for name, (_, _, s) in hardware.METHODS.items() if s}
    document = {"rows": rows, "paper_seconds": paper, "cost_model": cost_model(rows), "curves": curves}
    common.finish("timing", args, document, draw)


if __name__ == "__main__":
    main()
