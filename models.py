"""Models: FLUX.1, SD3, FLUX.2 and Z-Image for pictures, Wan for videos, for any size and checkpoint of their classes.

What a model must offer, on top of what `Policy` (policy.py) does for all of them:

1. predict       the velocity, from one call of the transformer; `Policy.velocity` makes guidance from it
2. text          prompts to conditioning, with the pipeline's own text encoders
3. latents_of    from what the transformer sees to what the VAE decodes
4. latent_shape, text_length, pixels    set in __init__
5. token_side    the pixels that a token covers, from the configs alone: sizes are refused before anything is loaded

How they differ, and where the values come from:

|              | latent_shape                  | time       | guidance                  | text conditioning            |
|--------------|-------------------------------|------------|---------------------------|------------------------------|
| FluxPolicy   | (tokens, 64), packed 2 x 2    | sigma      | an input: one forward     | T5 states, CLIP's pooled     |
| SD3Policy    | (16, rows, columns)           | 1000 sigma | two forwards              | CLIP and T5 states, pooled   |
| Flux2Policy  | (tokens, 128), packed, normed | sigma      | two forwards or distilled | Qwen3 states of three layers |
| ZImagePolicy | (16, rows, columns)           | 1 - sigma  | two forwards, 0 is none   | Qwen3 states, of any length  |
| WanPolicy    | (16, frames, rows, columns)   | 1000 sigma | two forwards              | UMT5 states, zero after it   |

Channel counts, factors of the VAE, constants of the normalisation and the length of the text are read from the
checkpoint's own config. So small models, as those in tiny/, take the same path as the published ones.
tests/test_policies.py and tests/test_models.py compare every class with diffusers' own pipelines: the same noise gives
the same pictures.

`policy_of` finds the class that a checkpoint needs, `checkpoint_values` what the checkpoint itself says about shift and
guidance. To add a model, write its class and name it in IMAGE_MODELS.

Direction of time: sigma = 1 is pure noise, sigma = 0 the picture.
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from branchgrpo import Cond
from policy import Policy, cannot_be_loaded, check_pipeline


def check_size(height: int, width: int, multiple: int) -> None:
    """Refuse a size that tokens cannot tile: both sides must be positive multiples of what one token covers.

    Args:
        height, width: in pixels.
        multiple: pixels along one side of a token: the VAE's factor times the patch, for all published models here
            8 x 2 = 16.

    Raises:
        ValueError: naming the flag.
    """
    for flag, size in (("--height", height), ("--width", width)):
        if size < multiple or size % multiple:
            raise ValueError(f"{flag} must be a positive multiple of {multiple}, got {size}")


def check_frames(frames: int, frames_per_latent: int) -> None:
    """Refuse a number of frames that the VAE cannot tile: one frame, and then so many for each further latent frame.

    Args:
        frames: of a video. frames_per_latent: 4 for Wan's VAE.

    Raises:
        ValueError: naming the flag.
    """
    if frames < 1 or (frames - 1) % frames_per_latent:
        raise ValueError(f"--frames must be a multiple of {frames_per_latent}, plus 1, got {frames}")


# ------------------------------------------------------------------------------------------------------------ pictures
class ImagePolicy(Policy):
    """What the image models share: their size in pixels, latent positions and tokens.

    Args:
        pipe: the model's diffusers pipeline.
        height, width: pixels, multiples of the VAE's factor times the patch (16 for all published models here).
        kwargs: of `Policy`.

    Raises:
        ValueError: if height or width does not divide.
    """

    patch = 2  # latent positions along a side of a token
    usual_guidance: float  # where --guidance is not given
    guidance_source = "the model card"

    def __init__(self, pipe: DiffusionPipeline, height: int, width: int, **kwargs):
        # The size is checked first, before anything is moved or split.
        token_side = self.patch * pipe.vae_scale_factor  # pixels along a side of a token
        check_size(height, width, token_side)
        super().__init__(pipe, **kwargs)

        self.height, self.width, self.pixels = height, width, height * width
        self.rows, self.columns = height // token_side, width // token_side  # of tokens

    def unpacked_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the VAE's latent: (16, 4, 8) for 32 x 64 pixels."""
        return self.pipe.vae.config.latent_channels, self.patch * self.rows, self.patch * self.columns

    def latents_of(self, x: Tensor) -> Tensor:
        """Latents (B, channels, rows, columns) with mean 0 and variance 1 -> those of the VAE.

        The transformer was trained on (z - shift) * scale, with both numbers from the VAE's config: undo it.
        """
        vae = self.pipe.vae.config
        return x / vae.scaling_factor + vae.shift_factor

    @classmethod
    def token_side(cls, model: str) -> int:
        """Pixels along a side of a token, by the config of a checkpoint's VAE: a factor of 2 per level but the last."""
        levels = AutoencoderKL.load_config(model, subfolder="vae")["block_out_channels"]
        return cls.patch * 2 ** (len(levels) - 1)

    @staticmethod
    def log_shift(tokens: int, steps: int, config) -> float:
        """mu of a scheduler that shifts by size: linear in the number of tokens, between two that the config names.

        Args:
            tokens: of the picture. steps: T. config: the scheduler's.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )


class FluxPolicy(ImagePolicy):
    """FLUX.1 over packed latents of shape (tokens, channels).

    Packing. FLUX's VAE makes a latent of 16 channels, each side 8 times smaller than the picture's. The transformer
    takes 2 x 2 neighbouring positions as one token, with all of their channels. Example: a picture of 32 x 64 pixels
    has the latent (16, 4, 8), which is 2 x 4 = 8 tokens of 4 x 16 = 64 channels. Channel 4 c + 2 dy + dx of a token is
    channel c of the latent, at row dy and column dx of the 2 x 2. FLUX.1-dev at 720 x 720 has the latent (16, 90, 90),
    which is 45 x 45 = 2025 tokens. Packing only moves numbers, and noise, steps and log-probabilities do not care
    where a number stands. So everything stays packed, and `latents_of` alone unpacks.

    Args:
        guidance: value of the embedded guidance; unused by a checkpoint without that embedding.
        pipe, height, width, kwargs: of `ImagePolicy`.
    """

    pipeline = "FluxPipeline"
    usual_guidance, guidance_source = 3.5, "FLUX.1-dev's model card"

    # FLUX.1-dev was distilled from a model with classifier-free guidance: it takes the scale as an input, embedded like
    # the time, and predicts the guided velocity itself. FLUX.1-schnell has no such input.
    classifier_free = False

    def __init__(self, pipe: DiffusionPipeline, height: int, width: int, guidance: float = 3.5, **kwargs):
        super().__init__(pipe, height, width, guidance=guidance, **kwargs)

        # The transformer sees a list of tokens. Where each stands it reads from img_ids (tokens, 3), which are 0, row
        # and column, and turns them into rotary position embeddings. They are constants, alike for every row of a
        # batch.
        self.latent_shape = (self.rows * self.columns, pipe.transformer.config.in_channels)  # (tokens, channels)
        self.img_ids = pipe._prepare_latent_image_ids(1, self.rows, self.columns, self.device, torch.float32)

        # 512 as in diffusers' pipeline, or fewer where the tokenizer knows no more.
        self.text_length = min(512, pipe.tokenizer_2.model_max_length)

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt) from packed latents (B, tokens, channels); cond: states (B, L, C), pooled (B, C').

        sigma is the time: the model multiplies it by 1000 itself.
        """
        has_guidance = self.pipe.transformer.config.guidance_embeds
        guidance = torch.full_like(sigma, self.guidance, dtype=x.dtype) if has_guidance else None

        # Text tokens have no place in the picture: all stand at (0, 0, 0).
        txt_ids = torch.zeros(cond["states"].shape[1], 3, device=x.device)  # (L, 3)
        return self.call(
            reference,
            hidden_states=x,
            timestep=sigma.to(x.dtype),
            guidance=guidance,
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
            img_ids=self.img_ids,
            txt_ids=txt_ids,
        )

    def text(self, prompts: list[str]) -> Cond:
        """Text to states, T5's (P, L, C), one per token, and pooled, CLIP's vector (P, C') of the whole prompt."""
        states, pooled, _ = self.pipe.encode_prompt(prompts, None, self.device, max_sequence_length=self.text_length)
        return {"states": states, "pooled": pooled}

    def latents_of(self, x: Tensor) -> Tensor:
        """Packed latents (B, tokens, 64) -> those of the VAE, (B, 16, H / 8, W / 8)."""
        return super().latents_of(self.pipe._unpack_latents(x, self.height, self.width, self.pipe.vae_scale_factor))


class SD3Policy(ImagePolicy):
    """Stable Diffusion 3 and 3.5 over latents (16, rows, columns), which the transformer itself cuts into patches.

    Guidance is classifier-free: the pipeline's default is 7, papers of the field train with 4.5 (Flow-GRPO), or with 1,
    none, which costs half and lets RL learn what guidance did.

    Args:
        guidance: g of `Policy.velocity`; 1 is none.
        pipe, height, width, kwargs: of `ImagePolicy`.

    Raises:
        ValueError: if a side has more tokens than the position embedding knows places.
    """

    pipeline = "StableDiffusion3Pipeline"
    usual_guidance, guidance_source = 4.5, "Flow-GRPO"
    fits_fp16 = True

    def __init__(self, pipe: DiffusionPipeline, height: int, width: int, guidance: float = 4.5, **kwargs):
        super().__init__(pipe, height, width, guidance=guidance, **kwargs)
        self.latent_shape = self.unpacked_shape()
        most = pipe.transformer.config.pos_embed_max_size
        if max(self.rows, self.columns) > most:
            side = most * height // self.rows
            raise ValueError(f"--height and --width must be at most {side} for this checkpoint, got {height}, {width}")

        # 77 tokens of the two CLIPs, side by side, then so many of T5; 256 as in diffusers' pipeline.
        self.text_length = 256 if pipe.tokenizer_3 is None else min(256, pipe.tokenizer_3.model_max_length)

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt) from latents (B, 16, rows, columns); cond: states (B, 77 + L, C), pooled (B, C').

        Here the time runs from 0 to 1000, and the transformer takes it as it comes.
        """
        return self.call(
            reference,
            hidden_states=x,
            timestep=sigma.float() * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
        )

    def text(self, prompts: list[str]) -> Cond:
        """Text to states, those of both CLIPs beside each other and then T5's, and pooled, both CLIPs' vectors."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,  # the empty prompt is a prompt like any other, see Policy.embed
            max_sequence_length=self.text_length,
        )
        return {"states": states, "pooled": pooled}


class Flux2Policy(ImagePolicy):
    """FLUX.2-klein over packed, normalised latents of shape (tokens, 128).

    The VAE makes a latent of 32 channels. 2 x 2 neighbouring positions become one of 128 channels, each channel is
    normalised with the running mean and variance of a batch norm, and the positions are put into one row, from top left
    to bottom right. Example: 32 x 64 pixels have the latent (32, 4, 8), then (128, 2, 4), then (8, 128).

    The distilled checkpoints need no guidance: a scale is refused (`check_options`). The base ones take classifier-free
    guidance.

    Args:
        guidance: g of `Policy.velocity`; 1 is none.
        pipe, height, width, kwargs: of `ImagePolicy`.
    """

    pipeline = "Flux2KleinPipeline"
    usual_guidance = 4.0

    def __init__(self, pipe: DiffusionPipeline, height: int, width: int, guidance: float = 1.0, **kwargs):
        super().__init__(pipe, height, width, guidance=guidance, **kwargs)
        self.latent_shape = (self.rows * self.columns, pipe.transformer.config.in_channels)  # (tokens, 128)
        self.text_length = min(512, pipe.tokenizer.model_max_length)

        # Places have four coordinates: picture, row, column, and the token of the text. Of the picture (0, y, x, 0).
        one = torch.zeros(1, 1, self.rows, self.columns)
        self.img_ids = pipe._prepare_latent_ids(one).to(self.device)  # (1, tokens, 4)

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt) from packed latents (B, tokens, 128); cond: states (B, L, C). The time is sigma."""
        # Text token l stands at (0, 0, 0, l).
        length = cond["states"].shape[1]
        txt_ids = torch.zeros(1, length, 4, dtype=self.img_ids.dtype, device=x.device)  # (1, L, 4)
        txt_ids[..., 3] = torch.arange(length, device=x.device)
        return self.call(
            reference,
            hidden_states=x,
            timestep=sigma.to(x.dtype),
            guidance=None,
            encoder_hidden_states=cond["states"],
            img_ids=self.img_ids.expand(len(x), -1, -1),
            txt_ids=txt_ids.expand(len(x), -1, -1),
        )

    def text(self, prompts: list[str]) -> Cond:
        """Text to states (P, L, 3 C), those of three layers of Qwen3 beside each other."""
        states, _ = self.pipe.encode_prompt(prompts, self.device, max_sequence_length=self.text_length)
        return {"states": states}

    def latents_of(self, x: Tensor) -> Tensor:
        """Packed latents (B, tokens, 128) -> those of the VAE, (B, 32, H / 8, W / 8)."""
        # One row of tokens back into rows and columns.
        x = x.transpose(1, 2).unflatten(2, (self.rows, self.columns))  # (B, 128, rows, columns)

        # The transformer was trained on (z - mean) / std, per channel of the 2 x 2: undo it, then the 2 x 2.
        vae = self.pipe.vae
        mean, variance = (value.float().view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        return self.pipe._unpatchify_latents(x * (variance + vae.config.batch_norm_eps).sqrt() + mean)

    @staticmethod
    def log_shift(tokens: int, steps: int, config) -> float:
        """mu was fitted to what worked: it depends on the number of steps, too, and on nothing of the config."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)


class ZImagePolicy(ImagePolicy):
    """Z-Image over latents (16, rows, columns); three of its conventions are the other way round.

    Its time is 1 - sigma, so that 0 is noise; its output points from noise to data; and its scale s of guidance is one
    off the usual: c + s (c - u) = u + (s + 1) (c - u), so that 0 is none. Z-Image-Turbo is distilled and wants 0.

    Args:
        guidance: s, as in the pipeline; 0 is none.
        pipe, height, width, kwargs: of `ImagePolicy`.
    """

    pipeline = "ZImagePipeline"
    usual_guidance, guidance_source = 5.0, "its pipeline"
    guidance_of_none = 0.0

    def __init__(self, pipe: DiffusionPipeline, height: int, width: int, guidance: float = 5.0, **kwargs):
        super().__init__(pipe, height, width, guidance=guidance, **kwargs)
        self.latent_shape = self.unpacked_shape()
        self.text_length = min(512, pipe.tokenizer.model_max_length)

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt) from latents (B, 16, rows, columns); cond: states (B, L, C), length (B,)."""
        # The transformer takes pictures as a list of videos of one frame, and texts as a list of tensors as long as
        # they are: it pads them itself. To cut them, the host must know their lengths, and so waits for the device.
        pictures = list(x.unsqueeze(2).unbind())  # B of (16, 1, rows, columns)
        texts = [states[:n] for states, n in zip(cond["states"], cond["length"].tolist())]
        return -self.call(reference, x=pictures, t=1 - sigma.float(), cap_feats=texts).squeeze(2)

    def text(self, prompts: list[str]) -> Cond:
        """Text to states (P, L, C), Qwen3's, zero after the text; and its length in tokens (P,)."""
        texts, _ = self.pipe.encode_prompt(
            list(prompts),  # a copy: the pipeline writes its chat template into the list
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        states = texts[0].new_zeros(len(texts), self.text_length, texts[0].shape[-1])
        for row, text in zip(states, texts):
            row[: len(text)] = text
        return {"states": states, "length": torch.tensor([len(text) for text in texts], device=self.device)}


# -------------------------------------------------------------------------------------------------------------- videos
class WanPolicy(Policy):
    """Wan text-to-video over latents of shape (channels, latent frames, rows, columns).

    Frames. Wan's VAE encodes the first frame by itself, and every four that follow together: F = 4k + 1 frames become
    k + 1 latent frames. Example: 9 frames of 32 x 32 (the embedded model) have the latent (16, 3, 4, 4), and 33 frames
    of 480 x 832 (Wan2.1) have (16, 9, 60, 104). The transformer itself cuts that into patches of 1 x 2 x 2, which are
    9 x 30 x 52 = 14,040 tokens, so the latent is not packed.

    Args:
        pipe: a diffusers WanPipeline.
        height, width: pixels, multiples of the VAE's factor times the patch (16 for Wan2.1).
        frames: 4k + 1 for Wan2.1's VAE.
        guidance: g of `Policy.velocity`; 1 is none, and halves the cost.
        kwargs: of `Policy`.

    Raises:
        ValueError: if a size does not divide, or the checkpoint has two transformers (Wan2.2's 14B).
    """

    pipeline = "WanPipeline"
    usual_guidance, guidance_source = 5.0, "Wan2.1's model card"

    def __init__(self, pipe: DiffusionPipeline, height: int, width: int, frames: int, guidance: float = 1.0, **kwargs):
        # 1. Refuse what does not fit, before anything is moved or split.
        patch, frames_per_latent = pipe.transformer.config.patch_size, pipe.vae_scale_factor_temporal
        check_size(height, width, pipe.vae_scale_factor_spatial * patch[1])
        check_frames(frames, frames_per_latent)
        if pipe.transformer_2 is not None:
            raise ValueError("--model has a transformer for each noise range; only one can be trained here")

        # 2. The VAE stays in float32 whatever --dtype says, as diffusers runs it: in bf16 videos lose detail.
        pipe.vae.float()
        super().__init__(pipe, guidance=guidance, **kwargs)

        # 3. Shapes.
        channels, latent_frames = pipe.transformer.config.in_channels, (frames - 1) // frames_per_latent + 1
        rows, columns = height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial
        self.latent_shape = (channels, latent_frames, rows, columns)
        self.text_length, self.pixels = min(512, pipe.tokenizer.model_max_length), frames * height * width

    def predict(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt) from latents (B, *latent_shape); cond: states (B, L, C).

        Wan's time embedding was trained on times from 0 to 1000. FLUX's was too, but its transformer multiplies by
        1000 itself, so there the argument is sigma.
        """
        t = sigma.float() * self.pipe.scheduler.config.num_train_timesteps
        return self.call(reference, hidden_states=x, timestep=t, encoder_hidden_states=cond["states"])

    def text(self, prompts: list[str]) -> Cond:
        """Text to states, UMT5's (P, L, C), zero after the text."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.text_length}
        states, _ = self.pipe.encode_prompt(prompts, **options, device=self.device)
        return {"states": states}

    def latents_of(self, x: Tensor) -> Tensor:
        """The transformer was trained on (z - mean) / std, per channel; undo it. Shapes (1, channels, 1, 1, 1)."""
        vae = self.pipe.vae.config
        constants = (vae.latents_mean, vae.latents_std)
        mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1, 1) for values in constants)
        return x * std + mean

    @classmethod
    def token_side(cls, model: str) -> int:
        """Pixels along a side of a token, by a checkpoint's configs; where they are silent, 8 times 2."""
        vae, transformer = (AutoencoderKL.load_config(model, subfolder=name) for name in ("vae", "transformer"))
        return vae.get("scale_factor_spatial", 8) * transformer.get("patch_size", (1, 2, 2))[1]

    @classmethod
    def frames_per_latent(cls, model: str) -> int:
        """Frames of a latent frame after the first, by the config of a checkpoint's VAE."""
        return AutoencoderKL.load_config(model, subfolder="vae").get("scale_factor_temporal", 4)


# --------------------------------------------------------------------------------------------------------- checkpoints
IMAGE_MODELS = (FluxPolicy, SD3Policy, Flux2Policy, ZImagePolicy)
VIDEO_MODELS = (WanPolicy,)


def policy_of(model: str, kinds: tuple[type[Policy], ...]) -> type[Policy]:
    """The class for a checkpoint, by the pipeline that its model_index.json names.

    Args:
        model: a local folder, or a hub id. kinds: the classes to choose from.

    Raises:
        ValueError: if it is of none of them, listing their pipelines; or as `policy.check_pipeline`.
    """
    by_name = {kind.pipeline: kind for kind in kinds}
    return by_name[check_pipeline(model, *by_name)]


def check_options(kind: type[Policy], args, distilled: bool) -> None:
    """Refuse what a kind of model cannot do, before anything of it is loaded.

    Args:
        kind: the model's class. args: the options --dtype and --guidance, which is None where it is not given.
        distilled: was the checkpoint trained to need no guidance?

    Raises:
        ValueError: if its activations leave the range of --dtype fp16; if a distilled checkpoint is given a guidance,
            or another one less than none, at which a prompt would count for less than nothing.
    """
    if args.dtype == "fp16" and not kind.fits_fp16:
        fit = ", ".join(k.pipeline for k in (*IMAGE_MODELS, *VIDEO_MODELS) if k.fits_fp16)
        raise ValueError(f"--dtype fp16 is for {fit}: a {kind.pipeline} leaves its range, take bf16")

    if not kind.classifier_free or args.guidance is None:
        return
    none, got = kind.guidance_of_none, f"got {args.guidance:g}"
    if distilled and args.guidance != none:
        raise ValueError(f"--guidance must be {none:g} or left out: this checkpoint is distilled and takes none; {got}")
    if args.guidance < none:
        raise ValueError(f"--guidance must be at least {none:g} for a {kind.pipeline}, which is none; {got}")


def checkpoint_values(kind: type[Policy], args) -> dict[str, tuple[float, str]]:
    """What a checkpoint says about options that are not given: name -> value, and where it comes from.

    Args:
        kind: of `policy_of`. args: the options, those of size, --steps and --dtype resolved.

    Raises:
        ValueError: if its configs cannot be read, or do not go with the options.
    """
    try:
        index = DiffusionPipeline.load_config(args.model)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(args.model, subfolder="scheduler")
        token_side = kind.token_side(args.model)
        frames_per_latent = kind.frames_per_latent(args.model) if hasattr(args, "frames") else 1
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise cannot_be_loaded(args.model, error) from error

    check_options(kind, args, bool(index.get("is_distilled")))
    check_size(args.height, args.width, token_side)
    if hasattr(args, "frames"):
        check_frames(args.frames, frames_per_latent)
    shift = shift_of(kind, args, scheduler, token_side)

    # A distilled model has its guidance within. FLUX.2-klein's index says so, of Z-Image-Turbo and SD3.5-large-turbo
    # nothing but the name does.
    guidance = kind.usual_guidance, kind.guidance_source
    if index.get("is_distilled"):
        guidance = kind.guidance_of_none, "its model_index.json: distilled"
    elif "turbo" in Path(args.model).name.lower():
        guidance = kind.guidance_of_none, "its name: turbo"
    return {"shift": (shift, "its scheduler"), "guidance": guidance}


def shift_of(kind: type[Policy], args, config: dict, token_side: int = 16) -> float:
    """The shift s of the noise levels, sigma' = s sigma / (1 + (s - 1) sigma), as the checkpoint's scheduler has it.

    A scheduler has a constant shift, or one that grows with the size of the picture: s = exp(mu), where mu depends on
    the tokens. FLUX.1-dev at 720 x 720 has 2025 tokens, mu = 0.80 and s = 2.22.

    Args:
        kind, args: see `checkpoint_values`. config: the scheduler's. token_side: pixels along a side of a token.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)

    mu = kind.log_shift((args.height // token_side) * (args.width // token_side), args.steps, config)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
