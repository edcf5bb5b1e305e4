import math

import numpy as np
import pytest
import torch

from pixart_model.diffusion import Diffusion, alphas_bar

BETAS = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]


def alpha_bar_of(t):
    product = 1.0
    for beta in BETAS[: t + 1]:
        product *= 1 - beta
    return product


def normal_cdf(z):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def posterior(t, x, x_t):
    """Mean and log-variance of q(x_{t-1} | x_t, x), from Bayes' rule for Gaussians."""
    beta, alpha_bar, before = BETAS[t], alpha_bar_of(t), alpha_bar_of(t - 1)
    mean = (math.sqrt(before) * beta * x + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - alpha_bar)
    at = max(t, 1)
    variance = BETAS[at] * (1 - alpha_bar_of(at - 1)) / (1 - alpha_bar_of(at))
    return mean, math.log(variance)


def slow_loss(eps_hat, v, x, x_t, t, eps):
    """One sample, element by element, in Python floats."""
    squared, bits = [], []
    alpha_bar = alpha_bar_of(t)
    for e_hat, vi, xi, xti, ei in zip(*(a.ravel().tolist() for a in (eps_hat, v, x, x_t, eps)), strict=True):
        squared.append((ei - e_hat) ** 2)
        x_hat = (xti - math.sqrt(1 - alpha_bar) * e_hat) / math.sqrt(alpha_bar)
        mean, low = posterior(t, xi, xti)
        mean_hat, _ = posterior(t, x_hat, xti)
        log_variance = (1 + vi) / 2 * math.log(BETAS[t]) + (1 - vi) / 2 * low
        if t:
            nats = 0.5 * (
                log_variance - low - 1 + math.exp(low - log_variance) + (mean - mean_hat) ** 2 / math.exp(log_variance)
            )
        else:
            std = math.exp(0.5 * log_variance)
            above, under = normal_cdf((xi - mean_hat + 1 / 255) / std), normal_cdf((xi - mean_hat - 1 / 255) / std)
            p = above if xi < -0.999 else 1 - under if xi > 0.999 else above - under
            nats = -math.log(max(p, 1e-12))
        bits.append(nats / math.log(2))
    return float(np.mean(squared) + np.mean(bits))


@pytest.mark.parametrize("t", [0, 1, 2, 137, 500, 998, 999])
def test_the_loss_is_the_formula(t):
    rng = np.random.default_rng(t)
    x, eps, v = (rng.standard_normal((2, 4, 3, 3)) for _ in range(3))
    x[0, 0] = 0.9995
    x[0, 1] = -0.9995
    v = np.tanh(v)
    eps_hat = eps + (0.05 if t else 0.3) * rng.standard_normal(eps.shape)
    alpha_bar = alpha_bar_of(t)
    x_t = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * eps
    expected = [slow_loss(eps_hat[i], v[i], x[i], x_t[i], t, eps[i]) for i in range(2)]

    diffusion = Diffusion()
    steps = torch.tensor([t, t])
    single = [torch.from_numpy(a).float() for a in (x, eps)]
    noisy = diffusion.q_sample(single[0], steps, single[1])
    np.testing.assert_allclose(noisy.numpy(), x_t, atol=1e-6)
    out = torch.from_numpy(np.concatenate([eps_hat, v], axis=1)).float()
    found = diffusion.loss(out, single[0], noisy, steps, single[1])
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4)


def test_the_schedule_is_linear_in_float64():
    table = alphas_bar()
    assert table.dtype == torch.float64
    for t in (0, 1, 500, 999):
        assert table[t].item() == pytest.approx(alpha_bar_of(t), rel=1e-12)


def test_only_the_variance_learns_from_the_bound():
    diffusion = Diffusion()
    x, eps = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    t = torch.tensor([3, 700])
    out = torch.randn(2, 8, 4, 4, requires_grad=True)
    diffusion.loss(out, x, diffusion.q_sample(x, t, eps), t, eps).sum().backward()
    eps_hat, _ = out.detach().chunk(2, dim=1)
    torch.testing.assert_close(out.grad[:, :4], 2 * (eps_hat - eps) / eps[0].numel())
    assert (out.grad[:, 4:] != 0).any()


def test_samples_do_not_touch_each_other():
    diffusion = Diffusion()
    x, eps, out = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.randn(3, 8, 4, 4)
    t = torch.tensor([0, 10, 999])
    x_t = diffusion.q_sample(x, t, eps)
    together = diffusion.loss(out, x, x_t, t, eps)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], diffusion.loss(out[one], x[one], x_t[one], t[one], eps[one]))
