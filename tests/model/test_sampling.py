import copy
import math
import sys

import numpy as np
import pytest
import torch

from pixart_data.buckets import Bucket
from pixart_data.errors import ConfigError
from pixart_model.diffusion import alphas_bar, generator
from pixart_model.dit import DiT
from pixart_model.model import PixArt
from pixart_model.nulls import NullCaption
from pixart_model.sampling import canvas, sample_latents
from pixart_model.sizes import Model

pytest.importorskip("diffusers")
BUCKET = Bucket("0.50", 48, 96)


@pytest.fixture(scope="module", params=[False, True], ids=["single", "micro"])
def model(request):
    torch.manual_seed(0)
    config = Model(
        size="tiny", depth=2, width=48, heads=4, caption_width=16, base_size=8, micro_conditioning=request.param
    )
    made = PixArt(config)
    with torch.no_grad():
        made.final_layer.linear.weight.normal_(std=0.1)
        for block in made.blocks:
            block.cross_attn.proj.weight.normal_(std=0.2)
    return made.eval()


@pytest.fixture
def exact(model):
    """The model in float64: its latents grow to hundreds, so in fp32 the order of sums shows in the fourth decimal."""
    return copy.deepcopy(model).double()


@pytest.fixture
def captions():
    torch.manual_seed(1)
    return [torch.randn(n, 16) for n in (3, 7, 1, 5)]


@pytest.fixture
def null_caption():
    return NullCaption(torch.randn(2, 16, generator=torch.Generator().manual_seed(2)))


class Toy:
    """The exact noise of Gaussian data with a bend in it; accepts fractional times."""

    device, config = torch.device("cpu"), Model(size="tiny", depth=1, width=24, heads=2)

    def __init__(self):
        self.times, self.texts = [], []

    def __call__(self, x, t, text, mask, size_px, ratio):
        self.times.append(float(t[0]))
        self.texts.append(text)
        assert mask is None
        assert t.dtype == torch.float32
        return torch.cat([toy_eps(x, float(t[0])), torch.zeros_like(x)], dim=1)


LOG_ALPHA = 0.5 * np.log(alphas_bar().numpy())


def at(t):
    """log alpha, alpha, sigma and half log-SNR at a fractional time."""
    log_alpha = np.interp(t, np.arange(1000), LOG_ALPHA)
    sigma = math.sqrt(-math.expm1(2 * log_alpha))
    return log_alpha, math.exp(log_alpha), sigma, log_alpha - math.log(sigma)


def toy_eps(x, t):
    _, alpha, sigma, _ = at(t)
    return sigma * x / (sigma**2 + 0.25 * alpha**2) + 0.1 * (x * 1.3).sin()


def slow_dpm_solver(x, num_steps):
    """DPM-Solver++ (2M) from its paper's algorithm 2, in float64, at times evenly spaced from 999 to 0."""
    times = np.linspace(999, 0, num_steps + 1)
    x, before = x.double(), None
    for i in range(1, num_steps + 1):
        _, alpha_s, sigma_s, lambda_s = at(times[i - 1])
        _, alpha_t, sigma_t, lambda_t = at(times[i])
        data = (x - sigma_s * toy_eps(x, times[i - 1])) / alpha_s
        h = lambda_t - lambda_s
        direction = data
        last_of_few = num_steps < 10 and i == num_steps
        if before is not None and not last_of_few:
            previous, h_before = before
            ratio = h_before / h
            direction = (1 + 1 / (2 * ratio)) * data - 1 / (2 * ratio) * previous
        before = (data, h)
        x = sigma_t / sigma_s * x - alpha_t * math.expm1(-h) * direction
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 14, 20, 25])
def test_the_solver_is_the_papers_at_the_references_times(num_steps):
    toy = Toy()
    caption = [torch.zeros(1, 4096)] * 2
    found = sample_latents(toy, caption, NullCaption(caption[0]), BUCKET, [3, 4], guidance=1.0, num_steps=num_steps)
    start = torch.stack([torch.randn(4, 6, 12, generator=generator("cpu", seed)) for seed in (3, 4)])
    expected = slow_dpm_solver(start, num_steps)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(toy.times, np.linspace(999, 0, num_steps + 1)[:-1], rtol=1e-6)


def test_an_image_does_not_depend_on_its_batch(exact, captions, null_caption):
    together = sample_latents(exact, captions, null_caption, BUCKET, [5, 6, 7, 8], num_steps=4)
    assert together.shape == (4, 4, 6, 12)
    assert together.dtype == torch.float32
    for i in range(4):
        alone = sample_latents(exact, captions[i : i + 1], null_caption, BUCKET, [5 + i], num_steps=4)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-6)


def test_seed_caption_guidance_and_canvas_all_count(model, captions, null_caption):
    def draw(caption=captions[0], null=null_caption, bucket=BUCKET, seed=1, guidance=4.5):
        return sample_latents(model, [caption], null, bucket, [seed], guidance, num_steps=3)

    first = draw()
    assert torch.equal(first, draw())
    for other in (
        draw(seed=2),
        draw(caption=captions[1]),
        draw(guidance=1.0),
        draw(null=NullCaption(null_caption.features * 3)),
    ):
        assert not torch.allclose(first, other, atol=1e-3)
    assert draw(bucket=Bucket("2.00", 96, 48)).shape == (1, 4, 12, 6)


def test_guidance_is_on_all_channels_and_of_the_null_caption_at_its_own_length(model, captions, null_caption):
    caption, g = captions[0], 3.0
    found = sample_latents(model, [caption], null_caption, BUCKET, [1], g, num_steps=1)
    x = torch.randn(1, 4, 6, 12, generator=generator("cpu", 1))
    sizes, ratio = torch.tensor([[48.0, 96.0]]), torch.tensor([0.5])
    t = torch.tensor([999.0])
    with torch.no_grad():
        cond, uncond = (model(x, t, y[None], None, sizes, ratio)[:, :4] for y in (caption, null_caption.features))
    eps = uncond + g * (cond - uncond)
    (_, alpha_s, sigma_s, lambda_s), (_, alpha_t, sigma_t, lambda_t) = at(999), at(0)
    data = (x - sigma_s * eps) / alpha_s
    expected = sigma_t / sigma_s * x - alpha_t * math.expm1(lambda_s - lambda_t) * data
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(cond, uncond)


def test_the_null_caption_has_its_own_length_and_the_references_that_of_each_caption():
    torch.manual_seed(1)
    captions = [torch.randn(n, 16) for n in (3, 7, 1)]
    table = torch.randn(9, 16)
    for null, expected in (
        (NullCaption(table[:2]), [table[:2]] * 3),
        (NullCaption(table, follows_caption=True), [table[:3], table[:7], table[:1]]),
    ):
        toy = Toy()
        sample_latents(toy, captions, null, BUCKET, [0, 1, 2], num_steps=1)
        seen = toy.texts[0].split()
        assert len(seen) == 6
        for found, wanted in zip(seen, [*captions, *expected], strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("follows_caption", [False, True])
def test_pictures_are_those_of_padded_captions(exact, captions, follows_caption):
    class Padding:
        device, config = exact.device, exact.config

        def __call__(self, x, t, text, mask, size_px, ratio):
            padded, mask = text.padded()
            noisy = torch.where(mask[..., None], padded, 1e3)
            return exact(x, t, noisy, mask, size_px, ratio)

    null = NullCaption(torch.randn(7, 16, generator=torch.Generator().manual_seed(2)), follows_caption)
    found, expected = (
        sample_latents(one, captions, null, BUCKET, [5, 6, 7, 8], num_steps=3) for one in (exact, Padding())
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


def test_classes_are_guided_by_no_class():
    torch.manual_seed(0)
    dit = DiT(Model(size="tiny", depth=1, width=24, heads=2, base_size=8, condition="class", num_classes=3)).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dit.double()
    seen = []
    dit.y_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0].tolist()))
    labels = [torch.tensor(label) for label in (2, 0)]
    together = sample_latents(dit, labels, None, BUCKET, [1, 2], num_steps=3)
    assert seen == [[2, 0, 3, 3]] * 3
    alone = sample_latents(dit, labels[1:], None, BUCKET, [2], num_steps=3)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-6)
    assert not torch.allclose(alone, sample_latents(dit, labels[:1], None, BUCKET, [2], num_steps=3), atol=1e-3)
    unguided = sample_latents(dit, labels, None, BUCKET, [1, 2], guidance=1.0, num_steps=1)
    assert seen[-1] == [2, 0]
    assert unguided.isfinite().all()


def test_guidance_of_one_asks_the_model_once(captions, null_caption):
    seen = []

    class Counting(Toy):
        def __call__(self, x, *rest):
            seen.append(len(x))
            return super().__call__(x, *rest)

    for guidance in (1.0, 2.0):
        sample_latents(Counting(), captions[:1], null_caption, BUCKET, [0], guidance, num_steps=2)
    assert seen == [1, 1, 2, 2]


def test_bf16_models_sample_with_fp32_latents(model, captions, null_caption):
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = sample_latents(half, captions, null_caption, BUCKET, [1, 2, 3, 4], num_steps=3)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_the_canvas_is_the_nearest_bucket():
    assert canvas(1.0, 512) == Bucket("1.00", 512, 512)
    assert canvas(3 / 4, 256) == Bucket("0.78", 224, 288)
    assert canvas(4.0, 1024) == Bucket("4.00", 2048, 512)


def test_absent_diffusers_is_explained(model, captions, null_caption, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'pixart-toolkit\[sample\]'"):
        sample_latents(model, captions, null_caption, BUCKET, [1, 2, 3, 4])
