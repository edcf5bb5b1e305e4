"""The prompts of a run's grid, encoded once before it starts: training itself has no text encoder."""

import logging
from pathlib import Path

from jobs import ranks
from pixart_data.errors import ConfigError
from pixart_data.sections import TextFeatures
from pixart_data.shards import Manifest, read_manifest
from pixart_data.storage import location
from pixart_model.checkpoint import latest, read_meta
from pixart_model.config import Train
from pixart_model.prompts import prompts_path, read_prompts, write_prompts

log = logging.getLogger(__name__)

_SETTING = "grid.prompts"


def encode_prompts(job: Train) -> None:
    """Leave the features of `grid.prompts` in the run's directory, unless they are there.

    Of several processes the first one does it; the others find them when they need them, which is after they have met.
    A run that is finished draws no more.

    Raises:
        ConfigError: If the text encoder of the features, or a package that it needs, is not there.
        DataError: If the text set, or the run's last checkpoint, is damaged.
        JobError: If the storage fails.
    """
    grid, run_dir = job.grid, Path(job.run.output)
    last = latest(run_dir)
    if not ranks.is_first() or (last is not None and read_meta(last).step >= job.run.num_steps):
        return
    texts = unencoded(job)
    if texts is None:
        return
    from pixart_data.encoders import TextEncoder
    from pixart_data.models import quiet_loading

    quiet_loading()
    section = _section(job, texts)
    log.info("encoding %d prompts with %s", len(grid.prompts), section.model)
    encoder = TextEncoder(section, setting=_SETTING)
    if encoder.facts["width"] != texts.model["width"]:
        raise ConfigError(
            f"{_SETTING}: expected an encoder of width {texts.model['width']}, as the features have, {section.model} "
            f"has {encoder.facts['width']}; was the model exchanged since?"
        )
    write_prompts(run_dir, grid.prompts, texts, encoder.encode(grid.prompts))


def unencoded(job: Train) -> Manifest | None:
    """Return the manifest of the text set whose encoder has yet to encode the prompts, and can as far as is known.

    Returns:
        None if there are no prompts, or they are encoded.

    Raises:
        ConfigError: If a package that the encoder needs is not there, or the text set does not name it.
        DataError: If the text set is damaged.
    """
    grid, run_dir = job.grid, Path(job.run.output)
    if not (grid.prompts and grid.num_images) or job.model.condition == "class":
        return None
    main = max(sorted(job.data.texts), key=lambda name: job.data.texts[name])
    texts = read_manifest(location(job.data.features) / main)
    if read_prompts(run_dir, grid.prompts, texts) is not None:
        log.info("the prompts of the grid are encoded in %s", prompts_path(run_dir, grid.prompts, texts))
        return None
    try:
        import transformers  # noqa: F401 - the encoder needs it
        from PIL import Image  # noqa: F401 - its module does
    except ImportError as error:
        raise ConfigError(
            f"{_SETTING}: encoding them needs a package: {error}; pip install 'pixart-toolkit[sample]', or leave them "
            f"out and set grid.num_images, to draw captions of the dataset"
        ) from error
    _section(job, texts)
    return texts


def _section(job: Train, texts: Manifest) -> TextFeatures:
    """The encoder as the captions of the features went through it."""
    model, policy = texts.model, texts.policy
    missing = [
        name for name, facts in (("id", model), ("max_tokens", policy), ("cleaning", policy)) if name not in facts
    ]
    if missing:
        raise ConfigError(
            f"{_SETTING}: expected features that name their text encoder, found no {', '.join(missing)} in the "
            f"manifest of {job.data.features}; leave the prompts out and set grid.num_images, to draw its captions"
        )
    return TextFeatures(
        model=model["id"],
        subfolder=model.get("subfolder"),
        tokenizer_subfolder=model.get("tokenizer_subfolder"),
        revision=model.get("revision"),
        max_tokens=policy["max_tokens"],
        cleaning=policy["cleaning"],
        device=job.run.device,
    )
