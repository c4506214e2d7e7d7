"""What the benchmarks share: command line, resumable runs, a document with its provenance, intervals, figures.

Every benchmark writes bench/results/NAME.json (arguments, versions, commit, machine, raw values) and draws NAME.png and NAME.svg
from that file alone; its last line on stdout is the same JSON. `--smoke` runs it in seconds, into runs/smoke.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import diffusers  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from scipy import stats  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import Run, checkpoints  # noqa: E402
from launch import prepare as prepared_run  # noqa: E402

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777"]  # Okabe and Ito
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"svg.hashsalt": "branchgrpo", "figure.constrained_layout.use": True}


def parser(doc: str) -> argparse.ArgumentParser:
    """Flags of every benchmark; the description is the first line of its docstring."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--smoke", action="store_true", help="in seconds, into runs/smoke: does it run?")
    p.add_argument("--video", action="store_true", help="train_video.py instead of train_image.py")
    p.add_argument("--flags", default="", help="of every run, as in --flags='--model FOLDER --reward hpsv2'")
    p.add_argument("--jobs", type=int, default=2, help="training runs at once, --threads each")
    p.add_argument("--threads", type=int, default=1, help="of torch, in this process and in each run")
    p.add_argument("--name", help="of the JSON and the figure; default: the script's, as RESULTS.md shows it")
    return p


def script(args) -> str:
    """The module that trains."""
    return "train_video" if args.video else "train_image"


def job(args, flags: str) -> tuple:
    """What flags ask for, with those of all runs: see the script's own `job`."""
    return importlib.import_module(script(args)).job([*flags.split(), *args.flags.split()])


def prepare(args, flags: str, **changes) -> Run:
    """A run in this process, ready for `loop.iterate`; options that no flag may have are set by `changes`."""
    options, *rest = job(args, flags)
    vars(options).update(changes)
    torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(io.StringIO()):
        return prepared_run(options, Accelerator(cpu=options.device == "cpu" or not torch.cuda.is_available()), *rest)


def variant(run: Run, args, flags: str) -> Run:
    """The same policy, rewards and optimiser under other flags, so that a large model is loaded once; its lr stays."""
    options = job(args, flags)[0]
    options.lr = run.args.lr
    return dataclasses.replace(run, args=options)


class Failed(Exception):
    """A training run that stopped with an error, as one that diverges does."""


@functools.cache
def code() -> str:
    """A hash of all top-level code and of this file, comments and docstrings apart, and of tiny/: what a result depends on."""
    found = hashlib.sha256()
    for path in [*sorted(ROOT.glob("*.py")), ROOT / "bench/common.py"]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        found.update(ast.dump(tree).encode())
    for path in sorted(
        p for p in (ROOT / "tiny").rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".txt")
    ):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def train(
    args, folder: Path, flags: list[str], processes: int = 1, threads: int | None = None, model: bool = False
) -> list[dict]:
    """A whole run in a process of its own, or several; returns its metric rows.

    Kept under `folder`, and not repeated with the same flags and the same code. Raises Failed if it stops with an error.
    """
    where = ["--out", str(folder), "--save-every", "1000000"]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *many, str(ROOT / f"{script(args)}.py"), *flags, *args.flags.split(), *where]
    key, done_before = json.dumps({"command": command[1:], "code": code()}), folder / "command.json"
    if args.smoke or not done_before.exists() or done_before.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": str(threads or args.threads)}, capture_output=True, text=True
        )
        if done.returncode:
            raise Failed(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)
        if not model:
            shutil.rmtree(folder / "model")
        done_before.write_text(key)  # written last: what is there, was run to its end
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(args, name: str, key: str, compute):
    """What `compute()` returns, kept under runs/bench/NAME, and not repeated with the same flags and the same code."""
    path = runs(args) / f"{name}{'_video' if args.video else ''}" / f"{file_name(key)}.pt"
    stamp = json.dumps({"code": code(), "script": Path(sys.argv[0]).read_text(), "flags": args.flags, "key": key})
    if not args.smoke and path.exists():
        was, value = torch.load(path, weights_only=False)
        if was == stamp:
            return value
    value = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((stamp, value), beside := path.with_suffix(".writing"))
    os.replace(beside, path)
    return value


def runs(args) -> Path:
    """Where training runs and parts of results are kept."""
    return ROOT / ("runs/smoke" if args.smoke else "runs/bench")


def file_name(text: str) -> str:
    """A text with what no file name should hold replaced."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


def train_all(args, name: str, tasks: dict[str, str]) -> dict[str, list[dict]]:
    """Runs named by their cell, `args.jobs` at once, with a progress bar; those that are done are read, not repeated."""
    where = runs(args) / f"{name}{'_video' if args.video else ''}"
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(tasks), desc=name, file=sys.stderr) as bar:

        def cell(task):
            rows = train(args, where / file_name(task[0]), task[1].split())
            bar.update()
            return rows

        return dict(zip(tasks, pool.map(cell, tasks.items())))


def policy_seconds(row: dict) -> float:
    """Rollout, training and optimiser of one iteration; decoding and reward apart."""
    return row["seconds_rollout"] + row["seconds_train"]


def all_seconds(row: dict) -> float:
    """The whole of one iteration, decoding and reward too; evaluation apart."""
    return sum(v for k, v in row.items() if k.startswith("seconds_") and k != "seconds_eval")


def trailing(rewards: list[float]) -> list[float]:
    """At each evaluation the mean of the last three, so that a lucky one neither sets a mark nor reaches it."""
    return [float(np.mean(rewards[max(0, i - 2) : i + 1])) for i in range(len(rewards))]


def final_reward(rows: list[dict]) -> float:
    """Mean of the last three held-out evaluations."""
    return trailing([row["heldout_reward"] for row in rows if "heldout_reward" in row])[-1]


def interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval of independent values; of one value, that value."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def jackknife(statistic, n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value and Student's interval of what `statistic(left_out)` makes of n independent units, all of them where it is None."""
    whole, parts = np.asarray(statistic(None)), np.array([statistic(i) for i in range(n)])
    half = stats.t.ppf((1 + level) / 2, n - 1) * ((n - 1) * parts.var(0)) ** 0.5
    return whole, whole - half, whole + half


def provenance(args) -> dict:
    """Arguments, versions, commit and machine."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "tiny"], capture_output=True).returncode
    machine = {"cores": os.cpu_count(), "threads": args.threads, "architecture": platform.machine()}
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    libraries = (torch, diffusers, transformers, np)
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in libraries}
    arguments = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    command = shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {
        "command": command,
        "arguments": arguments,
        "versions": versions,
        "commit": commit + "-dirty" * bool(changed),
        "machine": machine,
    }


def folder(args) -> Path:
    """Where results go."""
    path = ROOT / ("runs/smoke" if args.smoke else "bench/results")
    path.mkdir(parents=True, exist_ok=True)
    return path


def finish(name: str, args, document: dict, draw) -> None:
    """Write the document and its figure; the last line on stdout is the document."""
    name = args.name or name + ("_video" if args.video else "")
    path = folder(args) / f"{name}.json"
    path.write_text(json.dumps(provenance(args) | document, indent=1))
    document = json.loads(path.read_text())
    with plt.rc_context(STYLE):
        figure = draw(document)
        for kind in ("png", "svg"):
            figure.savefig(path.with_suffix(f".{kind}"), dpi=150, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
    print(json.dumps(document))
