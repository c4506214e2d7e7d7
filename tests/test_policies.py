"""The policies against diffusers' own pipelines, on small models with random weights.

The same noise gives the same pictures. LoRA, reference, bf16, 4 bits, compilation and the text cache do what they
promise, and a checkpoint that does not fit is refused in one sentence.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers import transformer_flux, transformer_wan
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import gpu

import loop
from branchgrpo import (
    Sampler,
    credit,
    flatten_edges,
    generators,
    prune,
    repeat_cond,
    rollout,
    sample_ode,
    take_cond,
    update,
)
from models import FluxPolicy, WanPolicy
from policy import load_pipeline, on_the_cpu
from sde import sigma_schedule
from tiny.make_tiny_flux import build
from tree import make_forest

PROMPTS = ['red "CAT"', 'blue "HOUSE"', 'teal "OWL"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random FluxPipeline of the embedded model's size."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("flux")
    pipe = build()
    pipe.vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)  # values that a typed-in constant would miss
    pipe.save_pretrained(path)
    return path


def load(folder, **kwargs):
    """A policy for pictures of 32 x 64."""
    return FluxPolicy.load(str(folder), 32, 64, **kwargs)


@torch.no_grad()
def move_weights(policy):
    """Add random numbers to what is trained, the same in every run."""
    for weight in policy.trainable():
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))


@pytest.mark.parametrize("shape", [(32, 64), (48, 32)])
def test_ode_equals_the_pipeline(folder, shape):
    """From the same noise FluxPipeline and encode, velocity, the ODE walk and decode make the same pictures."""
    policy = FluxPolicy.load(str(folder), *shape, guidance=2.0)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(sigma_schedule(5, 3.0), "dance", 0.3)
    ours = policy.decode(sample_ode(policy, policy.encode(PROMPTS), sampler, noise))

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": shape[0], "width": shape[1], "max_sequence_length": 16}
    kwargs = {"guidance_scale": 2.0, "num_inference_steps": 5, "latents": noise, "output_type": "pt"}
    theirs = pipe(PROMPTS, **size, **kwargs).images
    assert ours.shape == (3, 3, *shape)
    assert (ours - theirs).abs().max() < 1e-5


def test_every_row_has_its_own_prompt_and_sigma(folder):
    """Rows of one call do not see one another: together they are what each is alone."""
    policy = load(folder)
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    sigma, cond = torch.tensor([1.0, 0.5, 0.1]), policy.encode(PROMPTS)
    with torch.no_grad():
        together = policy.velocity(x, sigma, cond)
        alone = [policy.velocity(x[i : i + 1], sigma[i : i + 1], policy.encode(PROMPTS[i : i + 1])) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_cond_helpers():
    cond = {"a": torch.arange(3)}
    assert repeat_cond(cond, 2)["a"].tolist() == [0, 0, 1, 1, 2, 2]
    assert take_cond(cond, torch.tensor([2, 0]))["a"].tolist() == [2, 0]


def test_only_the_transformer_is_trained(folder):
    """Gradients reach the transformer's weights, and nothing else asks for any."""
    policy = load(folder)
    v = policy.velocity(torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(PROMPTS[:1]))
    v.square().mean().backward()
    frozen = (policy.pipe.vae, policy.pipe.text_encoder, policy.pipe.text_encoder_2)
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    assert len(policy.trainable()) == len(list(policy.transformer.parameters()))
    assert sum(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.trainable()) > 100


def test_lora_trains_adapters_only_and_its_reference_is_the_base(folder, tmp_path):
    """Adapters off is the untrained model, before and after a step; the saved file loads into a fresh pipeline."""
    policy, base = load(folder, lora=4, keep_reference=True), load(folder)
    x, sigma = torch.randn(2, *policy.latent_shape), torch.tensor([0.9, 0.4])
    cond = policy.encode(PROMPTS[:2])
    plain = base.velocity(x, sigma, cond)
    assert torch.allclose(policy.velocity(x, sigma, cond), plain, atol=1e-6)  # B starts at 0

    # A stand-in for training: random numbers on all adapters.
    move_weights(policy)
    trained = policy.velocity(x, sigma, cond)
    assert (trained - plain).abs().max() > 1e-3
    assert torch.allclose(policy.velocity(x, sigma, cond, reference=True), plain, atol=1e-6)
    assert policy.velocity(x, sigma, cond).requires_grad  # adapters are back on, and still trained

    # alpha / rank is 2, which diffusers restores from the file's metadata.
    policy.save(tmp_path)
    fresh = FluxPipeline.from_pretrained(folder)
    fresh.load_lora_weights(tmp_path)
    loaded = FluxPolicy(fresh, 32, 64)
    assert torch.allclose(loaded.velocity(x, sigma, cond), trained, atol=1e-5)


@pytest.fixture(scope="module")
def lora_file(folder, tmp_path_factory):
    """A LoRA of rank 4 that was trained, and the policy that it was saved from."""
    policy, out = load(folder, lora=4), tmp_path_factory.mktemp("lora") / "model"
    move_weights(policy)
    policy.save(out)
    return out, policy


@pytest.mark.parametrize("with_metadata", [True, False])
def test_training_starts_from_a_lora(folder, lora_file, with_metadata, tmp_path):
    """It has the velocity that diffusers gives the file, is trained, and its reference is the model below."""
    source, trained = lora_file
    if not with_metadata:  # a file that says nothing means alpha = rank, half of what alpha = 2 rank adds
        weights = load_file(source / "pytorch_lora_weights.safetensors")
        source = tmp_path / "bare.safetensors"
        save_file(weights, source)
    policy, pipe = load(folder, lora=4, lora_from=str(source)), FluxPipeline.from_pretrained(folder)
    pipe.load_lora_weights(source)

    x, sigma, cond = torch.randn(2, *policy.latent_shape), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS[:2])
    expected = FluxPolicy(pipe, 32, 64).velocity(x, sigma, cond)
    velocity = policy.velocity(x, sigma, cond)
    assert torch.allclose(velocity, expected, atol=1e-6) and velocity.requires_grad
    assert torch.equal(velocity, trained.velocity(x, sigma, cond)) == with_metadata
    plain = load(folder).velocity(x, sigma, cond)
    assert torch.allclose(policy.velocity(x, sigma, cond, reference=True), plain, atol=1e-6)
    assert (velocity - plain).abs().max() > 1e-3


def test_a_lora_that_does_not_fit_is_named(folder, lora_file, wan, tmp_path):
    """Another rank, another model's layers, a file that is damaged or missing: one sentence each."""
    source, _ = lora_file
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((source / "pytorch_lora_weights.safetensors").read_bytes()[:1000])
    for rank, file, words in (
        (8, source, "has rank 4, and --lora is 8"),
        (4, damaged, "cannot be loaded"),
        (4, tmp_path / "missing", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            load(folder, lora=rank, lora_from=str(file))
    with pytest.raises(ValueError, match="for other layers than are trained here"):
        WanPolicy.load(str(wan), 32, 32, 5, lora=4, lora_from=str(source))


def test_reference_copy_without_lora(folder):
    """The reference stays the untrained model while all weights move."""
    policy = load(folder, keep_reference=True)
    x, sigma, cond = torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(PROMPTS[:1])
    before = policy.velocity(x, sigma, cond)
    with torch.no_grad():
        for p in policy.trainable():
            p.mul_(1.1)
    assert torch.allclose(policy.velocity(x, sigma, cond, reference=True), before, atol=1e-6)
    assert not torch.allclose(policy.velocity(x, sigma, cond), before, atol=1e-4)


def test_bf16_keeps_fp32_master_weights(folder):
    """What is trained and what is returned is float32; what is frozen is bf16."""
    policy = load(folder, dtype=torch.bfloat16)
    v = policy.velocity(torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(PROMPTS[:1]))
    assert v.dtype == torch.float32 and {p.dtype for p in policy.trainable()} == {torch.float32}
    assert policy.pipe.vae.dtype == torch.bfloat16
    assert policy.decode(torch.randn(1, *policy.latent_shape)).dtype == torch.float32


@pytest.mark.parametrize("flag, size", [("--height", (40, 64)), ("--width", (32, 8))])
def test_sizes_must_divide(folder, flag, size):
    with pytest.raises(ValueError, match=f"{flag} must be a positive multiple of 16"):
        FluxPolicy.load(str(folder), *size)


def test_a_broken_checkpoint_is_one_sentence(folder, tmp_path):
    """A folder without an index, one that lacks a component, one of another class, one with an empty component."""
    with pytest.raises(ValueError, match="no model_index.json"):
        load_pipeline(str(tmp_path), FluxPipeline, torch.float32)
    broken = shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ValueError, match="'text_encoder_2' is missing"):
        load_pipeline(str(broken), FluxPipeline, torch.float32)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    assert index["_class_name"] == "FluxPipeline"
    with pytest.raises(ValueError, match="is a WanPipeline; a FluxPipeline is needed"):
        load_pipeline(str(tmp_path), FluxPipeline, torch.float32)
    (broken / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_pipeline(str(broken), FluxPipeline, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- Wan
@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A random WanPipeline of the classes and the config keys of Wan2.1."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wan")
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    heads = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 96}
    transformer = WanTransformer3DModel(**heads, text_dim=32, freq_dim=32, qk_norm="rms_norm_across_heads")
    text = UMT5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    pipe = WanPipeline(
        ByT5Tokenizer(extra_ids=0, model_max_length=32), UMT5EncoderModel(text), vae,
        FlowMatchEulerDiscreteScheduler(shift=3.0), transformer,
    )  # fmt: skip
    pipe.save_pretrained(path)
    return path


MOVES = ["a red circle moves left", "a blue square", ""]


@pytest.mark.parametrize("guidance, shape", [(1.0, (32, 48, 9)), (4.0, (32, 32, 5)), (4.0, (16, 16, 1))])
def test_wan_equals_the_pipeline(wan, guidance, shape):
    """From the same noise WanPipeline and encode, guided velocity, the ODE walk and decode make the same videos."""
    policy = WanPolicy.load(str(wan), *shape, guidance=guidance)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    pipe = WanPipeline.from_pretrained(wan)
    pipe.set_progress_bar_config(disable=True)
    size = dict(zip(("height", "width", "num_frames"), shape)) | {"max_sequence_length": 32}
    kwargs = {"guidance_scale": guidance, "num_inference_steps": 4, "latents": noise, "output_type": "pt"}
    theirs = pipe(MOVES, **size, **kwargs).frames
    sampler = Sampler(pipe.scheduler.sigmas.double(), "dance", 0.3)
    ours = policy.decode(sample_ode(policy, policy.encode(MOVES), sampler, noise))
    assert ours.shape == theirs.shape == (3, shape[2], 3, *shape[:2])
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > 0.01


def test_wan_guidance_is_one_call_of_both_halves(wan):
    """u + g (c - u), each row with its own noise level; with g = 1 nothing else is encoded or computed."""
    policies = {g: WanPolicy.load(str(wan), 32, 32, 5, guidance=g) for g in (1.0, 3.0)}
    x = torch.randn(2, *policies[1.0].latent_shape, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.9, 0.2])
    with torch.no_grad():
        conditional = policies[1.0].velocity(x, sigma, policies[1.0].encode(MOVES[:2]))
        empty = policies[1.0].velocity(x, sigma, policies[1.0].encode(["", ""]))
        guided = policies[3.0].velocity(x, sigma, policies[3.0].encode(MOVES[:2]))
    torch.testing.assert_close(guided, empty + 3 * (conditional - empty), atol=1e-5, rtol=1e-4)
    assert set(policies[1.0].encode(MOVES)) == {"states"}


def test_wan_trains_with_lora_and_without(wan, tmp_path):
    """Every weight that is trained receives a gradient, and a model without a LoRA is saved as a whole pipeline."""
    for lora in (0, 2):
        policy = WanPolicy.load(str(wan), 32, 32, 5, guidance=2.0, lora=lora)
        x = torch.randn(1, *policy.latent_shape)
        policy.velocity(x, torch.tensor([0.5]), policy.encode(MOVES[:1])).square().mean().backward()
        grads = [p.grad for p in policy.trainable()]
        assert len(grads) > 20 and all(g is not None for g in grads)
        policy.save(tmp_path / str(lora))
    WanPipeline.from_pretrained(tmp_path / "0")


def test_wans_lora_file_gives_the_trained_velocity(wan, tmp_path):
    """The saved LoRA in a fresh pipeline is the trained model."""
    policy = WanPolicy.load(str(wan), 32, 32, 5, lora=2)
    x, sigma, cond = torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(MOVES[:1])
    plain = policy.velocity(x, sigma, cond)
    move_weights(policy)
    trained = policy.velocity(x, sigma, cond)
    policy.save(tmp_path)
    fresh = WanPipeline.from_pretrained(wan)
    fresh.load_lora_weights(tmp_path)
    loaded = WanPolicy(fresh, 32, 32, 5).velocity(x, sigma, cond)
    assert (trained - plain).abs().max() > 1e-3 and torch.allclose(loaded, trained, atol=1e-5)


def test_attention_gets_one_dtype(folder, wan, monkeypatch):
    """CUDA's autocast runs rms_norm in float32, but flash attention wants queries, keys and values alike in bf16."""
    # Norms that return float32 stand for CUDA's. Attention is watched on its way in.
    norm, seen = torch.nn.RMSNorm.forward, []
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: norm(self, x.float()).float())
    for module in (transformer_flux, transformer_wan):
        attend = module.dispatch_attention_fn

        def watched(q, k, v, *args, attend=attend, **kwargs):
            seen.append({q.dtype, k.dtype, v.dtype})
            return attend(q, k, v, *args, **kwargs)

        monkeypatch.setattr(module, "dispatch_attention_fn", watched)

    for kind, path, sizes in ((FluxPolicy, folder, (32, 64)), (WanPolicy, wan, (32, 32, 5))):
        policy = kind.load(str(path), *sizes, dtype=torch.bfloat16)
        x = torch.randn(1, *policy.latent_shape)
        policy.velocity(x, torch.tensor([0.5]), policy.encode(["a red circle moves left"]))
        assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)
        seen.clear()


@pytest.mark.parametrize(
    "sizes, words", [((32, 32, 8), "--frames"), ((24, 32, 9), "--height"), ((32, 40, 9), "--width")]
)
def test_wan_sizes_must_divide(wan, sizes, words):
    with pytest.raises(ValueError, match=words):
        WanPolicy.load(str(wan), *sizes)


def test_each_script_refuses_the_others_checkpoint(folder, wan):
    with pytest.raises(ValueError, match="is a FluxPipeline; a WanPipeline is needed"):
        WanPolicy.load(str(folder), 32, 32, 9)
    with pytest.raises(ValueError, match="is a WanPipeline; a FluxPipeline is needed"):
        FluxPolicy.load(str(wan), 32, 32)


def test_a_text_cache_outlives_the_policy_and_knows_its_encoders(folder, tmp_path, monkeypatch):
    """A second policy encodes only what the first has not; one with other encoders shares nothing with them."""
    expected = load(folder).encode(PROMPTS)
    load(folder, text_cache=str(tmp_path)).encode(PROMPTS[:2])
    second, encoded = load(folder, text_cache=str(tmp_path)), []
    text = second.text
    monkeypatch.setattr(second, "text", lambda prompts: encoded.append(prompts) or text(prompts))
    cond = second.encode(PROMPTS)
    assert encoded == [PROMPTS[2:]] and all(torch.equal(cond[k], expected[k]) for k in expected)

    # One weight differs, as in another checkpoint.
    other = load(folder, text_cache=str(tmp_path))
    with torch.no_grad():
        list(other.pipe.text_encoder.parameters())[-1].add_(1.0)
    files = len(list(tmp_path.iterdir()))
    other.encode(PROMPTS[:1])
    assert len(list(tmp_path.iterdir())) == files + 1 == 4


@pytest.mark.slow
def test_compiled_blocks_give_the_same_velocities_and_gradients(folder):
    """Up to rounding: less than 0.00001 of their length."""
    results = []  # (velocities, gradients): plain, compiled
    for compiled in (False, True):
        policy = load(folder, compiled=compiled)
        x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
        v = policy.velocity(x, torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS))
        v.square().sum().backward()
        results.append((v.detach(), torch.cat([p.grad.flatten() for p in policy.trainable()])))
    for plain, with_compile in zip(*results):
        assert (with_compile - plain).norm() < 1e-5 * plain.norm()


def test_parts_are_decoded_into_one_tensor():
    """Five latents, two at a time: parts of 2, 2 and 1, in their order."""
    sizes = []

    def decode(x):
        sizes.append(len(x))
        return x.unsqueeze(1) * 10

    pictures = on_the_cpu(decode, torch.arange(5.0), 2)
    assert sizes == [2, 2, 1] and pictures.tolist() == [[0.0], [10.0], [20.0], [30.0], [40.0]]


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
)
def test_four_bits_train_a_lora(folder, device, monkeypatch):
    """NF4: velocities near those of float32, gradients in the LoRA alone.

    diffusers packs weights on GPUs only; bitsandbytes can on the CPU too. There its two questions for a GPU are
    answered in its place, and packing, unpacking and gradients are the library's own.
    """
    pytest.importorskip("bitsandbytes", reason="make slow installs it")
    if device == "cpu":
        quantizer = importlib.import_module("diffusers.quantizers.bitsandbytes").BnB4BitDiffusersQuantizer
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})

    plain, packed = load(folder, device=device), load(folder, nf4=True, lora=4, dtype=torch.bfloat16, device=device)
    assert any(p.dtype == torch.uint8 for p in packed.transformer.parameters())
    x = torch.randn(3, *plain.latent_shape, generator=torch.Generator().manual_seed(3)).to(device)
    sigma, cond = torch.tensor([0.9, 0.5, 0.1], device=device), plain.encode(PROMPTS)
    v, v_plain = packed.velocity(x, sigma, packed.encode(PROMPTS)), plain.velocity(x, sigma, cond)
    assert 0 < (v - v_plain).norm() < 0.3 * v_plain.norm()
    v.square().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in packed.trainable())


def a_tree_and_an_update(policy, cond):
    """Roll out four leaves of one prompt, train once on given rewards: pictures, the update's log, seconds of both."""
    forest, sampler = make_forest(4, 2, (0, 1)), Sampler(sigma_schedule(4, 3.0), "cps", 0.7)
    lap = loop.stopwatch(policy.device)
    out = rollout(policy, cond, forest, sampler, generators(0, 0, range(1)), store="cpu")
    pictures, rolled = policy.decode(out.latents[-1].flatten(0, 1)), lap()
    rewards = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    advantages = credit(out, forest, rewards, 1.0, 5.0)
    edges = flatten_edges(out, forest, prune(forest, rewards, None, None), advantages, torch.arange(1), "edge")
    args = SimpleNamespace(clip=1e-4, kl=0.0, micro_batch=1, max_grad_norm=1.0)
    log = update(policy, torch.optim.AdamW(policy.trainable()), Accelerator(cpu=True), edges, cond, sampler, args)
    return pictures, log, rolled, lap()


@pytest.mark.slow
def test_flux_1_dev_at_full_width(capsys):
    """FLUX.1-dev's config with one block of each kind, random weights: a tree and a LoRA update on the CPU.

    Text encoders and VAE are stand-ins, of the true widths where the transformer meets them, with FLUX.1-dev's own
    constants of the normalisation: those of bench/gpu.py.
    """
    pipe = gpu.stand_in(FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True))
    policy = FluxPolicy(pipe, 128, 128, lora=8, checkpointing=True)
    cond = policy.encode(PROMPTS[:1])
    assert cond["states"].shape[2] == 4096 and cond["pooled"].shape == (1, 768)
    pictures, log, rolled, updated = a_tree_and_an_update(policy, cond)
    assert pictures.isfinite().all() and log["ratio_dev"] < 1e-4 and log["grad_norm"] > 0
    with capsys.disabled():
        print(f"\nFLUX.1-dev, two blocks: rollout {rolled:.0f} s, update {updated:.0f} s")
