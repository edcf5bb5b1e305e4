import pytest

from pixart_model.config import Cost, Train
from pixart_model.costs import UTILISATION, Spent, estimate, global_batch, samples_seen


def job(batch_size, batches_per_step, num_steps):
    data = {"features": "/features", "batch_size": batch_size, "batches_per_step": batches_per_step}
    return Train.model_validate({"data": data, "run": {"output": "/run", "num_steps": num_steps}})


@pytest.mark.parametrize(
    ("batch_size", "gpus", "num_steps", "samples", "images", "epochs"),
    [
        (128, 8, 300_000, 307e6, 1e6, 307),
        (178, 64, 150_000, 1.71e9, 10e6, 171),
        (178, 64, 90_000, 1.03e9, 14e6, 73),
        (40, 64, 100_000, 256e6, 14e6, 18),
        (12, 32, 16_000, 6.1e6, 14e6, 0.44),
    ],
)
def test_the_stages_of_the_paper_see_what_its_table_4_says(batch_size, gpus, num_steps, samples, images, epochs):
    stage = job(batch_size, gpus, num_steps)
    assert global_batch(stage) == batch_size * gpus
    assert samples_seen(stage) == pytest.approx(samples, rel=0.01)
    assert samples_seen(stage) / images == pytest.approx(epochs, rel=0.02)


def test_the_default_rates_are_the_papers():
    """753 A100-days for $28,400."""
    spent = Spent.of(753 * 24, Cost())
    assert spent.dollars == pytest.approx(28_400, rel=0.002)
    assert spent.kwh == pytest.approx(753 * 24 * 0.4)
    assert spent.kg_co2 == pytest.approx(753 * 24 * 0.4 * 0.4)
    assert spent.text() == "18,072 GPU-hours (753 days), $28,373.04, 7,229 kWh, 2,892 kg CO2"


def test_rates_are_those_of_the_job():
    rates = Cost(dollars_per_gpu_hour=3.0, watts_per_gpu=700.0, kg_co2_per_kwh=0.1)
    spent = Spent.of(1.0, rates) + Spent.of(1.0, rates)
    assert spent == Spent(2.0, 6.0, 1.4, pytest.approx(0.14))
    assert spent.text("cpu") == "2.00 CPU-hours, $6.00, 1.40 kWh, 0.14 kg CO2"
    assert Spent.read({"step": 3, "gpu_hours": 2, "dollars": 6, "kwh": 1.4}) == Spent(2.0, 6.0, 1.4, 0.0)


def test_an_estimate_is_the_work_over_the_pace():
    spent = estimate(3_600_000, 0.5, 100.0, Cost())
    assert spent.gpu_hours == pytest.approx(3_600_000 * 0.5 / (100 * UTILISATION) / 3600)
    assert estimate(3_600_000, 0.5, 200.0, Cost()).gpu_hours == pytest.approx(spent.gpu_hours / 2)
