"""Models: FLUX for images and Wan for video, at any size and for any diffusers checkpoint of these classes.

What a model must offer, on top of what `Policy` (policy.py) does for all of them:

1. velocity      v_theta(x, sigma, prompt) from one call of the transformer
2. embed         prompts to conditioning, with the pipeline's own text encoders
3. decode        clean latents to pictures or videos
4. latent_shape, text_length      set in __init__

How the two differ, and where the values come from:

|                     | FluxPolicy                          | WanPolicy                                              |
|---------------------|-------------------------------------|--------------------------------------------------------|
| latent_shape        | (tokens, channels), packed 2 x 2    | (channels, latent frames, rows, columns), not packed   |
| time argument       | sigma, 0 to 1                       | 1000 sigma, 0 to 1000                                  |
| guidance            | an input of the model: one forward  | classifier-free, outside the model: two forwards       |
| text conditioning   | T5 states and CLIP's pooled vector  | UMT5 states, zero after the text                       |
| before the decoder  | one scale and one shift             | a mean and a standard deviation per channel            |

Channel counts, factors of the VAE, constants of the normalisation and the length of the text are read from the
checkpoint's own config. So the small embedded models take the same path as FLUX.1-dev and Wan2.1.
tests/test_policies.py compares both classes with diffusers' own pipelines: the same noise gives the same pictures.

Direction of time: sigma = 1 is pure noise, sigma = 0 the picture.
"""

import torch
from diffusers import FluxPipeline, WanPipeline
from torch import Tensor

from branchgrpo import Cond
from policy import Policy

# The most pixels in one call of a VAE, which works at full resolution, where one large picture already fills gigabytes.
# Worked values: 64 pictures of 32 x 64 go together, pictures of 512 x 512 one by one.
PIXELS_PER_DECODE = 2**17


def in_unit_range(decoded: Tensor) -> Tensor:
    """What a VAE decodes, about [-1, 1], as [0, 1]. What is not finite becomes NaN; infinity clamped would be white."""
    x = decoded / 2 + 0.5
    return x.clamp(0, 1) + 0 * x  # 0 times infinity is NaN


def on_the_cpu(decode, x: Tensor, micro_batch: int) -> Tensor:
    """Decode so many latents at a time, into one tensor on the CPU; parts that are joined at the end would lie there
    twice, and 64 videos of 33 frames of 480 x 832 are 10 GiB.

    Args:
        decode: latents (b, ...) to pictures or videos (b, ...).
        x: all latents (B, ...).
        micro_batch: >= 1, the most latents at a time.
    """
    pictures = None
    for start in range(0, len(x), micro_batch):
        part = decode(x[start : start + micro_batch])
        if pictures is None:
            pictures = torch.empty(len(x), *part.shape[1:])
        pictures[start : start + len(part)] = part
    return pictures


def check_size(height: int, width: int, multiple: int) -> None:
    """Refuse a size that tokens cannot tile: both sides must be positive multiples of what one token covers.

    Args:
        height, width: in pixels.
        multiple: pixels along one side of a token: the VAE's factor times the patch, for FLUX.1-dev and Wan2.1
            8 x 2 = 16.

    Raises:
        ValueError: naming the flag.
    """
    for flag, size in (("--height", height), ("--width", width)):
        if size < multiple or size % multiple:
            raise ValueError(f"{flag} must be a positive multiple of {multiple}, got {size}")


class FluxPolicy(Policy):
    """FLUX over packed latents of shape (tokens, channels).

    Packing. FLUX's VAE makes a latent of 16 channels, each side 8 times smaller than the picture's. The transformer
    takes 2 x 2 neighbouring positions as one token, with all of their channels. Example: a picture of 32 x 64 pixels
    has the latent (16, 4, 8), which is 2 x 4 = 8 tokens of 4 x 16 = 64 channels. Channel 4 c + 2 dy + dx of a token is
    channel c of the latent, at row dy and column dx of the 2 x 2. FLUX.1-dev at 720 x 720 has the latent (16, 90, 90),
    which is 45 x 45 = 2025 tokens. Packing only moves numbers, and noise, steps and log-probabilities do not care
    where a number stands. So everything stays packed, and `decode` alone unpacks.

    Args:
        pipe: a diffusers FluxPipeline.
        height, width: pixels, multiples of the VAE's factor times the packing (16 for FLUX.1-dev).
        guidance: value of the embedded guidance; unused by a checkpoint without that embedding.
        kwargs: of `Policy`.

    Raises:
        ValueError: if height or width does not divide.
    """

    pipeline_class = FluxPipeline

    def __init__(self, pipe: FluxPipeline, height: int, width: int, guidance: float = 3.5, **kwargs):
        # The size is checked first, before anything is moved or split.
        token_side = 2 * pipe.vae_scale_factor  # pixels along a side of a token
        check_size(height, width, token_side)
        super().__init__(pipe, **kwargs)
        self.height, self.width, self.guidance = height, width, guidance

        # The transformer sees a list of tokens. Where each stands it reads from img_ids (tokens, 3), which are 0, row
        # and column, and turns them into rotary position embeddings. They are constants, alike for every row of a
        # batch.
        rows, columns = height // token_side, width // token_side
        self.latent_shape = (rows * columns, pipe.transformer.config.in_channels)  # (tokens, channels)
        self.img_ids = pipe._prepare_latent_image_ids(1, rows, columns, self.device, torch.float32)

        # 512 as in diffusers' pipeline, or fewer where the tokenizer knows no more.
        self.text_length = min(512, pipe.tokenizer_2.model_max_length)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt) from one forward.

        Args:
            x: packed latents (B, tokens, channels).
            sigma: (B,) in (0, 1]. The model multiplies it by 1000 itself.
            cond: states (B, L, C), pooled (B, C').
            reference: ask the untrained model.

        Returns:
            (B, tokens, channels), float32.
        """
        # FLUX.1-dev was distilled from a model with classifier-free guidance: it takes the scale as an input, embedded
        # like the time, and predicts the guided velocity itself. FLUX.1-schnell has no such input.
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

    def embed(self, prompts: list[str]) -> Cond:
        """Text to states, T5's (P, L, C), one per token, and pooled, CLIP's vector (P, C') of the whole prompt."""
        states, pooled, _ = self.pipe.encode_prompt(prompts, None, self.device, max_sequence_length=self.text_length)
        return {"states": states, "pooled": pooled}

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Packed latents (B, tokens, channels) -> pictures (B, 3, H, W) in [0, 1], float32 on the CPU."""
        vae = self.pipe.vae

        def pictures_of(packed: Tensor) -> Tensor:
            # (b, tokens, 64) -> (b, 16, H / 8, W / 8)
            z = self.pipe._unpack_latents(packed.to(self.device), self.height, self.width, self.pipe.vae_scale_factor)

            # The transformer was trained on (z - shift) * scale, which has about mean 0 and variance 1: undo it. The
            # VAE answers in [-1, 1].
            z = z / vae.config.scaling_factor + vae.config.shift_factor
            return in_unit_range(vae.decode(z.to(vae.dtype)).sample.float())

        return on_the_cpu(pictures_of, x, max(1, PIXELS_PER_DECODE // (self.height * self.width)))


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
        guidance: g of classifier-free guidance, u + g (c - u) of the velocities with (c) and without (u) the prompt, in
            rollout and in training alike; 1 leaves u out and halves the cost.
        kwargs: of `Policy`.

    Raises:
        ValueError: if a size does not divide, or the checkpoint has two transformers (Wan2.2's 14B).
    """

    pipeline_class = WanPipeline

    def __init__(self, pipe: WanPipeline, height: int, width: int, frames: int, guidance: float = 1.0, **kwargs):
        # 1. Refuse what does not fit, before anything is moved or split.
        patch, frames_per_latent = pipe.transformer.config.patch_size, pipe.vae_scale_factor_temporal
        check_size(height, width, pipe.vae_scale_factor_spatial * patch[1])
        if frames < 1 or (frames - 1) % frames_per_latent:
            raise ValueError(f"--frames must be a multiple of {frames_per_latent}, plus 1, for this VAE, got {frames}")
        if pipe.transformer_2 is not None:
            raise ValueError("--model has a transformer for each noise range; only one can be trained here")

        # 2. The VAE stays in float32 whatever --dtype says, as diffusers runs it: in bf16 videos lose detail.
        pipe.vae.float()
        super().__init__(pipe, **kwargs)

        # 3. Shapes. `guided` also tells `Policy` that encodings with and without an empty prompt are different things.
        self.guidance, self.guided = guidance, guidance != 1
        channels, latent_frames = pipe.transformer.config.in_channels, (frames - 1) // frames_per_latent + 1
        rows, columns = height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial
        self.latent_shape = (channels, latent_frames, rows, columns)
        self.text_length, self.pixels = min(512, pipe.tokenizer.model_max_length), frames * height * width

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt), guided: u + g (c - u), arXiv:2207.12598.

        Args:
            x: latents (B, *latent_shape).
            sigma: (B,) in (0, 1].
            cond: states (B, L, C); with guidance also empty (B, L, C), the states of the empty prompt.
            reference: ask the untrained model.

        Returns:
            The shape of x, float32.
        """
        # Wan's time embedding was trained on times from 0 to 1000. FLUX's was too, but its transformer multiplies by
        # 1000 itself, so there the argument is sigma.
        t = sigma.float() * self.pipe.scheduler.config.num_train_timesteps
        if not self.guided:
            return self.call(reference, hidden_states=x, timestep=t, encoder_hidden_states=cond["states"])

        # Guidance needs the velocity with and without the prompt. Both come from one call of twice the batch: rows 0
        # to B - 1 with the prompt, B to 2B - 1 without. One call keeps a GPU busier than two, and under FSDP it
        # gathers the weights once.
        doubled = {
            "hidden_states": x.repeat(2, 1, 1, 1, 1),
            "timestep": t.repeat(2),
            "encoder_hidden_states": torch.cat([cond["states"], cond["empty"]]),
        }
        v_prompt, v_empty = self.call(reference, **doubled).chunk(2)
        return v_empty + self.guidance * (v_prompt - v_empty)

    def embed(self, prompts: list[str]) -> Cond:
        """Text to states, UMT5's (P, L, C), zero after the text; with guidance those of the empty prompt beside them.

        The empty prompt is the same in every row. A copy in each keeps one rule for all tensors of a `Cond`: the first
        dimension is the prompts.
        """
        options = {"do_classifier_free_guidance": self.guided, "max_sequence_length": self.text_length}
        states, empty = self.pipe.encode_prompt(prompts, **options, device=self.device)
        return {"states": states} | ({} if empty is None else {"empty": empty})

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, *latent_shape) -> videos (B, F, 3, H, W) in [0, 1], float32 on the CPU."""
        vae = self.pipe.vae

        # The transformer was trained on (z - mean) / std, per channel; undo it. Shapes (1, channels, 1, 1, 1).
        constants = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1) for values in constants)

        def videos_of(latents: Tensor) -> Tensor:
            z = latents.to(self.device) * std + mean
            video = vae.decode(z.to(vae.dtype)).sample.float()  # (b, 3, F, H, W) in [-1, 1]
            return in_unit_range(video).transpose(1, 2)

        return on_the_cpu(videos_of, x, max(1, PIXELS_PER_DECODE // self.pixels))
