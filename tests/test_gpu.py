"""bench/gpu.py without a GPU: its random models, its document that grows, its rules, and a dry run of every step."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch

import hardware
import train_image

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE / "bench"))

import common  # noqa: E402
import gpu  # noqa: E402
import results  # noqa: E402


# --------------------------------------------------------------------------------------------------- the random models
def test_the_random_models_have_the_official_size():
    """Parameters of both transformers and both VAEs are those of hardware.py; without data, so it takes no memory."""
    transformers = {"flux1-dev": diffusers.FluxTransformer2DModel, "wan2.1-1.3b": diffusers.WanTransformer3DModel}
    with torch.device("meta"):
        vaes = {"flux1-dev": diffusers.AutoencoderKL(**gpu.FLUX_VAE), "wan2.1-1.3b": diffusers.AutoencoderKLWan()}
        for name, config in (("flux1-dev", gpu.FLUX), ("wan2.1-1.3b", gpu.WAN)):
            figures, transformer = hardware.ARCHITECTURES[name], transformers[name].from_config(config)
            counts = [sum(w.numel() for w in model.parameters()) for model in (transformer, vaes[name])]
            assert counts == [figures.parameters, figures.frozen["VAE"]], name


@pytest.mark.parametrize("architecture", gpu.BUILT)
def test_a_stand_in_is_as_wide_as_its_transformer_wants(architecture, tmp_path, monkeypatch):
    """Saved and loaded: bf16, of the asked length of text; norms are 1, and other weights have their variance."""
    monkeypatch.chdir(HERE)
    pipe = gpu.build(architecture, dry_run=True)
    gpu.stand_in(pipe.transformer, text_length=24).save_pretrained(tmp_path)
    loaded = getattr(diffusers, type(pipe).__name__).from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokenizer = loaded.tokenizer_2 if architecture.startswith("flux") else loaded.tokenizer
    assert tokenizer.model_max_length == 24

    norms = 0
    for name, weight in loaded.transformer.named_parameters():
        if weight.ndim == 1:
            norms += name.endswith("weight")
            assert (weight == float(name.endswith("weight"))).all(), name
        elif weight.numel() > 4096:
            assert float(weight.detach().float().std()) == pytest.approx(weight[0].numel() ** -0.5, rel=0.1), name
    assert norms >= 8


# ------------------------------------------------------------------------------------------------------------ its plan
def test_the_plan_is_that_of_the_report(capsys):
    """Seconds of a forward and of one with its backward, and the memory, as `--plan` prints them for this script."""
    flags = " ".join(gpu.words_of("flux_lora_80gb"))
    planned = gpu.plan(flags, "flux1-dev", "h100")
    train_image.main(f"{flags} --plan flux1-dev --gpu h100".split())
    printed = capsys.readouterr().out
    forward, factor = map(float, re.search(r"([\d.]+) seconds per forward, (\d)", printed).groups())

    # The report rounds seconds per forward to milliseconds, and averages over the places of the window; here it is at
    # the first one.
    options = train_image.job(f"{flags} --plan flux1-dev".split())[0]
    counts = {key: 4 * n for key, n in hardware.counted(options, 0).items()}  # four prompts
    assert planned["rollout"] == pytest.approx(counts["forwards"] * forward, rel=0.01)
    assert planned["training"] == pytest.approx(counts["trained_parents"] * factor * forward, rel=0.01)
    summed = sum(float(gib) for gib in re.findall(r"^[a-zA-Z].* ([\d.]+) GiB$", printed, re.M))
    assert planned["peak_gib"] == pytest.approx(summed, abs=0.1)


def test_cards_are_known_by_their_full_names():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80gb"}
    names |= {"NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA L40S": "l40s", "NVIDIA B200": "h100"}
    assert {name: gpu.card_of(name) for name in names} == names


def test_all_steps_fit_into_the_minutes():
    """By what they are expected to take on an H100."""
    assert sum(step.seconds for step in gpu.STEPS) <= 60 * gpu.MINUTES
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS) and set(gpu.TABLE) <= hardware.METHODS.keys()


# ------------------------------------------------------------------------------------------------- the growing document
def test_without_a_card_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1 and "no GPU was found" in printed.err


class Killed(BaseException):
    """Stands for a worker that dies without a word."""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run fake steps: workers in this process, the document in a folder of the test.

    Returns a function of steps and minutes that gives the document's steps, and the groups that were started.
    """
    document, groups = tmp_path / "gpu_card.json", []

    def in_a_process(names, args):
        groups.append(names)
        args.worker = names
        try:
            gpu.work(args)
            return "its process ended with code 0"
        except Killed:
            return "its process ended with code -9"
        except Exception:
            return "its process ended with code 1"

    def run(steps, minutes=8.0, gib=80.0):
        monkeypatch.setattr(gpu, "STEPS", steps)
        monkeypatch.setattr(gpu, "in_a_process", in_a_process)
        until = time.time() + 60 * minutes
        args = argparse.Namespace(dry_run=False, document=document, until=until, gib=gib, minutes=minutes)
        document.write_text(json.dumps({"steps": {}}))
        gpu.measure_all(args, [step.name for step in steps])
        return json.loads(document.read_text())["steps"], groups

    run.document = document
    return run


def test_the_document_grows_and_a_failure_stops_nothing_else(bench):
    """Of a group of three the second step fails, and the third gets a worker of its own; so does what was killed."""
    seen = []

    def grows(args):
        yield {"a": 1}
        seen.append(json.loads(bench.document.read_text())["steps"]["grows"])
        yield {"b": 2}

    def fails(args):
        yield {"before": 3}
        raise ValueError("the first line\nthe second")

    def dies(args):
        yield {"last": 4}
        raise Killed

    def works(args):
        yield {"c": 5}

    steps = [gpu.Step("grows", 1, 0, "one", grows), gpu.Step("fails", 1, 0, "one", fails)]
    steps += [gpu.Step("third", 1, 0, "one", works), gpu.Step("dies", 1, 0, "two", dies)]
    steps += [gpu.Step("last", 1, 0, "two", works)]
    entries, groups = bench(steps)

    # While it ran, the first value was there already.
    assert seen[0]["values"] == {"a": 1} and seen[0]["status"] == "running"
    assert entries["grows"]["values"] == {"a": 1, "b": 2} and entries["grows"]["status"] == "measured"

    # What failed keeps what it had yielded.
    assert entries["fails"]["status"] == "failed" and entries["fails"]["why"] == "ValueError: the first line"
    assert entries["fails"]["values"] == {"before": 3}
    assert entries["dies"]["status"] == "failed" and entries["dies"]["why"].endswith("code -9")
    assert entries["dies"]["values"] == {"last": 4}
    assert entries["third"]["status"] == entries["last"]["status"] == "measured"
    assert groups == [["grows", "fails", "third"], ["third"], ["dies", "last"], ["last"]]


def test_what_does_not_fit_is_not_begun(bench):
    """With one minute a step of two is left out, whether it comes first in its group or not; shorter ones are not."""

    def works(args):
        yield {"done": True}

    steps = [gpu.Step("short", 10, 0, "one", works), gpu.Step("long", 120, 0, "one", works)]
    steps += [gpu.Step("longer", 130, 0, "two", works), gpu.Step("after", 10, 0, "two", works)]
    steps += [gpu.Step("large", 10, 141, "three", works)]
    steps += [gpu.Step("packed", 10, 0, "four", works, "no_such_package")]
    entries, groups = bench(steps, minutes=1)
    assert {name: entry["status"] for name, entry in entries.items()} == {
        **{"short": "measured", "long": "not run", "longer": "not run", "after": "measured"},
        **{"large": "not run", "packed": "not run"},
    }
    assert entries["long"]["why"] == entries["longer"]["why"] == "out of time"
    assert entries["large"]["why"] == "it needs a card of 141 GiB"
    assert entries["packed"]["why"] == "pip install no_such_package"
    assert groups == [["short", "long"], ["after"]]


def test_a_worker_that_is_too_slow_is_ended(tmp_path, monkeypatch):
    """The real thing, with a process that sleeps in the place of a worker; its own child ends with it."""
    sleeper = tmp_path / "gpu.py"
    sleeper.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(sleeper))
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py"])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    started = time.time()
    assert gpu.in_a_process(["a"], argparse.Namespace(until=started + 3)) == "out of time"
    assert time.time() - started < 20

    # A killed child is gone, or waits for whoever collects it.
    stat = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker's own child lives on")


# -------------------------------------------------------------------------------------------------------- what is shown
def made_up() -> dict:
    """A document as a card would leave it, with one step that had no time."""
    row = {"seconds": {"rollout": 1.0}, "ratio_counted": 0.6, "ratio_planned": 0.61, "ratio": 0.6234}
    config = {"plan": {"rollout": 19.0, "training": 13.0, "peak_gib": 27.1}, "peak_gib": 28.25, "ratio_dev": 1e-3}
    config |= {"seconds": {"rollout": 15.5, "training": 11.5, "optimiser": 0.012}}
    values = {
        "tests": {"summary": "3 passed in 30.00s", "failed": []},
        "flux_lora_80gb": config,
        "micro_batches": {"batch": [1, 2], "forward": [0.02, 0.03], "trained": [0.06, 0.08]},
        "table": {"BranchGRPO": row, "Mix, window 4": {"not run": "out of time", "planned_seconds": 9.0}},
        "ratios": {"1": {"ratio_dev": 0.0012, "clip_frac": 0.0}, "16": {"ratio_dev": 0.002, "clip_frac": 0.0}},
        "over_bare_calls": {"first": {"rollout": 1.02, "train": 1.04}, "second": {"rollout": 1.01, "train": 1.05}},
        "resume": {"equal": True, "largest_difference": 0.0, "of": "loss"},
        "demo": {"iterations": 210, "seconds": 80.4, "exact": 0.66, "reached": True},
    }
    steps = {name: {"status": "measured", "seconds": 1.0, "values": v} for name, v in values.items()}
    steps["flux_lora_24gb"] = {"status": "not run", "why": "pip install bitsandbytes", "values": {}}
    return {"card": "NVIDIA H100 80GB HBM3", "command": "python bench/gpu.py", "steps": steps}


def test_results_show_what_a_card_has_measured(tmp_path, monkeypatch):
    """A made-up document: every figure stands in the section, named as of random weights; without one nothing does."""
    (tmp_path / "bench/results").mkdir(parents=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    without, head = results.on_gpus(), results.head()
    assert head == results.HEAD and "random weights" not in without

    (tmp_path / "bench/results/gpu_nvidia-h100-80gb-hbm3.json").write_text(json.dumps(made_up()))
    text = results.on_gpus()
    assert text.startswith(without) and "### NVIDIA H100 80GB HBM3, random weights" in text
    rows = (
        "| `configs/flux_lora_80gb.sh` | 27.10, 28.25 | 19.00, 15.50 | 13.00, 11.50 | 0.01 |",
        "| BranchGRPO |  | 0.600 | 0.610 | 0.623 |",
        "| max abs(ratio - 1), bf16, unchanged policy, micro-batch 16 |  | 0.002 |",
        "| fraction of those ratios that is clipped | 0 | 0 |",
        "| rollout, over its bare calls | at most 1.10 | 1.02, 1.01 |",
        "| seconds per row at micro-batch 2: forward, with backward |  | 0.0150, 0.0400 |",
        "| largest difference of a resumed run's metrics | 0 | 0 |",
        "| `pytest -m gpu` |  | 3 passed in 30.00s |",
        "- `flux_lora_24gb`: not run (pip install bitsandbytes).",
    )
    for row in rows:
        assert row in text, row
    assert "80, 210 |" in text and "Mix, window" not in text.partition("### NVIDIA")[2]
    assert all(line.startswith("|") or len(line) <= 120 for line in text.splitlines())
    assert "no GPU was available" not in results.head()[0] and "NVIDIA H100" in results.head()[0]

    # A run that was cut at once has nothing but reasons.
    cut = made_up() | {"steps": {"tests": {"status": "stopped", "why": "out of time", "values": {}}}}
    (tmp_path / "bench/results/gpu_nvidia-h100-80gb-hbm3.json").write_text(json.dumps(cut))
    assert results.on_gpus().endswith("- `tests`: stopped (out of time).")


# ------------------------------------------------------------------------------------------------------------ a dry run
@pytest.mark.slow
def test_a_dry_run_measures_every_step(capfd, monkeypatch):
    """`make gpu ARGS=--dry-run`: the same code on the CPU; every step ends well and has what RESULTS.md shows."""
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--dry-run"])
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert stop.value.code == 0 and {"command", "versions", "commit", "machine"} <= set(document)
    assert document == json.loads((HERE / "runs/smoke/gpu_cpu.json").read_text())

    steps = document["steps"]
    assert {name: entry["status"] for name, entry in steps.items()} == dict.fromkeys(
        [step.name for step in gpu.STEPS], "measured"
    )
    assert list(steps["table"]["values"]) == list(gpu.TABLE)
    assert all(v["clip_frac"] == 0 and v["ratio_dev"] < 1e-3 for v in steps["ratios"]["values"].values())
    assert steps["resume"]["values"]["equal"]
    text = results.on_card(document)
    assert text.count("`configs/") == 3 and text.count("micro-batch") >= 6 and str(common.ROOT) not in text
