"""Gaussian diffusion: the noise schedule, the forward process and the training loss.

Legend: x clean latents; x_t noisy ones; t timestep, 0 to 999; beta the noise of a step; alpha_bar the share of signal
power left at t; snr signal over noise, in power; eps noise; q the true process and its posterior; v the model's
variance output, from -1 to 1 where it has learned, and not clamped before.
Source: DDPM (arXiv:2006.11239); improved DDPM (arXiv:2102.09672) for the learned variance; arithmetic as in the
PixArt reference, but for the bound, which is summed in float64.
"""

import hashlib
import math

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """Return a random generator whose stream is decided by `numbers`, such as a seed and a step."""
    text = ":".join(str(number) for number in numbers)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
    return torch.Generator(device).manual_seed(seed)


def alphas_bar() -> Tensor:
    """Return alpha_bar (1000,) in float64, for betas that grow linearly from 1e-4 to 2e-2."""
    return (1 - _betas()).cumprod(0)


class Diffusion:
    """The schedule's tables on a device, and what training does with them."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        beta, alpha_bar = _betas(), alphas_bar()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])  # alpha_bar of t - 1
        variance = beta * (1 - before) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x); 0 at t = 0
        tables = {
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "snr": alpha_bar / (1 - alpha_bar),
            "mean_x": beta * before.sqrt() / (1 - alpha_bar),  # weight of x in the posterior mean
            "mean_x_t": (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),  # weight of x_t in it
            "min_log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
            "max_log_variance": beta.log(),
        }
        self._tables = {name: table.to(device) for name, table in tables.items()}

    def q_sample(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add noise: x and eps (B, C, H, W), t (B,) whole timesteps; returns x_t (B, C, H, W)."""
        return self._at("signal", t).float() * x + self._at("noise", t).float() * eps

    def loss(
        self, out: Tensor, x: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, min_snr_gamma: float | None = None
    ) -> Tensor:
        """Return the training loss of each sample, (B,), in fp32: the sum of its two `terms`.

        They are added without weights, as in the reference: the second one then teaches the variance alone.
        """
        squared, bound = self.terms(out, x, x_t, t, eps, min_snr_gamma)
        return squared + bound

    def terms(
        self, out: Tensor, x: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, min_snr_gamma: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the loss of each sample is made of, fp32 (B,) each.

        The squared error of the noise, and the variational bound in bits per dimension, through which only the
        variance learns: the mean in it is held fixed (improved DDPM, section 3.1). At t = 0 the bound is the
        likelihood of the latents in bins of an 8-bit image, as the reference has it, though latents have none.

        Args:
            out: (B, 2 C, H, W): the model's noise and variance.
            x: Clean latents (B, C, H, W).
            x_t: What the model saw.
            t: Whole timesteps (B,).
            eps: The noise in x_t.
            min_snr_gamma: Weigh the squared error by min(SNR, gamma) / SNR (arXiv:2303.09556, for a model of the
                noise); the bound is left as it is.
        """
        eps_hat, v = out.float().chunk(2, dim=1)  # (B, C, H, W) each
        squared = (eps - eps_hat).square().flatten(1).mean(1)  # (B,)
        if min_snr_gamma is not None:
            snr = self._tables["snr"][t]  # (B,)
            squared = squared * (snr.clamp(max=min_snr_gamma) / snr).float()
        return squared, self._bound(eps_hat.detach(), v, x, x_t, t).float()

    def _bound(self, eps_hat: Tensor, v: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """In float64, for the two means nearly cancel: in fp32 the fourth digit of the bound is lost at small t."""
        eps_hat, v, x, x_t = (one.double() for one in (eps_hat, v, x, x_t))  # (B, C, H, W) each
        x_hat = (x_t - self._at("noise", t) * eps_hat) / self._at("signal", t)
        mean_hat = self._at("mean_x", t) * x_hat + self._at("mean_x_t", t) * x_t
        mean = self._at("mean_x", t) * x + self._at("mean_x_t", t) * x_t
        low, high = self._at("min_log_variance", t), self._at("max_log_variance", t)
        log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
        divergence = _normal_kl(mean, low, mean_hat, log_variance)
        decoder = -_discretized_log_likelihood(x, mean_hat, log_variance / 2)
        nats = torch.where((t == 0)[:, None, None, None], decoder, divergence)
        return nats.flatten(1).mean(1) / math.log(2)  # (B,)

    def _at(self, name: str, t: Tensor) -> Tensor:
        return self._tables[name][t][:, None, None, None]  # (B, 1, 1, 1)


def _betas() -> Tensor:
    return torch.linspace(1e-4, 2e-2, NUM_TIMESTEPS, dtype=torch.float64)


def _normal_kl(mean: Tensor, log_variance: Tensor, mean_hat: Tensor, log_variance_hat: Tensor) -> Tensor:
    """KL divergence of two Gaussians, elementwise, in nats."""
    ratio = (log_variance - log_variance_hat).exp() + (mean - mean_hat).square() * (-log_variance_hat).exp()
    return 0.5 * (log_variance_hat - log_variance - 1 + ratio)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin of width 2 / 255 around x, elementwise, in nats; the end bins are open."""
    inverse_std = (-log_std).exp()
    below = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    under = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, 1 - under, below - under))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The tanh approximation that the reference uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
