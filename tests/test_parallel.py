"""Many processes on gloo: the gradients of one, errors that all meet, checkpoints for any number of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workers import CASES

HERE = Path(__file__).parent.parent
SMALL = "--leaves 4 --prompts-per-iteration 2 --eval-size 5 --eval-every 2 --save-every 2 --iterations 4 --ema 0.9 --device cpu"


def start(script: str, *argv, processes: int = 1) -> subprocess.CompletedProcess:
    """A script in one process, or in several by torchrun."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(many if processes > 1 else []), str(HERE / script), *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env, timeout=300)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The gradients of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = start("tests/workers.py", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: load_file(folder / f"{name}.safetensors") for name in CASES}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flags", ["", "--fsdp"])
def test_gradients_are_those_of_one_process(alone, tmp_path, processes, flags):
    done = start("tests/workers.py", tmp_path, *flags.split(), processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, wanted in alone.items():
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == wanted.keys()
        difference = sum(float((found[k] - wanted[k]).double().square().sum()) for k in wanted) ** 0.5
        length = sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5
        assert length > 0 and difference < 1e-5 * length, (name, difference / length)


@pytest.mark.parametrize("what, error", [("score", "CannotScore"), ("loss", "NonFinite")])
def test_an_error_of_one_process_stops_all(tmp_path, what, error):
    done = start("tests/workers.py", tmp_path, "--break", what, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == [f"process 0: {error}", f"process 1: {error}"]


def test_a_run_continues_on_another_number_of_processes(tmp_path):
    """FSDP on two processes, then one; one, then FSDP on two: the rows of a run that was never moved."""
    for name, processes, flags in (("one", 1, ""), ("two", 2, "--fsdp")):
        done = start("train_image.py", *SMALL.split(), *flags.split(), "--out", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    for name, processes, flags in (("one", 2, "--fsdp"), ("two", 1, "")):
        moved = tmp_path / f"{name}, moved"
        shutil.copytree(tmp_path / name, moved)
        shutil.rmtree(moved / "checkpoint-4")
        resumed = [*SMALL.split(), *flags.split(), "--out", moved, "--resume"]
        done = start("train_image.py", *resumed, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1])["iterations"] == 4
    wanted = rows(tmp_path / "one")
    for name in ("two", "one, moved", "two, moved"):
        found = rows(tmp_path / name)
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted):
            assert a.keys() == b.keys()
            for key in a.keys() & {"heldout_reward", "grad_norm", "reward_mean", "nfe"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3), (name, key)
    weights = [
        load_file(tmp_path / n / "model/transformer/diffusion_pytorch_model.safetensors") for n in ("one", "two")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 3e-4
    ema = load_file(tmp_path / "two/checkpoint-4/trainable.safetensors")
    assert all(torch.equal(torch.isfinite(v).all(), torch.tensor(True)) for v in ema.values())


def test_fsdp_needs_processes():
    done = start("train_image.py", "--fsdp", "--device", "cpu")
    assert done.returncode == 2 and "torchrun" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--lora 4 --dtype bf16 --kl 0.1", "--dtype bf16 --gradient-checkpointing", "--compile"]
)
def test_fsdp_with_other_switches(tmp_path, flags):
    """Two processes, two iterations: it runs, the first ratios stay 1, and what it exports draws what it drew."""
    small = [*SMALL.split(), "--iterations", "2", "--fsdp", *flags.split(), "--out", tmp_path / "a"]
    done = start("train_image.py", *small, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    found = rows(tmp_path / "a")
    assert all(row["ratio_dev"] < 1e-4 and row["grad_norm"] > 0 for row in found[1:])
    model = ["--model", tmp_path / "a/model"] if "lora" not in flags else []
    if model:
        again = start("train_image.py", *SMALL.split(), *model, "--iterations", 0, "--out", tmp_path / "b")
        assert again.returncode == 0, again.stderr[-2000:]
        assert rows(tmp_path / "b")[0]["heldout_reward"] == pytest.approx(found[-1]["heldout_reward"], abs=0.05)
