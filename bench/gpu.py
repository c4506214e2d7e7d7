"""What does a GPU that is at hand say in 8 minutes, with nothing downloaded? Memory, seconds, rounding, resumption.

Question    How much memory and time do the scripts of configs/ take on this card, and how far are the plans of
            hardware.py from it? What are Table 1's ratios on FLUX.1-dev's architecture? How far from 1 are the ratios
            of an unchanged policy in bf16? Does a resumed run go on as if it had never stopped?
Hypothesis  Peak memory is within 10 % of the plan's. A method's time over sequential DanceGRPO's is at most 1.10 times
            what counting gives. Rollout takes at most 1.10 times its bare calls, training 1.15 times. No ratio of an
            unchanged policy is clipped. The resumed run has the same metrics.
Metric      Peak memory as torch's allocator counts it; seconds of rollout, training and optimiser of one iteration
            after a warm-up; max |ratio - 1|; the largest difference between two runs' metrics.
Rule        Each figure stands beside its plan or bound. One iteration each: there are no intervals.

    python bench/gpu.py                        # or `make gpu`: 8 minutes on one H100
    python bench/gpu.py --minutes 20           # more rows of Table 1, and steps that a slower card has no time for
    python bench/gpu.py --steps resume demo    # only these; the document keeps what it has of the others
    python bench/gpu.py --dry-run              # the same code on the CPU, with models as small as those of tiny/

Weights are random, but of true size and type: FLUX.1-dev's and Wan2.1-T2V-1.3B's transformers and VAEs, with small
text encoders of the true output width. Memory, seconds and rounding hardly depend on what the weights are. Rewards do,
so no reward is reported; the reward is the size of a JPEG. The embedded model serves for resumption and for the demo.

1. STEPS     what is measured, the most valuable first, each with the seconds that it takes on an H100
2. main      the parent process: starts a worker for each group of steps, until the time is up
3. work      a worker: measures the steps of its group in turn; after a failure the next worker does the rest
4. record    whatever a step yields is merged into bench/results/gpu_CARD.json at once, so a cut run keeps what it has

A step is a generator of dicts. Steps of one group share a process, and with it a model of 24 GB that took half a
minute to load. Other steps have processes of their own: a crash then loses nothing, and a peak of memory is their own.
"""

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import common
import diffusers
import numpy as np
import overhead
import timing
import torch

import hardware
import launch
import loop
from disk import remove, write_durably
from schedules import schedule_of
from tiny import make_tiny_flux, make_tiny_wan

# All processes run in the project's folder: no flag in a document then names a folder of the machine. HERE holds the
# random models, 27 GB, and the runs of `resume`; it may be deleted at any time.
HERE, PROMPTS = Path("runs/gpu"), "tiny/prompts_train.txt"
MINUTES, TABLE_SECONDS = 8, 75

# What the official configurations change in the defaults of diffusers' classes; Wan2.1's VAE changes nothing. In
# tests/test_gpu.py the numbers of parameters are those of hardware.py, which has them from the checkpoints.
FLUX, WAN = {"guidance_embeds": True}, {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
FLUX_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
FLUX_VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FLUX_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}

# What is built at true size and measured: those of hardware.ARCHITECTURES that this script has configurations of.
BUILT = ("flux1-dev", "wan2.1-1.3b")

# Rows of hardware.METHODS, the most telling first. Ratios are to the first one.
TABLE = ("sequential DanceGRPO", "BranchGRPO", "Mix, splits alone", "Mix, window 4", "+ width (Parent-Top1)")
TABLE += ("+ depth, window 5", "MixGRPO, window 5", "DanceGRPO, fraction 0.6", "Mix, splits alone, flash 4")

BARE = (overhead.bare_rollout, overhead.bare_training)


# ------------------------------------------------------------------------------------------------------- random models
def random_weights(model_class: type, config: dict, device: str) -> torch.nn.Module:
    """Make a model with random bf16 weights on the host; a GPU draws 12 billion of them in seconds.

    A weight of shape (out, in, ...) is normal with variance 1 / (in ...), so that a layer keeps the size of what it is
    given, at any width. Scales of norms are 1 and shifts are 0, as if they had just been made.
    """
    with torch.device("meta"):  # shapes without data
        model = model_class.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")

    # The only weights of one dimension are the scales of norms; everything else of one dimension is a shift. Each is
    # drawn by itself, so that a card that could not hold them all draws them too.
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        mean, std = (0.0, weight[0].numel() ** -0.5) if weight.ndim > 1 else (float(name.endswith("weight")), 0.0)
        weight.data.copy_(torch.empty(weight.shape, device=device).normal_(mean, std, generator=generator))
    return model


def stand_in(transformer, text_length: int = 16, vae=None) -> diffusers.DiffusionPipeline:
    """Make the pipeline of FLUX.1-dev or Wan2.1 around a transformer.

    The text encoders are those of tiny/, but as wide as the transformer wants what it is given.

    Args:
        transformer: of FLUX or Wan, at any size.
        text_length: tokens to which every prompt is padded, 512 in both models.
        vae: the autoencoder; None takes that of tiny/. FLUX.1-dev's constants are set in either.
    """
    flux, config = isinstance(transformer, diffusers.FluxTransformer2DModel), transformer.config
    pipe = (make_tiny_flux if flux else make_tiny_wan).build()
    pipe.transformer, pipe.vae = transformer, vae or pipe.vae

    # CLIP gives FLUX one vector per prompt; T5, or UMT5 in Wan, gives one per token.
    if flux:
        pipe.text_encoder.config.hidden_size = config.pooled_projection_dim
        pipe.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    last, width = ("_2", config.joint_attention_dim) if flux else ("", config.text_dim)
    getattr(pipe, f"tokenizer{last}").model_max_length = text_length
    getattr(pipe, f"text_encoder{last}").config.d_model = width

    # A new encoder of the changed configuration.
    for name in dict.fromkeys(("text_encoder", f"text_encoder{last}")):
        encoder = getattr(pipe, name)
        setattr(pipe, name, type(encoder)(encoder.config))
    return pipe


def build(architecture: str, dry_run: bool) -> diffusers.DiffusionPipeline:
    """Make a whole random pipeline of an architecture of hardware.py; for the dry run as small as that of tiny/."""
    flux = architecture.startswith("flux")
    model_class = diffusers.FluxTransformer2DModel if flux else diffusers.WanTransformer3DModel
    if dry_run:
        config = model_class.load_config(f"tiny/{'flux' if flux else 'wan'}/transformer")
        return stand_in(random_weights(model_class, config, "cpu"))
    vae = diffusers.AutoencoderKL(**FLUX_VAE) if flux else diffusers.AutoencoderKLWan()
    return stand_in(random_weights(model_class, FLUX if flux else WAN, "cuda"), 512, vae)


def folder_of(architecture: str, dry_run: bool) -> Path:
    """Return the folder of a random pipeline."""
    return HERE / (f"{architecture}-small" if dry_run else architecture)


def pipelines(args) -> Iterator[dict]:
    """Step: save both pipelines as diffusers does, so that all that follows goes through the project's own loading."""
    for architecture in BUILT:
        folder, started = folder_of(architecture, args.dry_run), time.time()
        if args.dry_run:  # quick to make, and the code may have changed
            remove(folder)
        if not folder.exists():
            # Written beside and renamed. Not `disk.replacing`, which would wait until 24 GB are on the disk.
            remove(unfinished := folder.with_name(f".writing-{folder.name}"))
            build(architecture, args.dry_run).save_pretrained(unfinished)
            os.replace(unfinished, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        yield {architecture: {"gib": size / hardware.GIB, "seconds": time.time() - started}}


# ------------------------------------------------------------------------------------------------ runs in this process
def settings(args, video: bool = False) -> argparse.Namespace:
    """Return what the functions of common.py want to know of a benchmark's command line."""
    return argparse.Namespace(video=video, flags="", threads=torch.get_num_threads(), smoke=args.dry_run)


def device(args) -> str:
    """Return the flag that says where to run."""
    return f"--device {'cpu' if args.dry_run else 'cuda'}"


def interpolated(curves: dict) -> list[Callable]:
    """Make functions from batch size to seconds, without and with a backward, as hardware.seconds takes them."""
    return [lambda b, y=curves[name]: float(np.interp(b, curves["batch"], y)) for name in ("forward", "trained")]


def measured(run: common.Run, iteration: int, optimiser: list[float]) -> tuple[dict, dict]:
    """Do one iteration; return its row of metrics, and its seconds by part.

    Args:
        optimiser: from timing.watch_steps. The metrics count the optimiser's step as training; here it stands apart.
    """
    optimiser.clear()
    row = loop.iterate(run, iteration)[0]
    seconds = {part: row[f"seconds_{part}"] for part in ("rollout", "decode", "reward")}
    return row, seconds | {"training": row["seconds_train"] - sum(optimiser), "optimiser": sum(optimiser)}


# -------------------------------------------------------------------------------------------------- scripts of configs/
def words_of(config: str) -> list[str]:
    """Return the flags that a script of configs/ gives to its training script."""
    # The script starts `python`. A stand-in of that name, found first, prints what it is given, one word per line.
    with tempfile.TemporaryDirectory() as folder:
        (python := Path(folder, "python")).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        python.chmod(0o755)
        environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PROMPTS": PROMPTS}
        return subprocess.check_output(["sh", f"configs/{config}.sh"], env=environment, text=True).split()[1:]


def plan(flags: str, architecture: str, gpu: str) -> dict:
    """Return what hardware.py predicts for these flags on a card: seconds of rollout and training, peak GiB.

    The text encoders do not count: those of the random pipeline are small, and all scripts keep them on the CPU.
    """
    video = hardware.ARCHITECTURES[architecture].video
    planning = argparse.Namespace(video=video, flags=f"--plan {architecture} --gpu {gpu}")
    options = common.job(planning, flags)[0]

    # Where calls of the other kind cost nothing, the seconds are those of one kind.
    forward, factor = hardware.call_seconds(options)
    seconds = functools.partial(hardware.seconds, options, 0, options.prompts_per_iteration)
    rollout, training = (
        seconds(lambda b: forward * b, lambda b: 0),
        seconds(lambda b: 0, lambda b: factor * forward * b),
    )
    memory = sum(hardware.memory(options, 1).values()) / hardware.GIB
    return {"rollout": rollout, "training": training, "peak_gib": memory, "gpu": gpu}


def card_of(name: str) -> str:
    """Return the card of hardware.GPUS that a card's full name belongs to; h100 if it is none of them."""
    return next((gpu for gpu in hardware.GPUS if gpu.split("-")[0] in name.lower().replace(" ", "")), "h100")


def config(name: str, args) -> Iterator[dict]:
    """Step: one iteration of a script of configs/, with one prompt, beside its plan.

    The flags are the script's own, but for the model, the reward, the prompts and what the dry run makes smaller.
    """
    architecture = "wan2.1-1.3b" if name.startswith("wan") else "flux1-dev"
    video = hardware.ARCHITECTURES[architecture].video
    changed = f"--model {folder_of(architecture, args.dry_run)} --prompts-per-iteration 1 --iterations 1 --eval-size 1"
    changed += f" --reward jpeg --watch jpeg --text-cache {HERE / 'text'} {device(args)}"
    changed += f" --height 32 --width 64 --steps 6 --leaves 4 --no-nf4{' --frames 5' * video}" * args.dry_run
    flags = " ".join([*words_of(name), changed])
    yield {"changed": changed, "plan": plan(flags, architecture, card_of(args.card))}

    # Warm-up: calls at the shapes that follow, which also say what a bare call takes, and an optimiser's step, so that
    # its moments are there when memory peaks. A run has them from its second iteration on.
    run = common.prepare(settings(args, video), flags, lr=1e-12)
    optimiser, curves = timing.watch_steps(run), timing.batch_curves(run, 3)
    run.optimizer.step()
    yield {"curves": curves, "from_bare_calls": hardware.seconds(run.args, 0, 1, *interpolated(curves))}

    row, seconds = measured(run, 0, optimiser)
    yield {"seconds": seconds} | {key: row[key] for key in ("peak_gib", "ratio_dev", "clip_frac")}


# ------------------------------------------------------------------------------------------- FLUX.1-dev at 256 x 256
def variant(args, flags: str) -> common.Run:
    """Return the shared model under other flags."""
    return common.variant(shared(args.dry_run)[0], settings(args), common_flags(args) + flags)


def common_flags(args) -> str:
    """Return the flags that all runs at 256 x 256 share; the last one of a kind counts.

    Gradient checkpointing makes a trained row of a LoRA cost three forwards, as counting assumes of all weights.
    """
    size = "--height 32 --width 64 --steps 10 --leaves 8" if args.dry_run else "--height 256 --width 256 --steps 20"
    flags = f"--model {folder_of('flux1-dev', args.dry_run)} --prompts {PROMPTS} --reward jpeg --watch jpeg {size} "
    flags += f"--dtype bf16 --lora 64 --gradient-checkpointing --ema 0 --prompts-per-iteration 1 {device(args)} "
    return f"{flags} --micro-batch 8 --iterations 300 --eval-size 1 "


@functools.cache
def shared(dry_run: bool) -> tuple[common.Run, dict]:
    """Load the random FLUX.1-dev with a LoRA, and measure its curves, once for all steps of a process.

    The learning rate is so small that the policy stays as it is.
    """
    args = argparse.Namespace(dry_run=dry_run)
    run = common.prepare(settings(args), f"{common_flags(args)} --micro-batch {4 if dry_run else 16}", lr=1e-12)
    return run, timing.batch_curves(run, 2 if dry_run else 3)


def micro_batches(args) -> Iterator[dict]:
    """Step: seconds of a call against micro-batch size, without and with a backward."""
    yield shared(args.dry_run)[1]


def table(args) -> Iterator[dict]:
    """Step: rows of the paper's Table 1, an iteration each, over sequential DanceGRPO.

    A sliding window stands in the middle of its way, for measuring, counting and planning alike. A row that would not
    fit into this step's part of the time is not begun, and said to be missing.
    """
    first, curves = shared(args.dry_run)
    optimiser, started, base = timing.watch_steps(first), time.time(), None
    allowance = np.inf if args.dry_run else TABLE_SECONDS * args.minutes / MINUTES
    for name in TABLE:
        run = variant(args, hardware.METHODS[name][0])
        place = len(hardware.slide(run.args)) // 2
        planned, counts = hardware.seconds(run.args, place, 1, *interpolated(curves)), hardware.counted(run.args, place)
        if time.time() - started + planned > allowance:
            yield {name: {"not run": "out of time", "planned_seconds": planned}}
            continue

        # Three ways to the same ratio: the clock, counting of calls, and the plan from the curves of single calls.
        row, seconds = measured(run, place, optimiser)
        costs = common.policy_seconds(row), counts["forwards"] + 3 * counts["trained_parents"], planned
        base = base or costs
        over_base = [cost / cost_of_base for cost, cost_of_base in zip(costs, base)]
        yield {name: {"seconds": seconds} | dict(zip(("ratio", "ratio_counted", "ratio_planned"), over_base))}


def ratios(args) -> Iterator[dict]:
    """Step: max |ratio - 1| of an unchanged policy in bf16, where rollout and update cut their rows differently.

    Of two optimiser steps the first is on-policy and never clips. The second compares with what the policy itself said
    just before; nothing has moved, so nothing may be clipped there either.
    """
    for b in (1, 4, 16):
        flags = f"--method branchgrpo --steps 10 --leaves 4 --updates 2 --updates-by parents --micro-batch {b}"
        row = loop.iterate(variant(args, flags), 0)[0]
        yield {str(b): {key: row[key] for key in ("ratio_dev", "clip_frac", "seconds_rollout", "seconds_train")}}


def over_bare_calls(args) -> Iterator[dict]:
    """Step: rollout and training over the transformer calls that they need, twice; see bench/overhead.py."""
    run = variant(args, "--method branchgrpo --steps 10 --leaves 8")
    forest, cond = schedule_of(run.args, 0).forest, run.policy.encode(run.prompts[:1])
    for repetition in ("first", "second"):
        row = loop.iterate(run, 0)[0]
        bare = [overhead.seconds(run, lambda f=f: f(run, cond, forest)) for f in BARE]
        yield {repetition: {k: row[f"seconds_{k}"] / s for k, s in zip(("rollout", "train"), bare)}}


# --------------------------------------------------------------------------------------------------- the embedded model
def resume(args) -> Iterator[dict]:
    """Step: two iterations in one go, against one iteration that a resumed run adds the second to."""
    flags = f"--leaves 4 --prompts-per-iteration 2 --eval-size 4 --iterations 2 --save-every 1 --keep 9 {device(args)}"

    def last_row(out: Path, more: str = "") -> dict:
        """Train as the script does, but without its pictures; return the last row of metrics."""
        launch.main(*common.job(settings(args), f"{flags} --out {out} {more}"), lambda run: None)
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])

    # The stopped run is a copy of the whole one without its last checkpoint: resumed, it does iteration 2 again.
    for folder in (whole := HERE / "whole", resumed := HERE / "resumed"):
        remove(folder)
    row = last_row(whole)
    shutil.copytree(whole, resumed)
    remove(resumed / "checkpoint-2")
    again = last_row(resumed, "--resume")
    differences = {k: abs(row[k] - again[k]) for k in row if not k.startswith("seconds_") and k != "peak_gib"}
    worst = max(differences, key=differences.get)
    yield {"equal": differences[worst] == 0, "largest_difference": differences[worst], "of": worst}


def demo(args) -> Iterator[dict]:
    """Step: `python train_image.py` until 65 % of the held-out words are exact, or the time is up."""
    small = " --leaves 4 --prompts-per-iteration 1 --eval-size 4 --iterations 2 --eval-every 1" * args.dry_run
    run, seconds = common.prepare(settings(args), f"{device(args)} --eval-every 10{small}"), 0.0
    for i in range(run.args.iterations):
        seconds += common.all_seconds(loop.iterate(run, i)[0])
        if (i + 1) % run.args.eval_every == 0:
            exact = loop.evaluate(run)[0]["heldout_exact"]
            yield {"iterations": i + 1, "seconds": seconds, "exact": exact, "reached": exact >= 0.65}
            if exact >= 0.65 or time.time() + 10 > args.until:
                return


def tests(args) -> Iterator[dict]:
    """Step: the tests that need a GPU. The dry run only collects them."""
    files = [str(p) for p in sorted(Path("tests").glob("test_*.py")) if "@pytest.mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", *files, *["--collect-only"] * args.dry_run]
    printed = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", printed, re.M)
    yield {"summary": printed.rpartition("\n")[2].strip("= "), "failed": failed}


# --------------------------------------------------------------------------------------------------------------- steps
class Step(NamedTuple):
    """One thing to measure."""

    name: str
    seconds: float  # on an H100: by the plan at 0.4 of its peak rate, loading and importing guessed
    gib: float  # that the card must have
    group: str  # steps that follow one another with the same group share a process
    measure: Callable  # from the command line to a generator of dicts
    package: str = "torch"  # that must be installed


STEPS = [
    Step("tests", 40, 0, "tests", tests),
    Step("pipelines", 50, 0, "pipelines", pipelines),
    Step("flux_lora_80gb", 70, 30, "flux_lora_80gb", functools.partial(config, "flux_lora_80gb")),
    Step("micro_batches", 40, 36, "flux at 256", micro_batches),
    Step("table", TABLE_SECONDS, 36, "flux at 256", table),
    Step("ratios", 15, 36, "flux at 256", ratios),
    Step("over_bare_calls", 20, 36, "flux at 256", over_bare_calls),
    Step("wan_lora_24gb", 40, 12, "wan_lora_24gb", functools.partial(config, "wan_lora_24gb")),
    Step("flux_lora_24gb", 65, 12, "flux_lora_24gb", functools.partial(config, "flux_lora_24gb"), "bitsandbytes"),
    Step("resume", 20, 0, "resume", resume),
    Step("demo", 45, 0, "demo", demo),
]


def why_not(step: Step, args) -> str | None:
    """Say why a step cannot be begun now; None if it can."""
    if not args.dry_run and find_spec(step.package) is None:
        return f"pip install {step.package}"
    if step.gib > args.gib:
        return f"it needs a card of {step.gib} GiB"
    return "out of time" if time.time() + step.seconds > args.until else None


def record(path: Path, name: str, **entry) -> None:
    """Merge an entry into a step of the document, durably; `values` into what the step has yielded before.

    `status` is running, measured, failed, stopped or not run; with the last three there is `why`.
    """
    document = json.loads(path.read_text())
    step = document["steps"].setdefault(name, {"values": {}})
    step["values"] |= entry.pop("values", {})
    step.update(entry)
    write_durably(path, json.dumps(document, indent=1))


def statuses(path: Path) -> dict[str, str]:
    """Return the status of every step that the document knows."""
    return {name: entry["status"] for name, entry in json.loads(path.read_text())["steps"].items()}


def work(args) -> None:
    """Measure the steps of --worker in turn. After a failure the process ends: memory may be left that others need."""
    for step in [step for step in STEPS if step.name in args.worker]:
        if why := why_not(step, args):
            record(args.document, step.name, status="not run", why=why)
            continue
        started = time.time()
        record(args.document, step.name, status="running")
        try:
            for values in step.measure(args):
                record(args.document, step.name, values=values, seconds=time.time() - started)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]  # a library's message may have many
            record(args.document, step.name, status="failed", why=f"{type(error).__name__}: {first_line}")
            raise
        record(args.document, step.name, status="measured")


def in_a_process(names: list[str], args) -> str:
    """Let a worker measure some steps, until the time is up; say how it ended."""
    command = [sys.executable, __file__, *sys.argv[1:], "--until", str(args.until), "--worker", *names]

    # A session of its own, so that whatever the worker has started ends with it. Our own stdout stays clean.
    with subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as process:
        try:
            return f"its process ended with code {process.wait(max(1.0, args.until - time.time()))}"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def measure_all(args, names: list[str]) -> None:
    """Measure the steps, group by group, each step once."""
    steps = {step.name: step for step in STEPS}
    while names:
        first = steps[names[0]]
        group = [name for name in names if steps[name].group == first.group]
        if why := why_not(first, args):
            record(args.document, first.name, status="not run", why=why)
        else:
            ended = in_a_process(group, args)

            # A worker that was killed could not say so: its step is still said to run. One that died before its first
            # step would otherwise be started for ever.
            known = statuses(args.document)
            running = [name for name in group if known.get(name) == "running"]
            for name in running or [first.name] * (not known.keys() & {*group}):
                record(args.document, name, status="stopped" if ended == "out of time" else "failed", why=ended)
        names = [name for name in names if name not in statuses(args.document)]


def main() -> None:
    """Look for a card, measure, and print a line per step and the document."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="a step that would not fit is not begun")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="only these; default: all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, into runs/smoke/gpu_cpu.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)  # from the parent to a worker: its steps,
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # and when it must have ended
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.exit(2, "bench/gpu.py: no GPU was found; --dry-run walks the same code on the CPU\n")

    # What parent and workers both need to know.
    os.chdir(common.ROOT)
    args.card = "cpu" if args.dry_run else torch.cuda.get_device_name()
    args.gib = np.inf if args.dry_run else torch.cuda.get_device_properties(0).total_memory / hardware.GIB
    args.until = args.until or (np.inf if args.dry_run else time.time() + 60 * args.minutes)
    args.document = common.folder(settings(args)) / f"gpu_{args.card.lower().replace(' ', '-')}.json"
    if args.worker:
        return work(args)

    # The document. What it has of other steps stays where only some are asked for.
    arguments = argparse.Namespace(minutes=args.minutes, steps=args.steps, threads=torch.get_num_threads())
    before = json.loads(args.document.read_text())["steps"] if args.document.exists() else {}
    document = common.provenance(arguments) | {"card": args.card}
    document["steps"] = {name: entry for name, entry in before.items() if name not in args.steps}
    write_durably(args.document, json.dumps(document, indent=1))

    measure_all(args, [name for name in names if name in args.steps])
    document = json.loads(args.document.read_text())
    for name, entry in document["steps"].items():
        print(f"{name:<16}{entry.get('seconds', 0):6.0f} s  {entry['status']}  {entry.get('why', '')}")
    print(json.dumps(document))
    sys.exit("failed" in statuses(args.document).values())


if __name__ == "__main__":
    main()
