"""Latents from captions, or from classes: DPM-Solver++ with classifier-free guidance.

Legend: B images, C latent channels, L text tokens, D width of the text encoder; x latents, t timesteps.
The solver is diffusers', at the times the PixArt reference uses: evenly spaced from 999 to 0 and not rounded, with
alpha_bar interpolated between whole timesteps in its logarithm. Source: DPM-Solver++ (arXiv:2211.01095).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixart_data.buckets import Bucket, bucket_table, nearest_bucket
from pixart_data.errors import ConfigError
from pixart_model.diffusion import NUM_TIMESTEPS, alphas_bar, generator
from pixart_model.networks import Network
from pixart_model.nulls import NullCaption
from pixart_model.packing import pack

_CELL_PX = 8
_FEW_STEPS = 10


def canvas(height_over_width: float, resolution_px: int) -> Bucket:
    """Return the bucket of a resolution that is nearest to an aspect ratio."""
    return nearest_bucket(10_000, round(10_000 * height_over_width), bucket_table(resolution_px))


@torch.no_grad()  # FSDP2's parameters do not go through inference mode
def sample_latents(
    model: Network,
    captions: Sequence[Tensor],
    null_caption: NullCaption | None,
    bucket: Bucket,
    seeds: Sequence[int],
    guidance: float = 4.5,
    num_steps: int = 20,
) -> Tensor:
    """Draw one image for each caption, or each class of a DiT, on the model's device and in its type.

    An image is decided by its caption, its seed and the canvas; up to rounding it does not depend on the others.

    Args:
        model: In evaluation mode.
        captions: B captions, (n_i, D) each, true tokens only; of a DiT B classes, int64 () each.
        null_caption: What the other half of guidance sees in place of each caption, as in training: at its own length,
            or, of the reference's, at the caption's. None of a DiT, which has a class for none.
        bucket: The canvas; a model with micro-conditioning is told its sides and its ratio.
        seeds: One for each image.
        guidance: 1 for none. All latent channels are guided.
        num_steps: Evaluations of the model for each image.

    Returns:
        fp32 (B, C, height_px / 8, width_px / 8), as the model was trained on: to decode them, divide by the VAE's
        scaling factor and add its shift factor.

    Raises:
        ConfigError: If diffusers is not installed.
    """
    scheduler = _scheduler(num_steps, model.device)
    shape = (model.config.in_channels, bucket.height_px // _CELL_PX, bucket.width_px // _CELL_PX)
    x = torch.stack([torch.randn(shape, generator=generator("cpu", seed)) for seed in seeds])  # (B, C, H, W)
    x = x.to(model.device)
    guided = guidance != 1
    nulls = _nulls(model, captions, null_caption) if guided else []
    conditions = [one.to(x.device) for one in (*captions, *nulls)]  # B, or 2 B
    y = pack(conditions) if null_caption is not None else torch.stack(conditions)
    size_px = torch.tensor([[bucket.height_px, bucket.width_px]], device=x.device).expand(len(conditions), 2)
    ratio = torch.tensor([float(bucket.ratio)], device=x.device).expand(len(conditions))
    for t in scheduler.timesteps:
        twice = torch.cat([x, x]) if guided else x  # (B or 2 B, C, H, W)
        out = model(twice, t.expand(len(twice)), y, None, size_px, ratio)
        eps = out.float().chunk(2, dim=1)[0]  # (B or 2 B, C, H, W)
        if guided:
            with_caption, without = eps.chunk(2)
            eps = without + guidance * (with_caption - without)  # (B, C, H, W)
        x = scheduler.step(eps, t, x).prev_sample
    return x


def _nulls(model: Network, captions: Sequence[Tensor], null_caption: NullCaption | None) -> list[Tensor]:
    """What stands for each caption, or each class, in the half of guidance that has none."""
    if null_caption is None:
        return [torch.full_like(label, model.config.num_classes) for label in captions]
    return [null_caption.at(len(caption)) for caption in captions]


def _scheduler(num_steps: int, device: torch.device) -> Any:
    """DPM-Solver++ (2M) of diffusers, moved to the reference's fractional times."""
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError as error:
        raise ConfigError("sampling needs diffusers; pip install 'pixart-toolkit[sample]'") from error
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        final_sigmas_type="sigma_min",
        lower_order_final=num_steps < _FEW_STEPS,
    )
    scheduler.set_timesteps(num_steps, device=device)
    times = torch.linspace(NUM_TIMESTEPS - 1, 0, num_steps + 1, dtype=torch.float64)
    below = times.floor().long().clamp(max=NUM_TIMESTEPS - 2)
    share = times - below
    log_signal = alphas_bar().log()  # of the squared signal
    log_alpha = log_signal[below] * (1 - share) + log_signal[below + 1] * share
    scheduler.sigmas = (torch.expm1(-log_alpha)).sqrt().float()  # sqrt((1 - alpha_bar) / alpha_bar)
    scheduler.timesteps = times[:-1].float().to(device)
    scheduler.set_begin_index(0)
    return scheduler
