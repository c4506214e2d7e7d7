"""What a run is, and what it keeps on disk: its folder, its options, its checkpoints and its log.

1. Run                              what one process holds of a run
2. find_out, options_to_keep        the folder; options.json, against which a resumed run compares its flags
3. save_checkpoint, load_checkpoint trained weights, optimiser, EMA and all rows of metrics, on any number of processes
4. Log                              metrics.jsonl, and TensorBoard or Weights & Biases

A folder holds options.json, metrics.jsonl, before.safetensors, checkpoint-N for some iterations N, the tracker's files
and, when the run has ended, the pictures of report.py and the trained model.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from diffusers.training_utils import EMAModel
from torch import Tensor

import parallel
from branchgrpo import Sampler
from flags import MAY_CHANGE
from preference import to_uint8
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
    iteration: int = 0  # iterations done
    history: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl
    pictures: Tensor | None = None  # of the last evaluation

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.args.out)

    def sampler(self, sigmas: Tensor | None = None) -> Sampler:
        """The transitions of this run's options: of an iteration with its own noise levels, by default of
        evaluation."""
        args = self.args
        if sigmas is None:
            sigmas = sigma_schedule(args.steps, args.shift)
        return Sampler(sigmas, args.sde, args.eta, noise_sharing(args), args.cps_density, args.flash is not None)


# ------------------------------------------------------------------------------------------------- the folder of a run
def find_out(args) -> str:
    """The run's folder from `--out` and `--resume`: a new one under runs/, the one given, or that of the run to
    continue.

    Raises:
        ValueError: if a run would be overwritten, or there is none to continue.
    """
    # A new run never writes into another's folder.
    if args.resume is None:
        out = args.out or f"runs/{args.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        if (Path(out) / "options.json").exists():
            raise ValueError(f"--out {out} holds a run: add --resume to continue it, or name another folder")
        return out

    # --resume FOLDER, or --resume with --out FOLDER, or the newest run under runs/.
    runs = sorted(Path("runs").glob("*/options.json"), key=lambda path: path.stat().st_mtime)
    out = args.resume or args.out or (str(runs[-1].parent) if runs else "runs")
    if not (Path(out) / "options.json").exists():
        raise ValueError(f"--resume: {out} holds no run (no options.json)")
    return out


def options_to_keep(args, prompts: list[str], heldout: list[str]) -> str:
    """What options.json holds: every option that shapes a run, and a hash of its prompts. On resume it is compared.

    --iterations may then be that of the last checkpoint: nothing is left to train, and the model is written.

    Raises:
        ValueError: if an option or the prompts differ from those of the run to continue.
    """
    digest = hashlib.sha256("\n".join([*prompts, "", *heldout]).encode()).hexdigest()
    options = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    options = json.loads(json.dumps(options | {"sha256-of-prompts": digest}))  # tuples become lists, as on disk
    if args.resume is None:
        return json.dumps(options, indent=1)

    # The one exception: training may be declared finished at the iteration of the newest checkpoint.
    newest = max((iteration_of(path) for path in checkpoints(Path(args.out))), default=None)
    for name, kept in json.loads((Path(args.out) / "options.json").read_text()).items():
        finished = name == "iterations" and options[name] == newest
        if options[name] != kept and not finished:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume: the run has --{flag} {kept}, not {options[name]}; give the same flags")
    return json.dumps(options, indent=1)


# --------------------------------------------------------------------------------------------------------- checkpoints
def iteration_of(checkpoint: Path) -> int:
    """The number of iterations after which a checkpoint was written: checkpoint-300 -> 300."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(out.glob("checkpoint-*"), key=iteration_of)


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint beside, then rename it, so that a half-written one never has the good name; --keep are kept.

    Every process must call it.
    """
    final, unfinished = run.out / f"checkpoint-{run.iteration}", run.out / ".writing"
    main = run.accelerator.is_main_process
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()

    # All processes write their pieces into the folder of the main one: not before it is there, not after it is renamed.
    run.accelerator.wait_for_everyone()
    parallel.save(run, unfinished)
    run.accelerator.wait_for_everyone()

    if main:
        (unfinished / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.history))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in checkpoints(run.out)[: -run.args.keep]:
            shutil.rmtree(old)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restore what `save_checkpoint` wrote, on any number of processes; metric rows written after it are dropped."""
    parallel.load(run, folder)
    run.history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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
