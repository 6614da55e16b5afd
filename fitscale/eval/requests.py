"""What is to be drawn: one request an image, and how many requests are cut into chunks."""

from dataclasses import dataclass

from fitscale.config.errors import UserError
from fitscale.config.schema import Config
from fitscale.plan.evaluation import CHUNK_IMAGES

MOST_TOKENS = 1 << 24  # of an image, to draw


@dataclass(frozen=True)
class Request:
    """One image to draw: `index` decides its noise, `rows` and `cols` its size in patches."""

    index: int
    label: int
    rows: int
    cols: int
    guidance: float | None = None  # scale of its own; None = the config's

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


def chunk_ranges(number: int, size: int = CHUNK_IMAGES) -> list[range]:
    """The numbers 0 .. `number` - 1 in runs of `size`; the last may be shorter."""
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def patches(config: Config, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of a height x width pixel image.

    Raises:
        UserError: a side is no multiple of the patch, and names the nearest that are; or an image is too large.
    """
    multiple = config.model.patch_size * config.data.latent.factor
    for name, side in (("--height", height), ("--width", width)):
        if side < 1 or side % multiple:
            low = max(side // multiple, 1) * multiple
            raise UserError(
                f"{name}: {side} is not a multiple of {multiple} (model.patch_size {config.model.patch_size} x "
                f"data.latent.factor {config.data.latent.factor}); the nearest are {low} and {low + multiple}"
            )
    rows, cols = height // multiple, width // multiple
    if rows * cols > MOST_TOKENS:
        raise UserError(f"--height, --width: {height} x {width} pixels are more than {MOST_TOKENS} tokens")
    return rows, cols
