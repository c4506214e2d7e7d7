"""Runs every benchmark in turn at its documented size, or with --smoke in seconds; a finished one is not repeated.

python bench/run.py                  # what `make bench` runs: under 6 hours on 2 cores; stop it and start it again as you like
python bench/run.py --video          # the comparison of video methods too, one more hour
python bench/run.py --smoke          # what `make bench-smoke` runs
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import common
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HOURS = {  # each alone on the machine, those that time first; `NAME flags` -> hours on 2 cores
    "nfe": 0.02,
    "timing": 0.4,
    "overhead": 0.2,
    "evaluate --train '--iterations 200'": 0.1,
    "gradient": 0.6,
    "diversity": 0.35,
    "scaling": 0.45,
    "ablation": 0.9,
    "alignment": 2.2,
    "alignment --video --seeds 3 --iterations 48 --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4 4e-4"
    " --flags '--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144'": 1.1,
}


def main() -> None:
    """Run them, then write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--smoke", action="store_true", help="each in seconds, into runs/smoke")
    only.add_argument("--video", action="store_true", help="the video methods too, which have no smoke of their own")
    args = parser.parse_args()
    done = ROOT / "runs/bench"
    done.mkdir(parents=True, exist_ok=True)
    names, failed = [n for n in HOURS if args.video or "--video" not in n], []
    with tqdm(total=round(sum(HOURS[n] for n in names), 2), unit="h", desc="benchmarks", file=sys.stderr) as bar:
        for name in names:
            script, *flags = shlex.split(name)
            key = script + ("_video" if "--video" in flags else "")
            marker, stamp = (
                done / f"{key}.done",
                f"{name}\n{common.code()}\n{(ROOT / f'bench/{script}.py').read_text()}",
            )
            bar.set_postfix_str(key)
            there = (ROOT / f"bench/results/{key}.json").exists() and marker.exists() and marker.read_text() == stamp
            if args.smoke or not there:
                flags = [*flags, "--smoke"] if args.smoke else flags
                command = [sys.executable, str(ROOT / f"bench/{script}.py"), *flags]
                if subprocess.run(command, stdout=subprocess.DEVNULL if args.smoke else None).returncode:
                    failed.append(key)
                elif not args.smoke:
                    marker.write_text(stamp)
            bar.update(HOURS[name])
    if not args.smoke:
        subprocess.run([sys.executable, str(ROOT / "bench/results.py")], check=True)
    if failed:
        sys.exit(f"these failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
