"""Pictures on one sheet: drawn during training, the same captions and seeds at every checkpoint."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixart_data.errors import ConfigError
from pixart_data.storage import write_atomic
from pixart_model.config import Train
from pixart_model.dataset import Dataset
from pixart_model.model import PixArt
from pixart_model.sampling import sample_latents

if TYPE_CHECKING:
    from PIL import Image


class Painter:
    """Draws the first captions of a dataset, on the canvas that most of its images have.

    Raises:
        ConfigError: If diffusers or Pillow is not installed, or the VAE cannot be loaded.
    """

    def __init__(self, job: Train, dataset: Dataset, device: torch.device) -> None:
        self.grid, self.seed = job.grid, job.run.seed
        self.captions = dataset.first_captions(job.grid.num_images)
        self.null_caption = dataset.null_caption()
        self.bucket = dataset.commonest_bucket()
        self.facts = dataset.images.manifest.model
        self.vae = _load_vae(job.grid.vae, self.facts).to(device)

    @torch.inference_mode()
    def draw(self, model: PixArt, path: Path) -> None:
        """Draw with a model and write the PNG at `path`; raises JobError if the storage fails."""
        seeds = [self.seed + i for i in range(len(self.captions))]
        guidance, num_steps = self.grid.guidance, self.grid.num_steps
        latents = sample_latents(model, self.captions, self.null_caption, self.bucket, seeds, guidance, num_steps)
        latents = latents / self.facts["scaling_factor"] + (self.facts.get("shift_factor") or 0.0)  # (B, C, H, W)
        pictures = [_picture(self.vae.decode(z[None]).sample[0]) for z in latents]
        buffer = io.BytesIO()
        contact_sheet(pictures).save(buffer, format="PNG")
        write_atomic(path, buffer.getvalue())


def contact_sheet(pictures: "Sequence[Image.Image]") -> "Image.Image":
    """Lay pictures out, row by row, on a sheet about as many cells wide as high; a cell fits the largest picture."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width_px, height_px = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width_px, rows * height_px), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width_px, i // columns * height_px))
    return sheet


def _load_vae(given: str | None, facts: dict[str, Any]) -> Any:
    """The decoder in fp32; the revision that the features were made with, unless another model is given."""
    try:
        import PIL  # noqa: F401 - drawing needs it later
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError("grid: needs diffusers and Pillow; pip install 'pixart-toolkit[sample]'") from error
    name = given or facts["id"]
    place = {} if given else {"subfolder": facts.get("subfolder"), "revision": facts.get("revision")}
    try:
        vae = AutoencoderKL.from_pretrained(name, **place, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"grid.vae: {name} cannot be loaded ({why}); give a folder, or num_images = 0") from error
    return vae.eval().requires_grad_(False)


def _picture(values: Tensor) -> "Image.Image":
    """Turn values (3, h, w) from -1 to 1 into a picture."""
    from PIL import Image

    pixels = ((values.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
