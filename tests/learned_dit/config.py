"""The config of the tests' own backbone."""

from dataclasses import dataclass

from fitscale.config.checks import at_least
from fitscale.config.schema import ModelConfig


@dataclass(frozen=True)
class LearnedDitConfig(ModelConfig):
    """A DiT whose positions are a table of rows and one of columns."""

    family: str = "learned_dit"
    max_side: int = 16  # patches; larger images cannot be placed
    mlp_ratio: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("model.max_side", self.max_side, 1)
        at_least("model.mlp_ratio", self.mlp_ratio, 1)

    @property
    def mlp_hidden_size(self) -> int:
        return self.mlp_ratio * self.hidden_size

    @property
    def tp_divides(self) -> dict[str, int]:
        return {"num_heads": self.num_heads, "mlp_hidden_size": self.mlp_hidden_size}

    @property
    def scales(self) -> tuple[tuple[int, float], ...]:
        return ((2, 0.25), (1, 1.0))
