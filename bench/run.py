"""Runs every benchmark in turn at its documented size, or with --smoke in seconds; a finished one is not repeated.

python bench/run.py                  # what `make bench` runs: 6.5 hours on 2 cores; stop it and start it again as you like
python bench/run.py --smoke          # what `make bench-smoke` runs
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HOURS = {  # each alone on the machine, those that time first; `NAME flags` -> hours on 2 cores
    "nfe": 0.02,
    "timing": 0.35,
    "overhead": 0.2,
    "gradient": 0.4,
    "diversity": 0.4,
    "scaling": 0.8,
    "ablation": 1.6,
    "alignment": 1.5,
    "alignment --video --seeds 3 --iterations 48 --steps dance:0.8 dance:1.6 cps:0.7 --lrs 1e-4 2e-4 4e-4"
    " --flags '--leaves 8 --prompts-per-iteration 8 --lr-end 1 --eval-size 144'": 1.2,
}
ONLY_LARGE = "alignment --video"  # no smoke of its own


def main() -> None:
    """Run them, then write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    o = parser.parse_args()
    done = ROOT / "runs/bench"
    done.mkdir(parents=True, exist_ok=True)
    names = [n for n in HOURS if not (o.smoke and n.startswith(ONLY_LARGE))]
    with tqdm(total=round(sum(HOURS[n] for n in names), 2), unit="h", desc="benchmarks", file=sys.stderr) as bar:
        for name in names:
            script, *flags = shlex.split(name)
            marker = done / f"{name.partition(' --seeds')[0].replace(' ', '')}.done"
            bar.set_postfix_str(name)
            if o.smoke or not marker.exists():
                command = [sys.executable, str(ROOT / f"bench/{script}.py"), *flags, *(["--smoke"] if o.smoke else [])]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL if o.smoke else None)
            if not o.smoke:
                marker.write_text(time.strftime("%Y-%m-%d %H:%M\n"))
            bar.update(HOURS[name])
    if not o.smoke:
        subprocess.run([sys.executable, str(ROOT / "bench/results.py")], check=True)


if __name__ == "__main__":
    main()
