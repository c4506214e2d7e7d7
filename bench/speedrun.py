"""Speed-run: what does it take until 65 % of the held-out words are read exactly?

Question    How many model evaluations, and how many seconds on 2 cores, does a recipe need?
Hypothesis  Another objective on a cheaper tree needs at most a quarter of the demo's.
Metric      Policy units: one per forward, two per backward, over rollout and training; evaluations are not counted.
            Seconds: rollout, training and optimiser, alone on the machine with two threads. Both are taken where the
            fraction of the 256 held-out words that are read exactly, as a mean of three evaluations, first reaches the
            mark; linear between evaluations.
Rule        Five seeds that no setting was chosen on. A record needs an interval that excludes the old one. The colour
            reward, which every recipe is rewarded for too, must not end below its start.

    python bench/speedrun.py             # 1.2 hours on 2 cores; resumes where it was stopped

RECIPES holds the records in their order; a new one is a new line, measured by the same command.
"""

import sys

import common
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

STAR = "--method tempflow --sde cps --eta 0.7 --leaves 8 --flash 2 --objective endpoint --prompts-per-iteration 8"
RECIPES = {  # name -> (date, flags)
    "the demo: BranchGRPO-Mix, Eq. 5": ("2026-11-21", "--eval-every 10"),
    "endpoint on a star that splits at a random step": (
        "2026-11-29",
        f"{STAR} --lr 1e-4 --iterations 192 --eval-every 4",
    ),
}


def reached(rows: list[dict], mark: float) -> dict | None:
    """Iterations, units and seconds until heldout_exact, a mean of three evaluations, first reaches the mark."""
    units, seconds, points = 0, 0.0, []
    for row in rows:
        units += row.get("units", 0)
        seconds += common.policy_seconds(row) if "seconds_rollout" in row else 0.0
        if "heldout_exact" in row:
            points.append((row["heldout_exact"], row["iteration"], units, seconds))
    crossed = common.crossing(common.trailing([p[0] for p in points]), mark)
    if crossed is None:
        return None
    i, fraction = crossed
    before, after = np.array(points[i - 1][1:]), np.array(points[i][1:])
    return dict(zip(("iterations", "units", "seconds"), (before + fraction * (after - before)).tolist()))


def draw(document: dict):
    """Units to the mark, a point per seed and recipe."""
    figure = plt.figure(figsize=(8, 1.2 + 0.7 * len(document["recipes"])))
    ax = figure.subplots()
    for y, (_, recipe) in enumerate(document["recipes"].items()):
        units = [seed["reached"]["units"] for seed in recipe["seeds"] if seed["reached"]]
        ax.plot(units, [y] * len(units), "o", color=common.COLOURS[y % len(common.COLOURS)], alpha=0.6)
    ax.set_yticks(range(len(document["recipes"])), document["recipes"])
    ax.set_ylim(len(document["recipes"]) - 0.5, -0.5)
    ax.set_xlim(0, None)
    ax.set_xlabel(f"policy units until {document['mark']:.0%} of the words are exact")
    return figure


def main() -> None:
    """Run every recipe and seed one after the other; print the records, write the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.set_defaults(threads=2)
    parser.add_argument("--seeds", type=int, nargs="*", default=[11, 12, 13, 14, 15], help="paired seeds")
    parser.add_argument("--mark", type=float, default=0.65, help="fraction of the words")
    args = parser.parse_args()
    recipes = RECIPES
    if args.smoke:
        small = " --iterations 2 --eval-every 1 --eval-size 4 --prompts-per-iteration 1"
        args.seeds, args.mark, recipes = [0], 0.3, {name: (date, f + small) for name, (date, f) in RECIPES.items()}

    found = {}
    with tqdm(total=len(recipes) * len(args.seeds), desc="runs", file=sys.stderr) as bar:
        for name, (date, flags) in recipes.items():
            found[name] = {"date": date, "flags": flags, "seeds": []}
            for seed in args.seeds:
                folder = common.runs(args) / "speedrun" / common.file_name(f"{name}-{seed}")
                rows = common.train(args, folder, f"{flags} --seed {seed}".split())
                colour = [row["heldout_colour"] for row in rows if "heldout_colour" in row]
                result = {"seed": seed, "reached": reached(rows, args.mark), "colour": [colour[0], colour[-1]]}
                exact = [row["heldout_exact"] for row in rows if "heldout_exact" in row]
                found[name]["seeds"].append(result | {"exact": [exact[0], common.trailing(exact)[-1]]})
                bar.update()
            times = [seed["reached"] for seed in found[name]["seeds"] if seed["reached"]]
            for key in ("iterations", "units", "seconds"):
                found[name][key] = common.interval([t[key] for t in times]) if len(times) == len(args.seeds) else None
            print(name, {k: found[name][k] for k in ("iterations", "units", "seconds")}, flush=True)
    common.finish("speedrun", args, {"mark": args.mark, "recipes": found}, draw)


if __name__ == "__main__":
    main()
