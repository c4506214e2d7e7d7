"""What the benchmarks share: command line, training runs that are not repeated, provenance, intervals and figures.

Every benchmark writes bench/results/NAME.json (arguments, versions, commit, machine, raw values) and draws NAME.png and
NAME.svg from that file alone. Its last line on stdout is the same JSON. `--smoke` runs it in seconds, into runs/smoke.

A benchmark that was stopped goes on where it stopped, because two kinds of work are kept under runs/bench:

1. `train`, `train_all`   whole training runs, each in a process of its own; what is kept is the run's folder
2. `kept`                 any other part of a benchmark; what is kept is one file

Either is repeated as soon as its flags change, or the code that it depends on (`code`).

In all benchmarks `args` is the benchmark's own command line, and `options` are the resolved options of a training run.
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
from loop import iterate  # noqa: E402

# The palette of Okabe and Ito, which readers with any kind of colour vision can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777"]
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"svg.hashsalt": "branchgrpo", "figure.constrained_layout.use": True}


# -------------------------------------------------------------------------------------------------------- command line
def parser(doc: str) -> argparse.ArgumentParser:
    """Make the flags that every benchmark has; the description is the first line of its docstring."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--smoke", action="store_true", help="only show that it runs: in seconds, into runs/smoke")
    p.add_argument("--video", action="store_true", help="use train_video.py instead of train_image.py")
    p.add_argument("--flags", default="", help="flags of every run, as in --flags='--model FOLDER --reward hpsv2'")
    p.add_argument("--jobs", type=int, default=2, help="training runs at the same time, with --threads each")
    p.add_argument("--threads", type=int, default=1, help="threads of torch, in this process and in each run")
    p.add_argument("--name", help="name of the JSON and of the figure; default: the script's, which RESULTS.md shows")
    return p


def script(args) -> str:
    """Name the module that trains."""
    return "train_video" if args.video else "train_image"


def job(args, flags: str) -> tuple:
    """Resolve `flags` together with the flags of all runs: (options, ...), see the training script's own `job`."""
    return importlib.import_module(script(args)).job([*flags.split(), *args.flags.split()])


# ---------------------------------------------------------------------------------------------- runs in this process
def prepare(args, flags: str, **changes) -> Run:
    """Make a run in this process, ready for `loop.iterate`.

    Args:
        args: the benchmark's command line.
        flags: of the training script, as one text.
        changes: options that no flag may have, such as a learning rate so small that nothing is learnt.
    """
    options, *rest = job(args, flags)
    vars(options).update(changes)
    torch.set_num_threads(args.threads)

    # What a training run prints at its start would only come between the rows of the benchmark's table.
    with contextlib.redirect_stdout(io.StringIO()):
        return prepared_run(options, Accelerator(cpu=options.device == "cpu" or not torch.cuda.is_available()), *rest)


def variant(run: Run, args, flags: str) -> Run:
    """Return the same policy, rewards and optimiser under other flags.

    A large model is then loaded once for all variants. The learning rate stays that of `run`.
    """
    options = job(args, flags)[0]
    options.lr = run.args.lr
    return dataclasses.replace(run, args=options)


def in_turn(args, recipes: dict[str, str], each: int = 3, threads: int | None = None) -> dict[str, list[dict]]:
    """Time recipes side by side: iterations of each in turn, four rounds, of which the first only warms up.

    Nothing else may run meanwhile. The weights stay where they are. A window or a split that moves has its places at
    equal distances over the run, so each round takes others.

    Args:
        args: the benchmark's command line.
        recipes: name -> flags.
        each: iterations of a recipe in each round.
        threads: of torch; --threads by default.

    Returns:
        name -> rows of metrics of its 3 * `each` iterations; of one round in a smoke run.
    """
    run, rows = prepare(args, "", lr=1e-12), {name: [] for name in recipes}
    torch.set_num_threads(threads or args.threads)
    for round_ in range(1 if args.smoke else 4):
        for name, flags in recipes.items():
            own = variant(run, args, flags)
            first = round_ * own.args.iterations // 4
            done = [iterate(own, i)[0] for i in range(first, first + (1 if args.smoke else each))]
            if round_ or args.smoke:
                rows[name] += done
    torch.set_num_threads(args.threads)
    return rows


# ------------------------------------------------------------------------------------- runs in processes of their own
class Failed(Exception):
    """A training run stopped with an error, as one that diverges does."""


@functools.cache
def code() -> str:
    """Hash what a result depends on: all top-level code and this file, and the embedded models and prompts in tiny/.

    Comments and docstrings do not count, so that they may be improved without repeating hours of measurements.
    """
    digest = hashlib.sha256()

    # A syntax tree holds no comments. Docstrings are the first statement of a body: they are cut off.
    for path in [*sorted(ROOT.glob("*.py")), ROOT / "bench/common.py"]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())

    # The scripts that made tiny/ do not count, only what they made.
    suffixes = (".safetensors", ".json", ".txt")
    for path in sorted(p for p in (ROOT / "tiny").rglob("*") if p.is_file() and p.suffix in suffixes):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def train(
    args, folder: Path, flags: list[str], processes: int = 1, threads: int | None = None, model: bool = False
) -> list[dict]:
    """Do a whole training run in a process of its own, or in several, and return its rows of metrics.

    The run is kept under `folder`, and is not repeated while its flags and the code stay the same.

    Args:
        args: the benchmark's command line.
        folder: the run's own folder, which is emptied before the run starts.
        flags: of the training script, as a list of words; those of --flags are added.
        processes: how many of them share the prompts; more than one are started by torchrun.
        threads: threads of torch in each process; --threads by default.
        model: whether the trained model is kept, which takes space.

    Raises:
        Failed: if the run stops with an error.
    """
    # A benchmark reads the metrics alone. --save-every is out of reach, so only the last checkpoint is ever written.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = torchrun if processes > 1 else []
    output = ["--out", str(folder), "--save-every", "1000000"]
    command = [sys.executable, *launcher, str(ROOT / f"{script(args)}.py"), *flags, *args.flags.split(), *output]

    # The marker names the command and the code of the run that lies in this folder. A smoke run is always repeated,
    # since all it has to show is that the code runs.
    key, marker = json.dumps({"command": command[1:], "code": code()}), folder / "command.json"
    if args.smoke or not marker.exists() or marker.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads or args.threads)}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise Failed(f"{' '.join(command)}\n{process.stderr[-2000:]}")

        # Hundreds of runs would fill the disk with weights that nobody reads.
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)
        if not model:
            shutil.rmtree(folder / "model")

        # The marker is written last: where it lies, the run came to its end.
        marker.write_text(key)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tried(args, folder: Path, flags: str, bar) -> float | None:
    """Return the final reward of one cell of a grid; None where the run diverged, which is said and ranks last."""
    try:
        return final_reward(train(args, folder, flags.split()))
    except Failed as error:
        tqdm.write(f"{flags}: {error}", file=sys.stderr)
        return None
    finally:
        bar.update()


def train_all(args, name: str, tasks: dict[str, str]) -> dict[str, list[dict]]:
    """Do many training runs, `args.jobs` at the same time, with a progress bar; finished ones are read, not repeated.

    Args:
        args: the benchmark's command line.
        name: of the folder that holds the runs.
        tasks: name of a run -> its flags.

    Returns:
        Name of a run -> its rows of metrics.
    """
    parent = runs(args) / f"{name}{'_video' if args.video else ''}"
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(tasks), desc=name, file=sys.stderr) as bar:

        def train_one(task: tuple[str, str]) -> list[dict]:
            run_name, flags = task
            rows = train(args, parent / file_name(run_name), flags.split())
            bar.update()
            return rows

        return dict(zip(tasks, pool.map(train_one, tasks.items())))


# ---------------------------------------------------------------------------------------------- parts of other results
def kept(args, name: str, key: str, compute):
    """Return what `compute()` returns, from a file if it was computed before under the same flags, script and code.

    Args:
        args: the benchmark's command line.
        name: of the benchmark, which is the folder's under runs/bench.
        key: of this part; it becomes the name of the file.
        compute: a function without arguments.
    """
    path = runs(args) / f"{name}{'_video' if args.video else ''}" / f"{file_name(key)}.pt"
    stamp = json.dumps({"code": code(), "script": Path(sys.argv[0]).read_text(), "flags": args.flags, "key": key})
    if not args.smoke and path.exists():
        stamp_of_file, value = torch.load(path, weights_only=False)
        if stamp_of_file == stamp:
            return value

    # The file is written beside and renamed, so that one that is half written never has the good name.
    value = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((stamp, value), unfinished := path.with_suffix(".writing"))
    os.replace(unfinished, path)
    return value


def runs(args) -> Path:
    """Return the folder in which training runs and parts of results are kept."""
    return ROOT / ("runs/smoke" if args.smoke else "runs/bench")


def file_name(text: str) -> str:
    """Replace by _ what no file name should hold: 's = 4' -> 's___4'. A long name is cut, and ends in its hash."""
    name = "".join(c if c.isalnum() or c in "-._" else "_" for c in text)
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# ------------------------------------------------------------------------------------- what is read from the metrics
def policy_seconds(row: dict) -> float:
    """Return the rollout and training time of one iteration, the optimiser included, decoding and rewards left out."""
    return row["seconds_rollout"] + row["seconds_train"]


def all_seconds(row: dict) -> float:
    """Return the whole time of one iteration, decoding and rewards included, the evaluation left out."""
    return sum(v for k, v in row.items() if k.startswith("seconds_") and k != "seconds_eval")


def trailing(rewards: list[float]) -> list[float]:
    """Average, at each evaluation, the last three: a lucky one then neither sets a mark nor reaches it."""
    return [float(np.mean(rewards[max(0, i - 2) : i + 1])) for i in range(len(rewards))]


def crossing(values: list[float], mark: float) -> tuple[int, float] | None:
    """Where a curve first reaches the mark: (i, w), between the values i - 1 and i, a fraction w of the way; else None.

    Linear between two values: of 1.0 and 2.0 a mark of 1.5 is reached at (1, 0.5). A curve that starts above it gives
    (1, 0.0).
    """
    for i, (a, b) in enumerate(zip(values, values[1:]), 1):
        if b >= mark:
            return i, 0.0 if a >= mark else (mark - a) / (b - a)
    return None


def final_reward(rows: list[dict]) -> float:
    """Return the mean of the last three held-out evaluations."""
    return trailing([row["heldout_reward"] for row in rows if "heldout_reward" in row])[-1]


# ----------------------------------------------------------------------------------------------------------- intervals
def interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean, low and high of Student's interval of n independent values: mean +- t_{n-1} std / sqrt(n).

    One value alone has no spread: its interval is the value itself.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean

    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def jackknife(statistic, n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return value, low and high of a statistic of n independent units, by leaving out one unit at a time.

    The variance is (n - 1)/n sum_i (theta_i - mean theta)^2, where theta_i is the statistic without unit i. It serves
    where the statistic, such as a ratio of means, is no mean itself.

    Args:
        statistic: a function of the unit to leave out; None leaves out none.
        n: number of units.
        level: of the interval.
    """
    whole, without_one = np.asarray(statistic(None)), np.array([statistic(i) for i in range(n)])
    half = stats.t.ppf((1 + level) / 2, n - 1) * ((n - 1) * without_one.var(0)) ** 0.5
    return whole, whole - half, whole + half


# ----------------------------------------------------------------------------------------------------------- documents
def provenance(args) -> dict:
    """Return what a reader needs to repeat a result: command, arguments, versions, commit and machine."""
    # "-dirty" says that the code is not that of the commit. Docs and results do not count.
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "tiny"], capture_output=True).returncode

    machine = {"cores": os.cpu_count(), "threads": args.threads, "architecture": platform.machine()}
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    libraries = (torch, diffusers, transformers, np)
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in libraries}

    # A path is no argument: some benchmarks put their folder into `args`.
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
    """Return the folder of results, and make it."""
    path = ROOT / ("runs/smoke" if args.smoke else "bench/results")
    path.mkdir(parents=True, exist_ok=True)
    return path


def finish(name: str, args, document: dict, draw) -> None:
    """Write the document and its figure, and print the document as the last line on stdout.

    Args:
        name: of the benchmark; --name replaces it.
        args: the benchmark's command line.
        document: what was measured.
        draw: a function that makes a figure from the document.
    """
    name = args.name or name + ("_video" if args.video else "")
    path = folder(args) / f"{name}.json"
    path.write_text(json.dumps(provenance(args) | document, indent=1))

    # The figure is drawn from what was written, so that it can hold nothing that the file does not.
    document = json.loads(path.read_text())
    with plt.rc_context(STYLE):
        figure = draw(document)
        for kind in ("png", "svg"):
            metadata = {"Date": None} if kind == "svg" else None  # without a date the same JSON gives the same file
            figure.savefig(path.with_suffix(f".{kind}"), dpi=150, metadata=metadata)
        plt.close(figure)
    print(json.dumps(document))
