"""What test_parallel.py starts with torchrun: one iteration of each case; the main process writes its gradients.

python tests/workers.py FOLDER               # in as many processes as torchrun starts, by DDP and then by FSDP2
python tests/workers.py FOLDER --families    # the cases of other models
python tests/workers.py FOLDER --faults      # and then the second process meets faults, is slow, and is stopped
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import families
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
    "endpoint": "--objective endpoint --splits 0,2",
    "elbo, without noise": "--objective elbo --method ode --noise-draws 1",
    "Wan, guided": "--video --guidance 2 --frames 5 --reward colour:1",
}
FAMILY_CASES = {  # on random checkpoints
    "SD3, guided": "--family sd3 --guidance 2",
    "FLUX.2, LoRA": "--family flux2 --guidance 1 --lora 2",
    "Z-Image, guided": "--family z_image --guidance 1",
}
KINDS = {"DDP": "", "FSDP": "--fsdp"}
FAMILY = "--reward colour:1 --height 32 --width 32 --dtype fp32 --eta 0.7"


def random_checkpoint(name: str, folder: str) -> Path:
    """A checkpoint of families.py, the same in every process; each makes its own, before they know of one another.

    (transformers saves on the main process alone.)
    """
    path = Path(folder) / f"{name}-{os.environ.get('RANK', 'alone')}"
    return path if path.exists() else families.saved(name, path)


def prepared_run(flags: str, folder: str) -> Run:
    """A Run at iteration 0."""
    script = train_video if "--video" in flags else train_image
    if flags.startswith("--family"):
        _, name, flags = flags.split(maxsplit=2)
        flags += f" {FAMILY} --model {random_checkpoint(name, folder)}"
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


def errors_of(folder: str) -> dict:
    """What each fault raises on this process: case -> the error's class and text."""
    accelerator = Accelerator(cpu=True)
    second = accelerator.process_index == 1

    # The second process alone gets a score that is no number.
    broken = prepared_run(CASES["all weights"], folder)
    healthy = broken.rewards["colour"]
    if second:
        broken.rewards["colour"] = lambda pictures, prompts: torch.full((len(prompts),), torch.nan)

    # The second process has another learning rate, then other prompts. Then the main one cannot have its folder.
    args, _, _, prompts, heldout = train_image.job(["--out", folder, "--lr", "2e-5" if second else "1e-5"])
    same, *_ = train_image.job(["--out", f"{folder}/file/below"])
    Path(folder, "file").write_text("")
    cases = {
        "score": lambda: loop.iterate(broken, 0),
        "flag": lambda: launch.check_same_options(args, prompts, heldout),
        "prompts": lambda: launch.check_same_options(same, prompts[second:], heldout),
        "folder": lambda: launch.claim_folder(same, accelerator, prompts, heldout),
        "loss": lambda: loop.iterate(broken, 0),
    }
    errors = {}
    for case, call in cases.items():
        if case == "loss" and second:  # without the check of `score`, the NaN reaches the loss
            broken.rewards["colour"] = healthy
            rewards.score = lambda by_name, pictures, prompts: {
                name: torch.full((len(prompts),), torch.nan) for name in by_name
            }
        try:
            call()
        except (ValueError, NonFinite, rewards.CannotScore) as error:
            errors[case] = [type(error).__name__, str(error)]
    return errors


def hang() -> None:
    """The main process waits for the second one, which first takes its time, then is stopped from outside."""
    parallel.Lookout.BEAT, parallel.Lookout.PATIENCE = 0.1, 1.0
    accelerator = Accelerator(cpu=True)
    lookout = parallel.Lookout()
    lookout.at("rewards")
    if accelerator.process_index == 1:
        time.sleep(2)
    lookout.at("rewards of all processes")
    accelerator.wait_for_everyone()

    lookout.at("update")
    if accelerator.process_index == 1:
        time.sleep(0.5)  # until its place is known
        subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    accelerator.wait_for_everyone()
    lookout.close()


def main() -> None:
    """See above."""
    folder, *flags = sys.argv[1:]
    cases = FAMILY_CASES if "--families" in flags else CASES
    for name in families.FAMILIES if "--families" in flags else ():
        random_checkpoint(name, folder)

    for kind, added in KINDS.items():
        for name, case in cases.items():
            run = prepared_run(f"{case} {added}", folder)
            gradients = gradients_of_an_iteration(run)
            if run.accelerator.is_main_process:
                save_file(gradients, Path(folder) / f"{kind}, {name}.safetensors")

    if "--faults" in flags:
        errors = errors_of(folder)
        Path(folder, f"{Accelerator(cpu=True).process_index}.json").write_text(json.dumps(errors))
        hang()


if __name__ == "__main__":
    main()
