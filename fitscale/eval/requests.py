"""What is to be drawn: one request an image, and how many requests are cut into chunks."""

from dataclasses import dataclass

from fitscale.plan.evaluation import CHUNK_IMAGES


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
