"""A whole `PixArtAlphaPipeline` of diffusers around the transformer's weights: `pixart convert --to pipeline`."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.config import Convert
from jobs.layouts import MICRO_SIDE, write_transformer
from pixart_data.errors import ConfigError
from pixart_data.models import loading, quiet_loading, require_kind
from pixart_data.retries import storage
from pixart_model.diffusion import NUM_TIMESTEPS
from pixart_model.weights import TRANSFORMER, Weights

log = logging.getLogger(__name__)

_BINNED = (32, 64, 128)  # sides in latent cells for which the pipeline has a table of aspect ratios
_PIPELINE_TOKENS = 120  # its default


@dataclass(frozen=True)
class _Place:
    """Where `from_pretrained` finds a model."""

    model: str
    subfolder: str | None
    tokenizer_subfolder: str | None
    revision: str | None


def require(job: Convert, weights: Weights) -> None:
    """Check, before anything is loaded, that diffusers' pipeline can drive a model and that its other parts are known.

    Raises:
        ConfigError: If not, or diffusers or transformers is not installed.
    """
    try:
        import diffusers  # noqa: F401 - the parts are loaded later
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError("layout: a pipeline needs diffusers; pip install 'pixart-toolkit[sample]'") from error
    config = weights.config
    if config.micro_conditioning and config.base_size != MICRO_SIDE:
        raise ConfigError(
            f"model.micro_conditioning: PixArtAlphaPipeline has it with base_size {MICRO_SIDE} only (1024 px), found "
            f"{config.base_size}; convert with --to diffusers, and call the transformer in a loop of your own"
        )
    text, image = _places(job, weights)
    require_kind("text_encoder", text.model, text.subfolder, "(?i)t5")
    require_kind("vae", image.model, image.subfolder, "Autoencoder")


def write(job: Convert, weights: Weights, folder: Path) -> None:
    """Write a folder that `PixArtAlphaPipeline.from_pretrained` loads.

    Raises:
        ConfigError: If a part cannot be loaded, or does not go with the transformer.
        JobError: If the storage fails.
    """
    from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import AutoTokenizer, T5EncoderModel

    quiet_loading()
    text, image = _places(job, weights)
    with loading("text_encoder", text.model):
        tokenizer = AutoTokenizer.from_pretrained(
            text.model, subfolder=text.tokenizer_subfolder or "", revision=text.revision
        )
        encoder = T5EncoderModel.from_pretrained(
            text.model, subfolder=text.subfolder or "", revision=text.revision, dtype="auto"
        )
    with loading("vae", image.model):
        vae = AutoencoderKL.from_pretrained(
            image.model, subfolder=image.subfolder, revision=image.revision, low_cpu_mem_usage=False
        )
    _require_match(weights, encoder, vae, text, image)
    part = folder / TRANSFORMER
    with storage(folder):
        part.mkdir()
    write_transformer(weights, part)
    transformer = PixArtTransformer2DModel.from_pretrained(part, torch_dtype=_dtype(weights), low_cpu_mem_usage=False)
    pipeline = PixArtAlphaPipeline(tokenizer, encoder, vae, transformer, _scheduler())
    with storage(folder):
        pipeline.save_pretrained(folder)
    _say(weights)


def _scheduler() -> Any:
    """DPM-Solver++ (2M) as the reference has it from 10 steps on, up to the rounding of timesteps."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )


def _places(job: Convert, weights: Weights) -> tuple[_Place, _Place]:
    """Where text encoder and VAE are: as the job says, or else the models that the training features were made with."""
    text, image = (weights.features or {}).get("text", {}), (weights.features or {}).get("image", {})
    return (
        _place(weights, "text_encoder", text, job.text_encoder, job.text_encoder_subfolder, job.tokenizer_subfolder),
        _place(weights, "vae", image, job.vae, job.vae_subfolder, None),
    )


def _place(
    weights: Weights,
    key: str,
    features: dict[str, Any],
    given: str | None,
    subfolder: str | None,
    tokenizer_subfolder: str | None,
) -> _Place:
    if given is not None:
        return _Place(given, subfolder, tokenizer_subfolder, None)
    if not features:
        raise ConfigError(
            f"{key}: expected the model that {weights.where} was trained with, which it does not tell, found none; "
            f"give --set {key}=ID"
        )
    facts = features["model"]
    names = ("subfolder", "tokenizer_subfolder", "revision")
    return _Place(facts["id"], *(facts.get(name) for name in names))


def _require_match(weights: Weights, encoder: Any, vae: Any, text: _Place, image: _Place) -> None:
    config = weights.config
    facts = (
        ("text_encoder", "width", config.caption_width, encoder.config.d_model, text),
        ("vae", "channels", config.in_channels, vae.config.latent_channels, image),
    )
    for key, what, expected, found, place in facts:
        if expected != found:
            raise ConfigError(
                f"{key}: expected {what} {expected}, which the transformer has, found {found} in {place.model}; give "
                f"another with --set {key}=ID"
            )
    trained = (weights.features or {}).get("image", {}).get("model", {})
    for what in ("scaling_factor", "shift_factor"):
        had, found = trained.get(what), getattr(vae.config, what, None) or 0.0
        if had is not None and not math.isclose(had, found, rel_tol=1e-6):
            raise ConfigError(
                f"vae: expected {what} {had}, as the features have it that {weights.where} was trained on, found "
                f"{found} in {image.model}; give the VAE that made them with --set vae=ID"
            )
    if vae.config.shift_factor:
        raise ConfigError(
            f"vae: expected no shift_factor, which PixArtAlphaPipeline leaves out, found {vae.config.shift_factor} in "
            f"{image.model}; convert with --to diffusers, and decode in a loop of your own"
        )


def _dtype(weights: Weights) -> torch.dtype:
    return weights.tensors["x_embedder.proj.weight"].dtype


def _say(weights: Weights) -> None:
    """Tell what has to be said to the pipeline when it is called."""
    policy = (weights.features or {}).get("text", {}).get("policy", {})
    limit = policy.get("max_tokens") or _PIPELINE_TOKENS
    if policy.get("cleaning"):
        log.warning(
            "call the pipeline with clean_caption=False: by default it rewrites prompts as training (%s) did not "
            "rewrite captions; it lower-cases them all the same, so where capitals matter give it prompt_embeds",
            policy["cleaning"],
        )
    if limit != _PIPELINE_TOKENS:
        log.warning("call the pipeline with max_sequence_length=%d: it was trained on captions up to that", limit)
    if weights.config.base_size not in _BINNED:
        log.warning("call the pipeline with use_resolution_binning=False: it has no table for this resolution")
