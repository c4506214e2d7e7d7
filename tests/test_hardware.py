"""The plan, the scripts of configs/ and the commands of docs/gpu.md.

The figures of the architectures are compared with the real ones on models without data (torch's meta device), memory
and seconds with sums by hand. The scripts and the commands are run with the embedded model in the place of the large
one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

import hardware
import train_image
import train_video
from policy import LORA_TARGETS

BF16, HERE = torch.bfloat16, Path(__file__).parent.parent


def flux(double: int, single: int, side: int = 720) -> tuple:
    """FLUX.1-dev on the meta device with these numbers of blocks, inputs of a square picture, and its tokens."""
    tokens = (side // 16) ** 2
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True).to(BF16)
        inputs = {"hidden_states": torch.empty(1, tokens, 64, dtype=BF16), "timestep": torch.empty(1, dtype=BF16)}
        inputs |= {"guidance": torch.empty(1, dtype=BF16), "pooled_projections": torch.empty(1, 768, dtype=BF16)}
        inputs |= {"encoder_hidden_states": torch.empty(1, 512, 4096, dtype=BF16)}
        inputs |= {"img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(512, 3)}
    return model, inputs, tokens


def wan(blocks: int, frames: int = 33, height: int = 480, width: int = 832) -> tuple:
    """Wan2.1-T2V-1.3B, likewise."""
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    heads = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096}
    with torch.device("meta"):
        model = WanTransformer3DModel(**heads, num_layers=blocks).to(BF16)
        inputs = {"hidden_states": torch.empty(shape, dtype=BF16), "timestep": torch.empty(1, dtype=BF16)}
        inputs |= {"encoder_hidden_states": torch.empty(1, 512, 4096, dtype=BF16)}
    return model, inputs, shape[2] * shape[3] * shape[4] // 4


@pytest.mark.parametrize("name, make", [("flux1-dev", lambda: flux(19, 38)), ("wan2.1-1.3b", lambda: wan(30))])
def test_parameters_and_flops_are_the_real_ones(name, make):
    """At full depth: shapes run through, parameters are exact, FLOPs within a thousandth of torch's counter."""
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
    """TFLOP of torch's counter at other sizes: attention grows with the square of the tokens."""
    assert hardware.flux_flops(32**2) / 1e12 == pytest.approx(21.50, rel=1e-3)
    assert hardware.flux_flops(64**2) / 1e12 == pytest.approx(74.38, rel=1e-3)
    assert hardware.wan_flops(14 * 1560) / 1e12 == pytest.approx(144.76, rel=1e-3)


def saved_bytes(model, inputs) -> dict[str, int]:
    """Bytes that autograd keeps of one forward, for each kind of block, under autocast.

    A storage that is kept by several operations counts once, and weights do not count.
    """
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[str, int]] = {}  # address of a storage -> kind of block, bytes
    alive, block_kind = [], []  # tensors are held, so that no address is used twice; the block that runs now

    def pack(x):
        alive.append(x)
        address = x.untyped_storage().data_ptr()
        if block_kind and address not in weights:
            kept.setdefault(address, (block_kind[0], x.untyped_storage().nbytes()))
        return x

    for block in model.modules():
        if type(block).__name__ in model._repeated_blocks:
            block.register_forward_pre_hook(lambda m, inputs: block_kind.append(type(m).__name__))
            block.register_forward_hook(lambda m, inputs, output: block_kind.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", BF16):
        model(**inputs)
    return {kind: sum(n for k, n in kept.values() if k == kind) for kind in model._repeated_blocks}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["flux1-dev", "wan2.1-1.3b"])
def test_activations_are_those_autograd_keeps(name, lora, monkeypatch):
    """One real block of each kind at full width, on the CPU: bytes per further token, over the width."""
    # CUDA's autocast computes norms in float32, which the CPU's does not.
    arch, norm = hardware.ARCHITECTURES[name], torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *a, **k: norm(x.float(), *a, **k))

    # At two lengths, whose difference has nothing in it that does not grow with the tokens.
    saved = []
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
        saved.append(saved_bytes(model.to_empty(device="cpu"), inputs))
    per_token = sum(n * (saved[1][kind] - saved[0][kind]) / 64 for kind, n in kinds.items()) / arch.blocks
    assert per_token / arch.width == pytest.approx(arch.saved[lora], rel=0.02)


def planned(text: str):
    """Options of a plan of FLUX.1-dev."""
    return train_image.job(f"--plan flux1-dev {text}".split())[0]


def test_memory_by_hand():
    """FLUX.1-dev at 720 x 720: 2025 tokens and 512 of text, width 3072, 57 blocks."""
    n, t5, clip, vae = 11_901_408_320, 4_762_310_656, 123_060_480, 83_819_683

    # All weights on eight GPUs with FSDP: an eighth of weights and moments on each, no frozen weights.
    options = "--dtype bf16 --fsdp --ema 0.99 --text-offload --reward jpeg --micro-batch 1 --prompts-per-iteration 8"
    full = hardware.memory(planned(options), 8)
    assert full["weights, trained, fp32"] == 4 * n / 8
    assert full["AdamW's two moments, fp32"] == 8 * n / 8
    assert full["T5-XXL"] == 0 and full["VAE"] == 2 * vae and full["weights, frozen"] == 0
    assert full["activations"] == (2025 + 512) * 3072 * 63 * 57

    # A LoRA with checkpointing, micro-batches of two: the input of every block, 2 bytes, and one block's activations.
    lora = hardware.memory(planned("--dtype bf16 --lora 64 --gradient-checkpointing --micro-batch 2 --reward hpsv2"), 1)
    assert lora["weights, frozen"] == 2 * n and lora["gradients, fp32"] == 4 * 64 * 532 * 3072
    assert lora["activations"] == 2 * 2537 * 3072 * (35 + 2 * 57)
    assert lora["reward models"] == 4 * 986e6

    # While prompts are encoded: the weights, and the encoders with what T5's widest layer makes of 32 prompts.
    held = lora["weights, frozen"] + lora["weights, trained, fp32"] + lora["reward models"] + lora["VAE"]
    widest = 32 * 512 * (3 * 10240 + 4 * 4096)
    encoding = hardware.memory_while_encoding(planned("--dtype bf16 --lora 64"), lora)
    assert encoding == held + 2 * (t5 + clip + widest)

    # DDP without micro-batches: all 187 trained parents of each of the two prompts of a GPU in one call. Every GPU
    # holds all weights and moments.
    ddp = hardware.memory(planned("--dtype bf16 --micro-batch 0 --prompts-per-iteration 4 --method branchgrpo"), 2)
    assert ddp["activations"] == 2 * 187 * 2537 * 3072 * 63 * 57 and ddp["gradients, DDP's buckets"] == 4 * n
    assert ddp["weights, trained, fp32"] == 4 * n and ddp["AdamW's two moments, fp32"] == 8 * n


def test_seconds_by_hand():
    """T = 20, splits 0,3,6,9: nodes go in micro-batches of at most 4. A call of b nodes costs 1 + b, trained 10 b."""
    args = planned("--method branchgrpo --leaves 16 --micro-batch 4 --prompts-per-iteration 1")
    sizes = [1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 10]  # nodes at the depths 0 to 19
    rollout = sum(n + -(-n // 4) for n in sizes)
    parents = sum(sizes[:-1])  # the last step is deterministic and not trained
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
    shared = "--dtype bf16 --lora 64 --micro-batch 1"
    train_image.main(f"--plan flux1-dev --gpu h100 {shared} --gradient-checkpointing".split())
    text = capsys.readouterr().out
    assert "11.90B parameters, 2025 tokens" in text and "37.28 TFLOP per forward" in text and "fits" in text
    for name in hardware.METHODS:
        assert name.replace("splits alone", "noise at the splits only") in text
    train_video.main(f"--plan wan2.1-1.3b --gpu rtx4090 {shared}".split())
    assert "DOES NOT FIT" in capsys.readouterr().out


def run_config(name: str, *argv, **environment) -> subprocess.CompletedProcess:
    """Run a script of configs/ with further flags, the last of which counts."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "NODES": "1", "HEAD": "localhost:29541"} | environment
    env["PATH"] = os.pathsep.join([environment.get("PATH", str(Path(sys.executable).parent)), os.environ["PATH"]])
    command = ["sh", str(HERE / "configs" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env, timeout=300)


def words_of_config(name: str, stand_ins: Path, *argv, **environment) -> list[str]:
    """What a script of configs/ would start, word by word, without python or torchrun: stand-ins print it instead."""
    for program in ("python", "torchrun"):
        (stand_ins / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (stand_ins / program).chmod(0o755)
    done = run_config(name, *argv, PATH=str(stand_ins), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CONFIGS = sorted(p.name for p in (HERE / "configs").glob("*.sh"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_needs_the_memory_it_states(name, tmp_path, capsys):
    """Its comment states the memory, the command of the plan and the sum. The plan of what it runs agrees, and fits."""
    text = (HERE / "configs" / name).read_text().replace("\n#   ", " ")  # a comment goes on where it is indented
    stated = re.search(r"# Memory: ([\d.]+) GiB of [\d.]+, by `.*sh configs/(\S+) (--plan [^`]*)`", text)
    words = words_of_config(name, tmp_path, *stated[3].split(), GPUS="1")

    # What it would run is planned here.
    script = "train_video.py" if name.startswith("wan") else "train_image.py"
    {"train_image.py": train_image, "train_video.py": train_video}[script].main(words[words.index(script) + 1 :])
    plan = capsys.readouterr().out.strip()
    total = plan.splitlines()[-1]
    assert stated[2] == name and f"{float(stated[1]):8.2f} GiB: fits" in total, total

    # The sum is that of the larger moment: training, or the encoding before it. Its terms are those of the plan, apart
    # from the encoders, whose own activations the plan adds to them.
    terms = re.search(r"\n# Sum: (.*)\n", text)[1]
    numbers = [float(x) for x in re.findall(r" ([\d.]+)(?:,|$)", terms)]
    assert sum(numbers) == pytest.approx(float(stated[1]), abs=0.005 * len(numbers))
    assert all(f" {x:.2f} GiB" in plan for x in numbers if f"encoders {x:.2f}" not in terms)


TINY = "--iterations 1 --eval-size 2 --leaves 4 --steps 10 --device cpu --micro-batch 0 --no-nf4 --watch auto"
TINY += " --text-cache {0}/text"
IMAGE = " --model tiny/flux --height 32 --width 64 --reward ocr:1 --prompts tiny/prompts_train.txt"
VIDEO = " --model tiny/wan --height 32 --width 32 --frames 9 --reward motion:1 --prompts tiny/video_train.txt"
QUICK = ("wan_lora_24gb.sh",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_a_config_trains_the_embedded_model(name, tmp_path, capsys, monkeypatch):
    """Each script as it stands, on two processes where it takes several; the embedded model, prompts and reward."""
    flags = (TINY + (VIDEO if name.startswith("wan") else IMAGE)).format(tmp_path).split()
    flags += ["--dtype", "fp32"] * name.startswith("wan")  # bf16 is slow on a CPU, and once is enough
    flags, environment = [*flags, "--out", tmp_path / "run"], {"GPUS": "2", "PROMPTS": "tiny/prompts_train.txt"}
    script, *words = words_of_config(name, tmp_path, *flags, **environment)
    if script.endswith(".py"):  # one process: this one, where the libraries are loaded already
        monkeypatch.chdir(HERE)
        {"train_image.py": train_image, "train_video.py": train_video}[script].main(words)
        printed = capsys.readouterr().out
    else:
        done = run_config(name, *flags, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    assert json.loads(printed.splitlines()[-1])["iterations"] == 1


def test_a_day_with_a_gpu(tmp_path, capsys, monkeypatch):
    """The commands of docs/gpu.md in their order, from the plan on, with the embedded model in place of FLUX.1-dev."""
    text = (HERE / "docs/gpu.md").read_text()
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("sh configs/flux_lora_24gb.sh")]
    assert len(commands) == 5 and commands[-1][-2:] == ["--iterations", "40"]
    small = (TINY + IMAGE).format(tmp_path).replace("--iterations 1 ", "").split()
    monkeypatch.chdir(HERE)

    def run(*argv) -> str:
        """The script's command in this process, where the libraries are loaded already; the last line it printed."""
        script, *words = words_of_config("flux_lora_24gb.sh", tmp_path, *argv)
        assert script == "train_image.py"
        train_image.main(words)
        return capsys.readouterr().out.splitlines()[-1]

    # The plan, as it stands.
    assert "fits" in run(*commands[0])

    # A try, a run of four iterations, the same resumed, and the checkpoint after two of them made the model.
    steps = zip(commands[1:], (1, 4, 4, 2), (["--out", str(tmp_path / "try")], [], [], []))
    for words, iterations, out in steps:
        if iterations == 2:
            shutil.rmtree(tmp_path / "day/checkpoint-4")
        argv = [word.replace("runs/day", str(tmp_path / "day")) for word in words]
        argv += [*out, *small, "--dtype", "fp32", "--save-every", "2", "--keep", "9", "--iterations", iterations]
        assert json.loads(run(*argv))["iterations"] == iterations

    # The snippet that loads the LoRA.
    snippet = re.search(r"```py\n(.*?)```", text, re.S)[1]
    for large, own in (("black-forest-labs/FLUX.1-dev", HERE / "tiny/flux"), ("runs/day", tmp_path / "day")):
        assert large in snippet
        snippet = snippet.replace(large, str(own))
    variables: dict = {}
    exec(snippet, variables)
    assert variables["pipe"].get_active_adapters()


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
