"""Run."""

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
    history: list[dict] = field(default_factory=list)
    pictures: Tensor | None = None  # of the last evaluation

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.args.out)

    def sampler(self, sigmas: Tensor | None = None) -> Sampler:
        """The transitions of this run's options: of an iteration with its own noise levels, by default of evaluation."""
        args = self.args
        if sigmas is None:
            sigmas = sigma_schedule(args.steps, args.shift)
        return Sampler(sigmas, args.sde, args.eta, noise_sharing(args), args.cps_density, args.flash is not None)


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(run: Run) -> None:
    """Write state and metrics beside, then rename: a half-written checkpoint never has the good name; --keep are kept."""
    final, beside, main = run.out / f"checkpoint-{run.iteration}", run.out / ".writing", run.accelerator.is_main_process
    if main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    run.accelerator.wait_for_everyone()
    parallel.save(run, beside)
    run.accelerator.wait_for_everyone()
    if main:
        (beside / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.history))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        for old in checkpoints(run.out)[: -run.args.keep]:
            shutil.rmtree(old)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restore what `save_checkpoint` wrote, on any number of processes; metric rows written after it are dropped."""
    parallel.load(run, folder)
    run.history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run.iteration = int(folder.name.split("-")[1])


def find_out(args) -> str:
    """The run's folder from `--out` and `--resume`: a new one under runs/, the one given, or that of the run to continue.

    Raises:
        ValueError: if a run would be overwritten, or there is none to continue.
    """
    if args.resume is None:
        out = args.out or f"runs/{args.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        if (Path(out) / "options.json").exists():
            raise ValueError(f"--out {out} holds a run: add --resume to continue it, or name another folder")
        return out
    runs = sorted(Path("runs").glob("*/options.json"), key=lambda p: p.stat().st_mtime)
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
    now = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE} | {"sha256-of-prompts": digest}
    now = json.loads(json.dumps(now))  # tuples become lists, as on disk
    done = [int(path.name.split("-")[1]) for path in checkpoints(Path(args.out))]
    for name, was in (
        json.loads((Path(args.out) / "options.json").read_text()).items() if args.resume is not None else ()
    ):
        if now[name] != was and (name, now[name]) != ("iterations", max(done, default=None)):
            flag = name.replace("_", "-")
            raise ValueError(f"--resume: the run has --{flag} {was}, not {now[name]}; give the same flags")
    return json.dumps(now, indent=1)


class Log:
    """metrics.jsonl and a tracker, written by the main process; on resume what came after the checkpoint is dropped.

    Weights & Biases keeps what it has, and ignores the steps that come again.
    """

    def __init__(self, run: Run):
        self.run, self.main = run, run.accelerator.is_main_process
        if not self.main:
            return
        self.path = run.out / "metrics.jsonl"
        self.path.write_text("".join(json.dumps(row) + "\n" for row in run.history))
        if run.args.tracker == "wandb":
            name = hashlib.sha256(str(run.out.resolve()).encode()).hexdigest()[:16]
            settings = {"dir": run.out, "name": run.out.name, "id": name, "resume": "allow", "config": vars(run.args)}
            self.tracker = WandBTracker("branchgrpo", **settings)
        else:
            self.tracker = TensorBoardTracker("tensorboard", run.out, purge_step=run.iteration + 1)
        self.tracker.start()

    def write(self, row: dict, pictures: Tensor | None = None, histograms: dict[str, Tensor] | None = None) -> None:
        """Append one row; scalars and pictures to the tracker, histograms to TensorBoard."""
        self.run.history.append(row)
        if not self.main:
            return
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
        at = row["iteration"]
        self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, step=at)
        if pictures is not None:
            layout = {"dataformats": "NHWC"} if self.run.args.tracker == "tensorboard" else {}
            self.tracker.log_images({"heldout": to_uint8(pictures)}, step=at, **layout)
        if self.run.args.tracker == "tensorboard":
            for name, values in (histograms or {}).items():
                self.tracker.writer.add_histogram(name, values, at)
