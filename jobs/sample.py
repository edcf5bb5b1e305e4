"""`pixart sample`: prompts to pictures. The one place where text encoder, transformer and VAE meet."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart_data.config import resolved_toml
from pixart_data.encoders import ImageEncoder, TextEncoder
from pixart_data.errors import ConfigError
from pixart_data.models import placement, quiet_loading
from pixart_data.retries import storage
from pixart_data.sections import ImageFeatures, TextFeatures
from pixart_data.storage import make_dir, write_atomic
from pixart_model import checkpoint
from pixart_model.config import Sample
from pixart_model.grid import contact_sheet
from pixart_model.sampling import canvas, sample_latents

log = logging.getLogger(__name__)

GRID = "grid.png"
PROMPTS = "prompts.txt"
_MOST_ON_A_SHEET = 100  # pictures, which are held in memory until it is made


def sample(job: Sample, dry_run: bool) -> None:
    """Draw every prompt of a job, or print what would be drawn."""
    prompts = _prompts(job)
    path = checkpoint.find(Path(job.checkpoint))
    meta = checkpoint.read_meta(path)
    if "text" not in meta.features:
        raise ConfigError(
            f"checkpoint: expected a model of captions, found one of {meta.model['num_classes']} classes in {path}; "
            "look at the grids in its run's folder, or train on captions from it with init.weights"
        )
    bucket = canvas(job.height_over_width, job.resolution_px or meta.features["resolution_px"])
    size = f"{bucket.width_px} x {bucket.height_px} px"
    if dry_run:
        print(f"sample: {len(prompts)} prompts, {size}, {job.num_steps} steps, from {path} -> {job.output}")
        return
    quiet_loading()
    place = placement(job.device, job.dtype)
    captions = _encode(job, meta.features["text"], prompts)
    log.info("sample: %d prompts encoded; drawing %s with %s", len(prompts), size, path)
    model = checkpoint.load_model(path, job.use_ema, place.device, place.dtype)
    null_caption = checkpoint.load_null_caption(path)
    latents = []
    for start in range(0, len(prompts), job.batch_size):
        batch = captions[start : start + job.batch_size]
        seeds = [job.seed + start + i for i in range(len(batch))]
        latents.append(sample_latents(model, batch, null_caption, bucket, seeds, job.guidance, job.num_steps))
        log.info("sample: %d of %d drawn", start + len(batch), len(prompts))
    del model  # the VAE takes its place
    _write(job, path, prompts, _decoded(job, meta.features["image"], latents))


def _prompts(job: Sample) -> list[str]:
    prompts = list(job.prompts)
    if job.prompts_file is not None:
        try:
            lines = Path(job.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts_file: {job.prompts_file} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError('prompts: expected at least one, found none; add --prompt "..." or a prompts_file')
    return prompts


def _encode(job: Sample, facts: dict[str, Any], prompts: list[str]) -> list[torch.Tensor]:
    """Encode the prompts as the training captions were: same encoder, same policy, same limit."""
    trained, policy = facts["model"], facts["policy"]
    section = TextFeatures(
        model=job.text_encoder or trained["id"],
        subfolder=job.text_encoder_subfolder if job.text_encoder else trained["subfolder"],
        tokenizer_subfolder=job.tokenizer_subfolder if job.text_encoder else trained["tokenizer_subfolder"],
        revision=None if job.text_encoder else trained["revision"],
        max_tokens=policy["max_tokens"],
        cleaning=policy["cleaning"],
        dtype=job.dtype,
        device=job.device,
    )
    encoder = TextEncoder(section, setting="text_encoder")
    if encoder.facts["width"] != trained["width"]:
        raise ConfigError(
            f"text_encoder: expected width {trained['width']}, {section.model} has {encoder.facts['width']}; "
            f"the model was trained on {trained['id']}"
        )
    return encoder.encode(prompts)


def _decoded(job: Sample, facts: dict[str, Any], latents: list[torch.Tensor]) -> Iterator[Image.Image]:
    """Return pictures, each made when it is asked for: all of them may be more than memory holds."""
    trained = facts["model"]
    section = ImageFeatures(
        model=job.vae or trained["id"],
        subfolder=job.vae_subfolder if job.vae else trained["subfolder"],
        revision=None if job.vae else trained["revision"],
        dtype=job.dtype,
        device=job.device,
    )
    vae = ImageEncoder(section, setting="vae")
    factor = trained["scaling_factor"]
    return (vae.decode(z[None] / factor + trained["shift_factor"])[0] for batch in latents for z in batch)


def _write(job: Sample, path: Path, prompts: list[str], pictures: Iterator[Image.Image]) -> None:
    """Write pictures as they come. Their list comes first: the next run clears away what a killed one has left."""
    output = make_dir(Path(job.output))
    _make_room(output)
    write_atomic(output / "job.toml", resolved_toml(job).encode())
    names = [f"{i:04d}.png {' '.join(prompt.split())}\n" for i, prompt in enumerate(prompts)]
    write_atomic(output / PROMPTS, "".join(names).encode())
    has_sheet = len(prompts) <= _MOST_ON_A_SHEET
    shown = []
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        info = PngInfo()
        settings = {"seed": job.seed + i, "guidance": job.guidance, "num_steps": job.num_steps, "checkpoint": path}
        for name, value in {"prompt": prompt, **settings}.items():
            info.add_itxt(name, str(value))
        with storage(output):
            picture.save(output / f"{i:04d}.png", pnginfo=info)
        if has_sheet:
            shown.append(picture)
    sheet = f"more than {_MOST_ON_A_SHEET}, so there is no sheet of all of them"
    if has_sheet:
        with storage(output):
            contact_sheet(shown).save(output / GRID)
        sheet = f"all on one sheet in {output / GRID}"
    print(f"sample: {len(prompts)} images -> {output}, {sheet}")


def _make_room(output: Path) -> None:
    """Delete the pictures of an earlier run into the same folder: those that its list names, and their sheet."""
    listed = output / PROMPTS
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    for name in (line.split(" ", 1)[0] for line in lines):
        if re.fullmatch(r"\d{4,}\.png", name):
            (output / name).unlink(missing_ok=True)
    if lines:
        (output / GRID).unlink(missing_ok=True)
        log.info("sample: %s held %d pictures of an earlier run; they are replaced", output, len(lines))
