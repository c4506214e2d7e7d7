"""How fast does each method learn? Held-out reward against policy seconds, evaluations and updates, paired over seeds.

Question    Which share of DanceGRPO's policy seconds (rollout and training) does BranchGRPO need to reach its final reward?
Hypothesis  At most a quarter: the tree shares prefixes, siblings share forwards, and credit arrives at every depth.
Metric      Policy seconds until the held-out reward (linear between evaluations) first reaches DanceGRPO's final one, over
            DanceGRPO's policy seconds; the same seed on both sides. DanceGRPO's final reward is the mean of its last
            three evaluations of that seed, so that one lucky evaluation does not set the mark.
Rule        Same leaves, same updates, same prompts. Each arm runs at its own best eta and learning rate from one grid, chosen
            by successive halving on prompts that are neither trained on nor tested on. Median over seeds and each seed's
            value are reported; a seed that never reaches the mark counts as "not reached".

    python bench/alignment.py            # resumes where it was stopped
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "DanceGRPO": "--method dancegrpo",
    "BranchGRPO": "--method branchgrpo",
    "BranchGRPO + depth": "--method branchgrpo --depth-prune",
    "BranchGRPO + width": "--method branchgrpo --width-prune",
    "BranchGRPO-Mix, splits alone": "--method branchgrpo-mix --mix 0",
}
STEPS = "dance:0.4 dance:0.8 dance:1.6 dance:2.4 cps:0.3 cps:0.5 cps:0.7 cps:0.85"


def flags_of(setting: tuple) -> list[str]:
    """A point of the grid as flags."""
    return [text for name, value in zip(("--sde", "--eta", "--lr"), setting) for text in (name, str(value))]


def run(folder: Path, flags: list[str], script: str) -> list[dict]:
    """One training run in its own process on one thread, kept under `folder`; returns its metric rows."""
    command = [sys.executable, str(ROOT / script), *flags, "--out", str(folder), "--save-every", "1000000"]
    if not (folder / "model").exists():  # the last thing a run writes
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds_an_iteration(arms: list[str], tuned: dict, o, rounds: int = 3) -> dict[str, float]:
    """Policy seconds (rollout and training) an iteration of each arm alone, over a whole sweep of its window; median of rounds."""
    seconds = {arm: [] for arm in arms}
    for i in range(rounds):
        for arm in arms:
            flags = [*ARMS[arm].split(), *flags_of(tuned[arm]["setting"]), *o.shared, "--eval-size", "8"]
            rows = run(o.out / f"time/{arm}-{i}".replace(" ", "_"), [*flags, "--iterations", "9"], o.script)
            seconds[arm].append(np.mean([row["seconds_rollout"] + row["seconds_train"] for row in rows[2:]]))
    return {arm: float(np.median(values)) for arm, values in seconds.items()}


def curve(rows: list[dict], an_iteration: float = 0.0) -> dict[str, list[float]]:
    """Every held-out score against cumulated policy seconds, model evaluations and updates."""
    scores = [k for k in rows[0] if k.startswith("heldout_")]
    out = {k.removeprefix("heldout_"): [] for k in ("iteration", "seconds", "nfe", *scores)}
    nfe = 0
    for row in rows:
        nfe += row.get("nfe", 0)
        if "heldout_reward" in row:
            values = [row["iteration"], row["iteration"] * an_iteration, nfe, *(row[k] for k in scores)]
            for key, value in zip(out, values):
                out[key].append(value)
    return out


def seconds_to(c: dict, mark: float) -> float | None:
    """Policy seconds until the reward first reaches the mark, linear between evaluations; None if it never does."""
    for i in range(1, len(c["reward"])):
        a, b = c["reward"][i - 1], c["reward"][i]
        if b >= mark:
            share = 0.0 if a >= mark else (mark - a) / (b - a)
            return c["seconds"][i - 1] + share * (c["seconds"][i] - c["seconds"][i - 1])
    return None


def tune(arm: str, o, pool: ThreadPoolExecutor, bar: tqdm) -> dict:
    """Successive halving over the grid on tuning prompts: all cells for a third, the best at full length."""
    files = ["--prompts", str(o.out / "tune_train.txt"), "--eval-prompts", str(o.out / "tune_heldout.txt")]
    cells, record = o.grid, []
    for iterations, keep in ((o.iterations // 3, o.finalists), (o.iterations, 1)):

        def cell(setting, iterations=iterations):
            flags = [*ARMS[arm].split(), *flags_of(setting), "--seed", "1000", *files, *o.shared]
            name = "tune/{}/{}-{}-{}-{}".format(arm, iterations, *setting).replace(" ", "_")
            rows = run(
                o.out / name, [*flags, "--iterations", str(iterations), "--eval-every", str(iterations // 2)], o.script
            )
            bar.update()
            return curve(rows)["reward"][-1]

        scores = list(pool.map(cell, cells))
        record.append({"iterations": iterations, "cells": [[*c, s] for c, s in zip(cells, scores)]})
        cells = [c for _, c in sorted(zip(scores, cells), reverse=True)[:keep]]
    return {"setting": cells[0], "grid": record}


def compare(results: dict, seeds: list[int]) -> dict:
    """Each arm against DanceGRPO, seed by seed: final reward, seconds an iteration, share of seconds to its mark."""
    table = {}
    for arm, arm_curves in results.items():
        shares, finals, per_update = [], [], []
        for s in range(len(seeds)):
            dance, mine = results["DanceGRPO"][s], arm_curves[s]
            reached = seconds_to(mine, float(np.mean(dance["reward"][-3:])))
            shares.append(None if reached is None else reached / dance["seconds"][-1])
            finals.append(float(np.mean(mine["reward"][-3:])))
            per_update.append(mine["seconds"][-1] / mine["iteration"][-1])
        found = [x if x is not None else np.inf for x in shares]
        median = float(np.median(found))
        table[arm] = {
            "final_reward": finals,
            "final_scores": {k: [float(np.mean(c[k][-3:])) for c in arm_curves] for k in list(arm_curves[0])[4:]},
            "seconds_an_update": per_update,
            "share_of_dance_seconds": shares,
            "median_share": median if np.isfinite(median) else None,
        }
    return table


def main() -> None:
    """Tune every arm, run every arm and seed, print the table; the last line is the JSON document."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds")
    parser.add_argument("--iterations", type=int, default=60, help="updates of every arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), help="DanceGRPO is always run")
    parser.add_argument("--flags", default="--leaves 8 --prompts-per-iteration 8 --lr-end 1", help="of all arms")
    parser.add_argument("--steps", nargs="*", default=STEPS.split(), metavar="KIND:ETA", help="of the grid")
    parser.add_argument("--lrs", nargs="*", type=float, default=[5e-5, 1e-4, 2e-4], help="of the grid")
    parser.add_argument("--finalists", type=int, default=4, help="cells of the grid that run at full length")
    parser.add_argument("--video", action="store_true", help="train_video.py instead of train_image.py")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/alignment", help="where the runs are kept")
    o = parser.parse_args()
    o.shared, o.out, o.script = o.flags.split(), o.out.resolve(), "train_video.py" if o.video else "train_image.py"
    o.grid = [(kind, float(eta), lr) for kind, eta in (x.split(":") for x in o.steps) for lr in o.lrs]
    o.out.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / f"tiny/{'video' if o.video else 'prompts'}_train.txt").read_text().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(lines)
    n = min(256, len(lines) // 4)
    (o.out / "tune_train.txt").write_text("".join(lines[:-n]))
    (o.out / "tune_heldout.txt").write_text("".join(lines[-n:]))
    arms = list(dict.fromkeys(["DanceGRPO", *o.arms]))
    total = len(arms) * (len(o.grid) + min(o.finalists, len(o.grid)) + o.seeds)
    with ThreadPoolExecutor(o.jobs) as pool, tqdm(total=total, desc="runs", file=sys.stderr) as bar:
        tuned = {arm: tune(arm, o, pool, bar) for arm in arms}

        def final(task):
            seed, arm = task
            flags = [*ARMS[arm].split(), *flags_of(tuned[arm]["setting"]), *o.shared]
            flags += ["--seed", str(seed), "--iterations", str(o.iterations), "--eval-every", "5"]
            rows = run(o.out / f"{arm}-{seed}".replace(" ", "_"), flags, o.script)
            bar.update()
            return rows

        tasks = [(seed, arm) for seed in range(1, o.seeds + 1) for arm in arms]
        runs = list(pool.map(final, tasks))
    alone = seconds_an_iteration(arms, tuned, o)
    results = {arm: [curve(rows, alone[arm]) for (_, a), rows in zip(tasks, runs) if a == arm] for arm in arms}
    table = compare(results, list(range(o.seeds)))
    print(f"{'arm':<30} {'steps, eta, lr':>22} {'reward':>8} {'s/update':>9} {'share of Dance seconds':>24}")
    for arm, row in table.items():
        share = "not reached" if row["median_share"] is None else f"{row['median_share']:.3f}"
        numbers = f"{np.mean(row['final_reward']):8.3f} {np.mean(row['seconds_an_update']):9.3f} {share:>24}"
        print(f"{arm:<30} {' '.join(map(str, tuned[arm]['setting'])):>22} {numbers}")
    document = {
        "arguments": vars(o) | {"out": "", "shared": o.shared},
        "tuned": tuned,
        "table": table,
        "curves": results,
    }
    path = ROOT / f"bench/results/alignment{'_video' if o.video else ''}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1))
    print(json.dumps({"table": table}))


if __name__ == "__main__":
    main()
