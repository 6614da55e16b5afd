"""From the bytes of an image file to the pixel arrays that are encoded, as FiT prepares them (arXiv 2402.12376).

1. Decode: EXIF orientation applied, the first frame of an animation, every colour mode turned into 8-bit RGB.
2. An image of at most side^2 pixels keeps its size; a larger one is resized to that area, its aspect ratio kept.
3. What is over after a multiple of 16 on each side is cut off evenly, so that nothing is distorted.
4. If both sides exceed `side`, a second variant is resized to cover side x side and cropped to its centre.

Each variant is flipped before it is encoded, not after: a VAE's latent of a flipped image is not its flipped latent.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MULTIPLE = 16  # image pixels: a patch of 2 x 2 latent pixels, 8 image pixels each
RESIZE = "Pillow Lanczos, antialiased"
MAX_PIXELS = 2**28  # of a source image; more is taken for a decompression bomb
TOO_LARGE = f"too large: more than {MAX_PIXELS:,} pixels"


class Rejected(ValueError):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Picture:
    """One variant of an image before encoding: uint8 (height, width, 3), its kind (`resize` or `crop`), if mirrored."""

    pixels_HW3: np.ndarray
    kind: str
    flip: bool = False


def pictures(data: bytes, side: int) -> list[Picture]:
    """The variants of an image file for target side `side`, a multiple of 16; each is followed by its mirror image.

    Raises:
        Rejected: it is no image, it is damaged, or a side is too short.
        MemoryError: there was not enough memory just now.
    """
    image = decode(data)
    width, height = image.size
    found = [(_fit(image, *area_limited(height, width, side)), "resize")]
    if min(height, width) > side:
        shorter = min(height, width)
        covering = round(height * side / shorter), round(width * side / shorter)
        found.append((_fit(image, *covering, crop=side), "crop"))
    drawn = [(Picture(pixels, kind), Picture(pixels[:, ::-1], kind, flip=True)) for pixels, kind in found]
    return [variant for pair in drawn for variant in pair]


def area_limited(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of at most side^2 pixels with the same aspect ratio (to rounding); smaller images keep theirs."""
    scale = min(1.0, (side * side / (height * width)) ** 0.5)
    return int(height * scale + 1e-9), int(width * scale + 1e-9)


def decode(data: bytes) -> Image.Image:
    """The image as 8-bit RGB, upright; transparent parts over white.

    Raises:
        Rejected: with the reason.
    """
    if not data:
        raise Rejected("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what cannot be decoded raises
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Rejected(TOO_LARGE)
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (Rejected, MemoryError):  # short memory is no fault of the image
        raise
    except Image.UnidentifiedImageError:
        raise Rejected("not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        raise Rejected(TOO_LARGE) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise Rejected(f"damaged: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise Rejected(f"integer levels {levels.min()} .. {levels.max()}: neither 8 nor 16 bits")
        return Image.fromarray((levels / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected("floating-point pixels: their range is not known")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, height: int, width: int, crop: int | None = None) -> np.ndarray:
    """Resize to (height, width), then keep the centre: a `crop` square, or the largest multiples of 16."""
    keep_height, keep_width = (crop or side // MULTIPLE * MULTIPLE for side in (height, width))
    if not keep_height or not keep_width:
        raise Rejected(f"too narrow: {width} x {height} pixels within the area limit, a side is below {MULTIPLE}")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - keep_height) // 2, (width - keep_width) // 2
    return np.asarray(image.crop((left, top, left + keep_width, top + keep_height)))
