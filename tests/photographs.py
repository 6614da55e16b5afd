"""Photograph-like pictures in many formats, and files that only look like pictures."""

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth colours with detail on top, RGB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 8, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_some_format(seed: int, image: Image.Image) -> tuple[str, bytes]:
    """(suffix, bytes): JPEG in RGB, grey or CMYK; PNG with alpha or 16 bits; WebP; BMP; TIFF; GIF animated."""
    choices = [
        lambda: ("jpg", encoded(image, "JPEG")),
        lambda: ("png", encoded(image, "PNG", compress_level=1)),
        lambda: ("jpeg", encoded(image.convert("L"), "JPEG")),
        lambda: ("jpg", encoded(image.convert("CMYK"), "JPEG")),
        lambda: ("png", encoded(image.convert("RGBA"), "PNG", compress_level=1)),
        lambda: ("png", encoded(sixteen_bits(image), "PNG", compress_level=1)),
        lambda: ("bmp", encoded(image, "BMP")),
        lambda: ("tif", encoded(image, "TIFF")),
        lambda: ("gif", encoded(image, "GIF", save_all=True, append_images=[image.rotate(180)])),
    ]
    return choices[seed % len(choices)]()


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def write_photographs(folder: Path, count: int, sizes: int = 300, classes: int = 5, longest: int = 400) -> None:
    """`count` pictures of `sizes` different sizes, in `classes` subfolders."""
    rng = np.random.default_rng(0)
    shapes = list(dict.fromkeys((int(h), int(w)) for h, w in rng.integers(20, longest, (2 * sizes, 2))))[:sizes]
    for number in range(count):
        suffix, data = in_some_format(number, photograph(number, *shapes[number % len(shapes)]))
        path = folder / f"class{number % classes}" / f"image{number:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def tiny_vae(path: Path) -> None:
    """Save a randomly initialised AutoencoderKL of the usual shape (factor 8, 4 channels), tiny, in a folder."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    model.save_pretrained(path)


def broken_files() -> dict[str, bytes]:
    """Name -> contents, twenty kinds of file that are no usable image."""
    whole = photograph(1, 64, 64)
    jpeg, png, gif = (encoded(whole, kind) for kind in ("JPEG", "PNG", "GIF"))
    webp, tiff, bmp = (encoded(whole, kind) for kind in ("WEBP", "TIFF", "BMP"))
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    return {
        "empty.jpg": b"",
        "text.jpg": b"not an image at all\n" * 20,
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "zeros.png": bytes(1000),
        "noise.jpg": np.random.default_rng(0).bytes(1000),
        "zip.jpg": archive.getvalue(),
        "document.pdf": b"%PDF-1.4\n%%EOF\n",
        "header_only.jpg": jpeg[:20],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "half.webp": webp[: len(webp) // 2],
        "half.tif": tiff[: len(tiff) // 2],
        "half.bmp": bmp[: len(bmp) // 2],
        "half.gif": gif[: len(gif) // 2],
        "overwritten.png": png[:60] + bytes(200) + png[260:],
        "signature_only.png": png[:8],
        "bomb.png": bytes(bomb),
        "tiny.png": encoded(whole.resize((8, 8)), "PNG"),
        "sliver.png": encoded(whole.resize((2000, 15)), "PNG"),
        "floats.tif": encoded(Image.fromarray(np.ones((64, 64), np.float32)), "TIFF"),
    }


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar, complete and in the order given."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
