"""Small random checkpoints in diffusers' own format, one for each family of image models beside FLUX.1.

Every component is of the class that the published checkpoint has, only narrow; vocabularies are bytes. Constants that a
typed-in number would miss (scales, shifts, running means) are unlike their defaults. Around a transformer of another
size the text encoders and the autoencoder are as wide as it wants what it is given.
"""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

# The template of Qwen3's chats, shortened: a thinking model that may not think gets an empty thought.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, as byte-level tokenizers write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer_of(kind, tokens: list[str], **settings):
    """A tokenizer of these tokens that merges nothing."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return kind(vocab=str(vocabulary), merges=str(merges), **settings)


def clip(width: int) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """A CLIP text tower with a projection, and a tokenizer that knows bytes alone."""
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config), tokenizer_of(CLIPTokenizer, tokens, model_max_length=77)


def qwen(width: int, layers: int, kind):
    """A Qwen3 of so many layers, and a tokenizer that knows bytes and the marks of a chat."""
    tokenizer = tokenizer_of(
        Qwen2TokenizerFast, byte_symbols(), pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHAT, model_max_length=96,
    )  # fmt: skip
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8, hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return kind(config), tokenizer


def vae(channels: int, kind=AutoencoderKL, **constants):
    """An autoencoder of four levels, whose latents are an eighth of the picture's size."""
    return kind(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **constants,
    )  # fmt: skip


def sd3(transformer=None, **scheduler) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5's classes: two CLIPs, T5, joint attention with norms, dual attention in the first block."""
    transformer = transformer or SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=16, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip

    # The first CLIP has 3 of 8 parts of the pooled vector, as 768 of 2048 in the published one.
    config = transformer.config
    narrow = config.pooled_projection_dim * 3 // 8 // 2 * 2
    (one, tokenizer_one), (two, tokenizer_two) = clip(narrow), clip(config.pooled_projection_dim - narrow)
    t5 = T5Config(vocab_size=384, d_model=config.joint_attention_dim, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae(16, scaling_factor=1.5305, shift_factor=0.0609), one, tokenizer_one, two, tokenizer_two,
        T5EncoderModel(t5), ByT5Tokenizer(extra_ids=0, model_max_length=24),
    )  # fmt: skip


def flux2(transformer=None, distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2-klein's classes. Its text is three inner layers of Qwen3, the last of them the 27th."""
    transformer = transformer or Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    text, tokenizer = qwen(transformer.config.joint_attention_dim // 3, 28, Qwen3ForCausalLM)
    decoder = vae(transformer.config.in_channels // 4, AutoencoderKLFlux2)
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, decoder, text, tokenizer, transformer, distilled)


def z_image(transformer=None) -> ZImagePipeline:
    """Z-Image's classes: one stream, after a refiner for the picture and one for the text."""
    transformer = transformer or ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad)
    text, tokenizer = qwen(transformer.config.cap_feat_dim, 2, Qwen3Model)
    scheduler, decoder = FlowMatchEulerDiscreteScheduler(shift=6.0), vae(16, scaling_factor=0.3611, shift_factor=0.1159)
    return ZImagePipeline(scheduler, decoder, text, tokenizer, transformer)


FAMILIES = {"sd3": sd3, "flux2": flux2, "z_image": z_image}


def saved(name: str, folder: Path, **changes) -> Path:
    """Write the random checkpoint of a family, always the same one, and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FAMILIES[name](**changes).save_pretrained(folder)
    return folder
