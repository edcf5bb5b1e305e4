"""Pictures drawn during training: the same captions and seeds at every checkpoint, in one PNG."""

import io
import math
from pathlib import Path
from typing import Any

import torch

from pixart_data.commits import write_atomic
from pixart_data.errors import ConfigError
from pixart_model.config import Train
from pixart_model.dataset import Dataset
from pixart_model.model import PixArt
from pixart_model.sampling import sample_latents


class Painter:
    """Draws the first captions of a dataset, on the canvas that most of its images have."""

    def __init__(self, job: Train, dataset: Dataset, device: torch.device) -> None:
        self.grid, self.seed = job.grid, job.run.seed
        self.captions = dataset.first_captions(job.grid.num_images)
        self.null_caption = dataset.null_caption()
        self.bucket = dataset.commonest_bucket()
        facts = dataset.images.manifest.model
        self.scaling_factor = float(facts["scaling_factor"])
        self.vae = _load_vae(job.grid.vae, facts).to(device)

    @torch.inference_mode()
    def draw(self, model: PixArt, path: Path) -> None:
        """Draw with a model and write the PNG at `path`; raises JobError if the storage fails."""
        seeds = [self.seed + i for i in range(len(self.captions))]
        guidance, num_steps = self.grid.guidance, self.grid.num_steps
        latents = sample_latents(model, self.captions, self.null_caption, self.bucket, seeds, guidance, num_steps)
        pictures = [self.vae.decode(z[None] / self.scaling_factor).sample[0].float() for z in latents]  # (3, h, w) each
        write_atomic(path, _png(torch.stack(pictures)))


def _load_vae(given: str | None, facts: dict[str, Any]) -> Any:
    """The decoder in fp32; the revision that the features were made with, unless another model is given."""
    try:
        import PIL  # noqa: F401 - drawing needs it later
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError("grid: needs diffusers and Pillow; pip install 'pixart-toolkit[sample]'") from error
    chosen = {"subfolder": facts.get("subfolder"), "revision": facts.get("revision")}
    try:
        vae = AutoencoderKL.from_pretrained(given or facts["id"], **({} if given else chosen))
    except (OSError, ValueError) as error:
        name = given or facts["id"]
        raise ConfigError(f"grid.vae: {name} cannot be loaded ({error}); give a folder, or num_images = 0") from error
    return vae.eval().requires_grad_(False)


def _png(pictures: torch.Tensor) -> bytes:
    """Tile pictures (B, 3, h, w), values from -1 to 1, into rows of about equal number."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures.shape[2:]
    sheet = Image.new("RGB", (columns * width, rows * height))
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, h, w, 3)
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
