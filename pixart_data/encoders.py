"""The encoders whose outputs training reads: a VAE for images and T5 for captions.

Legend: B batch, C latent channels (4), H W pixels, h w latent cells (8 px each), L tokens, D text width.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pixart_data import sections
from pixart_data.batches import Halving
from pixart_data.errors import ConfigError
from pixart_data.models import loading, placement, provenance, require_weights
from pixart_data.texts import clean

DOWNSAMPLING = 8


class ImageEncoder:
    """A VAE of the Stable Diffusion family: images to posteriors, and latents back to images.

    `setting` is the job file's key that names the model, for messages.

    Raises:
        ConfigError: If the model cannot be loaded or does not downsample by 8.
    """

    def __init__(self, config: sections.ImageFeatures, setting: str = "image.model") -> None:
        from diffusers import AutoencoderKL

        # bf16 arithmetic moves latents by about 1% of their standard deviation, for features that are stored as fp16.
        self.placement = placement(config.device, "fp32" if config.dtype == "auto" else config.dtype)
        with loading(setting, config.model):
            self.vae, info = AutoencoderKL.from_pretrained(
                config.model,
                subfolder=config.subfolder,
                revision=config.revision,
                torch_dtype=self.placement.dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
            require_weights(info)
        self.vae.to(self.placement.device).eval()
        self._moments = Halving(self._encode)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if factor != DOWNSAMPLING:
            raise ConfigError(f"{setting}: expected a VAE that downsamples by 8, {config.model} does by {factor}")
        self.facts = {
            **provenance(self.vae.config, config.model, config.revision, config.subfolder),
            "dtype": str(self.placement.dtype).removeprefix("torch."),
            "scaling_factor": float(self.vae.config.scaling_factor),
            "shift_factor": float(self.vae.config.shift_factor or 0.0),
            "channels": int(self.vae.config.latent_channels),
            "downsampling": factor,
        }

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add `moments`, F16 (B, 2, C, h, w): posterior mean and std, unscaled, to `pixels`, uint8 (B, H, W, 3)."""
        return batch | {"moments": np.stack(self._moments(batch["pixels"]))}

    def _encode(self, images: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float16]]:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.placement.device)
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (B, 3, H, W); in bf16 this would err by half a level
        posterior = self.vae.encode(x.to(self.placement.dtype)).latent_dist
        moments = torch.stack([posterior.mean, posterior.std], dim=1)  # (B, 2, C, h, w)
        return list(moments.to(torch.float16).cpu().numpy())

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return pictures of unscaled latents (B, C, h, w)."""
        x = self.vae.decode(latents.to(self.placement.device, self.placement.dtype)).sample  # (B, 3, H, W)
        pixels = ((x.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


class TextEncoder:
    """A T5 encoder. Captions are cleaned by the section's policy, cut at `max_tokens`, and encoded by length.

    `setting` is the job file's key that names the model, for messages.

    Raises:
        ConfigError: If the model or its tokenizer cannot be loaded.
    """

    def __init__(self, config: sections.TextFeatures, setting: str = "text.model") -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        self.config = config
        self.placement = placement(config.device, config.dtype)
        with loading(setting, config.model):
            # `None` is not a subfolder to transformers, the empty string is none.
            self.tokenizer = AutoTokenizer.from_pretrained(
                config.model, subfolder=config.tokenizer_subfolder or "", revision=config.revision
            )
            # Loading in the dtype, not casting after, keeps the layers that T5 must have in fp32.
            self.model, info = T5EncoderModel.from_pretrained(
                config.model,
                subfolder=config.subfolder or "",
                revision=config.revision,
                dtype=self.placement.dtype,
                output_loading_info=True,
            )
            require_weights(info)
        self.model.to(self.placement.device).eval()
        self._features = Halving(self._encode_batch, weigh=lambda rows: len(rows) * len(rows[-1]))
        self.facts = {
            **provenance(self.model.config, config.model, config.revision, config.subfolder),
            "tokenizer_subfolder": config.tokenizer_subfolder,
            "dtype": str(self.placement.dtype).removeprefix("torch."),
            "width": int(self.model.config.d_model),
        }

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Clean the column `caption`; add `t5`, a list of (n, D) bf16 bits, and the bools `truncated` and `finite`."""
        captions = [clean(caption, self.config.cleaning) for caption in batch["caption"]]
        tokens = self._tokens(captions)
        features = self._encode([row[: self.config.max_tokens] for row in tokens])
        return batch | {
            "caption": captions,
            "t5": [self._bits(f) for f in features],
            "truncated": [len(row) > self.config.max_tokens for row in tokens],
            "finite": [bool(f.isfinite().all()) for f in features],
        }

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """Return the features of captions, each (n, D) in bf16 with its true tokens only."""
        cleaned = [clean(caption, self.config.cleaning) for caption in captions]
        return self._encode([row[: self.config.max_tokens] for row in self._tokens(cleaned)])

    def _tokens(self, captions: list[str]) -> list[list[int]]:
        """Tokenize in full; a row longer than the limit is cut so that it still ends in the end-of-sequence token."""
        rows: list[list[int]] = self.tokenizer(captions, verbose=False)["input_ids"] if captions else []
        limit = self.config.max_tokens
        return [row if len(row) <= limit else [*row[: limit - 1], row[-1], *row[limit:]] for row in rows]

    @torch.inference_mode()
    def _encode(self, rows: list[list[int]]) -> list[torch.Tensor]:
        features: list[torch.Tensor | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        while order:
            batch = self._take(order, rows)
            for i, feature in zip(batch, self._features([rows[i] for i in batch]), strict=True):
                features[i] = feature
        return [feature for feature in features if feature is not None]

    def _encode_batch(self, rows: list[list[int]]) -> list[torch.Tensor]:
        length = len(rows[-1])  # the longest
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # (B, L)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])  # (B, L)
        device = self.placement.device
        states = self.model(ids.to(device), attention_mask=mask.to(device)).last_hidden_state  # (B, L, D)
        return [state[: len(row)] for row, state in zip(rows, states.to(torch.bfloat16).cpu(), strict=True)]

    def _take(self, order: list[int], rows: list[list[int]]) -> list[int]:
        """Remove the next batch from `order` (sorted by length): as many rows as fit `batch_tokens`, at least one."""
        size = 1
        while size < len(order) and (size + 1) * len(rows[order[size]]) <= self.config.batch_tokens:
            size += 1
        batch, order[:size] = order[:size], []
        return batch

    @staticmethod
    def _bits(features: torch.Tensor) -> npt.NDArray[np.uint16]:
        return features.contiguous().view(torch.int16).numpy().view(np.uint16)
