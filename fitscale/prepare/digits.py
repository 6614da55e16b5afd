"""scikit-learn's handwritten digits as a small flexible-resolution data set.

1,797 real scans of 8 x 8 pixels with 17 levels of grey. Cropped to their ink they have different sizes and aspect
ratios; each is stored at several scales, and an epoch draws one of them.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from fitscale.config.checks import at_least
from fitscale.config.errors import UserError
from fitscale.data.build_index import build_index
from fitscale.data.index import Index
from fitscale.data.shards import Sample, ShardSetMeta, Variant, write_shards

SCALES = (0.75, 1.0, 1.25)  # at patch size 1 this gives 12 to 100 tokens


def digit_variants(scales: tuple[float, ...] = SCALES, multiple: int = 1) -> list[Sample]:
    """Every digit, cropped to its ink, as a uint8 (1, height, width) variant for each of `scales`.

    Height and width are the nearest multiples of `multiple`, as patches of several pixels need them. Whether a digit is
    held out is `index.is_held_out(sample.key, fraction)`, as in the batch plan.
    """
    from sklearn.datasets import load_digits

    if not scales or min(scales) <= 0:
        raise UserError(f"scales: {scales} must be one or more numbers above 0")
    at_least("--multiple", multiple, 1)
    digits = load_digits()
    samples = []
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        ink = _crop(scan)
        variants = [Variant(_resize(ink, scale, multiple)[None]) for scale in scales]
        samples.append(Sample(f"digit-{number:04d}", int(label), variants))
    return samples


def digits_meta(scales: tuple[float, ...] = SCALES, multiple: int = 1) -> ShardSetMeta:
    """The description of the digits' shards."""
    recipe: dict[str, object] = {
        "source": "sklearn.datasets.load_digits",
        "crop": "bounding box of the ink",
        "resize": "Pillow bicubic, antialiased",
        "scales": list(scales),
    }
    recipe |= {"multiple": multiple} if multiple > 1 else {}  # shards of earlier versions do not name it
    return ShardSetMeta("pixels", factor=1, scaling=1.0, channels=1, num_classes=10, recipe=recipe)


def write_digits(
    out: Path, scales: tuple[float, ...] = SCALES, images_per_shard: int = 256, multiple: int = 1
) -> Index:
    """Write the digits' shards and index into the empty or new folder `out`."""
    write_shards(out, digit_variants(scales, multiple), digits_meta(scales, multiple), images_per_shard)
    return build_index(out)


def _crop(scan: np.ndarray) -> np.ndarray:
    """The bounding box of the ink, in 0..255 (stored: 0..16)."""
    rows, cols = np.flatnonzero(scan.any(axis=1)), np.flatnonzero(scan.any(axis=0))
    ink = scan[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return (ink * (255 / 16)).round().astype(np.uint8)


def _resize(image: np.ndarray, scale: float, multiple: int) -> np.ndarray:
    height, width = (multiple * max(1, round(side * scale / multiple)) for side in image.shape)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
