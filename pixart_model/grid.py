"""Pictures on one sheet: drawn during training, always the same prompts and seeds."""

import importlib
import io
import logging
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
from pixart_model.devices import resolve_dtype
from pixart_model.networks import Network
from pixart_model.nulls import NullCaption
from pixart_model.parallel import World
from pixart_model.prompts import prompts_path, read_prompts, write_legend
from pixart_model.sampling import sample_latents

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "grids"
_log = logging.getLogger(__name__)


class Painter:
    """Draws on the canvas that most images of a dataset have: prompts, captions of the dataset, or classes.

    All processes make one and draw at the same time, for a model that is spread over them can only be called by all;
    the first one decodes and writes. A sheet that cannot be drawn is no reason to end a run: it says so and goes on.

    Args:
        job: Whose grid it is.
        dataset: For its canvas, its captions and the VAE that made it.
        null: What stands for no caption, or None for a model of classes.
        world: Where this process stands among all.
        run_dir: The run's directory.

    Raises:
        ConfigError: If diffusers or Pillow is not installed, the VAE cannot be loaded, or prompts are not encoded.
    """

    def __init__(self, job: Train, dataset: Dataset, null: NullCaption | None, world: World, run_dir: Path) -> None:
        self._job, self._world, self._null = job, world, null
        self._folder = run_dir / FOLDER
        self._bucket = dataset.commonest_bucket()
        self._facts = dataset.images.manifest.model
        with world.agreed():
            require_packages()
            self._conditions, legend = _classes(job, dataset) if null is None else _captions(job, dataset, run_dir)
            self._vae = load_vae(job.grid.vae, self._facts).to(world.device) if world.is_first else None
            if world.is_first:
                write_legend(self._folder, _columns(len(legend)), legend)

    def is_due(self, step: int, saved: bool) -> bool:
        """Tell whether to draw after a step, at which a checkpoint was `saved` or not."""
        every = self._job.grid.every
        return saved if every is None else step % every == 0 or step == self._job.run.num_steps

    @torch.no_grad()
    def draw(self, model: Network, step: int) -> Path | None:
        """Draw with a model.

        Returns:
            The path of the sheet, a PNG; None where the memory or the VAE failed, of which a warning tells.

        Raises:
            JobError: If the storage fails.
        """
        path = self._folder / f"step_{step:08d}.png"
        latents, sheet, why = None, None, ""
        try:
            latents = self._latents(model)  # (B, C, H, W)
        except torch.OutOfMemoryError as error:
            if hasattr(model, "reshard"):  # FSDP2: the others wait for this one's share of the weights
                raise
            why = _first_line(error)
        if latents is not None and self._vae is not None:
            sheet, why = _sheet(self._vae, self._facts, latents)
        if why:
            if self._world.device.type == "cuda":
                torch.cuda.empty_cache()
            _log.warning(
                "%s: could not be drawn (%s); training goes on without it; grid.num_images = 0 draws none", path, why
            )
        with self._world.agreed():
            if sheet is not None:
                write_atomic(path, sheet)
        return None if why else path

    def _latents(self, model: Network) -> Tensor:
        grid, device, count = self._job.grid, self._world.device, len(self._conditions)
        seeds = [self._job.run.seed + i for i in range(count)]
        dtype = resolve_dtype(self._job.run.dtype, device)
        drawn = []
        for start in range(0, count, self._job.data.batch_size):
            part = slice(start, start + self._job.data.batch_size)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                drawn.append(
                    sample_latents(
                        model, self._conditions[part], self._null, self._bucket, seeds[part], grid.guidance,
                        grid.num_steps,
                    )
                )  # fmt: skip
        reshard: Any = getattr(model, "reshard", None)  # FSDP2 leaves parameters whole after a forward pass without
        if reshard is not None:  # gradients, and whole ones can neither be averaged nor saved
            reshard()
        return torch.cat(drawn)


def _sheet(vae: Any, facts: dict[str, Any], latents: Tensor) -> tuple[bytes | None, str]:
    """Decode latents (B, C, H, W) and return a PNG; or none, and why."""
    latents = latents / facts["scaling_factor"] + (facts.get("shift_factor") or 0.0)
    buffer = io.BytesIO()
    try:
        contact_sheet([_picture(vae.decode(z[None]).sample[0]) for z in latents]).save(buffer, format="PNG")
    except (RuntimeError, ValueError) as error:
        return None, _first_line(error)
    return buffer.getvalue(), ""


def contact_sheet(pictures: "Sequence[Image.Image]") -> "Image.Image":
    """Lay pictures out, row by row, on a sheet about as many cells wide as high; a cell fits the largest picture."""
    from PIL import Image

    columns = _columns(len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width_px, height_px = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width_px, rows * height_px), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width_px, i // columns * height_px))
    return sheet


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _captions(job: Train, dataset: Dataset, run_dir: Path) -> tuple[list[Tensor], list[str]]:
    """Return the prompts' features, then those of captions of the dataset; and what each of them is."""
    prompts = job.grid.prompts
    encoded = read_prompts(run_dir, prompts, dataset.mixture.main.manifest) if prompts else []
    if encoded is None:
        path = prompts_path(run_dir, prompts, dataset.mixture.main.manifest)
        raise ConfigError(
            f"grid.prompts: expected them encoded in {path}, found none for these prompts and this text encoder; start "
            "the run with `pixart train`, which encodes them"
        )
    count = job.grid.num_images - len(prompts)
    keys = dataset.first_keys(count)
    return [*encoded, *dataset.first_captions(count)], [*prompts, *(f"the caption of {key}" for key in keys)]


def _classes(job: Train, dataset: Dataset) -> tuple[list[Tensor], list[str]]:
    """Return classes spread evenly, int64 () each, and what each of them is."""
    if job.grid.prompts:
        raise ConfigError(
            "grid.prompts: expected none with model.condition = 'class', found prompts; set grid.num_images instead"
        )
    labels = [i * job.model.num_classes // job.grid.num_images for i in range(job.grid.num_images)]
    names = {label: f", {name}" for label, name in enumerate(dataset.classes)}
    return [torch.tensor(label) for label in labels], [f"class {label}{names.get(label, '')}" for label in labels]


def require_packages() -> None:
    """Check that what drawing needs is installed.

    Raises:
        ConfigError: Otherwise, saying what to type.
    """
    try:
        importlib.import_module("PIL")
        importlib.import_module("diffusers")
    except ImportError as error:
        raise ConfigError("grid: needs diffusers and Pillow; pip install 'pixart-toolkit[sample]'") from error


def load_vae(given: str | None, facts: dict[str, Any]) -> Any:
    """Return the decoder of a grid, in fp32 on the CPU.

    Args:
        given: A model; None for that of the features, at their revision.
        facts: Of the model that made the features.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    from diffusers import AutoencoderKL

    name = given or facts["id"]
    place = {} if given else {"subfolder": facts.get("subfolder"), "revision": facts.get("revision")}
    try:
        vae = AutoencoderKL.from_pretrained(name, **place, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        why = _first_line(error)
        raise ConfigError(f"grid.vae: {name} cannot be loaded ({why}); give a folder, or num_images = 0") from error
    return vae.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _picture(values: Tensor) -> "Image.Image":
    """Turn values (3, h, w) from -1 to 1 into a picture."""
    from PIL import Image

    pixels = ((values.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
