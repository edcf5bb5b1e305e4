import torch

from pixart_model.diffusion import Diffusion, generator


def test_generators_follow_their_numbers():
    draws = [
        torch.randn(4, generator=generator("cpu", *numbers)) for numbers in ((0, 1), (0, 1), (1, 0), (0, 11), (0,))
    ]
    assert torch.equal(draws[0], draws[1])
    assert all(not torch.equal(draws[0], other) for other in draws[2:])
    assert generator("cpu", 0, 1).initial_seed() == 8613600020916457518


def test_noise_takes_over_with_time():
    diffusion = Diffusion()
    x, eps = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    signal = [float(diffusion.q_sample(x, torch.tensor([t]), eps)) for t in (0, 250, 500, 999)]
    assert signal == sorted(signal, reverse=True)
    assert signal[0] > 0.9999
    assert signal[-1] < 0.01


def test_the_perfect_model_pays_only_for_its_variance():
    diffusion = Diffusion()
    torch.manual_seed(0)
    x, eps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = torch.tensor([1, 10, 500, 999])
    x_t = diffusion.q_sample(x, t, eps)
    lowest = diffusion.loss(torch.cat([eps, -torch.ones_like(eps)], dim=1), x, x_t, t, eps)
    highest = diffusion.loss(torch.cat([eps, torch.ones_like(eps)], dim=1), x, x_t, t, eps)
    assert lowest.abs().max() < 1e-3
    assert (highest[:2] > lowest[:2] + 1e-3).all()  # later, the two bounds of the variance meet
