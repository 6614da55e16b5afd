"""`model.quantise`, for the configs of the backbones whose large linears may be ternary (`ternary`). No torch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from fitscale.config.checks import one_of
from fitscale.config.errors import UserError
from fitscale.config.schema import ModelConfig

ROWS_IN_A_BYTE = 4


@dataclass(frozen=True)
class QuantisedConfig(ModelConfig, ABC):
    """A config with ternary linears as an option; `packed_widths` are numbers of rows that a byte's must divide."""

    quantise: str = one_of("none", "ternary", "packed")  # the blocks' linears: `model.common.ternary`

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, width in self.packed_widths.items() if self.is_ternary else ():
            if width % ROWS_IN_A_BYTE:
                raise UserError(
                    f"model.quantise: {self.quantise} takes four rows of a weight in a byte; model.{name} is {width}, "
                    "valid: a multiple of 4"
                )

    @property
    def is_ternary(self) -> bool:
        return self.quantise != "none"

    @property
    def kind(self) -> str:
        return f"{self.family}-ternary" if self.is_ternary else self.family

    @property
    @abstractmethod
    def mlp_hidden_size(self) -> int:
        """Width of the blocks' MLPs."""

    @property
    def packed_widths(self) -> dict[str, int]:
        return {"head_dim": self.head_dim, "mlp_hidden_size": self.mlp_hidden_size}

    @property
    def tp_divides(self) -> dict[str, int]:
        packed = {"mlp_hidden_size / 4": self.mlp_hidden_size // ROWS_IN_A_BYTE} if self.is_ternary else {}
        return {"num_heads": self.num_heads, "mlp_hidden_size": self.mlp_hidden_size, **packed}

    def to_sample(self) -> Self:
        return replace(self, quantise="packed") if self.quantise == "ternary" else self
