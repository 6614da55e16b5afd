"""The config of Flag-DiT and Large-DiT (arXiv 2405.05945, class-conditional). No torch."""

from dataclasses import dataclass, field, replace

from fitscale.config.checks import number
from fitscale.config.errors import UserError
from fitscale.model.common.quantise_config import QuantisedConfig
from fitscale.model.common.rope_config import RasterRopeConfig

TIME_CHANNELS = 256  # width of the time embedding's sinusoids
WIDEST_CONDITION = 1024


@dataclass(frozen=True)
class FlagConfig(QuantisedConfig):
    """One network; `family` says what it learns: flag_dit a velocity, large_dit noise and its variance."""

    rope: RasterRopeConfig = field(default_factory=RasterRopeConfig)
    mlp_multiple: int = number(256, least=1, most=10**6)  # the SwiGLU's width is a multiple of this

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise UserError(
                f"model.hidden_size: {self.hidden_size} / model.num_heads {self.num_heads} gives a head dimension of "
                f"{self.head_dim}; RoPE needs an even one (pairs)"
            )

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the SwiGLU: floor(2/3 * 4d), rounded up to a multiple of `mlp_multiple`."""
        return -(-(self.hidden_size * 8 // 3) // self.mlp_multiple) * self.mlp_multiple

    @property
    def condition_size(self) -> int:
        """Width of what time and class give together."""
        return min(self.hidden_size, WIDEST_CONDITION)

    @property
    def final_channels(self) -> int:
        """Channels that the last linear gives for a latent pixel."""
        return 2 * self.in_channels

    @property
    def out_channels(self) -> int:
        """Those of them that are used: half where a velocity is learned, and the others' rows never train."""
        return self.in_channels if self.objective == "rectified" else 2 * self.in_channels

    @property
    def objective(self) -> str:
        return "rectified" if self.family == "flag_dit" else "ddpm"

    @property
    def positions(self) -> str:
        return str(self.rope)

    def with_positions(self, method: str, decouple: bool) -> "FlagConfig":
        if decouple:
            raise UserError(f"--decouple: models of family {self.family} have one axis of positions; leave it out")
        return replace(self, rope=replace(self.rope, method=method))
