"""What a run is, and what it keeps on disk: its folder, its options, its checkpoints and its log.

1. Run                              what one process holds of a run
2. find_out, options_to_keep        the folder; options.json, against which a resumed run compares its flags
3. save_checkpoint, load_checkpoint trained weights, optimiser, EMA and all rows of metrics, on any number of processes
4. Log                              metrics.jsonl, and TensorBoard or Weights & Biases

A folder holds options.json, metrics.jsonl, before.safetensors, checkpoint-N for some iterations N, the tracker's files
and, when the run has ended, the pictures of report.py and the trained model.

Whose is a checkpoint? A run has an identity, a random number in its options.json. A checkpoint's manifest.json names
it, the iteration, and every file with its size and checksum; it is written last. Only folders with such a list are ever
counted, loaded or deleted, so other people's folders are safe whatever they are called, and a damaged checkpoint is
noticed: the run then goes on from the one before it.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import parallel
from branchgrpo import NonFinite, Sampler
from disk import cannot_write, damage, list_files, read_json, sync, write_durably
from flags import HERE, MAY_CHANGE
from preference import to_uint8
from prompts import digest_of
from rewards import Reward
from schedules import noise_sharing
from sde import sigma_schedule


@dataclass
class Run:
    """What one process holds of a run: options, policy, prompts, rewards and the state that a checkpoint keeps."""

    args: object
    accelerator: Accelerator
    policy: object
    prompts: list[str]
    heldout: list[str]
    rewards: dict[str, Reward]  # optimised and watched
    weights: dict[str, float]  # optimised
    optimizer: torch.optim.Optimizer | None = None
    ema: EMAModel | None = None
    identity: str = ""  # of the run, as its options.json and its checkpoints name it
    iteration: int = 0  # iterations done
    history: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl
    pictures: Tensor | None = None  # of the last evaluation
    lookout: parallel.Lookout | None = None  # with several processes

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.args.out)

    def at(self, place: str) -> None:
        """Tell the other processes where this one is."""
        if self.lookout:
            self.lookout.at(place)

    def sampler(self, sigmas: Tensor | None = None) -> Sampler:
        """The transitions of this run's options: of an iteration with its own noise levels, by default of
        evaluation."""
        args = self.args
        if sigmas is None:
            sigmas = sigma_schedule(args.steps, args.shift)
        return Sampler(sigmas, args.sde, args.eta, noise_sharing(args), args.cps_density, args.flash is not None)


# ------------------------------------------------------------------------------------------------- the folder of a run
def find_out(args) -> str:
    """The run's folder by `--out` and `--resume`: a new one under runs/, the one given, or that of the run to continue.

    Raises:
        ValueError: if a run would be overwritten, or there is none to continue.
    """
    # A new run never writes into another's folder. The random end keeps two apart that start in the same second.
    if args.resume is None:
        out = args.out or f"runs/{args.method}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        if (Path(out) / "options.json").exists():
            raise ValueError(f"--out {out} holds a run: add --resume to continue it, or name another folder")
        return out

    # --resume FOLDER, or --resume with --out FOLDER, or the newest run under runs/.
    runs = sorted(Path("runs").glob("*/options.json"), key=lambda path: path.stat().st_mtime)
    out = args.resume or args.out or (str(runs[-1].parent) if runs else "runs")
    if not (Path(out) / "options.json").exists():
        raise ValueError(f"--resume: {out} holds no run (no options.json)")
    return out


def same_place(value):
    """A path inside the project by what it means: a project that was moved still knows its own files."""
    path = Path(value) if isinstance(value, str) else None
    if path and path.exists() and path.resolve().is_relative_to(HERE.resolve()):
        return f"PROJECT/{path.resolve().relative_to(HERE.resolve())}"
    return value


def options_to_keep(args, prompts: list[str], heldout: list[str]) -> dict:
    """What options.json holds: every option that shapes a run, a hash of its prompts, and the run's identity.

    On resume the options are compared. --iterations may then be that of a kept checkpoint, whose model is written; or
    more than before: the run is extended, and from there on the rate and the windows are those of a run so long.

    Raises:
        ValueError: if an option or the prompts differ from those of the run to continue, or options.json is damaged.
    """
    options = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    options = {name: same_place(value) if name in ("model", "lora_from") else value for name, value in options.items()}
    options["sha256-of-prompts"] = digest_of(prompts, heldout)
    options = json.loads(json.dumps(options))  # tuples become lists, as on disk
    if args.resume is None:
        return options | {"run": secrets.token_hex(16)}

    kept = read_json(Path(args.out) / "options.json", "without it the run cannot be continued")
    done = [iteration_of(path) for path in checkpoints(Path(args.out))]
    for name, value in kept.items():
        if name in ("run", "sha256-of-model"):  # the former names the run, the latter is compared once it is loaded
            continue
        now = options.get(name)
        extended = name == "iterations" and (now in done or now > value)
        if now != value and not extended:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume: the run has --{flag} {value}, not {now}; give the same flags")
    return kept | options


# --------------------------------------------------------------------------------------------------------- checkpoints
MANIFEST = "manifest.json"


def iteration_of(checkpoint: Path) -> int:
    """The number of iterations after which a checkpoint was written: checkpoint-300 -> 300."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints that the run of this folder wrote, oldest first, whole or not (`whole_checkpoint` says)."""
    identity = read_json(out / "options.json", "it says whose checkpoints these are")["run"]
    own = []
    for path in out.glob("checkpoint-*"):
        manifest = path / MANIFEST
        if re.fullmatch(r"checkpoint-\d+", path.name) and manifest.is_file():
            try:
                listed = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError:
                continue  # torn: nobody's
            if listed.get("run") == identity and listed.get("iteration") == iteration_of(path):
                own.append(path)
    return sorted(own, key=iteration_of)


def whole_checkpoint(out: Path, iterations: int) -> Path | None:
    """The newest checkpoint that is as it was written, after at most so many iterations; None if there is none.

    A damaged one is passed over, and said.

    Raises:
        ValueError: if all are damaged.
    """
    notes = []
    for path in reversed([path for path in checkpoints(out) if iteration_of(path) <= iterations]):
        wrong = damage(path, json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"])
        if wrong is None:
            for note in notes:
                print(f"{note}: going on from {path.name}", file=sys.stderr)
            return path
        notes.append(f"{path} is damaged ({wrong})")
    if notes:
        raise ValueError(f"--resume: no checkpoint is whole: {'; '.join(notes)}. Delete them to begin anew")
    return None


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint beside, then rename it, so that a half-written one never has the good name; --keep are kept.

    Every process must call it.

    Raises:
        NonFinite: on every process, if a weight is not finite: the checkpoint before stays the newest.
        ValueError: on every process, if the disk is full or cannot be written.
    """
    run.at(f"checkpoint {run.iteration}")
    final, unfinished = run.out / f"checkpoint-{run.iteration}", run.out / ".writing"
    main = run.accelerator.is_main_process

    # Weights that a step has ruined are not kept.
    finite = all(weight.isfinite().all() for weight in run.policy.trainable())
    ruined = f"a weight is not finite after iteration {run.iteration}: the checkpoint before it stays the newest"
    parallel.together(None if finite else ruined, NonFinite)

    # All processes write their pieces into the folder of the main one: not before it is there, not after it is renamed.
    # What a full disk raises depends on who meets it first: OSError, RuntimeError, or torch's own, no Exception at all.
    error = None
    try:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
    except OSError as raised:
        error = cannot_write(final, raised)
    parallel.together(error, ValueError)
    try:
        parallel.save(run, unfinished)
    except (Exception, CheckpointException) as raised:
        error = cannot_write(final, raised)
    parallel.together(error, ValueError)

    # The list of files comes last, and the name after it. Then older checkpoints of this run go.
    try:
        if main:
            rows = "".join(json.dumps(row) + "\n" for row in run.history)
            (unfinished / "metrics.jsonl").write_text(rows, encoding="utf-8")
            listed = {"run": run.identity, "iteration": run.iteration, "files": list_files(unfinished, MANIFEST)}
            write_durably(unfinished / MANIFEST, json.dumps(listed, indent=1))
            if final in checkpoints(run.out):
                shutil.rmtree(final)
            os.replace(unfinished, final)
            sync(run.out)
            for old in checkpoints(run.out)[: -run.args.keep]:
                shutil.rmtree(old)
    except OSError as raised:
        error = cannot_write(final, raised)
    parallel.together(error, ValueError)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restore what `save_checkpoint` wrote, on any number of processes; metric rows written after it are dropped."""
    parallel.load(run, folder)
    run.history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    run.iteration = iteration_of(folder)


# ----------------------------------------------------------------------------------------------------------------- log
class Log:
    """metrics.jsonl and a tracker, written by the main process; on resume what came after the checkpoint is dropped.

    Weights & Biases keeps what it has, and ignores the steps that come again.
    """

    def __init__(self, run: Run):
        self.run, self.main = run, run.accelerator.is_main_process
        if not self.main:
            return

        # The rows up to the checkpoint, which are all there are in a new run: none.
        self.path = run.out / "metrics.jsonl"
        self.path.write_text("".join(json.dumps(row) + "\n" for row in run.history))

        # W&B continues a run by its id: a hash of the folder, so that it is found again.
        if run.args.tracker == "wandb":
            identity = hashlib.sha256(str(run.out.resolve()).encode()).hexdigest()[:16]
            settings = {"dir": run.out, "name": run.out.name, "id": identity, "resume": "allow"}
            self.tracker = WandBTracker("branchgrpo", **settings, config=vars(run.args))
        else:
            self.tracker = TensorBoardTracker("tensorboard", run.out, purge_step=run.iteration + 1)
        self.tracker.start()

    def write(self, row: dict, pictures: Tensor | None = None, histograms: dict[str, Tensor] | None = None) -> None:
        """Append one row; scalars and pictures (B, 3, H, W) to the tracker, histograms to TensorBoard."""
        self.run.history.append(row)
        if not self.main:
            return
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")

        iteration, tensorboard = row["iteration"], self.run.args.tracker == "tensorboard"
        self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, step=iteration)
        if pictures is not None:
            layout = {"dataformats": "NHWC"} if tensorboard else {}
            self.tracker.log_images({"heldout": to_uint8(pictures)}, step=iteration, **layout)
        if tensorboard:
            for name, values in (histograms or {}).items():
                self.tracker.writer.add_histogram(name, values, iteration)
