"""The training loop that images and video share.

Each iteration: 1. take the next prompts, 2. roll out their forests, 3. decode the leaves and score them, 4. credit and prune,
5. update, 6. log; now and then evaluate on held-out prompts (ODE, fixed noise) and save a checkpoint.

Everything random is keyed by (seed, iteration, prompt slot), so a killed run resumes bit for bit on the CPU, and but for
rounding the result does not depend on the number of processes. Direction of time: as in sde.py.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import hardware
import parallel
import rewards as R
from branchgrpo import NonFinite, Rollout, Sampler, credit, gather, generators, prune, rollout, sample_ode, update
from flags import HERE, MAY_CHANGE, describe
from schedules import noise_sharing, plan
from sde import sigma_schedule
from tree import Forest, count, effective_leaves

EVAL_KEY = 2**31  # the held-out noises are the same for every seed: runs are paired


@dataclass
class Run:
    """What one process holds of a run: options, policy, prompts, rewards and the state that a checkpoint keeps."""

    o: object
    accelerator: Accelerator
    policy: object
    prompts: list[str]
    heldout: list[str]
    rewards: dict[str, R.Reward]  # optimised and watched
    weights: dict[str, float]  # optimised
    optimizer: torch.optim.Optimizer | None = None
    ema: EMAModel | None = None
    iteration: int = 0  # iterations done
    history: list[dict] = field(default_factory=list)
    pictures: Tensor | None = None  # of the last evaluation

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.o.out)

    def sampler(self, sigmas: Tensor | None = None) -> Sampler:
        """The transitions of this run's options: of an iteration with its own noise levels, by default of evaluation."""
        o = self.o
        if sigmas is None:
            sigmas = sigma_schedule(o.steps, o.shift)
        return Sampler(sigmas, o.sde, o.eta, noise_sharing(o), o.cps_density, o.flash is not None)


# --------------------------------------------------------------------------------------------------------- checkpoints
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
        for old in checkpoints(run.out)[: -run.o.keep]:
            shutil.rmtree(old)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Restore what `save_checkpoint` wrote, on any number of processes; metric rows written after it are dropped."""
    parallel.load(run, folder)
    run.history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    run.iteration = int(folder.name.split("-")[1])


# ---------------------------------------------------------------------------------------------------------- evaluation
def score(run: Run, pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """`rewards.score` of this process's pictures.

    Raises:
        CannotScore: on every process at once: one that stopped alone would leave the others waiting.
    """
    scores, failed = {}, None
    try:
        scores = R.score(run.rewards, pictures, prompts)
    except R.CannotScore as error:
        failed = str(error)
    for why in filter(None, gather_object([failed])):
        raise R.CannotScore(why)
    return scores


@torch.no_grad()
def generate(run: Run, numbers: range) -> tuple[list[str], dict[str, Tensor], Tensor]:
    """Held-out prompts and noises of these numbers, ODE, EMA weights where EMA is on: prompts, scores (n,), pictures (n, ...)."""
    o, acc = run.o, run.accelerator
    prompts = [run.heldout[i % len(run.heldout)] for i in numbers]
    if run.ema:
        run.ema.store(run.policy.trainable())
        run.ema.copy_to(run.policy.trainable())
    noise = torch.stack([torch.randn(run.policy.latent_shape, generator=g) for g in generators(EVAL_KEY, 0, numbers)])
    cond = run.policy.encode(prompts)
    latents = sample_ode(run.policy, cond, run.sampler(), noise.to(acc.device), o.micro_batch)
    if run.ema:
        run.ema.restore(run.policy.trainable())
    pictures = run.policy.decode(latents)
    return prompts, score(run, pictures, prompts), pictures


def evaluate(run: Run, show: int = 24) -> tuple[dict[str, float], Tensor]:
    """`--eval-size` held-out prompt-noise pairs, always the same.

    Returns:
        means (heldout_reward, heldout_exact, heldout_NAME), and the first `show` pictures (show, 3, H, W). heldout_exact is
        the share of pictures whose ocr score is 1, absent without ocr.
    """
    acc, size = run.accelerator, run.o.eval_size
    share = -(-size // acc.num_processes)  # of each process alike: the last may walk a few numbers too many
    numbers = range(acc.process_index * share, (acc.process_index + 1) * share)
    _, scores, pictures = generate(run, numbers)
    rows = gather_object([{name: float(scores[name][j]) for name in scores} for j, i in enumerate(numbers) if i < size])
    means = {name: float(np.mean([row[name] for row in rows])) for name in scores}
    shown = acc.gather((pictures[:show] * 255).round().byte().to(acc.device))[: min(show, size)].cpu() / 255
    result = {"heldout_reward": sum(w * means[name] for name, w in run.weights.items())}
    if "ocr" in means:
        result["heldout_exact"] = float(np.mean([row["ocr"] == 1 for row in rows]))
    return result | {f"heldout_{name}": value for name, value in means.items()}, shown


# ----------------------------------------------------------------------------------------------------------- iteration
def prompts_at(prompts: list[str], seed: int, first: int, n: int) -> list[str]:
    """Entries first .. first + n - 1 of the endless stream of prompts: each epoch is a new permutation."""
    size = len(prompts)
    epochs = range(first // size, (first + n - 1) // size + 1)
    order = {e: np.random.default_rng([seed, e, 2]).permutation(size) for e in epochs}
    return [prompts[order[i // size][i % size]] for i in range(first, first + n)]


def own_prompts(o, accelerator: Accelerator, prompts: list[str], iteration: int) -> list[str]:
    """Those of an iteration that this process owns: every n-th, so that --updates are alike on any number of processes."""
    n = o.prompts_per_iteration
    return prompts_at(prompts, o.seed, iteration * n, n)[accelerator.process_index :: accelerator.num_processes]


def strip(pictures: Tensor, n: int = 3) -> Tensor:
    """Videos (B, F, 3, H, W) as n of their frames side by side, (B, 3, H, n W); pictures (B, 3, H, W) as they are."""
    return pictures if pictures.ndim == 4 else R.sampled_frames(pictures, n).permute(0, 2, 3, 1, 4).flatten(3)


def stopwatch(device: torch.device):
    """A function that returns the seconds since it was last called, the device's queue drained."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before, last = last, time.perf_counter()
        return last - before

    return lap


def peak_gib(device: torch.device) -> float:
    """The most memory this process ever held, GiB: of the GPU, or without one its resident set (Linux, macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # getrusage's starts at that of the process it was forked from
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def credit_leaves(run: Run, out: Rollout, forest: Forest, scores: dict[str, Tensor]) -> tuple[Tensor, list, list]:
    """The weighted rewards (P, leaves), and credit from them: fused rewards, which pruning ranks, and advantages.

    --reward-mix reward: the credit of the weighted sum of rewards. advantage: the weighted sum of each reward's own
    advantages, clipped again, so that no reward wins by its scale; leaves are then ranked by their sum.
    """
    o, each = run.o, {name: s.unflatten(0, (-1, forest.leaves)) for name, s in scores.items()}  # (P, leaves)
    rewards = R.weighted_sum(each, run.weights)
    how = (o.fusion_beta, o.adv_clip, o.advantage == "group")
    if o.reward_mix == "reward":
        return rewards, rewards, credit(out, forest, rewards, *how)
    parts = [(w, credit(out, forest, each[name], *how)) for name, w in run.weights.items()]
    summed = [sum(w * a[i] for w, a in parts).clamp(-o.adv_clip, o.adv_clip) for i in range(forest.steps)]
    return rewards, summed[-1], summed


def iterate(run: Run, iteration: int) -> tuple[dict, dict[str, Tensor]]:
    """One iteration: roll out, score, credit, prune, update; returns its row of metrics, and what histograms show."""
    o, acc, policy = run.o, run.accelerator, run.policy
    todo, lap = plan(o, iteration), stopwatch(acc.device)
    sampler, forest, prompts = run.sampler(todo.sigmas), todo.forest, own_prompts(o, acc, run.prompts, iteration)
    slots = range(o.prompts_per_iteration)[acc.process_index :: acc.num_processes]
    cond = policy.encode(prompts)
    store = "cpu" if o.tree_offload else None
    out = rollout(policy, cond, forest, sampler, generators(o.seed, iteration, slots), o.micro_batch, store=store)
    row = {"seconds_rollout": lap()}
    pictures = policy.decode(out.latents[-1].flatten(0, 1))
    row["seconds_decode"] = lap()
    scores = score(run, pictures, [p for p in prompts for _ in range(forest.leaves)])
    row["seconds_reward"] = lap()

    leaf_rewards, ranking, advantages = credit_leaves(run, out, forest, scores)
    keep = prune(forest, ranking, o.width_prune, todo.depth, todo.trained_steps)
    row["lr"] = o.lr * (1 - (1 - o.lr_end) * iteration / o.iterations)
    for group in run.optimizer.param_groups:
        group["lr"] = row["lr"]
    stats = []
    for part in torch.arange(len(prompts)).chunk(o.updates):
        edges = gather(out, forest, keep, advantages, part, o.loss_weight, todo.step_weight)
        stats.append(update(policy, run.optimizer, acc, edges, cond, sampler, o))
        if run.ema:
            run.ema.step(policy.trainable())
    row["seconds_train"] = lap()

    counts = count(forest, keep)
    everywhere = acc.gather(leaf_rewards.to(acc.device))
    row |= {k: float(np.mean([s[k] for s in stats])) for k in stats[0]} | {"ratio_dev": stats[0]["ratio_dev"]}
    row |= {
        "reward_mean": everywhere.mean().item(),
        "reward_std": everywhere.std(1, correction=0).mean().item(),
        "effective_leaves": effective_leaves(out.path_logp(forest), forest, o.fusion_beta).mean().item(),
        "leaves": forest.leaves,
        "trained_edges": counts["trainable"] * o.prompts_per_iteration,
        "nfe": (counts["forwards"] + counts["trained_parents"]) * o.prompts_per_iteration,
        "peak_gib": peak_gib(acc.device),
    }
    row |= {f"reward_{name}": acc.gather(s.to(acc.device)).mean().item() for name, s in scores.items()}
    return row, {"leaf_rewards": leaf_rewards, "advantages": torch.cat(advantages, 1)}


# ---------------------------------------------------------------------------------------------------------------- runs
def find_out(o) -> str:
    """The run's folder from `--out` and `--resume`: a new one under runs/, the one given, or that of the run to continue.

    Raises:
        ValueError: if a run would be overwritten, or there is none to continue.
    """
    if o.resume is None:
        out = o.out or f"runs/{o.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        if (Path(out) / "options.json").exists():
            raise ValueError(f"--out {out} holds a run: add --resume to continue it, or name another folder")
        return out
    runs = sorted(Path("runs").glob("*/options.json"), key=lambda p: p.stat().st_mtime)
    out = o.resume or o.out or (str(runs[-1].parent) if runs else "runs")
    if not (Path(out) / "options.json").exists():
        raise ValueError(f"--resume: {out} holds no run (no options.json)")
    return out


def options_to_keep(o, prompts: list[str], heldout: list[str]) -> str:
    """What options.json holds: every option that shapes a run, and a hash of its prompts. On resume it is compared.

    --iterations may then be that of the last checkpoint: nothing is left to train, and the model is written.

    Raises:
        ValueError: if an option or the prompts differ from those of the run to continue.
    """
    digest = hashlib.sha256("\n".join([*prompts, "", *heldout]).encode()).hexdigest()
    now = {k: v for k, v in vars(o).items() if k not in MAY_CHANGE} | {"sha256-of-prompts": digest}
    now = json.loads(json.dumps(now))  # tuples become lists, as on disk
    done = [int(path.name.split("-")[1]) for path in checkpoints(Path(o.out))]
    for name, was in json.loads((Path(o.out) / "options.json").read_text()).items() if o.resume is not None else ():
        if now[name] != was and (name, now[name]) != ("iterations", max(done, default=None)):
            flag = name.replace("_", "-")
            raise ValueError(f"--resume: the run has --{flag} {was}, not {now[name]}; give the same flags")
    return json.dumps(now, indent=1)


def start(script: str, job, argv: list[str] | None, finish) -> None:
    """A script's main: what `job` makes of the flags is trained, or with --plan only counted; our errors are one sentence, exit 2."""
    try:
        o, *rest = job(argv)
        if o.plan:
            print(hardware.report(o))
        else:
            main(o, *rest, finish)
    except (ValueError, NonFinite) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(where).resolve().parent != HERE.resolve():
            raise  # a library's: where it happened matters
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)


def main(o, load_policy, shape: tuple[int, ...], prompts: list[str], heldout: list[str], finish) -> None:
    """A whole run from resolved options: rewards, policy, loop, pictures; prints the counts first, the document last.

    Args:
        load_policy, shape, prompts, heldout: see `prepare`.
        finish: called with the Run at the end, on the main process; writes what people look at.

    Raises:
        ValueError: before any long work, one sentence; NonFinite or CannotScore in the loop.
    """
    for flag, asked in (("--device cuda", o.device == "cuda"), ("--nf4", o.nf4)):
        if asked and not torch.cuda.is_available():
            raise ValueError(f"{flag}: no GPU was found")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # others wait while one writes a large checkpoint
    handlers = [patience, DistributedDataParallelKwargs(broadcast_buffers=False)]  # buffers are constants
    cpu = o.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)  # --dtype alone decides
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED") or accelerator.state.dynamo_plugin.backend != "NO":
        raise ValueError("accelerate's own sharding and compilation must be off: here they are --fsdp and --compile")
    main_process = accelerator.is_main_process
    o.out = broadcast_object_list([find_out(o) if main_process else None])[0]
    if main_process:
        options = options_to_keep(o, prompts, heldout)
        print(describe(o, prompts, heldout), flush=True)
    run = prepare(o, accelerator, load_policy, shape, prompts, heldout)
    if main_process and o.resume is None:
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / ".options").write_text(options)
        os.replace(run.out / ".options", run.out / "options.json")
    accelerator.wait_for_everyone()
    if not all(gather_object([(run.out / "options.json").exists()])):
        raise ValueError(f"--out {run.out} must be a folder that all processes share")
    last = broadcast_object_list([["", *map(str, checkpoints(run.out))][-1]])[0]  # as the main process sees it
    if o.resume is not None and last:
        load_checkpoint(run, Path(last))
    train(run)
    if run.ema:
        run.ema.copy_to(run.policy.trainable())
    run.policy.gather(main_process)
    if main_process:
        finish(run)
        print(json.dumps(summary(run)))
    accelerator.wait_for_everyone()  # a node that leaves early may take the others' meeting point with it


def prepare(o, accelerator: Accelerator, load_policy, shape: tuple[int, ...], prompts, heldout) -> Run:
    """Rewards, policy, optimiser and EMA from resolved options: a Run at iteration 0.

    Args:
        load_policy: called with dtype, device, guidance, lora, keep_reference, checkpointing, tiling; see policies.py.
        shape: of one picture or video.
        prompts, heldout: from flags.load_prompts.

    Raises:
        ValueError: if --fsdp has no other process, the processes do not share the prompts or updates evenly, or rewards or policy cannot be loaded.
    """
    if o.fsdp and not torch.distributed.is_initialized():
        raise ValueError("--fsdp splits the model over processes: start it with torchrun")
    share = o.prompts_per_iteration / accelerator.num_processes
    if share % o.updates:
        n = accelerator.num_processes * o.updates
        raise ValueError(f"--prompts-per-iteration must be a multiple of processes x --updates = {n}")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    setup = R.Setup(o.reward_weights, accelerator.device, dtypes[o.reward_dtype], o.reward_offload, o.reward_batch)
    rewards, weights = R.load_rewards(o.reward, o.watch, [*prompts, *heldout], torch.ones(1, *shape), setup)
    trained = {"guidance": o.guidance, "lora": o.lora, "keep_reference": o.kl > 0}
    memory = {"checkpointing": o.gradient_checkpointing, "tiling": o.vae_tiling, "sharded": o.fsdp, "nf4": o.nf4}
    memory |= {"compiled": o.compile, "text_offload": o.text_offload, "text_cache": o.text_cache}
    policy = load_policy(dtype=dtypes[o.dtype], device=accelerator.device, **trained, **memory)
    if o.text_offload:
        mine = [p for i in range(o.iterations) for p in own_prompts(o, accelerator, prompts, i)]
        policy.remember([*dict.fromkeys(mine), *heldout[: o.eval_size + accelerator.num_processes]])
    run = Run(o, accelerator, policy, prompts, heldout, rewards, weights)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=o.lr, weight_decay=o.weight_decay)
    run.ema = EMAModel(policy.trainable(), decay=o.ema, min_decay=o.ema) if o.ema else None  # no warm-up
    if not o.fsdp:
        policy.transformer = accelerator.prepare(policy.transformer)
    run.optimizer = accelerator.prepare(optimizer)
    return run


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
        if run.o.tracker == "wandb":
            name = hashlib.sha256(str(run.out.resolve()).encode()).hexdigest()[:16]
            settings = {"dir": run.out, "name": run.out.name, "id": name, "resume": "allow", "config": vars(run.o)}
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
            layout = {"dataformats": "NHWC"} if self.run.o.tracker == "tensorboard" else {}
            self.tracker.log_images({"heldout": R.to_uint8(strip(pictures))}, step=at, **layout)
        if self.run.o.tracker == "tensorboard":
            for name, values in (histograms or {}).items():
                self.tracker.writer.add_histogram(name, values, at)


def train(run: Run) -> None:
    """All iterations that are left; evaluates first, at every --eval-every, and last; saves at --save-every and last.

    Raises:
        NonFinite, CannotScore: the run stops; the last good checkpoint stays.
    """
    o, log = run.o, Log(run)
    if not run.history:
        lap = stopwatch(run.accelerator.device)
        scores, run.pictures = evaluate(run)
        log.write({"iteration": 0, **scores, "seconds_eval": lap()}, run.pictures)
        if run.accelerator.is_main_process:
            save_file({"pictures": run.pictures.contiguous()}, run.out / "before.safetensors")
    bar = tqdm(total=o.iterations, initial=run.iteration, desc=o.method, file=sys.stderr, disable=not log.main)
    held = [r["heldout_reward"] for r in run.history if "heldout_reward" in r][-1]
    for iteration in range(run.iteration, o.iterations):
        row, histograms = iterate(run, iteration)
        row, pictures = {"iteration": iteration + 1} | row, None
        run.iteration = iteration + 1
        last = run.iteration == o.iterations
        if last or run.iteration % o.eval_every == 0:
            lap = stopwatch(run.accelerator.device)
            scores, run.pictures = evaluate(run)
            pictures = run.pictures
            row |= scores | {"seconds_eval": lap()}
            held = scores["heldout_reward"]
        log.write(row, pictures, histograms)
        if last or run.iteration % o.save_every == 0:
            save_checkpoint(run)
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", heldout=f"{held:.3f}")
        bar.update()
    bar.close()
    if log.main:
        log.tracker.finish()
    if run.pictures is None:  # a finished run, resumed
        run.pictures = evaluate(run)[1]


def summary(run: Run) -> dict:
    """The final JSON document: held-out scores before and after, seconds, model evaluations, where the files are."""
    evaluated = [r for r in run.history if "heldout_reward" in r]
    first, last, rows = evaluated[0], evaluated[-1], run.history[1:]
    seconds = sum(v for r in run.history for k, v in r.items() if k.startswith("seconds_"))
    document = {"reward_before": first["heldout_reward"], "reward_after": last["heldout_reward"]}
    document |= {"exact_before": first.get("heldout_exact"), "exact_after": last.get("heldout_exact")}
    for name in run.rewards:
        document |= {f"{name}_before": first[f"heldout_{name}"], f"{name}_after": last[f"heldout_{name}"]}
    return document | {
        "seconds": round(seconds, 2),
        "nfe": sum(r["nfe"] for r in rows),
        "iterations": run.iteration,
        "leaves": rows[-1]["leaves"] if rows else run.o.leaves,
        "trained_edges": rows[-1]["trained_edges"] if rows else 0,
        "out": str(run.out),
    }
