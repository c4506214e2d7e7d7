"""The plan: figures of the architectures against the real ones on meta tensors, memory and seconds by hand, one table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanTransformer3DModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

import hardware
import train_image
import train_video
from policy import LORA_TARGETS

BF16, HERE = torch.bfloat16, Path(__file__).parent.parent


def flux(double: int, single: int, side: int = 720) -> tuple:
    """FLUX.1-dev's config at some depth on meta tensors, its inputs, its tokens."""
    tokens = (side // 16) ** 2
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True).to(BF16)
        inputs = {"hidden_states": torch.empty(1, tokens, 64, dtype=BF16), "timestep": torch.empty(1, dtype=BF16)}
        inputs |= {"guidance": torch.empty(1, dtype=BF16), "pooled_projections": torch.empty(1, 768, dtype=BF16)}
        inputs |= {"encoder_hidden_states": torch.empty(1, 512, 4096, dtype=BF16)}
        inputs |= {"img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(512, 3)}
    return model, inputs, tokens


def wan(blocks: int, frames: int = 33, height: int = 480, width: int = 832) -> tuple:
    """The same of Wan2.1-T2V-1.3B."""
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    heads = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096}
    with torch.device("meta"):
        model = WanTransformer3DModel(**heads, num_layers=blocks).to(BF16)
        inputs = {"hidden_states": torch.empty(shape, dtype=BF16), "timestep": torch.empty(1, dtype=BF16)}
        inputs |= {"encoder_hidden_states": torch.empty(1, 512, 4096, dtype=BF16)}
    return model, inputs, shape[2] * shape[3] * shape[4] // 4


@pytest.mark.parametrize("name, make", [("flux1-dev", lambda: flux(19, 38)), ("wan2.1-1.3b", lambda: wan(30))])
def test_parameters_and_flops_are_the_real_ones(name, make):
    """The whole depth: shapes run through, parameters are exact, FLOPs within a thousandth."""
    arch, (model, inputs, tokens) = hardware.ARCHITECTURES[name], make()
    assert sum(p.numel() for p in model.parameters()) == arch.parameters
    blocks = [m for m in model.modules() if type(m).__name__ in model._repeated_blocks]
    assert len(blocks) == arch.blocks and max(sum(p.numel() for p in b.parameters()) for b in blocks) == arch.block
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert model(**inputs).sample.shape == inputs["hidden_states"].shape
    assert arch.flops(tokens) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS))
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" in n) == 4 * arch.lora * arch.width


def test_flops_grow_as_the_real_ones_do():
    assert hardware.flux_flops(32**2) / 1e12 == pytest.approx(21.50, rel=1e-3)
    assert hardware.flux_flops(64**2) / 1e12 == pytest.approx(74.38, rel=1e-3)
    assert hardware.wan_flops(14 * 1560) / 1e12 == pytest.approx(144.76, rel=1e-3)


def saved_bytes(model, inputs) -> dict[str, int]:
    """Bytes that autograd keeps of one forward in each kind of block under autocast; a storage that is kept twice counts once."""
    weights, kept, alive, inside = {p.data_ptr() for p in model.parameters()}, {}, [], []

    def pack(x):
        alive.append(x)
        at = x.untyped_storage().data_ptr()
        if inside and at not in weights:
            kept.setdefault(at, (inside[0], x.untyped_storage().nbytes()))
        return x

    for block in model.modules():
        if type(block).__name__ in model._repeated_blocks:
            block.register_forward_pre_hook(lambda m, inputs: inside.append(type(m).__name__))
            block.register_forward_hook(lambda m, inputs, output: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", BF16):
        model(**inputs)
    return {kind: sum(n for k, n in kept.values() if k == kind) for kind in model._repeated_blocks}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["flux1-dev", "wan2.1-1.3b"])
def test_activations_are_those_autograd_keeps(name, lora, monkeypatch):
    """One real block of each kind at full width, on the CPU: bytes for each further token, over the width."""
    arch, norm = hardware.ARCHITECTURES[name], torch.nn.functional.layer_norm
    monkeypatch.setattr(
        torch.nn.functional, "layer_norm", lambda x, *a, **k: norm(x.float(), *a, **k)
    )  # as CUDA's autocast
    found = []
    for tokens in (64, 128):
        if name == "flux1-dev":
            model, inputs, _ = flux(1, 1)
            inputs |= {"hidden_states": torch.empty(1, tokens, 64), "img_ids": torch.empty(tokens, 3)}
            kinds = {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38}
        else:
            model, inputs, _ = wan(1)
            inputs |= {"hidden_states": torch.empty(1, 16, 1, 2, 2 * tokens)}
            kinds = {"WanTransformerBlock": 30}
        model.float()
        if lora:
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=64, target_modules=LORA_TARGETS))
        inputs = {k: torch.zeros(v.shape) for k, v in inputs.items()}
        found.append(saved_bytes(model.to_empty(device="cpu"), inputs))
    each = sum(n * (found[1][k] - found[0][k]) / 64 for k, n in kinds.items()) / arch.blocks / arch.width
    assert each == pytest.approx(arch.saved[lora], rel=0.02)


def planned(text: str):
    """Options of a plan of FLUX.1-dev."""
    return train_image.job(f"--plan flux1-dev {text}".split())[0]


def test_memory_by_hand():
    n = 11_901_408_320
    full = hardware.memory(
        planned(
            "--dtype bf16 --fsdp --ema 0.99 --text-offload --reward jpeg --micro-batch 1 --prompts-per-iteration 8"
        ),
        8,
    )
    assert (
        full["weights, trained, fp32"] == 4 * n / 8 and full["AdamW's two moments and a temporary, fp32"] == 12 * n / 8
    )
    assert full["T5-XXL"] == 0 and full["VAE"] == 2 * 83_819_683 and full["weights, frozen"] == 0
    assert full["activations"] == (2025 + 512) * 3072 * 63 * 57
    lora = hardware.memory(planned("--dtype bf16 --lora 64 --gradient-checkpointing --micro-batch 2 --reward hpsv2"), 1)
    assert lora["weights, frozen"] == 2 * n and lora["gradients, fp32"] == 4 * 64 * 532 * 3072
    assert lora["activations"] == 2 * 2537 * 3072 * (35 + 2 * 57)
    assert lora["reward models"] == 4 * 986e6
    held = lora["weights, frozen"] + lora["weights, trained, fp32"] + lora["reward models"] + lora["VAE"]
    encoders, widest = 4_762_310_656 + 123_060_480, 32 * 512 * (3 * 10240 + 4 * 4096)
    assert hardware.memory_while_encoding(planned("--dtype bf16 --lora 64"), lora) == held + 2 * (encoders + widest)
    every = hardware.memory(planned("--dtype bf16 --micro-batch 0 --prompts-per-iteration 4 --method branchgrpo"), 2)
    assert every["activations"] == 2 * 187 * 2537 * 3072 * 63 * 57 and every["gradients, DDP's buckets"] == 4 * n


def test_seconds_by_hand():
    """T = 20, splits 0,3,6,9: forwards in batches of at most 4 nodes, parents likewise; a call costs 1 + b."""
    args = planned("--method branchgrpo --leaves 16 --micro-batch 4 --prompts-per-iteration 1")
    sizes = [1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 10]  # nodes at the depths 0..19
    rollout = sum(n + -(-n // 4) for n in sizes)
    parents = sum(sizes[:-1])
    assert hardware.seconds(args, 0, 1, lambda b: 1 + b, lambda b: 10 * b) == rollout + 10 * parents


def test_the_papers_seconds_follow_its_own_counts_but_for_mix():
    unit, errors = hardware.paper_errors()
    assert unit == pytest.approx(8.41, abs=0.01) and len(errors) == 7
    assert sorted(errors, key=lambda n: abs(errors[n]))[-1] == "Mix, window 4"
    assert sum(abs(e) < 0.07 for e in errors.values()) == 6


def test_windows_visit_every_place_once():
    for text, places in (
        ("--mix 4 --mix-every 1", 17),
        ("--method branchgrpo --depth-prune 5 --depth-every 1", 5),
        ("", 1),
    ):
        assert len(hardware.slide(planned(f"--leaves 16 {text}"))) == places


def test_the_report(capsys):
    train_image.main(
        [
            "--plan",
            "flux1-dev",
            "--gpu",
            "h100",
            "--dtype",
            "bf16",
            "--lora",
            "64",
            "--micro-batch",
            "1",
            "--gradient-checkpointing",
        ]
    )
    text = capsys.readouterr().out
    assert "11.90B parameters, 2025 tokens" in text and "37.28 TFLOP" in text and "fits" in text
    for name in hardware.METHODS:
        assert name in text
    train_video.main(
        ["--plan", "wan2.1-1.3b", "--gpu", "rtx4090", "--dtype", "bf16", "--lora", "64", "--micro-batch", "1"]
    )
    assert "DOES NOT FIT" in capsys.readouterr().out


def run_config(name: str, *argv, **environment) -> subprocess.CompletedProcess:
    """A script of configs/, with the flags that follow; the last of a flag counts."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "NODES": "1", "HEAD": "localhost:29541"} | environment
    env["PATH"] = os.pathsep.join([environment.get("PATH", str(Path(sys.executable).parent)), os.environ["PATH"]])
    command = ["sh", str(HERE / "configs" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env, timeout=300)


CONFIGS = sorted(p.name for p in (HERE / "configs").glob("*.sh"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_needs_the_memory_it_states(name, tmp_path, capsys):
    """Its comment gives the command of its plan and the sum; what the script hands to python is planned here, and fits."""
    for program in ("python", "torchrun"):  # stand-ins that print what they are given, a word a line
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / program).chmod(0o755)
    text = (HERE / "configs" / name).read_text()
    wanted = re.search(r"# Memory: ([\d.]+) GiB of [\d.]+, by `.*sh configs/(\S+) (--plan [^`]*)`", text)
    words = run_config(name, *wanted[3].split(), GPUS="1", PATH=str(tmp_path)).stdout.splitlines()
    script = "train_video.py" if name.startswith("wan") else "train_image.py"
    {"train_image.py": train_image, "train_video.py": train_video}[script].main(words[words.index(script) + 1 :])
    said = capsys.readouterr().out.strip()
    last = said.splitlines()[-1]
    assert wanted[2] == name and f"{float(wanted[1]):8.2f} GiB: fits" in last, last
    terms = re.search(r"\n# Sum: (.*)\n", text)[1]  # of the larger one: training, or encoding before it
    numbers = [float(x) for x in re.findall(r" ([\d.]+)(?:,|$)", terms)]
    assert sum(numbers) == pytest.approx(float(wanted[1]), abs=0.005 * len(numbers))
    assert all(f" {x:.2f} GiB" in said for x in numbers if f"encoders {x:.2f}" not in terms)


TINY = "--iterations 1 --eval-size 2 --leaves 4 --steps 10 --device cpu --micro-batch 0 --no-nf4 --watch auto --text-cache {0}/text"
IMAGE = " --model tiny/flux --height 32 --width 64 --reward ocr:1 --prompts tiny/prompts_train.txt"
VIDEO = " --model tiny/wan --height 32 --width 32 --frames 9 --reward motion:1 --prompts tiny/video_train.txt"
QUICK = ("flux_full_8x80gb.sh", "wan_lora_24gb.sh")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_a_config_trains_the_embedded_model(name, tmp_path):
    """Each launch script as it stands, on two processes where it takes several; model, prompts and reward in place of the large."""
    flags = (TINY + (VIDEO if name.startswith("wan") else IMAGE)).format(tmp_path).split()
    done = run_config(name, *flags, "--out", tmp_path / "run", GPUS="2", PROMPTS="tiny/prompts_train.txt")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["iterations"] == 1


def test_a_day_with_a_gpu(tmp_path):
    """README's commands from the plan to the last export, in their order, with the embedded model in place of the large one."""
    lines = [line.partition("  #")[0].split() for line in (HERE / "README.md").read_text().splitlines()]
    days = [words[2:] for words in lines if words[:2] == ["sh", "configs/flux_lora_24gb.sh"]]
    assert len(days) == 5 and days[-1][-2:] == ["--iterations", "40"]
    small = (TINY + IMAGE).format(tmp_path).replace("--iterations 1 ", "").split()
    lengths = {1: "1", 2: "4", 3: "4", 4: "2"}  # trained for 4, and then the checkpoint of 2 is exported
    for day, words in enumerate(days):
        argv = [w.replace("runs/day", str(tmp_path / "day")) for w in words] + (
            ["--out", str(tmp_path / "try")] if day == 1 else []
        )
        if day:
            argv += [*small, "--save-every", "2", "--keep", "9", "--iterations", lengths[day]]
        if day == 4:
            shutil.rmtree(tmp_path / "day/checkpoint-4")
        done = run_config("flux_lora_24gb.sh", *argv)
        assert done.returncode == 0, done.stderr[-2000:]
        if day:
            assert json.loads(done.stdout.splitlines()[-1])["iterations"] == int(lengths[day])
    pipe = FluxPipeline.from_pretrained(HERE / "tiny/flux")
    pipe.load_lora_weights(tmp_path / "day/model")
    assert pipe.get_active_adapters()


BAD = [
    ("image", "--plan flux", "one of flux1-dev, wan2.1-1.3b"),
    ("image", "--plan flux1-dev --gpu h900", "--gpu must be one of"),
    ("image", "--plan wan2.1-1.3b", "train_video.py"),
    ("video", "--plan flux1-dev", "train_image.py"),
    ("image", "--plan flux1-dev --gpus 3", "multiple of --gpus"),
]


@pytest.mark.parametrize("script, flags, words", BAD)
def test_bad_plans(capsys, script, flags, words):
    with pytest.raises(SystemExit) as stop:
        {"image": train_image, "video": train_video}[script].main(flags.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err
