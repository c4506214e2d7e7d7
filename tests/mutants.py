"""Plants faults in the mathematics: one at a time, and expects the tests to notice each; or one for you to find.

    make mutants                            # all faults;   python tests/mutants.py 3 17    only these
    python tests/mutants.py --exercise 3    # a copy of the project with a fault: find it and mend it

Each mutant is a file, a text that stands in it exactly once, and a wrong text. Faults are always planted in a copy of
the project, never in the project itself.

1. MUTANTS         the faults
   EXERCISES       twelve of them, from easy to hard, each with what a user would observe (docs/exercises.md)
2. copy_project    code, documents and embedded models; neither runs nor git's history
   plant           one fault in a copy
3. survives        whether the tests miss a fault. They run in a forked process, so that libraries are imported once
4. exercise        a copy with a fault and without the answers; says what is wrong, but not where
5. main            first the tests must be green on an unchanged copy. The last line counts; the exit code is 1 if a
                   fault went unnoticed
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"sde": "test_sde", "tree": "test_tree", "branchgrpo": "test_branchgrpo", "schedules": "test_schedules"}
TESTS |= {
    "flags": "test_flags",
    "policy": "test_policies",
    "models": "test_models",
    "preference": "test_preference",
    "pretrained": "test_vlm",
    "hardware": "test_hardware",
    "parallel": "test_parallel",
    "objectives": "test_objectives",
    "prompts": "test_prompts",
    "rewards": "test_rewards",
    "disk": "test_faults",
    "checkpoint": "test_faults",
    "launch": "test_faults",
}
FUSE = "return (beta * path_logp.double()).unflatten(1, (nodes, -1)).softmax(-1)"
CENTRE = "centred = rewards.double() - rewards.double().mean(1, keepdim=True)"
DROPPED = "set(range(max(start, forest.last_split + 1), start + width))"
MUTANTS = [
    ("sde", "u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps", "u = torch.arange(steps + 1.0) / steps"),
    ("sde", "return shift * u / (1 + (shift - 1) * u)", "return shift * u / (1 + shift * u)"),
    ("sde", "drift = (eta**2 / 2)", "drift = (eta**2)"),
    ("sde", "return x + v * dt + drift * dt, eta", "return x + v * dt - drift * dt, eta"),
    ("sde", "drift * dt, eta * (-dt).sqrt()", "drift * dt, eta * -dt"),
    ("sde", "v_scale = (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt", "v_scale = dt"),
    ("sde", "(c - b) / (2 * (b - a))", "(b - a) / (2 * (c - b))"),
    ("sde", "target + sigmas[2] / sigmas[1] * (x - target)", "target + sigmas[1] / sigmas[2] * (x - target)"),
    ("sde", "1 - torch.where(sigma >= 1, sigma_1, sigma)", "1 - torch.where(sigma >= 1, 0.99, sigma)"),
    ("sde", "(sigma_next**2 - std**2).sqrt()", "(sigma_next - std)"),
    ("sde", "x1hat = x - sigma * v, x + (1 - sigma) * v", "x1hat = x - sigma * v, x + (1 - sigma_next) * v"),
    ("sde", "square = ((x - mean) ** 2).flatten(1).mean(1)", "square = ((x - mean) ** 2).flatten(1).sum(1)"),
    ("sde", "return -square / (2 * std**2) - std.log()", "return -square / (2 * std**2)"),
    ("sde", "own = (shared + s * own) / math.sqrt(1 + s**2)", "own = shared + s * own"),
    ("sde", "own = (shared + s * own) / math.sqrt(1 + s**2)", "own = (s * shared + own) / math.sqrt(1 + s**2)"),
    ("sde", "return own.flatten(0, 1)", "return own.transpose(0, 1).flatten(0, 1)"),
    ("tree", "(self.sizes[below] // self.sizes[depth])", "self.sizes[depth]"),
    ("tree", "return self.chosen[step] and step < self.steps - 1", "return self.chosen[step]"),
    ("tree", "if not 0 <= i <= steps - 2", "if not 0 <= i <= steps - 1"),
    ("tree", "{*chosen, *splits}", "{*chosen}"),
    ("tree", "z_score(level, fused[-1])", "z_score(level, level)"),
    ("tree", CENTRE, "centred = rewards.double() - rewards.double().mean()"),
    ("tree", FUSE, FUSE.replace("(beta *", "(-beta *")),
    ("tree", FUSE, "return (beta * path_logp.double()).softmax(-1).unflatten(1, (nodes, -1))"),
    ("tree", "[z_score(level, level) for level in fused[1:]]", "[z_score(level, level) for level in fused[:-1]]"),
    ("tree", "reference.std(-1, correction=0, keepdim=True)", "reference.std(-1, keepdim=True)"),
    ("tree", "reference.std(-1, correction=0, keepdim=True)", "reference.std(correction=0)"),
    ("tree", "return torch.where(std < EQUAL, 0.0, z)", "return z"),
    ("tree", "level.clamp(-clip, clip)", "level.clamp(max=clip)"),
    ("tree", "families = 1 if split is None else forest.sizes[split]", "families = forest.sizes[i]"),
    ("tree", "z_score(level, level) - z_score(mean, level)", "z_score(level, level) + z_score(mean, level)"),
    ("tree", "after = forest.last_split + 1\n", "after = forest.last_split\n"),
    ("tree", "best = siblings.sort(dim=-1, descending=True, stable=True)", "best = siblings.sort(dim=-1, stable=True)"),
    ("tree", "extremes = torch.cat([order[:, :b], order[:, -b:]], 1)", "extremes = order[:, : 2 * b]"),
    ("tree", DROPPED, DROPPED.replace("start + width", "start + width + 1")),
    ("tree", DROPPED, "set(range(start, start + width))"),
    ("tree", "return min(first + iteration // every, last)", "return first + iteration // every"),
    ("tree", "mask.unflatten(0, (n, -1)).any(1)", "mask.unflatten(0, (n, -1)).all(1)"),
    ("tree", "(torch.broadcast_tensors(*level)).all(0)", "(torch.broadcast_tensors(*level)).any(0)"),
    ("branchgrpo", 'self.kind if stochastic else "ode"', "self.kind"),
    ("branchgrpo", "[:, forest.ancestors(i + 1, forest.steps)]", "[:, forest.ancestors(i, forest.steps)]"),
    (
        "branchgrpo",
        "np.random.SeedSequence([seed, iteration, slot])",
        "np.random.SeedSequence([seed + iteration, slot])",
    ),
    ("branchgrpo", "children = mean + std * moved(noise, device)", "children = mean + std**2 * moved(noise, device)"),
    ("branchgrpo", "mean.repeat_interleave(k, 0), std", "mean.repeat(k, 1, 1), std"),
    ("branchgrpo", "prompts.unsqueeze(1) * n +", "torch.arange(len(prompts)).unsqueeze(1) * n +"),
    ("branchgrpo", "slice(bounds[j], bounds[j + 1])", "slice(bounds[0], bounds[j + 1])"),
    (
        "branchgrpo",
        "branch_noise(x.shape[1], k, shape, sampler.s, g)",
        "branch_noise(x.shape[1], k, shape, math.inf, g)",
    ),
    ("branchgrpo", "for i in filter(forest.stochastic, range(forest.steps)):", "for i in range(forest.steps - 1):"),
    ("branchgrpo", "mask & (i in trained_steps or", "mask & (i not in trained_steps or"),
    ("branchgrpo", "mask & (i in trained_steps or not forest.stochastic(i))", "mask & (i in trained_steps)"),
    ("branchgrpo", "mask = keep[i][prompts]", "mask = torch.ones_like(keep[i])[prompts]"),
    ("branchgrpo", "cumsum(0).view_as(trained) - 1  #", "cumsum(0).view_as(trained)  #"),
    ("branchgrpo", "1 / forest.sizes[i + 1] if loss_weight", "1 / forest.sizes[i] if loss_weight"),
    ("branchgrpo", "return -torch.minimum(", "return -torch.maximum("),
    ("branchgrpo", "ratio.clamp(1 - clip, 1 + clip) * advantage)", "ratio.clamp(max=1 + clip) * advantage)"),
    ("branchgrpo", "(logp - edges.logp_old).exp()", "(logp - edges.logp_old.roll(1)).exp()"),
    ("branchgrpo", "(part.weight * loss).sum() / total_weight", "(part.weight * loss).mean()"),
    ("branchgrpo", "(mean - mean_ref) ** 2 / (2 * std**2)", "(mean - mean_ref) ** 2 / std**2"),
    ("branchgrpo", "cond = take_cond(cond, edges.prompt)", "cond = take_cond(cond, edges.prompt * 0)"),
    ("branchgrpo", ".float() * factor)", ".float())"),
    ("branchgrpo", "sampler.flash and not first and not last", "sampler.flash and not last"),
    ("branchgrpo", 'fields["parent"] = number[fields["parent"]]', "number.clamp_(0)"),
    (
        "branchgrpo",
        "sampler.sigmas[i - 1] == 1, i == forest.steps - 1",
        "sampler.sigmas[i - 1] == 1, i == forest.steps",
    ),
    ("schedules", "(step,), chosen=(step, step + 1))", "(step,), chosen=(step,))"),
    ("schedules", "return range(start, start + args.mix)", "return range(start, start + args.mix - 1)"),
    ("schedules", "np.ceil(args.timestep_fraction", "np.floor(args.timestep_fraction"),
    (
        "schedules",
        "return [s * len(std) / sum(std) for s in std] + [0.0]",
        "return [s / max(std) for s in std] + [0.0]",
    ),
    ("policy", "return v_empty + scale * (", "return v_prompt + scale * ("),
    ("policy", "self.guidance + 1 - self.guidance_of_none", "self.guidance"),
    ("policy", 'cond |= {f"empty_{name}": value.expand', 'cond |= {f"empty_{name}": cond[name].expand'),
    ("models", "if args.guidance < none:", "if args.guidance < 0:"),
    ("policy", "(torch.nn.RMSNorm, RMSNorm)", "torch.nn.RMSNorm"),
    ("models", "return x * std + mean", "return (x + mean) * std"),
    ("models", "x / vae.scaling_factor + vae.shift_factor", "x / vae.scaling_factor"),
    ("models", "t=1 - sigma.float()", "t=sigma.float()"),
    ("models", "txt_ids[..., 3] = torch.arange", "txt_ids[..., 2] = torch.arange"),
    ("models", "(variance + vae.config.batch_norm_eps).sqrt()", "variance.sqrt()"),
    ("models", "return mu if config.get", "return math.exp(mu) if config.get"),
    ("models", "states[:n] for states, n in", "states for states, n in"),
    ("branchgrpo", "    scaler.unscale_(optimizer)\n", "\n"),
    ("checkpoint", "run.scaler.load_state_dict(", "dict("),
    ("preference", "scale = size / max(x.shape[2:])", "scale = size / min(x.shape[2:])"),
    ("preference", "crop((h - size) / 2), crop((w - size) / 2)", "crop((h - size) / 2), crop((h - size) / 2)"),
    ("preference", "text = html.unescape(html.unescape(ftfy.fix_text(prompt)))", "text = ftfy.fix_text(prompt)"),
    (
        "preference",
        "(self.head(hidden[:, 0].float())[:, 0] - self.MEAN)",
        "(self.head(hidden[:, -1].float())[:, 0] - self.MEAN)",
    ),
    ("preference", 'in zip("qkv", value.chunk(3))', 'in zip("kqv", value.chunk(3))'),
    ("preference", "return self.scale * (self.image", "return (self.image"),
    ("preference", "weight.float() + scale * up @ down", "weight.float() + up @ down"),
    ("preference", '"position_ids": positions}', '"position_ids": None}'),
    ("preference", "most if h * w > most else least", "most"),
    ("preference", "x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)", "x.permute(0, 1, 4, 7, 8, 5, 3, 2, 6, 9)"),
    ("preference", '"padding_side": "left"', '"padding_side": "right"'),
    ("preference", '"mm_token_type_ids": kinds', '"mm_token_type_ids": 0 * kinds'),
    ("pretrained", "not in self.question or re.search(TOKEN, self.question)", "not in self.question"),
    ("policy", 'hashlib.sha256(f"{self.encoders}\\n{prompt}"', 'hashlib.sha256(f"{prompt}"'),
    ("policy", "normed.to(inputs[0].dtype)", "normed"),
    ("flags", "3e-4 if args.lora else 1e-5,", "1e-5 if args.lora else 3e-4,"),
    ("flags", "args.plan is None and config(Path(args.model)) == own", "args.plan is None"),
    ("flags", 'name in (*PRUNE_FLAGS, "out", "resume")', 'name in ("out", "resume")'),
    ("hardware", 'moments, fp32": 8 * trained / pieces', 'moments, fp32": 4 * trained / pieces'),
    ("hardware", "return 2 * weights * tokens + 4 * tokens**2 * d", "return 2 * weights * tokens + 2 * tokens**2 * d"),
    ("hardware", "(block_flops(tokens, d, 8960) + to_text)", "block_flops(tokens, d, 8960) + to_text"),
    ("hardware", " - 2 * 9 * d**2 * text", ""),
    ("hardware", "args.guidance == arch.policy.guidance_of_none", "args.guidance in (1, arch.policy.guidance_of_none)"),
    (
        "hardware",
        '"reference weights", "table of positions", "reward models")',
        '"reference weights", "reward models")',
    ),
    ("hardware", "pieces = gpus if args.fsdp else 1", "pieces = gpus"),
    ("hardware", "arch.saved[args.lora > 0]", "arch.saved[0]"),
    ("hardware", "rollout = sum(forward(b) for n in sizes[:-1]", "rollout = sum(forward(b) for n in sizes"),
    ("hardware", "(nfe[0] + 3 * nfe[1], paper_seconds)", "(nfe[0] + 2 * nfe[1], paper_seconds)"),
    ("parallel", "module._buffers.update(sharded._buffers)", "pass"),
    ("parallel", "zip(weights, run.ema.shadow_params)", "zip(weights, run.ema.shadow_params[::-1])"),
    ("parallel", "reshard_after_forward=True", "reshard_after_forward=None"),
    ("objectives", "d = x0 - x0.mean(2, keepdim=True)", "d = x0"),
    ("objectives", "d.square().sum(2).flatten(2).mean(2).sqrt()", "d.square().mean(2).flatten(2).mean(2).sqrt()"),
    ("objectives", "x0hat = points.x - sigma.view(-1, *[1] * (v.ndim - 1)) * v", "x0hat = points.x - v"),
    ("objectives", "families = (forest.sizes[i], forest.children[i], -1)", "families = (-1, forest.children[i], 1)"),
    ("objectives", "u = (torch.arange(draws) + u) / draws", "u = u"),
    ("objectives", "sigma.unsqueeze(1).expand(-1, leaves, -1)", "sigma.unsqueeze(2).expand(-1, -1, leaves)"),
    ("objectives", "return sigma**2 * (v - target)", "return (v - target)"),
    ("objectives", "ratio = (old - error).exp()", "ratio = (error - old).exp()"),
    ("objectives", "for side in (v, 2 * v_old - v):", "for side in (v, v_old - v):"),
    ("objectives", "r = (1 + rows.advantage) / 2", "r = rows.advantage"),
    ("objectives", 'args.adv_clip if args.objective == "nft" else 1', "1"),
    ("tree", "children.var(-1, correction=1)", "children.var(-1, correction=0)"),
    ("tree", "later = [*squares[1:], 0.0]", "later = [0.0] * len(squares)"),
    (
        "tree",
        "size = level.abs().unflatten(1, (forest.sizes[i], -1)).sum(2)",
        "size = level.abs().unflatten(1, (-1, 1)).sum(2)",
    ),
    ("schedules", "/ units_of(forest)", ""),
    ("schedules", "np.mean(values[-20:])", "np.mean(values[:1])"),
    ("prompts", "chance >= args.silent_prompts", "chance < args.silent_prompts"),
    ("prompts", 'encoding="utf-8-sig").split("\\n")', 'encoding="utf-8").split("\\n")'),
    ("prompts", "if any(row.get(None, ())):", "if False:"),
    ("prompts", "prompts = [prompt for prompt in prompts if prompt not in unseen]", "prompts = list(prompts)"),
    ("prompts", 'if first != (text or ""):', "if False:"),
    ("prompts", '"\\n".join(rewards[prompt] for prompt in (*prompts, *heldout))', '""'),
    ("rewards", "enumerate(prompts) if name in own[prompt])", "enumerate(prompts))"),
    ("rewards", "return torch.where(weight == 0, 0.0, weight * score)", "return weight * score"),
    ("rewards", "middle[i] - middle[last] < min(height[i], height[last]) / 2", "middle[i] - middle[last] < 10"),
    ("rewards", "for i in sorted(row, key=left.__getitem__)]", "for i in row]"),
    ("rewards", "if anywhere and target in text:", "if target in text:"),
    ("rewards", "height <= min(width, LINE_HEIGHT)", "height <= width"),
    ("rewards", "zip(result.txts, result.scores, strict=True) if sure >= SURE", "zip(result.txts, result.scores)"),
    ("disk", "if checksum(path) != wanted", "if False and checksum(path) != wanted"),
    ("disk", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    ("disk", "if free < needed:", "if free < 0:"),
    ("checkpoint", 'listed.get("run") == identity and', ""),
    ("checkpoint", "for old in earlier[: -run.args.keep]:", "for old in earlier[-run.args.keep :]:"),
    ("launch", "if value != everyone[0][name]:", "if False:"),
    ("launch", 'if options.setdefault("sha256-of-model", fingerprint) != fingerprint:', "if False:"),
]


# Exercises: (file, wrong text, what a user would observe). The wrong text chooses the mutant: a place in the list would
# move as soon as somebody puts another one before it.
EXERCISES = [
    (
        "schedules",
        "np.floor(args.timestep_fraction",
        "`--timestep-fraction 0.05` trains nothing at all where ten steps are noisy: the row of metrics has no"
        " loss, and no weight moves. With 0.6 and 19 noisy steps, 11 of them are trained where it should be 12.",
    ),
    (
        "tree",
        "extremes = order[:, : 2 * b]",
        "`--width-prune extreme-4` trains the chains of eight leaves after the last split, as many as it should."
        " But the worst leaves of a prompt are never among them.",
    ),
    (
        "sde",
        "own = shared + s * own",
        "At a split with `--branch-noise 4` the children of a node scatter with 17 times the variance of the step."
        " With `--branch-noise inf` all is well.",
    ),
    (
        "branchgrpo",
        "cond = take_cond(cond, edges.prompt * 0)",
        "With one prompt per optimiser step all is well. With several, `ratio_dev` of the first one is far above"
        " rounding, and the longer a model is trained, the less it heeds its prompt.",
    ),
    (
        "branchgrpo",
        "ratio.clamp(max=1 + clip) * advantage)",
        "With `--updates 2`, edges of positive advantage are clipped as they should be. But an edge of negative"
        " advantage that has already become far less likely is still pushed down with full force.",
    ),
    (
        "tree",
        "return z",
        "The rewards of a prompt's leaves differ by the rounding of float32 alone, so they have nothing to teach."
        " Yet their advantages are not 0, but about 1e-4, and where nothing else is trained Adam makes a full step"
        " of that.",
    ),
    (
        "sde",
        "return x + v * dt - drift * dt, eta",
        "With `--sde dance` the leaves are too noisy and lie too far out, and the more so the larger `--eta` is."
        " With `--sde flow` and `--sde cps` all is well.",
    ),
    (
        "tree",
        "return self.chosen[step]",
        "`python tree.py --steps 20 --branch 2 --splits 0,3,6,9` counts 218 trainable edges of the whole tree,"
        " where there are 202. In `python toy.py` the loss is not a number; with `--sde dance` it is one, but the"
        " leaves have grain.",
    ),
    (
        "sde",
        "square = ((x - mean) ** 2).flatten(1).sum(1)",
        "The larger a picture is, the fewer leaves fusion listens to. `python train_image.py --method branchgrpo"
        " --iterations 2 --eval-size 2` logs little more than 1 as `effective_leaves`, where it should be 15.9 of 16.",
    ),
    (
        "branchgrpo",
        "np.random.SeedSequence([seed + iteration, slot])",
        "Five runs with `--seed 0` to `--seed 4` are not independent of each other, so that an interval computed"
        " from them is too narrow. Each run by itself looks right in every way.",
    ),
    (
        "objectives",
        "sigma.unsqueeze(2).expand(-1, -1, leaves)",
        "With `--objective elbo`, a model that knows the leaf of each row, v = (x - x0) / sigma, should have an"
        " error of 0 in every row, and has not. With `--noise-draws 1` all is well.",
    ),
    (
        "tree",
        "return (beta * path_logp.double()).softmax(-1).unflatten(1, (nodes, -1))",
        "Below a leaf there is nothing to average, yet its fused reward is a small part of its own reward. With"
        " `--fusion-beta 0` a run hardly shows it: the advantages are right to two digits.",
    ),
]

# What an exercise's copy must not hold: the answers and this list, and with them the tests that read either.
ANSWERS = ("docs/exercises.md", "tests/mutants.py", "tests/test_exercises.py", "tests/test_readme.py")


def copy_project(folder: Path, without: tuple[str, ...] = ()) -> None:
    """Copy to a folder what the tests of TESTS need: code, documents and embedded models, no runs, no git history.

    Args:
        folder: where to; made if it is missing.
        without: files that are left out, named as seen from the project.
    """
    patterns = ("*.py", "*.md", "*.html", "pyproject.toml", "bench/*.py", "tests/*.py", "tests/reference/*.*")
    patterns += ("tiny/**/*", "configs/**/*", "docs/**/*")

    # All files are listed before the first is copied: the folder may lie inside the project.
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    for path in paths:
        name = path.relative_to(ROOT)
        if "__pycache__" not in name.parts and name.as_posix() not in without:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(path, folder / name)


def plant(folder: Path, name: str, right: str, wrong: str) -> None:
    """Put the wrong text in the place of the right one, in the file `name`.py of a copy."""
    source = folder / f"{name}.py"
    text = source.read_text()
    assert text.count(right) == 1, f"{name}.py must hold {right!r} exactly once"
    source.write_text(text.replace(right, wrong))


def survives(name: str, right: str = "", wrong: str = "") -> bool:
    """Whether the tests stay green on a copy of the project with this fault, or without one on an unchanged copy."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        if right:
            plant(Path(folder), name, right, wrong)

        child = os.fork()
        if child == 0:
            os.chdir(folder)
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
            sys.path[:0] = [folder, f"{folder}/tests"]
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            order = sorted(TESTS.values(), key=lambda test: test != TESTS[name])  # its own tests first
            files = [f"tests/{test}.py" for test in dict.fromkeys(order)]
            code = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *files])
            os._exit(int(code))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fault(number: int) -> tuple[str, str, str]:
    """The mutant of an exercise, 1 to 12: file, right text, wrong text."""
    name, wrong, _ = EXERCISES[number - 1]
    (mutant,) = [mutant for mutant in MUTANTS if (mutant[0], mutant[2]) == (name, wrong)]
    return mutant


def check_command(number: int) -> list[str]:
    """The command that fails in the folder of an exercise, and passes once the fault is mended: one file of tests."""
    name = fault(number)[0]

    # Those of objectives.py train whole runs at their end, which takes minutes and tells no more about these faults.
    chosen = ["-k", "not every_objective_trains"] if name == "objectives" else []
    return [sys.executable, "-m", "pytest", "-x", f"tests/{TESTS[name]}.py", *chosen]


def exercise(number: int, folder: Path) -> str:
    """Copy the project without the answers to a folder, plant the fault of an exercise, return what the learner reads.

    Raises:
        ValueError: if the folder is not empty, so that nobody's work is overwritten.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: remove it, or name another one with --folder")

    copy_project(folder, without=ANSWERS)
    plant(folder, *fault(number))

    # The command names the interpreter that runs this file: the copy has no environment of its own.
    command = f"cd {shlex.quote(str(folder))} && {shlex.join(check_command(number))}"
    symptom = textwrap.fill(EXERCISES[number - 1][2], 96, initial_indent="    ", subsequent_indent="    ")
    return f"""Exercise {number} of {len(EXERCISES)}: a copy of the project with one fault, to be found and mended, in
    {folder}

What is wrong
{symptom}

Is it mended? This command fails now, and passes then:
    {command}

Hints and the answer are in the project's docs/exercises.md; the copy has neither."""


def main(argv: list[str] | None = None) -> int:
    """Run the mutants named by number, or all; or set an exercise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    places = range(len(MUTANTS))
    parser.add_argument(
        "numbers", nargs="*", type=int, metavar="NUMBER", help=f"only these faults, 0 to {places[-1]}; default: all"
    )
    parser.add_argument(
        "--exercise",
        type=int,
        choices=range(1, len(EXERCISES) + 1),
        metavar="N",
        help=f"do not run the tests, but copy the project with the fault of exercise N, 1 to {len(EXERCISES)}",
    )
    parser.add_argument("--folder", type=Path, help="of the exercise; default: runs/exercise-N in the project")
    args = parser.parse_args(argv)

    # Arguments that contradict each other would otherwise be forgotten without a word.
    if args.exercise is None and args.folder:
        parser.error("--folder goes with --exercise")
    if args.exercise and args.numbers:
        parser.error("--exercise does not go with numbers of faults")
    if not set(args.numbers) <= set(places):
        parser.error(f"faults have the numbers 0 to {places[-1]}")

    if args.exercise is None:
        return plant_all(args.numbers or places)
    try:
        print(exercise(args.exercise, (args.folder or ROOT / f"runs/exercise-{args.exercise}").resolve()))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def plant_all(chosen) -> int:
    """Plant the faults of these numbers, one after the other; returns the exit code."""
    import accelerate  # noqa: F401  imported once, before the forks
    import diffusers  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from diffusers import FluxPipeline, WanPipeline  # noqa: F401

    # The forked tests must import the copy's modules, never those of the project.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    sys.dont_write_bytecode = True
    if not survives("sde"):  # a test that fails by itself would count every fault as noticed
        sys.exit("the tests are red on an unchanged copy of the project: no fault was planted")
    print("    green    an unchanged copy", flush=True)

    alive = []
    for i in chosen:
        name, right, wrong = MUTANTS[i]
        survived = survives(name, right, wrong)
        alive += [i] * survived
        print(f"{i:3d} {'SURVIVED' if survived else 'noticed '} {name}.py: {right[:50]} -> {wrong[:50]}", flush=True)
    print(f"{len(chosen) - len(alive)} noticed, {len(alive)} unnoticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
