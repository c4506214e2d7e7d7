"""Speed-run: what does it take until 65 % of the held-out words are read exactly?

Question    How many model evaluations, and how many seconds on 2 cores, does a recipe need?
Hypothesis  Another objective on a cheaper tree needs at most a quarter of the demo's.
Metric      Policy units: one per forward, two per backward, over rollout and training; evaluations are not counted.
            They are taken where the fraction of the 256 held-out words that are read exactly, as a mean of three
            evaluations, first reaches the mark; linear between evaluations. Seconds: these units times the seconds of
            a unit (rollout, training and optimiser), which are measured before the runs: two threads, nothing else
            running, the recipes in turn, medians.
Rule        Five seeds that no setting was chosen on. A record needs an interval that excludes the old one. The colour
            reward, which every recipe is rewarded for too, must not end below its start.

    python bench/speedrun.py             # 1.6 hours on 2 cores; resumes where it was stopped
    python bench/speedrun.py --only "endpoint on such a star, with a warm-up and averaged weights"

RECIPES holds the records in their order; a new one is a new line. The second command runs that one alone and reads the
others from the last result; each record says at which commit it was run.
"""

import json

import common
import matplotlib.pyplot as plt
import numpy as np

STAR = "--method tempflow --sde cps --eta 0.7 --leaves 8 --flash 2 --objective endpoint --prompts-per-iteration 8"
RECIPES = {  # name -> (date, flags)
    "the demo: BranchGRPO-Mix, Eq. 5": ("2026-11-21", "--eval-every 10"),
    "endpoint on a star that splits at a random step": (
        "2026-11-29",
        f"{STAR} --lr 1e-4 --iterations 192 --eval-every 4",
    ),
    "endpoint on such a star, with a warm-up and averaged weights": (
        "2026-11-29",
        f"{STAR} --lr 1e-4 --lr-warmup 16 --ema 0.96 --iterations 240 --eval-every 4",
    ),
}


def reached(rows: list[dict], mark: float) -> dict[str, float] | None:
    """Iterations and units until heldout_exact, a mean of three evaluations, first reaches the mark; None if never.

    Args:
        rows: metrics of a run. mark: fraction of the words.
    """
    units, points = 0, []
    for row in rows:
        units += row.get("units", 0)
        if "heldout_exact" in row:
            points.append((row["heldout_exact"], row["iteration"], units))
    crossed = common.crossing(common.trailing([p[0] for p in points]), mark)
    if crossed is None:
        return None
    i, fraction = crossed
    before, after = np.array(points[i - 1][1:]), np.array(points[i][1:])
    return dict(zip(("iterations", "units"), (before + fraction * (after - before)).tolist()))


def draw(document: dict):
    """Units to the mark, a point per seed and recipe."""
    figure = plt.figure(figsize=(10, 1.2 + 0.7 * len(document["recipes"])))
    ax = figure.subplots()
    for y, (_, recipe) in enumerate(document["recipes"].items()):
        units = [seed["reached"]["units"] / 1000 for seed in recipe["seeds"] if seed["reached"]]
        ax.plot(units, [y] * len(units), "o", color=common.COLOURS[y % len(common.COLOURS)], alpha=0.6)
        if never := len(recipe["seeds"]) - len(units):
            ax.annotate(f"{never} of {len(recipe['seeds'])} seeds do not get there", (max(units, default=0), y + 0.3))
    ax.set_yticks(range(len(document["recipes"])), document["recipes"])
    ax.set_ylim(len(document["recipes"]) - 0.5, -0.5)
    ax.set_xlim(0, None)
    ax.set_xlabel(f"thousand policy units until {document['mark']:.0%} of the words are exact")
    return figure


def measured(rows: list[dict], seed: int, mark: float) -> dict:
    """Return what the table needs of one run: where it reached the mark, and colour and words from start to end."""
    colour, exact = ([r[key] for r in rows if key in r] for key in ("heldout_colour", "heldout_exact"))
    ends = {"colour": [colour[0], colour[-1]], "exact": [exact[0], common.trailing(exact)[-1]]}
    return {"seed": seed, "reached": reached(rows, mark)} | ends


def main() -> None:
    """Time a unit of each recipe, then run every recipe and seed; print the records, write the JSON and the figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[11, 12, 13, 14, 15], help="paired seeds")
    parser.add_argument("--mark", type=float, default=0.65, help="fraction of the words")
    parser.add_argument(
        "--only", nargs="*", choices=RECIPES, default=list(RECIPES), help="run these; other records are read"
    )
    args = parser.parse_args()
    recipes = RECIPES
    if args.smoke:
        small = " --iterations 2 --eval-every 1 --eval-size 4 --prompts-per-iteration 1"
        args.seeds, args.mark, recipes = [0], 0.3, {name: (date, f + small) for name, (date, f) in RECIPES.items()}

    # A record that is not run again is read from the last result, and must be of the same flags, seeds and mark.
    found = {}
    if kept := [name for name in recipes if name not in args.only]:
        last = json.loads((common.folder(args) / "speedrun.json").read_text())
        for name in kept:
            record = last["recipes"].get(name, {"flags": None, "seeds": []})
            same = (record["flags"], [s["seed"] for s in record["seeds"]], last["mark"])
            if same != (recipes[name][1], args.seeds, args.mark):
                raise SystemExit(f"--only: speedrun.json has no record of {name!r} with these flags, seeds and mark")
            found[name] = record

    def seconds_per_unit() -> dict[str, float]:
        rows = common.in_turn(args, {name: flags for name, (_, flags) in recipes.items()}, each=6, threads=2)
        return {name: float(np.median([common.policy_seconds(r) / r["units"] for r in rows[name]])) for name in recipes}

    seconds = common.kept(args, "speedrun", "seconds of a unit", seconds_per_unit)
    tasks = {f"{name}-{seed}": f"{recipes[name][1]} --seed {seed}" for name in args.only for seed in args.seeds}
    runs = common.train_all(args, "speedrun", tasks)
    commit = common.provenance(args)["commit"]
    for name in args.only:
        date, flags = recipes[name]
        seeds = [measured(runs[f"{name}-{seed}"], seed, args.mark) for seed in args.seeds]
        found[name] = {"date": date, "commit": commit, "flags": flags, "seeds": seeds}

    # Units and their interval where every seed gets there. Seconds are of today's machine, for all recipes alike.
    for name, record in found.items():
        record["seconds_per_unit"] = seconds[name]
        times = [seed["reached"] for seed in record["seeds"] if seed["reached"]]
        for key in ("iterations", "units"):
            record[key] = common.interval([t[key] for t in times]) if len(times) == len(args.seeds) else None
        record["seconds"] = [seconds[name] * u for u in record["units"]] if record["units"] else None
        print(name, {k: record[k] for k in ("iterations", "units", "seconds")}, flush=True)
    common.finish("speedrun", args, {"mark": args.mark, "recipes": {name: found[name] for name in recipes}}, draw)


if __name__ == "__main__":
    main()
