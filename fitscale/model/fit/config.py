"""The config of FiT and FiTv2 (arXiv 2402.12376, 2410.13925). No torch."""

from dataclasses import dataclass, field, replace

from fitscale.config.errors import UserError
from fitscale.model.common.quantise_config import QuantisedConfig
from fitscale.model.common.rope_config import RopeConfig

TIME_CHANNELS = 256  # width of the time embedding's sinusoids


@dataclass(frozen=True)
class FitConfig(QuantisedConfig):
    """One FiT; `family` (fitv2, fit) decides everything in which FiTv2 and FiT (v1) differ."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm_weight: bool = False  # FiTv2's norms of q and k have a weight (an option of the published code)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 4:
            raise UserError(
                f"model.hidden_size: {self.hidden_size} / model.num_heads {self.num_heads} gives a head dimension of "
                f"{self.head_dim}; 2-D RoPE needs a multiple of 4 (a row and a column half, each of pairs)"
            )
        if self.qk_norm_weight and not self.is_v2:
            raise UserError("model.qk_norm_weight: FiT (v1) has no norm of q and k; it goes with model.family = fitv2")
        if self.is_ternary and not self.is_v2:
            raise UserError(
                "model.quantise: of FiT, only FiTv2 has ternary linears; valid for model.family = fit: none"
            )

    @property
    def is_v2(self) -> bool:
        return self.family == "fitv2"

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the SwiGLU: floor(2/3 * 4d) for FiTv2, 4d for FiT."""
        return self.hidden_size * 8 // 3 if self.is_v2 else 4 * self.hidden_size

    @property
    def adaln_rank(self) -> int | None:
        """Rank of AdaLN-LoRA (FiTv2); None where every block has its own full AdaLN (FiT)."""
        return self.hidden_size // 4 if self.is_v2 else None

    @property
    def out_channels(self) -> int:
        """Channels predicted per latent pixel: twice the input where sigma is learned (FiT)."""
        return self.in_channels if self.is_v2 else 2 * self.in_channels

    @property
    def objective(self) -> str:
        return "rectified" if self.is_v2 else "ddpm"

    @property
    def packed_widths(self) -> dict[str, int]:
        return {**super().packed_widths, "hidden_size / 4": self.hidden_size // 4}

    @property
    def positions(self) -> str:
        return str(self.rope)

    def with_positions(self, method: str, decouple: bool) -> "FitConfig":
        return replace(self, rope=replace(self.rope, method=method, decouple=decouple))
