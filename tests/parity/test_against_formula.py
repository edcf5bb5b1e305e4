"""The loss against the papers' formulas, element by element in Python floats: nothing here is the toolkit's.

DDPM (arXiv:2006.11239): equations 4, 7 and 13; improved DDPM (arXiv:2102.09672): equation 15 and the frozen mean;
min-SNR (arXiv:2303.09556).
"""

import math

import numpy as np
import pytest
import torch

from pixart_model.diffusion import Diffusion, alphas_bar

BETAS = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
TIMES = [0, 1, 2, 137, 500, 998, 999]


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
    at = max(t, 1)  # at t = 0 the variance is 0: the next one stands in, as in the papers' code
    variance = BETAS[at] * (1 - alpha_bar_of(at - 1)) / (1 - alpha_bar_of(at))
    return mean, math.log(variance)


def bits_of(t, eps_hat, v, x, x_t):
    """The bound of one element, in bits."""
    alpha_bar = alpha_bar_of(t)
    x_hat = (x_t - math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(alpha_bar)
    mean, low = posterior(t, x, x_t)
    mean_hat, _ = posterior(t, x_hat, x_t)
    log_variance = (1 + v) / 2 * math.log(BETAS[t]) + (1 - v) / 2 * low
    if t:
        nats = 0.5 * (
            log_variance - low - 1 + math.exp(low - log_variance) + (mean - mean_hat) ** 2 / math.exp(log_variance)
        )
    else:
        std = math.exp(0.5 * log_variance)
        above, under = normal_cdf((x - mean_hat + 1 / 255) / std), normal_cdf((x - mean_hat - 1 / 255) / std)
        p = above if x < -0.999 else 1 - under if x > 0.999 else above - under
        nats = -math.log(max(p, 1e-12))
    return nats / math.log(2)


def slow_terms(eps_hat, v, x, x_t, t, eps, gamma=None):
    """Both terms of one sample."""
    elements = list(zip(*(a.ravel().tolist() for a in (eps_hat, v, x, x_t, eps)), strict=True))
    snr = alpha_bar_of(t) / (1 - alpha_bar_of(t))
    weight = 1.0 if gamma is None else min(snr, gamma) / snr
    squared = np.mean([(ei - e_hat) ** 2 for e_hat, _, _, _, ei in elements])
    bits = np.mean([bits_of(t, e_hat, vi, xi, xti) for e_hat, vi, xi, xti, _ in elements])
    return weight * float(squared), float(bits)


def sample(t, miss=0.05, seed=0):
    """Single-precision x, eps, x_t, eps_hat, v of two samples; some of x lies in each of the two open bins."""
    rng = np.random.default_rng([t, seed])
    x, eps, v, error = (rng.standard_normal((2, 4, 3, 3)) for _ in range(4))
    x[0, 0], x[0, 1] = 0.9995, -0.9995
    alpha_bar = alpha_bar_of(t)
    x_t = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * eps
    return [np.float32(a) for a in (x, eps, x_t, eps + miss * error, np.tanh(v))]


def found_terms(t, x, eps, x_t, eps_hat, v, gamma=None):
    x, eps, x_t = (torch.from_numpy(a) for a in (x, eps, x_t))
    out = torch.from_numpy(np.concatenate([eps_hat, v], axis=1))
    terms = Diffusion().terms(out, x, x_t, torch.full((len(x),), t), eps, gamma)
    together = Diffusion().loss(out, x, x_t, torch.full((len(x),), t), eps, gamma)
    torch.testing.assert_close(together, terms[0] + terms[1], rtol=0, atol=0)
    assert terms[0].dtype == terms[1].dtype == torch.float32
    return np.stack([term.numpy() for term in terms], axis=1)  # (B, 2)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("miss", [0.05, 0.3, 1.5])
@pytest.mark.parametrize("t", TIMES)
def test_both_terms_are_the_formulas(t, miss, gamma):
    x, eps, x_t, eps_hat, v = sample(t, miss)
    found = found_terms(t, x, eps, x_t, eps_hat, v, gamma)
    wide = [a.astype(np.float64) for a in (eps_hat, v, x, x_t)]
    expected = [slow_terms(*(a[i] for a in wide), t, eps[i].astype(np.float64), gamma) for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_bins_without_any_probability_count_27_nats():
    x, eps, x_t, eps_hat, v = sample(0)
    x[1] = x[1].clip(-0.9, 0.9)
    x_t = x_t + np.float32(3)  # hundreds of standard deviations away
    found = found_terms(0, x, eps, x_t, eps_hat, v)[:, 1]
    wide = [a.astype(np.float64) for a in (eps_hat, v, x, x_t)]
    expected = [slow_terms(*(a[i] for a in wide), 0, eps[i].astype(np.float64))[1] for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1] == pytest.approx(-math.log2(1e-12))
    assert found[0] < 0.8 * found[1]  # its upper open bin reaches as far as the mean went


def test_noisy_latents_are_the_formula():
    for t in TIMES:
        x, eps, x_t, _, _ = sample(t)
        found = Diffusion().q_sample(torch.from_numpy(x), torch.tensor([t, t]), torch.from_numpy(eps))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), x_t, atol=1e-6)


def test_the_schedule_is_linear_in_float64():
    table = alphas_bar()
    assert table.dtype == torch.float64
    for t in (0, 1, 500, 999):
        assert table[t].item() == pytest.approx(alpha_bar_of(t), rel=1e-12)


@pytest.mark.parametrize("t", [0, 3, 700])
def test_the_variance_learns_as_the_formulas_derivative_says(t):
    x, eps, x_t, eps_hat, v = sample(t)
    out = torch.from_numpy(np.concatenate([eps_hat, v], axis=1)).requires_grad_()
    tensors = [torch.from_numpy(a) for a in (x, x_t, eps)]
    Diffusion().loss(out, tensors[0], tensors[1], torch.tensor([t, t]), tensors[2]).sum().backward()
    step = 1e-5
    for place in [(0, 0, 1, 1), (0, 1, 2, 0), (1, 2, 0, 0), (1, 3, 2, 2)]:
        element = [float(a[place]) for a in (eps_hat, v, x, x_t)]
        below, above = (bits_of(t, element[0], element[1] + sign * step, *element[2:]) for sign in (-1, 1))
        slope = (above - below) / (2 * step) / x[0].size
        channel = (place[0], 4 + place[1], *place[2:])
        assert float(out.grad[channel]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_only_the_variance_learns_from_the_bound(gamma):
    diffusion = Diffusion()
    torch.manual_seed(0)
    x, eps = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    t = torch.tensor([0, 3, 700])
    out = torch.randn(3, 8, 4, 4, requires_grad=True)
    squared, bound = diffusion.terms(out, x, diffusion.q_sample(x, t, eps), t, eps, gamma)
    (of_bound,) = torch.autograd.grad(bound.sum(), out, retain_graph=True)
    (of_squared,) = torch.autograd.grad(squared.sum(), out)
    assert (of_bound[:, :4] == 0).all()
    assert (of_bound[1:, 4:] != 0).all()
    assert (of_squared[:, 4:] == 0).all()
    snr = [alpha_bar_of(i) / (1 - alpha_bar_of(i)) for i in t.tolist()]
    weight = torch.tensor([1.0 if gamma is None else min(one, gamma) / one for one in snr])[:, None, None, None]
    eps_hat = out.detach()[:, :4]
    torch.testing.assert_close(of_squared[:, :4], weight * 2 * (eps_hat - eps) / eps[0].numel())


@pytest.mark.parametrize("v", [-100.0, -5.0, -1.0, 0.0, 1.0, 5.0, 100.0])
def test_loss_and_gradient_are_finite_at_all_timesteps(v):
    diffusion = Diffusion()
    torch.manual_seed(0)
    t = torch.arange(1000)
    x, eps = torch.randn(1000, 4, 2, 2), torch.randn(1000, 4, 2, 2)
    out = torch.cat([10 * torch.randn_like(eps), torch.full_like(eps, v)], dim=1).requires_grad_()
    loss = diffusion.loss(out, x, diffusion.q_sample(x, t, eps), t, eps, min_snr_gamma=5.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert out.grad.isfinite().all()


def test_samples_do_not_touch_each_other():
    diffusion = Diffusion()
    x, eps, out = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.randn(3, 8, 4, 4)
    t = torch.tensor([0, 10, 999])
    x_t = diffusion.q_sample(x, t, eps)
    together = diffusion.loss(out, x, x_t, t, eps, min_snr_gamma=5.0)
    for i in range(3):
        one = slice(i, i + 1)
        alone = diffusion.loss(out[one], x[one], x_t[one], t[one], eps[one], min_snr_gamma=5.0)
        torch.testing.assert_close(together[one], alone)
