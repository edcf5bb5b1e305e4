"""What training costs: GPU-hours, dollars, electricity and carbon dioxide, at the rates of a job file."""

from dataclasses import dataclass
from typing import Any, Self

from pixart_model.config import Cost, Train

UTILISATION = 0.4
"""Of a GPU's peak, that an estimate goes by. Measured runs say their own in `metrics.jsonl`."""

_HOURS_PER_DAY = 24
_KINDS = {"cuda": "GPU", "cpu": "CPU"}


@dataclass(frozen=True)
class Spent:
    """What some device-hours cost. A process that trains on a CPU counts as a device, too."""

    gpu_hours: float = 0.0
    dollars: float = 0.0
    kwh: float = 0.0
    kg_co2: float = 0.0

    @classmethod
    def of(cls, gpu_hours: float, rates: Cost) -> Self:
        """Return what so many hours of one GPU cost at these rates."""
        kwh = gpu_hours * rates.watts_per_gpu / 1000
        return cls(gpu_hours, gpu_hours * rates.dollars_per_gpu_hour, kwh, kwh * rates.kg_co2_per_kwh)

    @classmethod
    def read(cls, line: dict[str, Any]) -> Self:
        """Return what a line of `metrics.jsonl` says was spent; nothing where it does not say."""
        return cls(**{name: float(line.get(name, 0.0)) for name in cls.__dataclass_fields__})

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.gpu_hours + other.gpu_hours,
            self.dollars + other.dollars,
            self.kwh + other.kwh,
            self.kg_co2 + other.kg_co2,
        )

    def text(self, device: str = "cuda") -> str:
        """Say it in a line; `device` is the kind of device that the hours are of, `cuda` or `cpu`."""
        hours = f"{_short(self.gpu_hours)} {_KINDS.get(device, device)}-hours"
        if self.gpu_hours >= _HOURS_PER_DAY:
            hours += f" ({_short(self.gpu_hours / _HOURS_PER_DAY)} days)"
        return f"{hours}, ${self.dollars:,.2f}, {_short(self.kwh)} kWh, {_short(self.kg_co2)} kg CO2"


def global_batch(job: Train) -> int:
    """Return the samples in an optimizer step."""
    return job.data.batch_size * job.data.batches_per_step


def samples_seen(job: Train) -> int:
    """Return the samples that all steps of a job train on, each counted as often as it comes up."""
    return job.run.num_steps * global_batch(job)


def estimate(samples: int, tflop_per_sample: float, peak_tflops: float, rates: Cost) -> Spent:
    """Return what it costs to train on so many samples, on GPUs that are used to `UTILISATION` of their peak.

    Args:
        samples: Each counted as often as it comes up.
        tflop_per_sample: Forward and backward, what is computed twice included.
        peak_tflops: TFLOP/s of one GPU.
        rates: The job's.
    """
    return Spent.of(samples * tflop_per_sample / (UTILISATION * peak_tflops) / 3600, rates)


def _short(number: float) -> str:
    """Two decimals, fewer where there are digits enough before the point."""
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"  # noqa: PLR2004 - digits
