"""What SA-1B costs on a cluster: hours, dollars and terabytes, from stated assumptions.

`python -m jobs.budget` prints the table of the guide of clusters. Every rate is an assumption until a run on your nodes
has shown its own: `Budget(rates=...)` takes those.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

TB = 1e12
_SAMPLE_OVERHEAD_BYTES = 1200  # a tar header, padding, the header of safetensors, a row of the index


@dataclass(frozen=True)
class Stage:
    """One pass over all images.

    Attributes:
        rate: Images or captions in a second on one GPU.
        read_bytes: Read from storage for each image.
        write_bytes: Written to storage for each image.
    """

    name: str
    rate: float
    read_bytes: float
    write_bytes: float


@dataclass(frozen=True)
class Rates:
    """Assumptions for an A100 with 40 GB; none was measured with this toolkit.

    Attributes:
        caption: LLaVA-1.5-7B in the worker's own process, captions of about 200 tokens. Published: 0.67 images a second
            on an RTX 3090, 2.0 for a 4B model on an 80 GB card.
        caption_served: The same behind a server with continuous batching. Published: 3.8 a second for a 4B model on an
            80 GB card, up to 1024 tokens.
        vae_256: Images of 256 px. Published: 250 a second on an RTX 4090, one at a time.
        vae_512: Images of 512 px. Published: 67 a second, likewise.
        t5: Captions of 110 tokens. 4.7e9 weights at 2 operations for each token are 1 TFLOP a caption; a third of an
            A100's 312 TFLOP/s.
        num_tokens: T5 tokens of a caption, at most 120.
    """

    caption: float = 2.0
    caption_served: float = 4.0
    vae_256: float = 200.0
    vae_512: float = 60.0
    t5: float = 100.0
    image_bytes: float = 1.0e6
    caption_bytes: float = 600.0
    num_tokens: float = 110.0


@dataclass(frozen=True)
class Budget:
    """A cluster and what it works on.

    Attributes:
        node_usd_per_h: List price of p4d.24xlarge (8 A100), on demand, us-east-1, November 2026.
        storage_gb_per_s: What the shared storage gives to all nodes together, reading or writing.
        storage_usd_per_tb_month: List price of S3 Standard, us-east-1.
    """

    num_images: int = 11_000_000
    num_nodes: int = 8
    gpus_per_node: int = 8
    node_usd_per_h: float = 21.96
    storage_gb_per_s: float = 5.0
    storage_usd_per_tb_month: float = 23.0
    rates: Rates = field(default_factory=Rates)

    def stages(self) -> list[Stage]:
        """Return the passes over the images."""
        rates = self.rates
        return [
            Stage("caption, in-process", rates.caption, rates.image_bytes, rates.caption_bytes),
            Stage("caption, served", rates.caption_served, rates.image_bytes, rates.caption_bytes),
            Stage("extract 256 px", rates.vae_256, rates.image_bytes, moments_bytes(256)),
            Stage("extract 512 px", rates.vae_512, rates.image_bytes, moments_bytes(512)),
            Stage("extract text", rates.t5, rates.caption_bytes, text_bytes(rates.num_tokens)),
        ]

    def hours(self, stage: Stage) -> tuple[float, float]:
        """Return the hours that the GPUs need and those that the storage needs; the longer one decides."""
        gpu_s = self.num_images / (stage.rate * self.num_nodes * self.gpus_per_node)
        storage_s = self.num_images * (stage.read_bytes + stage.write_bytes) / (self.storage_gb_per_s * 1e9)
        return gpu_s / 3600, storage_s / 3600

    def table(self) -> str:
        """Return the account of all stages, as Markdown."""
        return "\n".join(self._rows()) + "\n"

    def _rows(self) -> Iterator[str]:
        yield "| pass | per GPU | hours | decided by | dollars | reads | writes | kept, a month |"
        yield "|---|---|---|---|---|---|---|---|"
        for stage in self.stages():
            gpu_h, storage_h = self.hours(stage)
            hours = max(gpu_h, storage_h)
            read_tb, write_tb = (self.num_images * count / TB for count in (stage.read_bytes, stage.write_bytes))
            yield (
                f"| {stage.name} | {stage.rate:g}/s | {hours:.1f} | {'GPUs' if gpu_h >= storage_h else 'storage'} "
                f"| ${hours * self.num_nodes * self.node_usd_per_h:,.0f} | {read_tb:.2f} TB | {write_tb:.2f} TB "
                f"| ${write_tb * self.storage_usd_per_tb_month:,.0f} |"
            )


def moments_bytes(resolution_px: int) -> float:
    """Return the bytes of one sample of an image set: mean and deviation, 4 channels, 1/8 of the side, F16."""
    return 2 * 4 * (resolution_px // 8) ** 2 * 2 + _SAMPLE_OVERHEAD_BYTES


def text_bytes(num_tokens: float, width: int = 4096) -> float:
    """Return the bytes of one sample of a text set: its true tokens, BF16."""
    return num_tokens * width * 2 + _SAMPLE_OVERHEAD_BYTES


if __name__ == "__main__":
    print(Budget().table(), end="")
