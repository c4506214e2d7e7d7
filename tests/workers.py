"""What test_parallel.py starts with torchrun: one iteration of each case; the main process writes the gradients it left.

python tests/workers.py FOLDER [FLAGS]            # one process, or as many as torchrun starts
python tests/workers.py FOLDER --break score|loss  # the second process gets a score, or a loss, that is no number
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import launch
import loop
import parallel
import train_image
import train_video
from checkpoint import Run

# Micro-batches of one node: the batch size of a call, which moves last bits, is the same on any number of processes.
SHARED = "--leaves 4 --prompts-per-iteration 4 --micro-batch 1 --max-grad-norm 0 --eval-size 1 --device cpu --steps 6"
CASES = {
    "all weights": "--method branchgrpo --width-prune extreme-1",
    "LoRA, KL": "--lora 4 --kl 0.1 --gradient-checkpointing",
    "KL": "--kl 0.1 --eta 0.5",
    "Wan, guided": "--video --guidance 2 --frames 5 --reward colour:1",  # motion multiplies the last bits of a picture
}


def prepared(flags: str, folder: str) -> Run:
    """A Run at iteration 0."""
    video = "--video" in flags
    script = train_video if video else train_image
    args, *rest = script.job([*SHARED.split(), *flags.replace("--video", "").split(), "--out", folder])
    return launch.prepare(args, Accelerator(cpu=True), *rest)


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Whole gradients by name, after one iteration."""
    loop.iterate(run, 0)
    weights = run.policy.pipe.transformer.named_parameters()
    found = {name: parallel.whole(p.grad).contiguous() for name, p in weights if p.requires_grad}
    run.policy.unshard(run.accelerator.is_main_process)
    if run.accelerator.is_main_process:  # whole again: it draws and saves alone
        loop.sample_ode(
            run.policy, run.policy.encode(run.prompts[:1]), run.sampler(), torch.zeros(1, *run.policy.latent_shape)
        )
        run.policy.save(Path(run.args.out) / "model")
    return found


def broken(what: str, folder: str) -> None:
    """Every process must meet the error that only the second one has."""
    run = prepared(CASES["all weights"], folder)
    if run.accelerator.process_index == 1:
        run.rewards["colour"] = lambda pictures, prompts: torch.full((len(prompts),), float("nan"))
        if what == "loss":
            loop.R.score = lambda rewards, pictures, prompts: {
                k: torch.full((len(prompts),), torch.nan) for k in rewards
            }
    try:
        loop.iterate(run, 0)
    except (loop.NonFinite, loop.R.CannotScore) as error:
        sys.stdout.write(f"process {run.accelerator.process_index}: {type(error).__name__}\n")  # in one piece


def main() -> None:
    """See above."""
    folder, *flags = sys.argv[1:]
    if flags[:1] == ["--break"]:
        broken(flags[1], folder)
        return
    for name, case in CASES.items():
        found = gradients(run := prepared(f"{case} {' '.join(flags)}", folder))
        if run.accelerator.is_main_process:
            save_file(found, Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    main()
