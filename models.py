"""Models."""

import torch
from diffusers import FluxPipeline, WanPipeline
from torch import Tensor

from branchgrpo import Cond
from policy import Policy


def check_size(height: int, width: int, multiple: int) -> None:
    """Both sides are positive multiples of what one token covers.

    Raises:
        ValueError: naming the flag.
    """
    for flag, size in (("--height", height), ("--width", width)):
        if size < multiple or size % multiple:
            raise ValueError(f"{flag} must be a positive multiple of {multiple}, got {size}")


class FluxPolicy(Policy):
    """FLUX over packed latents of shape (tokens, channels).

    Args:
        height, width: pixels, multiples of the VAE's factor times the packing (16 for FLUX.1-dev).
        guidance: value of the embedded guidance; unused by a checkpoint without that embedding.

    Raises:
        ValueError: if height or width does not divide.
    """

    pipeline_class = FluxPipeline

    def __init__(self, pipe: FluxPipeline, height: int, width: int, guidance: float = 3.5, **kwargs):
        patch = 2 * pipe.vae_scale_factor
        check_size(height, width, patch)
        super().__init__(pipe, **kwargs)
        self.height, self.width, self.guidance = height, width, guidance
        rows, columns = height // patch, width // patch
        self.latent_shape = (rows * columns, pipe.transformer.config.in_channels)  # (tokens, channels)
        self.img_ids = pipe._prepare_latent_image_ids(1, rows, columns, self.device, torch.float32)
        self.text_length = min(512, pipe.tokenizer_2.model_max_length)

    def embed(self, prompts: list[str]) -> Cond:
        """T5 states (P, L, C) and CLIP's pooled vector (P, C')."""
        states, pooled, _ = self.pipe.encode_prompt(prompts, None, self.device, max_sequence_length=self.text_length)
        return {"states": states, "pooled": pooled}

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt): x (B, tokens, channels), sigma (B,) in (0, 1] -> (B, tokens, channels) float32."""
        has_guidance = self.pipe.transformer.config.guidance_embeds
        return self.call(
            reference,
            hidden_states=x,
            timestep=sigma.to(x.dtype),
            guidance=torch.full_like(sigma, self.guidance, dtype=x.dtype) if has_guidance else None,
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
            img_ids=self.img_ids,
            txt_ids=torch.zeros(cond["states"].shape[1], 3, device=x.device),
        )

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Packed latents (B, tokens, channels) -> pictures (B, 3, H, W) in [0, 1], float32 on the CPU; one by one, unless tiny."""
        vae, pictures = self.pipe.vae, []
        micro_batch = max(1, 2**17 // (self.height * self.width))  # pixels a call: 64 pictures of 32 x 64
        for part in x.split(micro_batch):
            z = self.pipe._unpack_latents(part.to(self.device), self.height, self.width, self.pipe.vae_scale_factor)
            z = z / vae.config.scaling_factor + vae.config.shift_factor
            pictures.append((vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(pictures)


class WanPolicy(Policy):
    """Wan text-to-video over latents of shape (channels, latent frames, rows, columns).

    Args:
        height, width: pixels, multiples of the VAE's factor times the patch (16 for Wan2.1).
        frames: 4k + 1 for Wan2.1's VAE, which keeps the first frame and folds the rest by 4.
        guidance: classifier-free, u + g (c - u) of the velocities with (c) and without (u) the prompt, in rollout and in
            training, both in one call; 1 leaves u out and halves the cost.

    Raises:
        ValueError: if a size does not divide, or the checkpoint has two transformers (Wan2.2's 14B).
    """

    pipeline_class = WanPipeline

    def __init__(self, pipe: WanPipeline, height: int, width: int, frames: int, guidance: float = 1.0, **kwargs):
        patch, fold = pipe.transformer.config.patch_size, pipe.vae_scale_factor_temporal
        check_size(height, width, pipe.vae_scale_factor_spatial * patch[1])
        if frames < 1 or (frames - 1) % fold:
            raise ValueError(f"--frames must be a multiple of {fold}, plus 1, for this VAE, got {frames}")
        if pipe.transformer_2 is not None:
            raise ValueError("--model has a transformer for each noise range; only one can be trained here")
        pipe.vae.float()  # as diffusers runs it: in bf16 videos lose detail
        super().__init__(pipe, **kwargs)
        self.guidance, self.guided, shrink = guidance, guidance != 1, pipe.vae_scale_factor_spatial
        channels, latent_frames = pipe.transformer.config.in_channels, (frames - 1) // fold + 1
        self.latent_shape = (channels, latent_frames, height // shrink, width // shrink)
        self.text_length, self.pixels = min(512, pipe.tokenizer.model_max_length), frames * height * width

    def embed(self, prompts: list[str]) -> Cond:
        """UMT5 states (P, L, C), zero after the text; with guidance those of the empty prompt beside them."""
        how = {"do_classifier_free_guidance": self.guided, "max_sequence_length": self.text_length}
        states, empty = self.pipe.encode_prompt(prompts, **how, device=self.device)
        return {"states": states} | ({} if empty is None else {"empty": empty})

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, reference: bool = False) -> Tensor:
        """v_theta(x, sigma, prompt), guided: x (B, *latent_shape), sigma (B,) in (0, 1] -> the same shape, float32."""
        t = sigma.float() * self.pipe.scheduler.config.num_train_timesteps
        if not self.guided:
            return self.call(reference, hidden_states=x, timestep=t, encoder_hidden_states=cond["states"])
        both = torch.cat([cond["states"], cond["empty"]])
        twice = {"hidden_states": x.repeat(2, 1, 1, 1, 1), "timestep": t.repeat(2), "encoder_hidden_states": both}
        with_prompt, without = self.call(reference, **twice).chunk(2)
        return without + self.guidance * (with_prompt - without)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, *latent_shape) -> videos (B, F, 3, H, W) in [0, 1], float32 on the CPU; one by one, unless tiny."""
        vae, videos = self.pipe.vae, []
        micro_batch = max(1, 2**17 // self.pixels)  # as for pictures
        norms = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in norms)
        for part in x.split(micro_batch):
            video = vae.decode((part.to(self.device) * std + mean).to(vae.dtype)).sample.float()  # (b, 3, F, H, W)
            videos.append((video / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu())
        return torch.cat(videos)
