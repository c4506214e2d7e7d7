"""What test_parallel.py starts with torchrun: one iteration of each case; the main process writes its gradients.

python tests/workers.py FOLDER [FLAGS]             # in one process, or in as many as torchrun starts
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
import rewards
import train_image
import train_video
from branchgrpo import NonFinite, sample_ode
from checkpoint import Run

# Micro-batches of one node: the batch size of a call moves the last bits of its result, and with one node per call it
# is the same on any number of processes. For the same reason the video is judged by its colours: motion multiplies the
# last bits of a picture.
SHARED = "--leaves 4 --prompts-per-iteration 4 --micro-batch 1 --max-grad-norm 0 --eval-size 1 --device cpu --steps 6"
CASES = {
    "all weights": "--method branchgrpo --width-prune extreme-1",
    "LoRA, KL": "--lora 4 --kl 0.1 --gradient-checkpointing",
    "KL": "--kl 0.1 --eta 0.5",
    "Wan, guided": "--video --guidance 2 --frames 5 --reward colour:1",
}


def prepared_run(flags: str, folder: str) -> Run:
    """A Run at iteration 0."""
    script = train_video if "--video" in flags else train_image
    args, *rest = script.job([*SHARED.split(), *flags.replace("--video", "").split(), "--out", folder])
    return launch.prepare(args, Accelerator(cpu=True), *rest)


def gradients_of_an_iteration(run: Run) -> dict[str, torch.Tensor]:
    """Whole gradients by name, after one iteration."""
    loop.iterate(run, 0)
    weights = run.policy.pipe.transformer.named_parameters()
    gradients = {name: parallel.whole(p.grad).contiguous() for name, p in weights if p.requires_grad}

    # Made whole again, the model must draw and save on the main process alone.
    run.policy.unshard(run.accelerator.is_main_process)
    if run.accelerator.is_main_process:
        noise = torch.zeros(1, *run.policy.latent_shape)
        sample_ode(run.policy, run.policy.encode(run.prompts[:1]), run.sampler(), noise)
        run.policy.save(Path(run.args.out) / "model")
    return gradients


def break_second_process(what: str, folder: str) -> None:
    """Make the second process fail, and print which error each process meets: all must meet the same one."""
    run = prepared_run(CASES["all weights"], folder)
    if run.accelerator.process_index == 1:
        run.rewards["colour"] = lambda pictures, prompts: torch.full((len(prompts),), torch.nan)
        if what == "loss":  # without the check of `score`, the NaN reaches the loss
            rewards.score = lambda by_name, pictures, prompts: {
                name: torch.full((len(prompts),), torch.nan) for name in by_name
            }
    try:
        loop.iterate(run, 0)
    except (NonFinite, rewards.CannotScore) as error:
        # One write per line, so that the lines of two processes do not mix.
        sys.stdout.write(f"process {run.accelerator.process_index}: {type(error).__name__}\n")


def main() -> None:
    """See above."""
    folder, *flags = sys.argv[1:]
    if flags[:1] == ["--break"]:
        break_second_process(flags[1], folder)
        return
    for name, case in CASES.items():
        run = prepared_run(f"{case} {' '.join(flags)}", folder)
        gradients = gradients_of_an_iteration(run)
        if run.accelerator.is_main_process:
            save_file(gradients, Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    main()
