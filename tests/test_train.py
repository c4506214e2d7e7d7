"""`train_image.py` as a user meets it: the files it leaves, resuming, bad input, learning beyond noise."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxPipeline
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from test_parallel import start
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from workers import gradients_of_an_iteration, prepared_run

import checkpoint
import launch
import loop
import report
import train_image
from branchgrpo import Rollout, prune
from models import FluxPolicy
from prompts import count_silent, drawn_prompts, own_prompts, prompts_at
from tree import make_forest

HERE = Path(__file__).parent.parent
SMALL = "--leaves 4 --prompts-per-iteration 2 --eval-size 8 --eval-every 2 --save-every 2 --iterations 4 --ema 0.9"


def run(capsys, *argv):
    """Run in this process: the last line of stdout, parsed."""
    train_image.main([*SMALL.split(), *map(str, argv)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Runs inside this process write the model alone; the pictures are tested on the run in a process of its own."""
    monkeypatch.setattr(train_image.report, "write", lambda run: run.policy.save(run.out / "model"))


def refused(capsys, *argv):
    """Run with bad input: the sentence on stderr."""
    with pytest.raises(SystemExit) as stop:
        train_image.main(list(map(str, argv)))
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert not out.out.strip().endswith("}")
    return out.err.strip().splitlines()[-1]


def rows(out):
    """metrics.jsonl without what a clock or the system measured."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("seconds_", "peak_"))} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run, with what it printed."""
    out = tmp_path_factory.mktemp("runs") / "a"
    command = [sys.executable, HERE / "train_image.py", *SMALL.split(), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_last_line_is_one_json_document(finished):
    out, done = finished
    document = json.loads(done.stdout.splitlines()[-1])
    keys = "reward_before reward_after exact_before exact_after seconds nfe iterations out leaves trained_edges"
    assert set(keys.split()) <= set(document)
    assert document["iterations"] == 4 and document["leaves"] == 4 and document["out"] == str(out)
    history = rows(out)
    assert document["reward_before"] == history[0]["heldout_reward"]
    assert document["reward_after"] == history[-1]["heldout_reward"]

    # T = 10, K = 2, splits 0 and 4: forwards 1 + 4 x 2 + 5 x 4 = 29, trained parents 1 + 2, edges 2 + 4; 2 prompts
    assert document["nfe"] == 4 * 2 * (29 + 3) and document["trained_edges"] == 2 * 6
    assert "forwards       2 x 29" in done.stdout and "--eta" in done.stdout
    assert "reward=" in done.stderr and "heldout=" in done.stderr


def test_what_a_run_leaves_behind(finished):
    out, _ = finished
    for name in ("before_after.png", "curves.png", "tree.png"):
        assert min(Image.open(out / name).size) > 200
    assert (out / "tree.html").stat().st_size > 50_000

    # The model is a pipeline that diffusers loads.
    pipe = FluxPipeline.from_pretrained(out / "model")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe('red "CAT"', height=32, width=64, num_inference_steps=2, max_sequence_length=16).images[0]
    assert picture.size == (64, 32)

    # What TensorBoard, the folder and metrics.jsonl hold.
    board = event_accumulator.EventAccumulator(str(out / "tensorboard")).Reload().Tags()
    assert {"reward_mean", "heldout_exact"} <= set(board["scalars"])
    assert board["images"] and set(board["histograms"]) == {"leaf_rewards", "advantages"}
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    metrics = "reward_mean reward_std reward_ocr reward_colour ratio_dev clip_frac grad_norm nfe loss"
    assert set(metrics.split()) <= set(rows(out)[1]) and "kl" not in rows(out)[1]  # it was not asked for
    assert {"heldout_reward", "heldout_exact", "heldout_colour"} <= set(rows(out)[0])
    assert {"seconds_rollout", "seconds_reward", "seconds_train"} <= set(
        json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
    )


def test_the_first_pass_has_ratio_one(finished):
    assert max(r["ratio_dev"] for r in rows(finished[0])[1:]) < 1e-6


def test_the_saved_model_is_the_one_that_was_evaluated(finished, capsys, tmp_path):
    out, done = finished
    again = run(capsys, "--iterations", 0, "--model", out / "model", "--out", tmp_path / "b")
    after = json.loads(done.stdout.splitlines()[-1])
    assert again["iterations"] == 0 and again["nfe"] == 0
    assert again["reward_before"] == pytest.approx(after["reward_after"], abs=1e-6)


def state(checkpoint: Path, folder: Path) -> dict:
    """What a checkpoint holds of weights, optimiser and EMA."""
    dcp_to_torch_save(checkpoint, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_stopped_run_resumes_bit_for_bit(finished, capsys, tmp_path, monkeypatch, stop_at):
    """Stopped inside iteration stop_at (0: before any checkpoint; 1, 3: between two), then continued: the same rows."""
    out, iterate = tmp_path / "a", loop.iterate

    def stop(run_, iteration):
        if iteration == stop_at:
            raise KeyboardInterrupt
        return iterate(run_, iteration)

    monkeypatch.setattr(loop, "iterate", stop)
    with pytest.raises(SystemExit):  # Ctrl-C is one line, exit 130
        run(capsys, "--out", out)
    monkeypatch.setattr(loop, "iterate", iterate)

    # What a kill may leave behind beside that.
    (out / ".writing").mkdir(exist_ok=True)  # as a kill inside a save leaves it
    (out / ".writing" / "trainable.safetensors").write_bytes(b"half")
    (out / "metrics.jsonl").open("a").write('{"iteration": 99}\n')  # a row that no checkpoint knows

    # Both ways to resume; then the rows and the averaged weights.
    run(capsys, *(["--resume", out] if stop_at else ["--out", out, "--resume"]))
    assert rows(out) == rows(finished[0])
    resumed, whole = (state(folder / "checkpoint-4", tmp_path)["ema"] for folder in (out, finished[0]))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items() if name != "step")
    assert resumed["step"] == whole["step"] == 4


@pytest.mark.slow
def test_sigkill_and_resume(tmp_path):
    """Twenty runs killed with SIGKILL at random moments go on to the same metrics as one left alone.

    Each fourth is two processes with --fsdp, all killed at once. Each fifth may be killed before it has made its
    folder.
    """
    flags = [*SMALL.split(), "--iterations", "12", "--device", "cpu"]
    alone = [sys.executable, HERE / "train_image.py", *flags, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    sharded = [sys.executable, *torchrun, HERE / "train_image.py", *flags, "--fsdp", "--out"]
    run_whole = partial(
        subprocess.run, check=True, capture_output=True, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )

    # What a run that is left alone writes.
    commands, want = {"alone": alone, "sharded": sharded}, {}
    for name, argv in commands.items():
        run_whole([*argv, tmp_path / name])
        want[name] = rows(tmp_path / name)

    rng, quiet = np.random.default_rng(0), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for i in range(20):
        # Start one, and wait until it trains, or not even that.
        name, out = "sharded" if i % 4 == 3 else "alone", tmp_path / f"{i}"
        argv = commands[name]
        process = psutil.Popen([*argv, out], cwd=HERE, **quiet, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while i % 5 and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3 if i % 5 else 12))

        # Kill it with its children, and go on.
        with suppress(psutil.NoSuchProcess):  # it may have ended
            for member in [process, *process.children(recursive=True)]:
                member.kill()
        process.wait()
        run_whole([*argv, out, *["--resume"] * (out / "options.json").exists()])
        assert rows(out) == want[name], i


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(finished, tmp_path):
    """accelerate launch, gloo, DDP: the same prompts, the same noise, the same gradients up to summation order."""
    argv = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", "train_image.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *argv, *SMALL.split(), "--device", "cpu", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = rows(finished[0]), rows(tmp_path / "two")
    assert len(one) == len(two)
    assert two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-4)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert b.get("reward_mean", 0) == pytest.approx(a.get("reward_mean", 0), abs=0.02)
        assert b.get("nfe") == a.get("nfe") and b.get("trained_edges") == a.get("trained_edges")
    json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-6), ("bf16", 1e-4)])
def test_ratio_on_the_full_tree(capsys, tmp_path, dtype, limit):
    """The fully stochastic tree, trained in other batches than it was rolled out in: the first pass has ratio 1."""
    flags = ["--method", "branchgrpo", "--leaves", 16, "--steps", 8, "--iterations", 1, "--micro-batch", 24]
    flags += ["--dtype", dtype]
    run(capsys, *flags, "--out", tmp_path / "a")
    assert rows(tmp_path / "a")[1]["ratio_dev"] < limit


METHODS = "branchgrpo branchgrpo-mix dancegrpo flowgrpo mixgrpo flowgrpo-fast tempflow"


def velocities_and_gradients(flags: str, folder: Path) -> list[torch.Tensor]:
    """Velocities of four latents that are always the same, and the gradient of one iteration."""
    small_run = prepared_run(f"--method branchgrpo --kl 0.1 --reward colour --watch jpeg {flags}", str(folder))
    policy = small_run.policy
    x = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    v = policy.velocity(x, torch.tensor([1.0, 0.8, 0.4, 0.1]), policy.encode(small_run.prompts[:4])).detach()
    return [v, torch.cat([g.flatten() for g in gradients_of_an_iteration(small_run).values()])]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    return velocities_and_gradients("", tmp_path_factory.mktemp("plain"))


MEMORY = "--micro-batch 3,--micro-batch 0,--gradient-checkpointing,--tree-offload,--text-offload"
MEMORY += ",--text-cache TEXT,--reward-offload"


@pytest.mark.parametrize("flags", [*MEMORY.split(","), pytest.param("--compile", marks=pytest.mark.slow)])
def test_memory_flags_leave_velocities_and_gradients_unchanged(plainly, tmp_path, flags):
    with_flags = velocities_and_gradients(flags.replace("TEXT", str(tmp_path / "text")), tmp_path)
    for changed, plain in zip(with_flags, plainly):
        assert plain.norm() > 0 and (changed - plain).norm() < 1e-5 * plain.norm()


def test_a_checkpoint_becomes_a_model(finished, capsys, tmp_path):
    """--resume --iterations N of the last checkpoint only exports; any other length is refused."""
    shutil.copytree(finished[0], tmp_path / "a")
    shutil.rmtree(tmp_path / "a/checkpoint-4")
    shutil.rmtree(tmp_path / "a/model")
    with pytest.raises(SystemExit):
        run(capsys, "--out", tmp_path / "a", "--resume", "--iterations", 3)
    document = run(capsys, "--out", tmp_path / "a", "--resume", "--iterations", 2)
    assert document["iterations"] == 2 and FluxPolicy.load(str(tmp_path / "a/model"), 32, 64)


def test_other_prompts_are_refused_on_resume(finished, capsys, tmp_path):
    """The file of prompts may keep its name and change what it holds."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('red "CAT"\nblue "DOG"\ngreen "SUN"\n')
    flags = ["--prompts", prompts, "--out", tmp_path / "a", "--iterations", 1]
    run(capsys, *flags)
    prompts.write_text('red "CAT"\nblue "DOG"\ngreen "SKY"\n')
    with pytest.raises(SystemExit):
        run(capsys, *flags, "--resume")
    assert "sha256-of-prompts" in capsys.readouterr().err


def test_the_launcher_does_not_decide_the_dtype(finished, capsys, tmp_path, monkeypatch):
    """`accelerate launch` hands its settings over in the environment; --dtype alone counts."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(capsys, "--out", tmp_path / "a")
    assert rows(tmp_path / "a") == rows(finished[0])


def test_the_launcher_neither_compiles_nor_shards(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit):
        run(capsys, "--out", tmp_path / "a")
    assert "--fsdp and --compile" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)


def test_tiling_decodes_a_wide_picture_in_parts():
    load = partial(FluxPolicy.load, str(HERE / "tiny/flux"), 64, 1024)
    plain, tiled = load(), load(tiling=True)
    z, widths = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0)), []
    tiled.pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[-1]))
    assert tiled.decode(z).shape == plain.decode(z).shape == (2, 3, 64, 1024)
    assert len(widths) > 4 and max(widths) < 128


@pytest.mark.parametrize("method", METHODS.split())
def test_every_method_trains(capsys, tmp_path, method):
    document = run(capsys, "--method", method, "--iterations", 1, "--out", tmp_path / "a", "--kl", 0.1, "--updates", 2)
    row = rows(tmp_path / "a")[1]
    assert document["leaves"] == 4 and row["grad_norm"] > 0 and row["trained_edges"] > 0


def test_the_readme_command(capsys, tmp_path):
    """`python train_image.py --branch 4 --depth-prune`: 16 leaves stay 16, by two splits; pruning takes effect."""
    argv = ["--branch", 4, "--depth-prune", "--prompts-per-iteration", 1, "--eval-size", 2, "--iterations", 1]
    train_image.main([*map(str, argv), "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    printed = {row.split()[0]: row.split()[1:] for row in out.splitlines() if row.startswith("  --")}
    assert printed["--method"][0] == "branchgrpo" and printed["--splits"][0] == "0,4"

    # K = 4, splits 0 and 4 of 10: steps 0..8 have 4 x 4 + 5 x 16 = 96 edges, the window of 2 after step 4 drops 32.
    assert json.loads(out.splitlines()[-1])["leaves"] == 16
    assert rows(tmp_path / "a")[1]["trained_edges"] == 96 - 32


def test_lora_kl_ema_cps_train_together(capsys, tmp_path):
    flags = "--lora 4 --kl 0.01 --sde cps --eta 0.5 --cps-density upstream --iterations 2 --width-prune extreme-1"
    flags += " --updates 3 --updates-by parents --advantage sibling"  # two prompts, three optimiser steps
    run(capsys, *flags.split(), "--out", tmp_path / "a")
    second = rows(tmp_path / "a")[2]
    assert second["kl"] > 0
    FluxPipeline.from_pretrained(HERE / "tiny/flux").load_lora_weights(tmp_path / "a" / "model")


def test_a_nonfinite_loss_stops_and_leaves_the_good_checkpoint(capsys, tmp_path, monkeypatch):
    score = loop.R.weighted_sum
    calls = []

    def broken(scores, weights):
        calls.append(1)
        return score(scores, weights) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(loop.R, "weighted_sum", broken)
    error = refused(capsys, *SMALL.split(), "--out", tmp_path / "a")
    assert "not finite" in error
    assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-2"]


BAD = [
    ("--prompts nowhere.txt", "nowhere.txt"),
    ("--splits 0,9", "0..8"),
    ("--splits 0,0", "without repeats"),
    ("--splits a", "whole numbers"),
    ("--branch 1", "at least 2"),
    ("--splits 0,2 --leaves 16", "make 1 x 2^2 = 4"),
    ("--leaves 12", "make 1 x 2^4 = 16"),
    ("--roots 16", "no step would be noisy"),
    ("--splits=", "one leaf has nothing to compare"),
    ("--depth-every 3", "goes with --depth-prune"),
    ("--mix-every 3", "goes with a window"),
    ("--roots 16 --flash 3", "no step would be noisy"),
    ("--leaves 4096", "do not fit"),
    ("--reward beauty", "no reward 'beauty'"),
    ("--reward ocr:0", "other than 0"),
    ("--reward hpsv2", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"),
    ("--watch aesthetic", "hf download openai/clip-vit-large-patch14"),
    ("--height 33", "multiple of 16"),
    ("--model nowhere/at-all", "--model nowhere/at-all"),
    ("--dtype fp16", "the embedded models take fp32 or bf16"),
    ("--eta 0", "above 0"),
    ("--sde cps --eta 1.2", "between 0 and 1"),
    ("--lr nan", "--lr"),
    ("--clip 0", "--clip"),
    ("--ema 1", "below 1"),
    ("--steps 1", "at least 2"),
    ("--method dancegrpo --branch 2", "does not go with"),
    ("--method branchgrpo --mix 2", "--mix"),
    ("--mix 0 --depth-prune", "--mix 0"),
    ("--width-prune extreme-9", "leaves / 2"),
    ("--width-prune best", "parent-top1"),
    ("--width-prune parent-top1 --leaves 4 --roots 4", "needs a split"),
    ("--lr-end 1.5", "at most 1"),
    ("--updates 3", "must divide"),
    ("--timestep-fraction 0", "above 0"),
    ("--lr inf", "at most"),
    ("--shift 1e400", "at most"),
    ("--guidance 1e39", "at most"),
    ("--height 100000000", "at most 16384"),
    ("--height 512 --width 16", "too narrow"),
    ("--lora-from nowhere --lora 4 --model=", "--model is empty"),
    ("--lora-from nowhere", "goes with --lora"),
    ("--lora-from /nowhere/x.safetensors --lora 4", "there is no such file"),
    ("--text-cache README.md/below", "--text-cache"),
    ("--watch OCR", "--watch"),
    ("--model README.md", "is a file"),
    ("--unknown-flag", "unrecognized"),
    ("--iter 3", "unrecognized"),
    ("--resume nowhere", "holds no run"),
    ("--cps-density upstream --sde dance", "--sde cps"),
    ("--depth-prune 40", "0..10|1..10"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_one_sentence_and_exit_2(capsys, tmp_path, flags, words):
    began = time.time()
    error = refused(capsys, *flags.split(), "--out", tmp_path / "a")
    assert any(w in error for w in words.split("|")), error
    assert "error:" in error and not (tmp_path / "a").exists()
    assert time.time() - began < 10


def test_bad_prompts(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n")
    assert "holds no prompt" in refused(capsys, "--prompts", file)
    file.write_text('red "CAT"\n')
    assert "at least two" in refused(capsys, "--prompts", file)
    assert "none is left to train on" in refused(capsys, "--prompts", file, "--eval-prompts", file)
    file.write_text("a cat\na dog\n")
    assert "quoted text" in refused(capsys, "--prompts", file)


def test_a_run_is_never_overwritten_nor_resumed_with_other_flags(finished, capsys):
    out, _ = finished
    assert "--resume" in refused(capsys, *SMALL.split(), "--out", out)
    assert "has --lr" in refused(capsys, *SMALL.split(), "--resume", out, "--lr", 1e-3)


def test_heldout_prompts_are_unseen():
    """No held-out string contains, or is contained in, an RL prompt's; nor can the pre-training generator draw one."""
    import random

    from tiny.make_tiny_flux import Words, choose_heldout

    # The files hold what their maker says.
    strings = {}
    for name in ("train", "heldout"):
        lines = (HERE / f"tiny/prompts_{name}.txt").read_text().splitlines()
        strings[name] = [line.split('"')[1] for line in lines]
    assert len(set(strings["heldout"])) == 256 and len(set(strings["train"])) == 2048
    assert strings["heldout"] == choose_heldout(random.Random(0), 256)

    # No held-out string overlaps with a training prompt, or with one of 20,000 strings of pre-training.
    words = Words(random.Random(1), strings["heldout"])
    drawn = set(strings["train"]) | {words.draw() for _ in range(20000)}
    for held in strings["heldout"]:
        assert not any(held in w or w in held for w in drawn), held


def test_the_learning_rate_rises_and_falls_linearly(capsys, tmp_path):
    run(capsys, "--out", tmp_path / "a", "--lr", 1e-3, "--lr-end", 0.2)
    run(capsys, "--out", tmp_path / "b", "--lr", 1e-3, "--lr-end", 1)
    run(capsys, "--out", tmp_path / "c", "--lr", 1e-3, "--lr-end", 0.2, "--lr-warmup", 2)
    falling = [1e-3, 0.8e-3, 0.6e-3, 0.4e-3]
    for name, want in (("a", falling), ("b", [1e-3] * 4), ("c", [0.5e-3, *falling[1:]])):
        assert [row["lr"] for row in rows(tmp_path / name)[1:]] == pytest.approx(want)
        groups = state(tmp_path / name / "checkpoint-4", tmp_path)["optimizer"]["param_groups"]
        assert groups[0]["lr"] == pytest.approx(want[-1])


def test_the_prompt_stream_is_a_permutation_each_epoch():
    prompts = list("abcdefg")
    stream = prompts_at(prompts, 0, 0, 14)
    assert sorted(stream[:7]) == prompts == sorted(stream[7:]) and stream[:7] != stream[7:]
    assert prompts_at(prompts, 0, 5, 4) == stream[5:9]
    assert prompts_at(prompts, 1, 0, 7) != stream[:7]


@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_has_the_same_prompts_on_any_number_of_processes(updates):
    args, prompts = SimpleNamespace(prompts_per_iteration=8, seed=0, silent_prompts=1), [str(i) for i in range(20)]
    by_processes = []  # for each number of processes, the prompts of each update
    for n in (1, 2, 4):
        accelerators = [SimpleNamespace(num_processes=n, process_index=i) for i in range(n)]
        owned = [own_prompts(accelerator, drawn_prompts(args, prompts, 3, {})) for accelerator in accelerators]
        m = 8 // n // updates  # prompts of one process in one update, as `iterate` divides them
        by_processes.append([sorted(p for own in owned for p in own[k * m :][:m]) for k in range(updates)])

    one, two, four = by_processes
    assert one == two == four and sorted(sum(one, [])) == sorted(prompts_at(prompts, 0, 24, 8))


def test_silent_prompts_give_way():
    """A prompt without spread in its last two visits is drawn a fifth as often, others more; nothing else moves."""
    args, prompts = SimpleNamespace(prompts_per_iteration=4, seed=0, silent_prompts=0.2), list("abcdefgh")
    silent: dict[str, int] = {}
    count_silent(silent, ["a", "b"], [False, False])
    count_silent(silent, ["a", "b", "c"], [False, True, True])
    assert silent == {"a": 2}
    drawn = [drawn_prompts(args, prompts, i, silent) for i in range(1000)]
    plain = [drawn_prompts(args, prompts, i, {}) for i in range(1000)]
    times = [sum(draw.count(p) for draw in drawn) for p in prompts]
    assert 0.15 < times[0] / 500 < 0.25 and all(520 < n < 600 for n in times[1:])
    assert all(a == b for x, y in zip(drawn, plain) for a, b in zip(x, y) if b != "a")
    everyone = dict.fromkeys(prompts, 5)
    assert [drawn_prompts(args, prompts, i, everyone) for i in range(9)] == plain[:9]  # or there would be none to draw


def test_the_average_of_weights_has_the_decay_it_was_given(tmp_path):
    """From the first update on: no warm-up, which at 0.995 would last 1,800 updates."""
    run = prepared_run("--ema 0.9", str(tmp_path))
    weights, values, want = list(run.policy.trainable()), [1.0, 2.0, 4.0, 8.0], 1.0
    for value in values:
        weights[0].data.fill_(value)
        run.ema.step(weights)
    for value in values[1:]:
        want = 0.9 * want + 0.1 * value
    torch.testing.assert_close(run.ema.shadow_params[0], torch.full_like(weights[0], want).data)

    # For an evaluation the two change places, and change back whatever happens in it.
    trained = [w.detach().clone() for w in weights]
    average = [w.clone() for w in run.ema.shadow_params]
    with suppress(ZeroDivisionError), loop.averaged(run):
        assert all(map(torch.equal, weights, average)) and all(map(torch.equal, run.ema.shadow_params, trained))
        raise ZeroDivisionError
    assert all(map(torch.equal, weights, trained)) and all(map(torch.equal, run.ema.shadow_params, average))


def test_an_error_of_a_library_keeps_its_traceback():
    """Ours are one sentence; where another's happened must not be lost."""
    with pytest.raises(json.JSONDecodeError):
        launch.start("script", lambda argv: json.loads("{"), [], None)


def test_files_may_move_before_a_resumption_but_not_change(tmp_path):
    args = SimpleNamespace(resume=None, out=str(tmp_path), lr=1e-4, prompts="a.txt", reward_batch=32)
    (tmp_path / "options.json").write_text(json.dumps(checkpoint.options_to_keep(args, ["a", "b"], ["c"])))
    moved = SimpleNamespace(**vars(args) | {"resume": "", "prompts": "b.txt", "reward_batch": 4})
    checkpoint.options_to_keep(moved, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="prompts"):
        checkpoint.options_to_keep(moved, ["a", "d"], ["c"])
    with pytest.raises(ValueError, match="--lr"):
        checkpoint.options_to_keep(SimpleNamespace(**vars(moved) | {"lr": 1e-3}), ["a", "b"], ["c"])


def credit_mixed(scores, weights, mix, width=None):
    """Rewards, advantages and masks of two prompts with four leaves each, mixed in one of the two ways."""
    forest = make_forest(4, 2, (0, 1))
    out = Rollout([torch.zeros(2, n, 1) for n in forest.sizes], [torch.zeros(2, n) for n in forest.sizes[1:]], [])
    args = SimpleNamespace(reward_mix=mix, fusion_beta=1.0, adv_clip=5.0, advantage="depth")
    run = SimpleNamespace(args=args, weights=weights)
    rewards, ranking, advantages = loop.credit_leaves(run, out, forest, scores)
    return rewards, advantages, prune(forest, ranking, width, None)


def test_rewards_are_mixed_before_or_after_normalisation():
    """advantage: blind to each reward's scale; with one reward both ways agree; weights enter linearly."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(8, generator=g), torch.rand(8, generator=g)
    one = credit_mixed({"a": a, "b": b}, {"a": 1.0}, "reward")[1]
    for x, y in zip(one, credit_mixed({"a": a, "b": b}, {"a": 1.0}, "advantage")[1]):
        torch.testing.assert_close(x, y)

    # Two rewards, with weights 1 and 0.5.
    weights = {"a": 1.0, "b": 0.5}
    rewards, small, _ = credit_mixed({"a": a, "b": b}, weights, "advantage")
    torch.testing.assert_close(rewards, (a + 0.5 * b).view(2, 4))
    other = credit_mixed({"a": a, "b": b}, {"b": 1.0}, "reward")[1]
    for x, y, z in zip(small, one, other):
        torch.testing.assert_close(x, y + 0.5 * z)

    # One of them on a scale a thousand times as large.
    _, large, _ = credit_mixed({"a": a, "b": 1000 * b}, weights, "advantage")
    for x, y in zip(small, large):  # but for eps, 1e-4 beside the spread
        torch.testing.assert_close(x, y, atol=3e-3, rtol=1e-3)
    summed = credit_mixed({"a": a, "b": 1000 * b}, weights, "reward")[1]
    assert (summed[0] - large[0]).abs().max() > 0.1


def test_pruning_ranks_mixed_leaves_by_their_advantage():
    a, b = torch.tensor([0.0, 0.1, 0.0, 0.0] * 2), torch.tensor([500.0, 0.0, 500.0, 0.0] * 2)
    keep = credit_mixed({"a": a, "b": b}, {"a": 5.0, "b": 1.0}, "advantage", "parent-top1")[2]
    assert keep[-1].tolist() == [[False, True, True, False]] * 2  # by the sum of rewards leaf 0 would win
    keep = credit_mixed({"a": a, "b": b}, {"a": 5.0, "b": 1.0}, "reward", "parent-top1")[2]
    assert keep[-1].tolist() == [[True, False, True, False]] * 2


# ------------------------------------------------------------------------------------------------ a reward per prompt
KINDS = {  # prompts that each reward could score -> their own rewards; those of 'blue "DOG"' are --reward's
    'red "CAT"': "ocr:1",
    'blue "DOG"': None,
    'green "SUN"': "jpeg:0.1,colour:2",
    'black "OWL"': "jpeg:0.1,colour:2",
}
OWN = "--reward colour:1 --reward-column rewards --watch jpeg-large --prompts-per-iteration 4"


def records(path: Path, kinds=KINDS) -> Path:
    """A file of prompts with rewards of their own; None leaves the field out."""
    lines = [{"prompt": prompt} | ({"rewards": own} if own else {}) for prompt, own in kinds.items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def files(tmp_path):
    """The flags of two kinds of prompts, half of the held-out ones with each."""
    heldout = {'red "FOX"': "ocr:1", 'blue "ANT"': "jpeg:0.1,colour:2"}
    train, held_out = records(tmp_path / "train.jsonl"), records(tmp_path / "heldout.jsonl", heldout)
    return [*OWN.split(), "--prompts", str(train), "--eval-prompts", str(held_out)]


def test_prompts_of_several_kinds_train_together(capsys, tmp_path, files):
    """Each reward's columns are means over the pictures whose prompts have it; the weighted ones over all."""
    flags = [*files, "--prompts-per-iteration", 2, "--iterations", 2, "--eval-every", 2]
    train_image.main([*SMALL.split(), *map(str, flags), "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    for line in ("ocr:1: 2", "colour:1: 1", "jpeg:0.1,colour:2: 3"):
        assert f"rewards        prompts with {line}" in out
    options = json.loads((tmp_path / "a/options.json").read_text())
    assert options["rewards-of-prompts"] == {"ocr:1": 2, "colour:1": 1, "jpeg:0.1,colour:2": 3}
    assert "prompt_rewards" not in options and options["reward_column"] == "rewards"

    # Two iterations of two prompts are each prompt once. No row has a nan, and what no prompt has is absent.
    def no_constant(text):
        raise AssertionError(f"{text} is no JSON")

    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    history = [json.loads(line, parse_constant=no_constant) for line in lines]
    drawn = [prompts_at(list(KINDS), 0, 2 * i, 2) for i in range(2)]
    for row, prompts in zip(history[1:], drawn):
        own = [KINDS[prompt] or "colour:1" for prompt in prompts]
        for name in ("ocr", "jpeg", "colour"):
            assert (f"reward_{name}" in row) == any(name in loop.R.parse_weights(text) for text in own)
        assert "reward_jpeg-large" in row

    # Held out: four pairs of each kind. Its reward is the mean of each pair's own sum.
    document, first = json.loads(out.splitlines()[-1]), history[0]
    expected = (first["heldout_ocr"] + 0.1 * first["heldout_jpeg"] + 2 * first["heldout_colour"]) / 2
    assert document["reward_before"] == first["heldout_reward"] == pytest.approx(expected, abs=1e-6)
    assert {"ocr_before", "jpeg_after", "colour_before", "jpeg-large_after", "exact_before"} <= set(document)


@pytest.mark.parametrize("mix", ["reward", "advantage"])
def test_the_advantages_of_a_prompt_are_those_of_its_own_rewards(tmp_path, files, monkeypatch, mix):
    """To the bit what a run gives whose prompts all have that reward; ocr is asked about its prompts alone."""
    credited, read = {}, []
    credit_leaves = loop.credit_leaves

    def noted(run, out, forest, scores, weights):
        credited[name] = credit_leaves(run, out, forest, scores, weights)
        return credited[name]

    monkeypatch.setattr(loop, "credit_leaves", noted)
    runs = {"own": " ".join(files), "ocr:1": "--reward ocr:1", "colour:1": "--reward colour:1"}
    runs["jpeg:0.1,colour:2"] = "--reward jpeg:0.1,colour:2"
    for name, flags in runs.items():
        others = " ".join(files[files.index("--prompts") :])
        shared = "--leaves 4 --eval-size 2 --prompts-per-iteration 4 --device cpu --steps 6"
        argv = f"{shared} --reward-mix {mix} {flags if name == 'own' else f'{flags} {others}'}"
        args, *rest = train_image.job([*argv.split(), "--out", str(tmp_path)])
        run = launch.prepare(args, checkpoint.Accelerator(cpu=True), *rest)
        if name == "own":
            score = run.rewards["ocr"]
            run.rewards["ocr"] = lambda x, p, score=score: read.extend(p) or score(x, p)
        loop.iterate(run, 0)
        drawn = drawn_prompts(args, run.prompts, 0, {})
    assert sorted(drawn) == sorted(KINDS) and read == ['red "CAT"'] * 4

    rewards, ranking, advantages = credited["own"]
    for row, prompt in enumerate(drawn):
        expected = credited[KINDS[prompt] or "colour:1"]
        assert torch.equal(rewards[row], expected[0][row]) and torch.equal(ranking[row], expected[1][row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(advantages, expected[2], strict=True))
    assert all(torch.isfinite(a).all() for a in advantages) and advantages[-1].abs().max() > 0


@pytest.mark.slow
def test_two_processes_of_which_one_lacks_a_reward(tmp_path, capsys):
    """One prompt for each process, of different kinds: the same metrics as of one process, up to rounding."""
    kinds = {'red "CAT"': "ocr:1", 'blue "DOG"': "colour:1"}
    train = records(tmp_path / "train.jsonl", kinds)
    heldout = records(
        tmp_path / "heldout.jsonl", {'red "FOX"': "ocr:1", 'blue "ANT"': "colour:1", 'red "BEE"': "jpeg:1"}
    )
    flags = f"--reward-column rewards --watch jpeg-large --prompts {train} --eval-prompts {heldout}"
    flags += " --iterations 2 --eval-size 3 --micro-batch 1 --device cpu"
    run(capsys, *flags.split(), "--out", tmp_path / "one")
    done = start("train_image.py", *SMALL.split(), *flags.split(), "--out", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    names = {"reward_ocr", "reward_colour", "reward_jpeg-large", "reward_mean", "heldout_reward", "heldout_exact"}
    names |= {f"heldout_{name}" for name in ("ocr", "colour", "jpeg", "jpeg-large")}
    assert names <= {key for row in one for key in row} and "reward_jpeg" not in one[1]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in names & a.keys():
            assert b[name] == pytest.approx(a[name], abs=0.02), name


@pytest.mark.slow
def test_a_run_with_rewards_of_prompts_resumes_bit_for_bit(capsys, tmp_path, files, monkeypatch):
    """Also with prompts that teach nothing drawn less often; with other rewards of the same prompts it is refused."""
    flags, iterate = [*files, "--prompts-per-iteration", 2, "--silent-prompts", 0.5], loop.iterate
    run(capsys, *flags, "--out", tmp_path / "whole")

    def stop(run_, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        return iterate(run_, iteration)

    monkeypatch.setattr(loop, "iterate", stop)
    with pytest.raises(SystemExit):
        run(capsys, *flags, "--out", tmp_path / "a")
    monkeypatch.setattr(loop, "iterate", iterate)

    # The same prompts with other rewards are other prompts; without the flag they are so too.
    train = Path(files[files.index("--prompts") + 1])
    records(train, KINDS | {'red "CAT"': "ocr:2"})
    again = ["--out", tmp_path / "a", "--resume"]
    assert "sha256-of-prompts" in refused(capsys, *SMALL.split(), *flags, *again)
    records(train)
    column = flags.index("--reward-column")
    plain = [*flags[:column], *flags[column + 2 :]]
    assert "--reward-column rewards, not None" in refused(capsys, *SMALL.split(), *plain, *again)

    run(capsys, *flags, *again)
    assert rows(tmp_path / "a") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    "own, flags, words",
    [
        ("beauty:1", "", """the prompt 'red "CAT"': there is no reward 'beauty'"""),
        ("ocr:0", "", "needs a reward with a weight other than 0"),
        ("motion:1", "", "--reward-column motion: the motion reward needs one of left"),
        ("ocr:1", "--watch motion", "--watch motion: the motion reward needs one of left"),
    ],
)
def test_rewards_of_prompts_are_checked_before_anything_long(capsys, tmp_path, own, flags, words):
    path = records(tmp_path / "a.jsonl", {'red "CAT"': own, 'blue "DOG"': None})
    argv = ["--reward-column", "rewards", "--prompts", path, *flags.split(), "--out", tmp_path / "a"]
    assert words in refused(capsys, *argv)
    assert not (tmp_path / "a").exists()


def test_the_drawn_tree_has_the_rewards_of_its_prompt(tmp_path, files):
    """The page's weights are those of the first held-out prompt, and it shows what was scored, not a nan."""
    small = "--leaves 4 --steps 4 --eval-size 2 --device cpu"
    args, *rest = train_image.job([*small.split(), *files, "--out", str(tmp_path)])
    run = launch.prepare(args, checkpoint.Accelerator(cpu=True), *rest)
    report.tree(run)
    page = (tmp_path / "tree.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["weights"] == {"ocr": 1.0} and data["scores"].keys() == {"ocr", "jpeg-large"}
    assert data["rewards"] == data["scores"]["ocr"] and (tmp_path / "tree.png").exists()


def test_the_example_of_the_docs_runs(capsys, tmp_path, monkeypatch):
    """docs/rewards.md, "Another reward for each prompt": its file and its command, on a small scale."""
    text = (HERE / "docs/rewards.md").read_text().split("## Another reward for each prompt")[1].split("\n## ")[0]
    content, command = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("json", "sh"))
    argv = shlex.split(command.replace("\\\n", " "), comments=True)
    assert argv[:2] == ["python", "train_image.py"]
    (tmp_path / argv[argv.index("--prompts") + 1]).write_text(content)
    monkeypatch.chdir(tmp_path)
    small = "--leaves 4 --prompts-per-iteration 2 --eval-size 2 --iterations 1"
    document = run(capsys, *argv[2:], *small.split(), "--out", tmp_path / "a")
    assert document["iterations"] == 1
