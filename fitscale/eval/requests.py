"""What is to be drawn."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One image to draw: `index` decides its noise, `rows` and `cols` its size in patches."""

    index: int
    label: int
    rows: int
    cols: int
    guidance: float | None = None  # its own scale; None = the config's

    @property
    def tokens(self) -> int:
        return self.rows * self.cols
