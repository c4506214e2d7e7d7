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
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from disk import cannot_write, damage, list_files, read_json, remove, sync, write_durably
from flags import HERE, MAY_CHANGE
from preference import to_uint8
from prompts import digest_of
from rewards import Reward, own_weights, sets_of_rewards
from schedules import noise_sharing
from sde import sigma_schedule

WRITTEN = ("model", "metrics.jsonl", "before.safetensors", "curves.png", "tree.png")  # beside checkpoints
WRITTEN += ("tree.html", "before_after.png", "before_after.mp4", "before_after.gif")


@dataclass
class Run:
    """What one process holds of a run: options, policy, prompts, rewards and the state that a checkpoint keeps."""

    args: object
    accelerator: Accelerator
    policy: object
    prompts: list[str]
    heldout: list[str]
    rewards: dict[str, Reward]  # optimised and watched
    weights: dict[str, float]  # optimised, unless prompts have rewards of their own
    optimizer: torch.optim.Optimizer | None = None
    ema: EMAModel | None = None
    scaler: torch.amp.GradScaler | None = None  # with --dtype fp16, see branchgrpo.update
    identity: str = ""  # of the run, as its options.json and its checkpoints name it
    iteration: int = 0  # iterations done
    history: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl
    silent: dict[str, int] = field(default_factory=dict)  # prompt -> visits without spread, see prompts.py
    own: dict[str, dict[str, float]] = field(default_factory=dict)  # with --reward-column, see rewards.own_weights
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
        if holds_run(out):
            raise ValueError(f"--out {out} holds a run: add --resume to continue it, or name another folder")
        taken = [name for name in WRITTEN if (Path(out) / name).exists()]
        if taken:
            raise ValueError(f"--out {out} holds {', '.join(taken)}, which a run would replace: name another folder")
        if args.out:
            check_names(Path(out), args.iterations, [])
        return out

    # --resume FOLDER, or --resume with --out FOLDER, or the newest run under runs/.
    runs = sorted(Path("runs").glob("*/options.json"), key=lambda path: path.stat().st_mtime)
    out = args.resume or args.out or (str(runs[-1].parent) if runs else "runs")
    if not holds_run(out):
        raise ValueError(f"--resume: {out} holds no run (no options.json)")
    check_names(Path(out), args.iterations, checkpoints(Path(out)))
    return out


def holds_run(out: str) -> bool:
    """Whether a run has begun in a folder.

    Raises:
        ValueError: if nobody can say: the name is too long, or the folder another user's.
    """
    try:
        return (Path(out) / "options.json").exists()
    except OSError as error:
        raise ValueError(f"the run's folder {out} cannot be read: {error.strerror}") from error


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
    texts = vars(args).get("prompt_rewards")
    options["sha256-of-prompts"] = digest_of(prompts, heldout, texts)
    if texts:
        options["rewards-of-prompts"] = sets_of_rewards(own_weights(texts, args.reward), [*prompts, *heldout])
    options = json.loads(json.dumps(options))  # tuples become lists, as on disk
    out = Path(args.out)
    if args.resume is None:
        return options | {"run": secrets.token_hex(16)}

    kept = read_json(out / "options.json", "without it the run cannot be continued")
    own = checkpoints(out)

    # "run" names the run, the model is compared once loaded, and the hash of the prompts holds their rewards. Options
    # that have come since the run began keep their defaults; what this version does not know any more it cannot do.
    for name in sorted(options.keys() - kept.keys()):
        if args.origin.get(name) == "given":
            raise ValueError(f"--resume: the run does not know --{name.replace('_', '-')}: leave it out")
        print(f"--resume: the run does not know --{name.replace('_', '-')}: {options[name]} is taken", file=sys.stderr)
    compared = sorted(kept.keys() - {"run", "sha256-of-model", "rewards-of-prompts"})
    for name in compared:
        if name not in options:
            unknown = f"the run has --{name.replace('_', '-')}, which is unknown here"
            raise ValueError(f"--resume: {unknown}: go on with its own script and version")
    for name in compared:
        value, now = kept[name], options[name]
        if name == "iterations" and isinstance(value, int) and now != value:
            shorter = out / f"checkpoint-{now}"
            if now < value and shorter in own and (wrong := damage(shorter, manifest_of(shorter).get("files"))):
                raise ValueError(f"--resume --iterations {now}: {shorter} is damaged ({wrong}), there is no such model")
            if now > value or shorter in own:
                continue
        if now != value:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume: the run has --{flag} {value}, not {now}; give the same flags")
    return kept | options


# --------------------------------------------------------------------------------------------------------- checkpoints
MANIFEST = "manifest.json"


def iteration_of(checkpoint: Path) -> int:
    """The number of iterations after which a checkpoint was written: checkpoint-300 -> 300."""
    return int(checkpoint.name.split("-")[1])


def manifest_of(checkpoint: Path) -> dict:
    """What a checkpoint's list says; nothing where it is missing or torn, as in other people's folders."""
    try:
        return read_json(checkpoint / MANIFEST, "")
    except ValueError:
        return {}


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints that the run of this folder wrote, oldest first, whole or not (`whole_checkpoint` says).

    Raises:
        ValueError: if its options.json is missing or damaged.
    """
    identity = read_json(out / "options.json", "it says whose checkpoints these are").get("run")
    if not isinstance(identity, str):
        raise ValueError(f"{out}/options.json is damaged (it names no run): it says whose checkpoints these are")
    own = []
    for path in out.glob("checkpoint-*"):
        listed = manifest_of(path)
        if listed.get("run") == identity and path.name == f"checkpoint-{listed.get('iteration')}":
            own.append(path)
    return sorted(own, key=iteration_of)


def check_names(out: Path, iterations: int, own: list[Path]) -> None:
    """The names that checkpoints will get are free, or those of this run's own.

    Raises:
        ValueError: if another's folder has one: the run would end where it wants to save.
    """
    for path in out.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if re.fullmatch("[1-9][0-9]*", number) and int(number) <= iterations and path not in own:
            why = f"it is no checkpoint of this run, or its {MANIFEST} is torn"
            raise ValueError(f"{path} is in the way: {why}; move it")


def whole_checkpoint(out: Path, iterations: int) -> Path | None:
    """The newest checkpoint that is as it was written, after at most so many iterations; None if there is none.

    A damaged one is passed over, and said.

    Raises:
        ValueError: if all are damaged.
    """
    notes = []
    for path in reversed([path for path in checkpoints(out) if iteration_of(path) <= iterations]):
        wrong = damage(path, manifest_of(path).get("files"))
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
        NonFinite: on every process, if what it keeps is not finite: the checkpoint before stays the newest.
        ValueError: on every process, if the disk is full or cannot be written.
    """
    run.at(f"checkpoint {run.iteration}")
    final, unfinished = run.out / f"checkpoint-{run.iteration}", run.out / ".writing"
    main = run.accelerator.is_main_process

    # What a step has ruined is not kept: a run that goes on from it would end in the same way, each time.
    kept = {
        "a weight": run.policy.trainable(),
        "an averaged weight": run.ema.shadow_params if run.ema else [],
        "a moment of the optimiser": [x for state in run.optimizer.state.values() for x in state.values()],
    }
    for name, tensors in kept.items():
        ruined = f"{name} is not finite after iteration {run.iteration}: the checkpoint before it stays the newest"
        parallel.together(None if all(x.isfinite().all() for x in tensors) else ruined, NonFinite)

    # All processes write their pieces into the folder of the main one: not before it is there, not after it is renamed.
    # What a full disk raises depends on who meets it first: OSError, RuntimeError, or torch's own, no Exception at all.
    error = None
    try:
        if main:
            remove(unfinished)
            unfinished.mkdir()
    except OSError as raised:
        error = cannot_write(final, raised)
    parallel.together(error, ValueError)
    try:
        parallel.save(run, unfinished)
    except (Exception, CheckpointException) as raised:
        failures = getattr(raised, "failures", None) or {0: (raised,)}  # torch's own holds that of each process
        error = cannot_write(final, next(iter(failures.values()))[0])
    parallel.together(error, ValueError)

    # The list of files comes last, and the name after it. Then older checkpoints of this run go.
    try:
        if main:
            rows = "".join(json.dumps(row) + "\n" for row in run.history)
            (unfinished / "metrics.jsonl").write_text(rows, encoding="utf-8")
            (unfinished / "silent.json").write_text(json.dumps(run.silent), encoding="utf-8")
            if run.scaler:
                (unfinished / "scaler.json").write_text(json.dumps(run.scaler.state_dict()), encoding="utf-8")
            listed = {"run": run.identity, "iteration": run.iteration, "files": list_files(unfinished, MANIFEST)}
            write_durably(unfinished / MANIFEST, json.dumps(listed, indent=1))
            if final in checkpoints(run.out):
                remove(final)
            os.replace(unfinished, final)
            sync(run.out)
            # Later ones were passed over, or are of a longer run: they must not push out the one just written.
            earlier = [path for path in checkpoints(run.out) if iteration_of(path) <= run.iteration]
            for old in earlier[: -run.args.keep]:
                remove(old)
    except ValueError as raised:
        error = raised
    except OSError as raised:
        error = cannot_write(final, raised)
    parallel.together(error, ValueError)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restore what `save_checkpoint` wrote, on any number of processes; metric rows written after it are dropped."""
    parallel.load(run, folder)
    run.history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if (folder / "silent.json").exists():  # checkpoints had none before --silent-prompts
        run.silent = json.loads((folder / "silent.json").read_text(encoding="utf-8"))
    if run.scaler:
        run.scaler.load_state_dict(json.loads((folder / "scaler.json").read_text(encoding="utf-8")))
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

        self.path = run.out / "metrics.jsonl"
        with self.written():
            self.begin(run)

    @contextmanager
    def written(self) -> Iterator[None]:
        """One sentence where the disk is full, or something else stands in the way.

        Raises:
            ValueError: see `cannot_write`.
        """
        try:
            yield
        except OSError as error:
            raise cannot_write(Path(error.filename or self.run.out), error) from error

    def begin(self, run: Run) -> None:
        """Write the rows up to the checkpoint, of which a new run has none, and start the tracker."""
        self.path.write_text("".join(json.dumps(row) + "\n" for row in run.history))

        # W&B continues a run by its id: a hash of the folder, so that it is found again.
        if run.args.tracker == "wandb":
            identity = hashlib.sha256(str(run.out.resolve()).encode()).hexdigest()[:16]
            settings = {"dir": run.out, "name": run.out.name, "id": identity, "resume": "allow"}
            self.tracker = WandBTracker("branchgrpo", **settings, config=vars(run.args) | {"prompt_rewards": None})
        else:
            self.tracker = TensorBoardTracker("tensorboard", run.out, purge_step=run.iteration + 1)
        self.tracker.start()

    def write(self, row: dict, pictures: Tensor | None = None, histograms: dict[str, Tensor] | None = None) -> None:
        """Append one row; scalars and pictures (B, 3, H, W) to the tracker, histograms to TensorBoard."""
        self.run.history.append(row)
        if self.main:
            with self.written():
                self.append(row, pictures, histograms or {})

    def append(self, row: dict, pictures: Tensor | None, histograms: dict[str, Tensor]) -> None:
        """`write`, on the main process."""
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")

        iteration, tensorboard = row["iteration"], self.run.args.tracker == "tensorboard"
        self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, step=iteration)
        if pictures is not None:
            layout = {"dataformats": "NHWC"} if tensorboard else {}
            self.tracker.log_images({"heldout": to_uint8(pictures)}, step=iteration, **layout)
        if tensorboard:
            for name, values in histograms.items():
                self.tracker.writer.add_histogram(name, values, iteration)
