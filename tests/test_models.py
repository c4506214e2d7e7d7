"""SD3, FLUX.2 and Z-Image against diffusers' own pipelines, on small checkpoints with random weights.

What tests/test_policies.py proves for FLUX.1 and Wan, for these: from the same noise the pipeline and we make the same
pictures, whatever size, number of steps and guidance; training, LoRA, export, and what the checkpoint says of itself.
"""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import families
import numpy as np
import pytest
import torch
from test_hardware import words_of_config
from test_policies import a_tree_and_an_update, move_weights

import flags
import models
import train_image
from branchgrpo import Sampler, sample_ode, update
from models import IMAGE_MODELS, Flux2Policy, SD3Policy, ZImagePolicy, checkpoint_values, policy_of
from pretrained import FILES
from rewards import parse_weights
from sde import sigma_schedule

PROMPTS = ['red "CAT"', "a photo of two bears, one of them asleep", ""]
KINDS = {"sd3": SD3Policy, "flux2": Flux2Policy, "z_image": ZImagePolicy}
FAMILIES = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> a random checkpoint, made once."""
    return {name: families.saved(name, tmp_path_factory.mktemp(name) / "model") for name in families.FAMILIES}


def load(folder, family, height=32, width=64, **kwargs):
    return KINDS[family].load(str(folder), height, width, **kwargs)


def noise_for(policy, n: int, seed: int = 1):
    return torch.randn(n, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


def options(folder, height=32, width=64, steps=4, dtype="fp32", guidance=None):
    """Options as `flags.resolve` has them when it asks the checkpoint."""
    sizes = {"height": height, "width": width, "steps": steps}
    return SimpleNamespace(model=str(folder), dtype=dtype, guidance=guidance, **sizes)


def pipelines_pictures(folder, noise, policy, steps: int, guidance: float, sigmas=True):
    """What the checkpoint's own pipeline makes of the noise, and the noise levels that it took."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(policy, Flux2Policy):  # which is given latents before they are packed
        noise = noise.transpose(1, 2).unflatten(2, (policy.rows, policy.columns))
    kwargs = {"sigmas": np.linspace(1, 1 / steps, steps).tolist()} if sigmas else {}
    size = {"height": policy.height, "width": policy.width, "max_sequence_length": policy.text_length}
    pictures = pipe(
        prompt=list(PROMPTS), **size, **kwargs, num_inference_steps=steps, guidance_scale=guidance, latents=noise,
        output_type="pt",
    ).images  # fmt: skip
    return pictures, pipe.scheduler.sigmas


@pytest.mark.parametrize("shape, steps", [((32, 64), 4), ((48, 32), 7)])
@pytest.mark.parametrize(
    "family, guidance", [("sd3", 1.0), ("sd3", 4.5), ("flux2", 1.0), ("flux2", 3.0), ("z_image", 0.0), ("z_image", 2.0)]
)
def test_pictures_equal_the_pipelines(folders, family, guidance, shape, steps):
    """The same noise: encode, guided velocity, the walk at the checkpoint's own noise levels, decode."""
    policy = load(folders[family], family, *shape, guidance=guidance)
    noise = noise_for(policy, 3)
    theirs, sigmas = pipelines_pictures(folders[family], noise, policy, steps, guidance)

    shift, origin = checkpoint_values(KINDS[family], options(folders[family], *shape, steps))["shift"]
    ours_sigmas = sigma_schedule(steps, shift)
    assert origin == "its scheduler" and torch.allclose(ours_sigmas.float(), sigmas, atol=1e-6)
    ours = policy.decode(sample_ode(policy, policy.encode(PROMPTS), Sampler(ours_sigmas, "dance", 0.3), noise))
    assert ours.shape == (3, 3, *shape) and ours.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-5


def test_sd3s_own_noise_levels(folders):
    """Without explicit levels diffusers shifts SD3's twice at the end; walked along them, the pictures are equal."""
    policy = load(folders["sd3"], "sd3", guidance=2.0)
    noise = noise_for(policy, 3)
    theirs, sigmas = pipelines_pictures(folders["sd3"], noise, policy, 4, 2.0, sigmas=False)
    ours = policy.decode(sample_ode(policy, policy.encode(PROMPTS), Sampler(sigmas.double(), "dance", 0.3), noise))
    assert (ours - theirs).abs().max() < 1e-5
    assert (sigmas - sigma_schedule(4, 3.0)).abs().max() > 1e-3


def test_sd3_with_a_shift_that_grows_with_the_picture(tmp_path):
    """Where the scheduler says so, mu follows from the number of tokens."""
    growing = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    folder = families.saved("sd3", tmp_path, **growing)
    policy = load(folder, "sd3", guidance=1.0)
    noise = noise_for(policy, 3)
    theirs, sigmas = pipelines_pictures(folder, noise, policy, 4, 1.0)
    shift = checkpoint_values(SD3Policy, options(folder))["shift"][0]
    assert shift == pytest.approx(math.exp(0.5 + (8 - 4) / (64 - 4) * (1.15 - 0.5)))
    assert torch.allclose(sigma_schedule(4, shift).float(), sigmas, atol=1e-6)
    ours = sample_ode(policy, policy.encode(PROMPTS), Sampler(sigma_schedule(4, shift), "dance", 0.3), noise)
    assert (policy.decode(ours) - theirs).abs().max() < 1e-5


@FAMILIES
def test_rows_do_not_see_one_another(folders, family):
    """Rows of one call, each with its own prompt, length of prompt and noise level, are what each is alone."""
    policy = load(folders[family], family, guidance=2.0)
    x, sigma = noise_for(policy, 3), torch.tensor([1.0, 0.5, 0.1])
    cond = policy.encode(PROMPTS)
    with torch.no_grad():
        together = policy.velocity(x, sigma, cond)
        alone = [policy.velocity(x[i : i + 1], sigma[i : i + 1], policy.encode(PROMPTS[i : i + 1])) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_the_empty_prompt_is_encoded_once(folders, tmp_path):
    """A file for each prompt and one for the empty one, in which no other is repeated; without guidance the same."""
    guided = load(folders["sd3"], "sd3", guidance=2.0, text_cache=str(tmp_path))
    cond = guided.encode(PROMPTS[:2])
    assert cond["empty_states"].shape == cond["states"].shape and cond["empty_states"].stride(0) == 0
    assert len(list(tmp_path.iterdir())) == 2 + 1
    plain = load(folders["sd3"], "sd3", guidance=1.0, text_cache=str(tmp_path))
    again = plain.encode(PROMPTS[:2])
    assert torch.equal(again["states"], cond["states"]) and again.keys() < cond.keys()
    assert len(list(tmp_path.iterdir())) == 2 + 1


@FAMILIES
def test_guidance_goes_past_the_velocity_with_the_prompt(folders, family):
    """u + g (c - u), and for Z-Image's s = g - 1 the same; without guidance no empty prompt is encoded."""
    none = KINDS[family].guidance_of_none
    plain = load(folders[family], family, guidance=none)
    guided = load(folders[family], family, guidance=none + 2)
    x, sigma = noise_for(plain, 2), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        with_prompt = plain.velocity(x, sigma, plain.encode(PROMPTS[:2]))
        without = plain.velocity(x, sigma, plain.encode(["", ""]))
        v = guided.velocity(x, sigma, guided.encode(PROMPTS[:2]))
    torch.testing.assert_close(v, without + 3 * (with_prompt - without), atol=1e-5, rtol=1e-4)
    assert not any(name.startswith("empty_") for name in plain.encode(PROMPTS))


@FAMILIES
def test_a_tree_trains_on_policy(folders, family):
    """A tree, its credit and one update: in the first pass every ratio is 1, whatever the micro-batch."""
    policy = load(folders[family], family, guidance=KINDS[family].guidance_of_none + 1)
    pictures, log, _, _ = a_tree_and_an_update(policy, policy.encode(PROMPTS[:1]))
    assert pictures.shape == (4, 3, 32, 64) and pictures.isfinite().all()
    assert log["ratio_dev"] < 1e-4 and log["grad_norm"] > 0


@FAMILIES
def test_every_weight_is_trained_and_saved(folders, family, tmp_path):
    """All weights get a gradient, as DDP asks, and their checkpoint loads in diffusers with the trained velocity."""
    policy = load(folders[family], family, guidance=KINDS[family].guidance_of_none)
    x, sigma, cond = noise_for(policy, 2), torch.tensor([0.9, 0.3]), policy.encode(PROMPTS[:2])
    policy.velocity(x, sigma, cond).square().mean().backward()
    assert len(policy.trainable()) > 20 and all(weight.grad is not None for weight in policy.trainable())
    move_weights(policy)
    trained = policy.velocity(x, sigma, cond)
    policy.save(tmp_path / "model")
    loaded = load(tmp_path / "model", family, guidance=KINDS[family].guidance_of_none)
    assert torch.allclose(loaded.velocity(x, sigma, cond), trained, atol=1e-5)


@FAMILIES
def test_a_lora_trains_is_its_own_reference_and_loads_in_diffusers(folders, family, tmp_path):
    """Adapters off is the untrained model; the saved file in a fresh pipeline is the trained one, as is a new start."""
    none = KINDS[family].guidance_of_none
    policy, base = (load(folders[family], family, guidance=none, lora=r, keep_reference=r > 0) for r in (4, 0))
    x, sigma, cond = noise_for(policy, 2), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS[:2])
    plain = base.velocity(x, sigma, cond)
    assert torch.allclose(policy.velocity(x, sigma, cond), plain, atol=1e-6)

    move_weights(policy)
    trained = policy.velocity(x, sigma, cond)
    assert (trained - plain).abs().max() > 1e-3
    assert torch.allclose(policy.velocity(x, sigma, cond, reference=True), plain, atol=1e-6)

    policy.save(tmp_path / "model")
    fresh = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    fresh.load_lora_weights(tmp_path / "model")
    loaded = KINDS[family](fresh, 32, 64, guidance=none)
    assert torch.allclose(loaded.velocity(x, sigma, cond), trained, atol=1e-5)
    again = load(folders[family], family, guidance=none, lora=4, lora_from=str(tmp_path / "model"))
    assert torch.allclose(again.velocity(x, sigma, cond), trained, atol=1e-6)


@FAMILIES
def test_checkpointing_changes_nothing(folders, family):
    """Activations that are computed again give the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        policy = load(folders[family], family, lora=2, checkpointing=checkpointing)
        move_weights(policy)
        v = policy.velocity(noise_for(policy, 2), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS[:2]))
        v.square().sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.trainable()]))
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@FAMILIES
def test_attention_gets_one_dtype(folders, family, monkeypatch):
    """In bf16 queries, keys and values are alike, for weights that are trained in float32 as for frozen ones."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for lora in (0, 2):
        policy = load(folders[family], family, dtype=torch.bfloat16, lora=lora)
        cond = policy.encode(PROMPTS[:1])
        seen.clear()
        policy.velocity(noise_for(policy, 1), torch.tensor([0.5]), cond)
        assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)


@FAMILIES
def test_bf16_keeps_fp32_master_weights(folders, family):
    policy = load(folders[family], family, dtype=torch.bfloat16)
    exact = load(folders[family], family)
    x, sigma = noise_for(policy, 2), torch.tensor([0.9, 0.4])
    v, expected = (p.velocity(x, sigma, p.encode(PROMPTS[:2])) for p in (policy, exact))
    assert v.dtype == torch.float32 and {p.dtype for p in policy.trainable()} == {torch.float32}
    assert (v - expected).norm() < 0.05 * expected.norm()
    assert policy.decode(x).isfinite().all()


# --------------------------------------------------------------------------------------------------------------- fp16
def fp16_update(policy, scale: float):
    """An update in fp16 whose scaler begins with `scale`: its log, how far the weights moved, and the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [weight.detach().clone() for weight in policy.trainable()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_policies.update", lambda *args: update(*args, scaler=scaler))
        _, log, _, _ = a_tree_and_an_update(policy, policy.encode(PROMPTS[:1]))
    return log, sum((a - b).abs().sum().item() for a, b in zip(before, policy.trainable())), scaler


def test_fp16_needs_its_scaler_and_trains_with_it(folders):
    """The gradients are those of float32 within fp16's rounding; a scale that is too large makes no step and halves."""
    logs = {}
    for name, dtype, scale in (("exact", None, 1.0), ("fp16", torch.float16, 2.0**16)):
        policy = load(folders["sd3"], "sd3", guidance=1.0, **({"dtype": dtype} if dtype else {}))
        logs[name], moved, scaler = fp16_update(policy, scale)
        assert moved > 0 and scaler.get_scale() == scale
    assert logs["fp16"]["grad_norm"] == pytest.approx(logs["exact"]["grad_norm"], rel=0.05)
    assert logs["fp16"]["loss_scale"] == 2.0**16 and logs["fp16"]["ratio_dev"] < 1e-4

    policy = load(folders["sd3"], "sd3", guidance=1.0, dtype=torch.float16)
    log, moved, scaler = fp16_update(policy, 2.0**40)
    assert moved == 0 and log["grad_norm"] == 0 and scaler.get_scale() == 2.0**39


def test_fp16_is_refused_where_activations_leave_its_range(folders):
    with pytest.raises(ValueError, match="--dtype fp16 is for StableDiffusion3Pipeline: a ZImagePipeline leaves"):
        checkpoint_values(ZImagePolicy, options(folders["z_image"], dtype="fp16"))
    checkpoint_values(SD3Policy, options(folders["sd3"], dtype="fp16"))


# -------------------------------------------------------------------------------------------- which class, which values
def test_the_class_follows_from_the_checkpoint(folders, tmp_path):
    """From model_index.json; what is not supported is one sentence that lists what is."""
    assert {name: policy_of(str(folder), IMAGE_MODELS) for name, folder in folders.items()} == KINDS
    assert policy_of(str(flags.HERE / "tiny/flux"), IMAGE_MODELS) is models.FluxPolicy
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    supported = "FluxPipeline, StableDiffusion3Pipeline, Flux2KleinPipeline or ZImagePipeline"
    with pytest.raises(ValueError, match=f"is a QwenImagePipeline; a {supported} is needed here"):
        policy_of(str(tmp_path), IMAGE_MODELS)


def test_what_the_checkpoint_says_goes_before_the_table(folders):
    """Shift and guidance of the checkpoint unless given, with where they come from."""

    def resolved(folder, text=""):
        args = flags.parser("").parse_args(
            f"--model {folder} --height 32 --width 64 --steps 4 --leaves 4 {text}".split()
        )
        kind = policy_of(args.model, IMAGE_MODELS)
        flags.resolve(args, lambda options: checkpoint_values(kind, options))
        return args

    values = {name: resolved(folder) for name, folder in folders.items()}
    assert {name: args.guidance for name, args in values.items()} == {"sd3": 4.5, "flux2": 4.0, "z_image": 5.0}
    assert values["sd3"].shift == 3.0 and values["z_image"].shift == 6.0
    assert all(args.origin["shift"] == "its scheduler" for args in values.values())

    # FLUX.2's depends on size and steps.
    assert resolved(folders["flux2"], "--steps 8").shift != values["flux2"].shift

    given = resolved(folders["sd3"], "--shift 2 --guidance 1")
    assert (given.shift, given.guidance, given.origin["shift"]) == (2.0, 1.0, "given")
    # Turbo models are distilled, which nothing but their name says.
    turbo = folders["z_image"].with_name("Z-Image-Turbo")
    turbo.symlink_to(folders["z_image"])
    assert (resolved(turbo).guidance, resolved(turbo).origin["guidance"]) == (0.0, "its name: turbo")

    embedded = resolved(flags.HERE / "tiny/flux")
    assert embedded.shift == 3.0 and embedded.origin["shift"] != "its scheduler"


def test_flux_1_devs_shift_at_720(tmp_path):
    """2025 tokens: mu = 0.5 + (2025 - 256) / (4096 - 256) (1.15 - 0.5) = 0.799, s = 2.224."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"block_out_channels": [128, 256, 512, 512]}))
    assert models.FluxPolicy.token_side(str(tmp_path)) == 16
    args = options(tmp_path, 720, 720, 20)
    assert models.shift_of(models.FluxPolicy, args, {"use_dynamic_shifting": True}) == pytest.approx(2.2243, abs=1e-4)
    linear = {"use_dynamic_shifting": True, "time_shift_type": "linear"}  # mu itself is the shift
    assert models.shift_of(models.FluxPolicy, args, linear) == pytest.approx(0.7994, abs=1e-4)
    assert models.shift_of(models.WanPolicy, args, {"flow_shift": 3.0}) == 3.0


def test_distilled_flux2_takes_no_guidance(tmp_path):
    folder = families.saved("flux2", tmp_path, distilled=True)
    assert checkpoint_values(Flux2Policy, options(folder))["guidance"] == (1.0, "its model_index.json: distilled")
    with pytest.raises(ValueError, match="--guidance must be 1 or left out: this checkpoint is distilled.*got 4"):
        checkpoint_values(Flux2Policy, options(folder, guidance=4.0))
    policy = load(folder, "flux2")
    noise = noise_for(policy, 3)
    theirs, sigmas = pipelines_pictures(folder, noise, policy, 4, 4.0)  # which ignores the scale
    ours = sample_ode(policy, policy.encode(PROMPTS), Sampler(sigmas.double(), "dance", 0.3), noise)
    assert (policy.decode(ours) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    "family, wrong, words",
    [
        (
            "sd3",
            {"guidance": 0.0},
            "--guidance must be at least 1 for a StableDiffusion3Pipeline, which is none; got 0",
        ),
        ("flux2", {"guidance": 0.5}, "--guidance must be at least 1 for a Flux2KleinPipeline"),
        ("z_image", {"height": 40}, "--height must be a positive multiple of 16, got 40"),
        ("sd3", {"width": 24}, "--width must be a positive multiple of 16, got 24"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(folders, family, wrong, words):
    """The configs are enough to know it. Below 1 the prompt would count for less than nothing; Z-Image's 0 is none."""
    with pytest.raises(ValueError, match=re.escape(words)):
        checkpoint_values(KINDS[family], options(folders[family], **wrong))
    checkpoint_values(ZImagePolicy, options(folders["z_image"], guidance=0.0))


def test_wans_sizes_are_refused_before_it_is_loaded():
    wan = flags.HERE / "tiny/wan"
    for sizes, words in (((32, 32, 8), "--frames must be a multiple of 4, plus 1"), ((24, 32, 9), "--height")):
        args = options(wan, *sizes[:2])
        args.frames = sizes[2]
        with pytest.raises(ValueError, match=words):
            checkpoint_values(models.WanPolicy, args)


def test_why_a_checkpoint_is_not_there(monkeypatch):
    """A folder that does not exist is one; of a hub id there are four causes, and the library's sentence names none."""
    with pytest.raises(ValueError, match="^--model /data/sd35: there is no such folder$"):
        policy_of("/data/sd35", IMAGE_MODELS)

    def gated(*_):
        raise OSError("x/y is not a local folder and is not a valid model identifier\nlisted on the hub")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", gated)
    with pytest.raises(ValueError, match="valid model identifier; is the name right, its licence accepted on .*x/y"):
        policy_of("x/y", IMAGE_MODELS)


def test_sd3_knows_only_so_many_places(folders):
    """16 patches of 16 pixels."""
    load(folders["sd3"], "sd3", 256, 256)
    with pytest.raises(ValueError, match="--height and --width must be at most 256 for this checkpoint, got 32, 272"):
        load(folders["sd3"], "sd3", 32, 272)


# ---------------------------------------------------------------------------------------------------------- whole runs
@FAMILIES
def test_train_image_trains_each_family(folders, family, tmp_path, capsys):
    """The script, from the checkpoint's folder to pictures and a LoRA that diffusers loads; micro-batches and KL."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f'{colour} "{word}"' for colour in ("red", "blue") for word in ("A", "B", "C")))
    command = f"--model {folders[family]} --prompts {prompts} --height 32 --width 64 --steps 4 --leaves 4 --lora 2"
    command += " --reward jpeg --watch jpeg-large --iterations 2 --prompts-per-iteration 2 --micro-batch 3 --kl 0.01"
    command += f" --dtype fp32 --eval-size 2 --eval-every 2 --device cpu --out {tmp_path / 'run'}"
    train_image.main(command.split())
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [json.loads(line) for line in Path(document["out"], "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["ratio_dev"] < 1e-4 and rows[2]["grad_norm"] > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    pipe.load_lora_weights(tmp_path / "run/model")
    assert (tmp_path / "run/before_after.png").exists()


def test_fp16_resumes_bit_for_bit(folders, tmp_path, capsys):
    """The scale of the loss is part of a checkpoint."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('red "A"\nblue "B"\nteal "C"\n')
    command = f"--model {folders['sd3']} --prompts {prompts} --height 32 --width 32 --steps 4 --leaves 4 --lora 2"
    command += " --reward jpeg --prompts-per-iteration 2 --dtype fp16 --eval-size 2 --device cpu --guidance 1"
    command += " --iterations 2 --save-every 1 --lr-end 1"
    for name in ("whole", "halves"):
        train_image.main(f"{command} --out {tmp_path / name}".split())
    shutil.rmtree(tmp_path / "halves/checkpoint-2")
    scale = json.loads((tmp_path / "halves/checkpoint-1/scaler.json").read_text())
    assert scale["scale"] == 2.0**16 and scale["_growth_tracker"] == 1
    train_image.main(f"{command} --out {tmp_path / 'halves'} --resume".split())
    capsys.readouterr()

    last = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("whole", "halves")]
    same = [{k: v for k, v in row.items() if not k.startswith(("seconds", "peak"))} for row in last]
    assert same[0] == same[1] and same[0]["loss_scale"] == 2.0**16


@pytest.mark.parametrize("family, layers", [("sd3", 4 + 4 + 4 + 4 + 3), ("flux2", 8 + 2), ("z_image", 4 * (1 + 1 + 2))])
def test_a_lora_is_on_every_attention(folders, family, layers):
    """SD3: two streams of four, attn2 of the first block, and a last block whose text goes nowhere; FLUX.2: a double
    block, and the two fused layers of a single one; Z-Image: refiners and two blocks."""
    policy = load(folders[family], family, lora=2)
    assert len(policy.trainable()) == 2 * layers


def test_stable_diffusion_35_on_one_card(folders, tmp_path, capsys, monkeypatch):
    """The commands of docs/models.md in their order, from the plan on, with a small checkpoint for the large one."""
    text = (flags.HERE / "docs/models.md").read_text()
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("sh configs/sd3_lora_24gb.sh")]

    # What the commands load of rewards is what the page downloads.
    for words in commands[1:]:
        planned = words_of_config("sd3_lora_24gb.sh", tmp_path, *words, "--plan", "sd3.5-medium")[1:]
        args = train_image.job(planned)[0]
        assert args.watch == "auto"
        names = parse_weights(args.reward)
        for repository, file in (pair for name in names for pair in FILES[name]):
            assert f"hf download {repository} " in text and f" {file}" in text, (repository, file)
    assert len(commands) == 5 and commands[-1][2:4] == ["--guidance", "1"]
    small = f"--model {folders['sd3']} --prompts tiny/prompts_train.txt --height 32 --width 32 --steps 4 --leaves 4"
    small += " --reward jpeg --watch auto --eval-size 2 --prompts-per-iteration 2 --micro-batch 0 --device cpu"
    small += f" --dtype fp32 --save-every 1 --text-cache {tmp_path / 'text'}"
    monkeypatch.chdir(flags.HERE)

    def run(*argv) -> str:
        """The script's command in this process; the last line it printed."""
        script, *words = words_of_config("sd3_lora_24gb.sh", tmp_path, *argv)
        assert script == "train_image.py"
        train_image.main(words)
        return capsys.readouterr().out.splitlines()[-1]

    # The plan, as it stands; then a try, a run, the same resumed, and a run without guidance.
    assert "fits" in run(*commands[0])
    for words, iterations, out in zip(commands[1:], (1, 1, 2, 1), (["--out", str(tmp_path / "try")], [], [], [])):
        argv = [word.replace("runs/", f"{tmp_path}/") for word in words]
        assert json.loads(run(*argv, *out, *small.split(), "--iterations", iterations))["iterations"] == iterations

    # The snippet that loads the LoRA.
    snippet = re.search(r"```py\n(.*?)```", text, re.S)[1]
    for large, own in (("stabilityai/stable-diffusion-3.5-medium", folders["sd3"]), ("runs/sd3", tmp_path / "sd3")):
        assert large in snippet
        snippet = snippet.replace(large, str(own))
    variables: dict = {}
    exec(snippet, variables)
    assert variables["pipe"].get_active_adapters()


OFFICIAL = {  # one block of each kind at the published width: their parameters are checked in tests/test_hardware.py
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=2, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "flux2": lambda: diffusers.Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    ),
    "z_image": lambda: diffusers.ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1),
}  # fmt: skip


@pytest.mark.slow
@FAMILIES
def test_full_width(family, capsys):
    """The published width with one block of each kind, random weights: a tree and a LoRA update on the CPU."""
    policy = KINDS[family](families.FAMILIES[family](OFFICIAL[family]()), 128, 128, lora=8, checkpointing=True)
    pictures, log, rolled, updated = a_tree_and_an_update(policy, policy.encode(PROMPTS[:1]))
    assert pictures.isfinite().all() and log["ratio_dev"] < 1e-4 and log["grad_norm"] > 0
    with capsys.disabled():
        print(f"\n{family}: rollout {rolled:.0f} s, update {updated:.0f} s")
