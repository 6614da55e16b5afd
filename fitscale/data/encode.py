"""Between arrays and tokens, and from stored arrays back to images for people.

A token is a square patch of a (channels, height, width) array; its numbers are ordered `(c p1 p2)`, tokens in raster
order.
Pixels are stored as uint8 and trained on as x / 127.5 - 1. Latents are stored as trained on: scaling * (VAE's latent);
or as the moments of the VAE's posterior, scaling * (mean, standard deviation), of which training draws a latent.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange

from fitscale.config.errors import UserError
from fitscale.config.schema_data import LatentConfig

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def patchify(image_CHW: Array, patch_size: int) -> Array:
    """Tokens of an array: (channels, height, width) -> (rows * cols, channels * patch_size^2)."""
    return rearrange(image_CHW, "c (h p1) (w p2) -> (h w) (c p1 p2)", p1=patch_size, p2=patch_size)


def unpatchify(tokens_TC: Array, rows: int, cols: int, patch_size: int) -> Array:
    """The inverse of `patchify` for an array of rows x cols patches."""
    pattern = "(h w) (c p1 p2) -> c (h p1) (w p2)"
    return rearrange(tokens_TC, pattern, h=rows, w=cols, p1=patch_size, p2=patch_size)


def to_float(stored: np.ndarray) -> np.ndarray:
    """A stored array as it is trained on, float32: uint8 pixels in [-1, 1], latents as they are."""
    if stored.dtype == np.uint8:
        return stored / np.float32(127.5) - np.float32(1)
    return stored.astype(np.float32)


def draw_latent(moments_2CHW: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A latent (channels, height, width), float32, drawn from stored moments: mean + standard deviation * noise."""
    mean_CHW, std_CHW = np.split(moments_2CHW.astype(np.float32), 2)
    return mean_CHW + std_CHW * generator.standard_normal(mean_CHW.shape, dtype=np.float32)


class Encoder:
    """A VAE's posterior of images: the inverse of `Decoder`, for making shards.

    Raises:
        UserError: no AutoencoderKL at `name`, or its factor does not divide 16.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self._vae = _load_vae(name, dtype).to(device)
        self.dtype = str(dtype).removeprefix("torch.")  # bfloat16 on CUDA, else float32
        config = self._vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scaling, self.channels = float(config.scaling_factor), int(config.latent_channels)
        if 16 % self.factor:
            raise UserError(f"--encoder {name}: {self.factor} image pixels a latent pixel do not divide 16")

    @torch.no_grad()
    def __call__(self, images_BHW3: np.ndarray) -> np.ndarray:
        """scaling * (mean, standard deviation) of uint8 images of one shape: (B, 2 * channels, h, w) float16."""
        pixels = torch.from_numpy(images_BHW3).movedim(-1, 1).to(self._vae.device).float() / 127.5 - 1
        posterior = self._vae.encode(pixels.to(self._vae.dtype)).latent_dist
        moments = self.scaling * torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)
        return moments.cpu().numpy().astype(np.float16)


class Decoder:
    """Turns what the model generates into images.

    Raises:
        UserError: the VAE is not named, or cannot be loaded.
    """

    def __init__(self, latent: LatentConfig, device: str | torch.device = "cpu") -> None:
        self.latent = latent
        self._vae = _load_vae(latent.vae).to(device) if latent.kind == "vae" else None

    def __call__(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 images (..., H, W, channels) of latents, or of pixels in [-1, 1], (..., C, height, width)."""
        return self.pixels(latents).movedim(-3, -1).cpu().numpy()

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """The same as (..., channels, H, W), on the decoder's device."""
        if self._vae is None:
            return _to_uint8(latents)
        batch = latents.reshape(-1, *latents.shape[-3:]).to(self._vae.device, self._vae.dtype)
        images = self._vae.decode(batch / self.latent.scaling).sample
        return _to_uint8(images.reshape(*latents.shape[:-3], *images.shape[-3:]))


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    return ((images.float() + 1) * 127.5).round().clip(0, 255).to(torch.uint8)


def _load_vae(name: str | None, dtype: torch.dtype = torch.float32) -> Any:
    if name is None:
        raise UserError("data.latent.vae: needed to decode latents: a local folder or a hub name of an AutoencoderKL")
    from diffusers import AutoencoderKL

    # Weights in a pickle (.bin) could run code. The memory option is off anyway without accelerate, after a notice.
    options = {"torch_dtype": dtype, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        return AutoencoderKL.from_pretrained(name, **options).eval().requires_grad_(False)
    except Exception as error:  # diffusers raises nearly anything on damaged folders
        raise UserError(
            f"data.latent.vae: no AutoencoderKL at {name!r}, neither a local folder nor a reachable hub name "
            f"(its weights must be .safetensors): {error}"
        ) from error
