"""Many processes on the CPU (gloo), by DDP and by FSDP2.

Their gradients are those of one process, an error of one process stops all, and a checkpoint resumes on any number of
them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workers import CASES, FAMILY_CASES, KINDS, gradients_of_an_iteration, prepared_run

import parallel
import train_image

HERE = Path(__file__).parent.parent
SMALL = "--leaves 4 --prompts-per-iteration 2 --eval-size 5 --eval-every 2 --save-every 2 --iterations 4 --ema 0.9"
SMALL += " --device cpu"


def start(script: str, *argv, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script in one process, or in several by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(HERE / script), *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env, timeout=300)


def metric_rows(out: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gradients_of_one(tmp_path_factory):
    """Case -> the gradients that one process computes, by name."""
    folder = str(tmp_path_factory.mktemp("one"))
    return {name: gradients_of_an_iteration(prepared_run(case, folder)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder to which two processes wrote gradients and errors, and what they wrote to stderr."""
    folder = tmp_path_factory.mktemp("two")
    done = start("tests/workers.py", folder, "--faults", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(gradients_of_one, two_processes, kind):
    """The difference of all gradients together is less than 0.00001 of their length."""
    compare_gradients(gradients_of_one, two_processes[0], kind, 1e-5)


@pytest.mark.slow
def test_gradients_of_four_processes_are_those_of_one(gradients_of_one, tmp_path):
    assert start("tests/workers.py", tmp_path, processes=4).returncode == 0
    for kind in KINDS:
        compare_gradients(gradients_of_one, tmp_path, kind, 1e-5)


@pytest.mark.slow
def test_gradients_of_other_models_are_those_of_one_process(tmp_path):
    """Untrained decoders make rewards that hardly differ, so their last bits count for more: 0.00002."""
    folder = str(tmp_path / "one")
    one = {name: gradients_of_an_iteration(prepared_run(case, folder)) for name, case in FAMILY_CASES.items()}
    assert start("tests/workers.py", tmp_path, "--families", processes=2).returncode == 0
    for kind in KINDS:
        compare_gradients(one, tmp_path, kind, 2e-5)


def compare_gradients(of_one: dict, folder: Path, kind: str, limit: float) -> None:
    """The gradients that workers.py wrote into the folder are those of one process."""
    for case, expected in of_one.items():
        gradients = load_file(folder / f"{kind}, {case}.safetensors")
        assert gradients.keys() == expected.keys()
        difference = sum(float((gradients[k] - expected[k]).double().square().sum()) for k in expected) ** 0.5
        length = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
        assert length > 0 and difference < limit * length, (case, difference / length)


@pytest.fixture(scope="module")
def faults(two_processes):
    """What each of two processes raised of which the second met faults, by case, and what they wrote to stderr."""
    folder, err = two_processes
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], err


@pytest.mark.parametrize(
    "case, error, words",
    [
        ("score", "CannotScore", "colour"),
        ("loss", "NonFinite", "is not finite"),
        ("flag", "ValueError", "process 1 was started with --lr 2e-05, and the main process 1e-05"),
        ("prompts", "ValueError", "process 1 was started with other prompts"),
        ("folder", "ValueError", "is a file, not a folder"),
    ],
)
def test_an_error_of_one_process_stops_all(faults, case, error, words):
    """Both raise the same, so neither waits for the other."""
    first, second = faults[0]
    assert first[case] == second[case] and first[case][0] == error and words in first[case][1]


def test_who_is_waited_for_is_said(faults):
    """A process that takes its time is named with its place, one that was stopped as without a sign of life."""
    slow, stopped = [line for line in faults[1].splitlines() if "waits for" in line][:2]
    assert "process 0 is at rewards of all processes since" in slow and slow.endswith("process 1 (at rewards)")
    assert "process 0 is at update" in stopped and "process 1 (at update, without a sign of life)" in stopped


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_continues_on_another_number_of_processes(tmp_path, capsys, first, then):
    """FSDP on two processes, then one process, or the other way round: the rows of a run that was never moved."""

    def run(processes: int, *flags) -> tuple[str, str]:
        """What it writes. A run of one process is this process, where the libraries are loaded already."""
        if processes == 1:
            train_image.main([*SMALL.split(), *map(str, flags)])
            return capsys.readouterr()
        done = start("train_image.py", *SMALL.split(), "--fsdp", *flags, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr

    # A run on one process, and one that is moved. Its last checkpoint is damaged, so all take that of iteration 2.
    run(1, "--out", tmp_path / "one")
    moved = tmp_path / "moved"
    run(first, "--out", moved)
    trainable = load_file(moved / "checkpoint-4/trainable.safetensors")  # whole, though each process had a half
    assert all(torch.isfinite(weight).all() for weight in trainable.values())
    shard = moved / "checkpoint-4/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    out, err = run(then, "--out", moved, "--resume")
    assert "checkpoint-4 is damaged" in err and "going on from checkpoint-2" in err
    assert json.loads(out.splitlines()[-1])["iterations"] == 4

    # Both have the same rows, up to rounding, and the exported models agree.
    rows, expected = metric_rows(moved), metric_rows(tmp_path / "one")
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys()
        for key in row.keys() & {"heldout_reward", "grad_norm", "reward_mean", "nfe"}:
            assert row[key] == pytest.approx(other[key], rel=1e-3), key
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    weights = [load_file(tmp_path / name / file) for name in ("one", "moved")]
    assert weights[0].keys() == weights[1].keys() == trainable.keys()
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 3e-4


def test_a_checkpoint_names_averages_as_their_weights(tmp_path):
    """Before training the EMA is a copy of the weights: under each name the same numbers."""
    state = parallel.state(prepared_run("--ema 0.9", str(tmp_path)))
    assert len(state["model"]) > 100 and state["ema"].keys() == state["model"].keys() | {"step"}
    assert all(torch.equal(state["ema"][name], weight) for name, weight in state["model"].items())


def test_fsdp_needs_processes(capsys):
    with pytest.raises(SystemExit) as stop:
        train_image.main(["--fsdp", "--device", "cpu"])
    assert stop.value.code == 2 and "torchrun" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--lora 4 --dtype bf16 --kl 0.1", "--dtype bf16 --gradient-checkpointing", "--compile"]
)
def test_fsdp_with_other_switches(tmp_path, flags):
    """Two processes, two iterations: the ratios stay 1, and the exported model scores what the run scored."""
    small = [*SMALL.split(), "--iterations", "2", "--fsdp", *flags.split(), "--out", tmp_path / "a"]
    done = start("train_image.py", *small, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = metric_rows(tmp_path / "a")
    assert all(row["ratio_dev"] < 1e-4 and row["grad_norm"] > 0 for row in rows[1:])

    # A LoRA is exported as a file for the untrained model; anything else is a model that can be evaluated as it is.
    if "lora" not in flags:
        model = ["--model", tmp_path / "a/model"]
        again = start("train_image.py", *SMALL.split(), *model, "--iterations", 0, "--out", tmp_path / "b")
        assert again.returncode == 0, again.stderr[-2000:]
        evaluated = metric_rows(tmp_path / "b")[0]["heldout_reward"]
        assert evaluated == pytest.approx(rows[-1]["heldout_reward"], abs=0.05)
