"""Runs every benchmark in turn at its documented size, or with --smoke in seconds; a finished one is not repeated.

python bench/run.py           # what `make bench` runs: under 8 hours on 2 cores; stop it and start it again as you like
python bench/run.py --all     # equal updates, ablations, spread, what adapts, and video too: nine more hours
python bench/run.py --smoke   # what `make bench-smoke` runs
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import common
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HOURS = {  # `NAME flags` -> hours on 2 cores; each has the machine alone, and those that measure time come first
    "nfe": 0.02,
    "timing": 0.4,
    "overhead": 0.2,
    "evaluate --train '--iterations 200'": 0.1,
    "early": 0.2,
    "gradient": 1.2,
    "diversity": 0.35,
    "scaling": 0.45,
    "speedrun": 1.6,
    "equal_time": 3.2,
}
MORE = {  # the same of those that --all adds
    "alignment": 2.2,
    "ablation": 0.9,
    "spread": 1.0,
    "ablation --adaptive --seeds 5 --iterations 112": 0.9,
    "alignment --video --seeds 3 --iterations 48 --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4 4e-4"
    " --flags '--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144'": 1.1,
    "equal_time --name equal_time_warmup --arms 'DanceGRPO, warm-up' 'endpoint, star, two-step tail, warm-up'": 0.8,
    "equal_time --video --seeds 3 --arms 'Mix, noise at the splits, flash' 'endpoint, star at a random step'"
    " 'nft, ODE'": 1.5,
}


def run_one(name: str, smoke: bool) -> bool:
    """Run a benchmark, unless its result is there and was measured by the same command and code; say whether it failed.

    Args:
        name: a key of HOURS or MORE.
        smoke: run it in seconds, always, and without its output.
    """
    script, *flags = shlex.split(name)
    key = "adaptive" if "--adaptive" in flags else script + "_video" * ("--video" in flags)
    key = flags[flags.index("--name") + 1] if "--name" in flags else key

    # The marker holds all that the result depends on. It is written after the result.
    marker = ROOT / f"runs/bench/{key}.done"
    stamp = f"{name}\n{common.code()}\n{(ROOT / f'bench/{script}.py').read_text()}"
    result = ROOT / f"bench/results/{key}.json"
    if not smoke and result.exists() and marker.exists() and marker.read_text() == stamp:
        return False

    command = [sys.executable, str(ROOT / f"bench/{script}.py"), *flags, *["--smoke"] * smoke]
    if subprocess.run(command, stdout=subprocess.DEVNULL if smoke else None).returncode:
        return True
    if not smoke:
        marker.write_text(stamp)
    return False


def main() -> None:
    """Run them, then write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--smoke", action="store_true", help="each in seconds, into runs/smoke")
    only.add_argument("--all", action="store_true", help="those of MORE too")
    args = parser.parse_args()
    (ROOT / "runs/bench").mkdir(parents=True, exist_ok=True)

    # A comparison of videos has no smoke run. One that fails does not keep the others from running.
    hours, failed = HOURS | (MORE if args.all or args.smoke else {}), []
    hours = {name: h for name, h in hours.items() if not args.smoke or "--video" not in name}
    with tqdm(total=round(sum(hours.values()), 2), unit="h", desc="benchmarks", file=sys.stderr) as bar:
        for name in hours:
            bar.set_postfix_str(shlex.split(name)[0] + "_video" * ("--video" in name))
            if run_one(name, args.smoke):
                failed.append(name)
            bar.update(hours[name])

    if not args.smoke:
        subprocess.run([sys.executable, str(ROOT / "bench/results.py")], check=True)
    if failed:
        sys.exit(f"these failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
