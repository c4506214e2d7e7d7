"""What happens in training, for images and video alike.

Each iteration: 1. take the next prompts, 2. roll out their forests, 3. decode the leaves and score them, 4. credit and
prune, 5. update, 6. log. Now and then the policy is evaluated on held-out prompts (an ODE from fixed noises) and a
checkpoint is saved.

1. evaluate     held-out prompts and noises, always the same, so that curves of different runs can be paired
2. iterate      one iteration: rollout, reward, credit, update; returns its row of metrics (docs/metrics.md)
3. train        all iterations, with evaluations, checkpoints and logs in between

Everything random is keyed by (seed, iteration, prompt slot). So a killed run resumes bit for bit on the CPU, and but
for rounding the result does not depend on the number of processes. Direction of time: as in sde.py.
"""

import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import rewards as R
from branchgrpo import (
    NonFinite,
    Rollout,
    Rows,
    credit,
    generators,
    remember_logp,
    rollout,
    sample_ode,
    split_parents,
    update,
)
from checkpoint import Log, Run, save_checkpoint
from disk import replacing
from objectives import OBJECTIVES, ON_LEAVES, remember_velocity
from parallel import together
from prompts import count_silent, drawn_prompts, own_prompts
from schedules import kept_edges, schedule_of
from tree import EQUAL, Forest, count, effective_leaves, split_variance

EVAL_KEY = 2**31  # keys the held-out noises; the same for every seed, so runs are paired


# ---------------------------------------------------------------------------------------------------------- evaluation
def score(run: Run, latents: Tensor, pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """`rewards.score_own` of this process's pictures, if they are numbers at all.

    Args:
        latents: that the pictures were decoded from.

    Raises:
        NonFinite: if latents or pictures are not: clamped to [0, 1] they would be scored as black pictures.
        CannotScore: if a reward fails. Both on every process at once.
    """
    run.at("rewards")
    bad = [name for name, values in (("latents", latents), ("pictures", pictures)) if not values.isfinite().all()]
    together(f"the policy's {bad[0]} are not finite: they cannot be scored" if bad else None, NonFinite)
    scores, error = {}, None
    try:
        scores = R.score_own(run.rewards, pictures, prompts, run.own)
    except R.CannotScore as raised:
        error = raised
    run.at("rewards of all processes")
    together(error, R.CannotScore)
    return scores


@contextmanager
def averaged(run: Run):
    """The policy with the EMA weights, where EMA is on: trained and averaged weights change places, and change back.

    One weight at a time, on the device, so that it takes the memory of one weight more. EMAModel's own `store` copies
    all of them to the CPU, 48 GB for the whole of FLUX.1-dev, at every evaluation.
    """
    pairs = list(zip(run.policy.trainable(), run.ema.shadow_params)) if run.ema else []

    def exchange() -> None:
        for trained, average in pairs:
            before = trained.detach().clone()
            trained.data.copy_(average)
            average.data.copy_(before)

    exchange()
    try:
        yield
    finally:
        exchange()


@torch.no_grad()
def generate(run: Run, numbers: range) -> tuple[list[str], dict[str, Tensor], Tensor]:
    """Held-out pairs of these numbers, by the ODE, with the EMA weights where EMA is on.

    Returns:
        prompts, scores (n,) by name, and pictures (n, ...).
    """
    args, acc = run.args, run.accelerator

    # Pair i is prompt i, in turns, with a noise of its own.
    prompts = [run.heldout[i % len(run.heldout)] for i in numbers]
    noise = torch.stack([torch.randn(run.policy.latent_shape, generator=g) for g in generators(EVAL_KEY, 0, numbers)])

    # The averaged weights take the place of the trained ones for the walk, and give it back.
    cond = run.policy.encode(prompts)
    with averaged(run):
        latents = sample_ode(run.policy, cond, run.sampler(), noise.to(acc.device), args.micro_batch)

    pictures = run.policy.decode(latents)
    return prompts, score(run, latents, pictures, prompts), pictures


def evaluate(run: Run, show: int = 24) -> tuple[dict[str, float], Tensor]:
    """`--eval-size` held-out prompt-noise pairs, always the same.

    Returns:
        means (heldout_reward, heldout_exact, heldout_NAME), and of this process's pictures the first `show`
        (show, 3, H, W); on the main process these are the first pairs.
        heldout_exact is the fraction of pictures whose ocr score is 1, absent without ocr.
        heldout_NAME is the mean over the pairs whose prompts have that reward, absent where none has.
    """
    acc, size = run.accelerator, run.args.eval_size
    run.at(f"evaluation after iteration {run.iteration}")

    # Every process takes equally many pairs, or the collective calls below would not match: of 10 pairs on 4 processes
    # each takes 3, and the last two numbers, 10 and 11, are walked but not counted.
    per_process = -(-size // acc.num_processes)
    numbers = range(acc.process_index * per_process, (acc.process_index + 1) * per_process)
    prompts, scores, pictures = generate(run, numbers)

    # One row of scores per counted pair, from all processes: of the rewards that its prompt has.
    counted = prompts[: max(0, size - numbers.start)]
    own_rows = [
        {name: float(s[j]) for name, s in scores.items() if name in run.own.get(p, scores)}
        for j, p in enumerate(counted)
    ]
    rows = gather_object(own_rows)
    by_name = {name: [row[name] for row in rows if name in row] for name in scores}
    means = {name: float(np.mean(values)) for name, values in by_name.items() if values}
    shown = (pictures[: min(show, size)] * 255).round().byte() / 255  # the main process shows what it has itself

    # The mean of a sum is the sum of the means, unless prompts have rewards of their own: then each pair has its sum.
    # Processes take consecutive pairs, so the gathered rows stand in the order of the pairs.
    if run.own:
        weights = [run.own[run.heldout[i % len(run.heldout)]] for i in range(size)]
        sums = [sum(w * row[name] for name, w in own.items() if w) for own, row in zip(weights, rows, strict=True)]
        result = {"heldout_reward": float(np.mean(sums))}
    else:
        result = {"heldout_reward": sum(w * means[name] for name, w in run.weights.items())}
    if "ocr" in means:
        result["heldout_exact"] = float(np.mean([score == 1 for score in by_name["ocr"]]))
    return result | {f"heldout_{name}": value for name, value in means.items()}, shown


# ----------------------------------------------------------------------------------------------------------- iteration
def credit_leaves(
    run: Run, out: Rollout, forest: Forest, scores: dict[str, Tensor], weights: dict | None = None
) -> tuple[Tensor, Tensor, list]:
    """Credit from the scores of all leaves.

    --reward-mix reward: the credit of the weighted sum of rewards. advantage: the weighted sum of each reward's own
    advantages, clipped again, so that no reward wins by its scale; leaves are then ranked by their sum.

    Args:
        scores: name -> (P leaves,), nan where a prompt does not have the reward.
        weights: name -> weight, one for all prompts or (P, 1), see `rewards.prompt_weights`; None: those of --reward.

    Returns:
        the weighted rewards (P, leaves), what pruning ranks leaves by (P, leaves), and the advantages, T tensors
        (P, n_{i+1}).
    """
    args, weights = run.args, run.weights if weights is None else weights
    by_name = {name: s.unflatten(0, (-1, forest.leaves)) for name, s in scores.items()}  # (P, leaves) each
    rewards = R.weighted_sum(by_name, weights)
    options = (args.fusion_beta, args.adv_clip, args.advantage)
    if args.reward_mix == "reward":
        return rewards, rewards, credit(out, forest, rewards, *options)

    # One credit per reward, then their weighted sum, edge by edge. Credit compares within a prompt, so where a prompt
    # does not have the reward its own advantages are nan, and nobody else's.
    credits = [(w, credit(out, forest, by_name[name], *options)) for name, w in weights.items()]
    summed = [
        sum(R.weighted(a[i], w) for w, a in credits).clamp(-args.adv_clip, args.adv_clip) for i in range(forest.steps)
    ]
    return rewards, summed[-1], summed


def minibatches(run: Run, iteration: int, rows_of, prompts: int) -> list[Rows]:
    """The rows of each of the iteration's --updates optimiser steps.

    --updates-by prompts gives each step some of the prompts, with all their rows. parents gives each step a random
    subset of the rows of all prompts, so that one prompt per process can make several steps.

    Args:
        rows_of: makes the rows of the prompts whose indices it is given.
        prompts: of this process.
    """
    args = run.args
    if args.updates_by == "prompts":
        return [rows_of(subset) for subset in torch.arange(prompts).chunk(args.updates)]  # launch.py: they divide
    seed = [args.seed, iteration, 3, run.accelerator.process_index]  # 3: this stream; schedules have 1, prompts 2
    return split_parents(rows_of(torch.arange(prompts)), args.updates, seed)


def learning_rate(args, iteration: int) -> float:
    """The rate of iteration i, counted from 0: it falls linearly from --lr to the fraction --lr-end of it.

    Before that it rises over W = --lr-warmup iterations, by the factor (i + 1) / W. AdamW divides by a running mean of
    squared gradients, which after few of them says little: its first steps have full length in every weight, whatever
    the gradient is worth. W = 4, --lr 1, a constant rate: 0.25 0.5 0.75 1 1 ...
    """
    rise = min(1.0, (iteration + 1) / max(args.lr_warmup, 1))
    return args.lr * rise * (1 - (1 - args.lr_end) * iteration / args.iterations)


def iterate(run: Run, iteration: int) -> tuple[dict, dict[str, Tensor]]:
    """One iteration: roll out, score, credit, prune, update; returns its row of metrics, and what histograms show."""
    args, acc, policy = run.args, run.accelerator, run.policy
    schedule, lap = schedule_of(args, iteration, run.history), stopwatch(acc.device)
    sampler, forest = run.sampler(schedule.sigmas), schedule.forest

    run.at(f"iteration {iteration + 1}: rollout")

    # 1. The prompts of this process, and their slots in the iteration, which key their noise.
    drawn = drawn_prompts(args, run.prompts, iteration, run.silent)
    prompts = own_prompts(acc, drawn)
    slots = range(args.prompts_per_iteration)[acc.process_index :: acc.num_processes]
    cond = policy.encode(prompts)

    # 2. Roll out a forest for each.
    store = "cpu" if args.tree_offload else None
    rng = generators(args.seed, iteration, slots)
    out = rollout(policy, cond, forest, sampler, rng, args.micro_batch, store=store)
    row = {"seconds_rollout": lap()}

    # 3. Decode the leaves and score them; the leaves of a prompt are adjacent.
    pictures = policy.decode(out.latents[-1].flatten(0, 1))
    row["seconds_decode"] = lap()
    scores = score(run, out.latents[-1], pictures, [p for p in prompts for _ in range(forest.leaves)])
    row["seconds_reward"] = lap()

    # 4. Credit every edge from the leaves below it, then choose the edges to train.
    weights = R.prompt_weights(prompts, run.weights, run.own)
    leaf_rewards, ranking, advantages = credit_leaves(run, out, forest, scores, weights)
    keep = kept_edges(args, schedule, ranking, advantages)

    # 5. Update.
    row["lr"] = learning_rate(args, iteration)
    for group in run.optimizer.param_groups:
        group["lr"] = row["lr"]

    make_rows, objective = OBJECTIVES[args.objective]

    def rows_of(subset: Tensor) -> Rows:
        return make_rows(out, forest, keep, advantages, ranking, subset, rng, args, schedule.step_weight)

    # The first optimiser step is on-policy. Later ones compare with the policy as it is before it, which noised leaves
    # never asked; nor does the rollout in 16 bits say it, whose calls round otherwise than those of an update.
    run.at(f"iteration {iteration + 1}: update")
    batches, stats = minibatches(run, iteration, rows_of, len(prompts)), []
    rounded = args.objective == "surrogate" and args.dtype != "fp32"
    asked = batches[1:] if args.objective in ON_LEAVES or rounded else []
    for batch in asked:
        if args.objective in ON_LEAVES:
            remember_velocity(policy, batch, cond, args.micro_batch)
        else:
            remember_logp(policy, batch, cond, sampler, args.micro_batch)
    for batch in batches:
        step = (policy, run.optimizer, acc, batch, cond, sampler, args, objective)
        stats.append(update(*step, on_policy=not stats, scaler=run.scaler))
        if run.ema:
            run.ema.step(policy.trainable())
    row["seconds_train"] = lap()

    # 6. What is logged. Of several optimiser steps the mean; ratio_dev of the first, where it must be rounding alone.
    trained = [s for s in stats if s]
    row |= {name: float(np.mean([s[name] for s in trained])) for name in (trained[0] if trained else {})}
    row |= {"ratio_dev": stats[0]["ratio_dev"]} if "ratio_dev" in stats[0] else {}
    row |= rollout_metrics(run, out, forest, leaf_rewards, scores, drawn)
    row["trained_edges"] = sum(len(batch.weight) for batch in batches) * acc.num_processes

    # Evaluations of the transformer, in rollout and training. (The paper's NFE new is `kept` of tree.count.) In units
    # the backwards count too, two forwards each.
    trained, again = (sum(len(batch.x) for batch in some) * acc.num_processes for some in (batches, asked))
    forwards = count(forest)["forwards"] * args.prompts_per_iteration
    row |= {"nfe": forwards + again + trained, "units": forwards + again + 3 * trained}
    return row, {"leaf_rewards": leaf_rewards, "advantages": torch.cat(advantages, 1)}


def rollout_metrics(
    run: Run, out: Rollout, forest: Forest, leaf_rewards: Tensor, scores, drawn: list[str]
) -> dict[str, float]:
    """The metrics of an iteration beside those of its updates: rewards of all processes, memory.

    Also notes which of the prompts `drawn`, those of all processes, taught nothing.
    """
    args, acc = run.args, run.accelerator

    # The weighted reward and each score by itself, gathered from all processes, and brought to the host, once.
    own = torch.stack([leaf_rewards.flatten(), *(s.flatten() for s in scores.values())], 1)  # (P leaves, 1 + scores)
    weighted, *single = acc.gather(own.to(acc.device)).cpu().t().contiguous()
    rewards = weighted.view(-1, forest.leaves)  # (P of all processes, leaves)
    spread = rewards.std(1, correction=0)

    # Gathered rewards stand process by process, and process r owns the slots r, r + R, ...
    by_process = [prompt for rank in range(acc.num_processes) for prompt in drawn[rank :: acc.num_processes]]
    count_silent(run.silent, by_process, (spread >= EQUAL).tolist())
    # Once more for a tensor of another shape: (P, roots) of this process.
    listening = effective_leaves(out.path_logp(forest), forest, args.fusion_beta)
    metrics = {
        "reward_mean": rewards.mean().item(),
        "reward_std": spread.mean().item(),
        "prompts_without_spread": int((spread < EQUAL).sum()),
        "effective_leaves": acc.gather(listening.to(acc.device)).mean().item(),
        "leaves": forest.leaves,
        "peak_gib": peak_gib(acc.device),
    }
    metrics |= {f"variance_step_{i}": v for i, v in split_variance(rewards, forest).items()}

    # The mean of each score over the leaves that have it. What no prompt of the iteration has is absent.
    known = {name: s[~s.isnan()] for name, s in zip(scores, single)}
    return metrics | {f"reward_{name}": s.mean().item() for name, s in known.items() if len(s)}


# ------------------------------------------------------------------------------------------------------------- training
class Stopped(Exception):
    """SIGTERM came: a checkpoint was written after the iteration that it came in."""


class Terminator:
    """While it is open, notes SIGTERM, which clusters send before they kill, so that the iteration can be kept."""

    def __init__(self, accelerator):
        self.accelerator, self.asked, self.before = accelerator, False, None

    def __enter__(self) -> "Terminator":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to it alone
            self.before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *raised) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def note(self, number, frame) -> None:
        """The signal's handler."""
        self.asked = True

    def came(self) -> bool:
        """Whether it came to any process: all must stop after the same iteration."""
        return any(gather_object([self.asked]))


def train(run: Run) -> None:
    """All iterations that are left; evaluates first, at every --eval-every, and last; saves at --save-every and last.

    Raises:
        NonFinite, CannotScore: the run stops; the last good checkpoint stays.
        Stopped: after SIGTERM, with a checkpoint of the iteration that it came in.
    """
    with Terminator(run.accelerator) as terminator:
        begin(run, log := Log(run))
        go_on(run, log, terminator)

    if log.main:
        log.tracker.finish()
    if run.pictures is None:  # a finished run, resumed
        run.pictures = evaluate(run)[1]


def begin(run: Run, log: Log) -> None:
    """A run that begins is evaluated untrained, and its pictures are kept for before_after.png."""
    if not run.history:
        lap = stopwatch(run.accelerator.device)
        scores, run.pictures = evaluate(run)
        log.write({"iteration": 0, **scores, "seconds_eval": lap()}, strip(run.pictures))
        keep_before(run, run.pictures)


def go_on(run: Run, log: Log, terminator: Terminator) -> None:
    """The iterations that are left; see `train`."""
    args = run.args
    bar = tqdm(total=args.iterations, initial=run.iteration, desc=args.method, file=sys.stderr, disable=not log.main)
    heldout = [row["heldout_reward"] for row in run.history if "heldout_reward" in row][-1]
    for iteration in range(run.iteration, args.iterations):
        row, histograms = iterate(run, iteration)
        row, pictures = {"iteration": iteration + 1} | row, None
        run.iteration = iteration + 1
        warn_without_spread(run, row)

        last = run.iteration == args.iterations
        if last or run.iteration % args.eval_every == 0:
            lap = stopwatch(run.accelerator.device)
            scores, run.pictures = evaluate(run)
            pictures, heldout = strip(run.pictures), scores["heldout_reward"]
            row |= scores | {"seconds_eval": lap()}

        # The row is written before the checkpoint, which keeps all rows up to its iteration.
        log.write(row, pictures, histograms)
        stopped = terminator.came()
        if last or stopped or run.iteration % args.save_every == 0:
            save_checkpoint(run)
        if stopped and not last:
            raise Stopped
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", heldout=f"{heldout:.3f}")
        bar.update()
    bar.close()


def keep_before(run: Run, pictures: Tensor) -> None:
    """Write the pictures of the untrained policy, durably: they are needed at the end."""
    if run.accelerator.is_main_process:
        with replacing(run.out / "before.safetensors") as unfinished:
            save_file({"pictures": pictures.contiguous()}, unfinished)


def warn_without_spread(run: Run, row: dict) -> None:
    """Say once per run that an iteration could teach nothing, because each of its prompts had equal rewards."""
    prompts = run.args.prompts_per_iteration
    earlier = any(r.get("prompts_without_spread") == prompts for r in run.history)
    if row["prompts_without_spread"] == prompts and not earlier and run.accelerator.is_main_process:
        tqdm.write(
            f"iteration {row['iteration']}: all leaves of each prompt had equal rewards, so nothing was learnt."
            " If this goes on, choose a reward that tells these pictures apart. (This is said once.)",
            file=sys.stderr,
        )


def summary(run: Run) -> dict:
    """The final JSON document: held-out scores before and after, seconds, model evaluations, where the files are."""
    evaluated = [row for row in run.history if "heldout_reward" in row]
    first, last, rows = evaluated[0], evaluated[-1], run.history[1:]
    seconds = sum(value for row in run.history for name, value in row.items() if name.startswith("seconds_"))

    document = {"reward_before": first["heldout_reward"], "reward_after": last["heldout_reward"]}
    if "heldout_exact" in first:
        document |= {"exact_before": first["heldout_exact"], "exact_after": last["heldout_exact"]}
    for name in run.rewards:
        if f"heldout_{name}" in first:  # with --reward-column a reward may be of training prompts only
            document |= {f"{name}_before": first[f"heldout_{name}"], f"{name}_after": last[f"heldout_{name}"]}
    return document | {
        "seconds": round(seconds, 2),
        "nfe": sum(row["nfe"] for row in rows),
        "iterations": run.iteration,
        "leaves": rows[-1]["leaves"] if rows else run.args.leaves,
        "trained_edges": rows[-1]["trained_edges"] if rows else 0,
        "out": str(run.out),
    }


# ------------------------------------------------------------------------------------------------------------  measures
def strip(pictures: Tensor, n: int = 3) -> Tensor:
    """Videos (B, F, 3, H, W) as n of their frames side by side, (B, 3, H, n W); pictures (B, 3, H, W) as they are."""
    return pictures if pictures.ndim == 4 else R.sampled_frames(pictures, n).permute(0, 2, 3, 1, 4).flatten(3)


def stopwatch(device: torch.device):
    """A function that returns the seconds since it was last called, the device's queue drained."""
    last = 0.0

    def lap() -> float:
        nonlocal last
        if device.type == "cuda":  # a GPU works on after a call has returned
            torch.cuda.synchronize(device)
        before, last = last, time.perf_counter()
        return last - before

    lap()  # what was asked of the GPU before is not ours
    return lap


def peak_gib(device: torch.device) -> float:
    """The most memory this process ever held, GiB: of the GPU, or without one its resident set (Linux, macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # getrusage's starts at that of the process it was forked from
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
