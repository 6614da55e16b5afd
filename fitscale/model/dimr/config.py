"""The config of DiMR (arXiv 2406.09416). No torch."""

from dataclasses import dataclass

from fitscale.config.checks import number, one_of
from fitscale.config.errors import UserError
from fitscale.config.schema import ModelConfig

MLP_RATIO = 2  # width of a gated MLP over that of its block, in every published config
PIXELS = 4  # latent pixels of a token: the ConvNeXt stage has a row for each


@dataclass(frozen=True)
class DimrConfig(ModelConfig):
    """DiMR of two resolutions: `depth` Transformer blocks of `hidden_size` on the patches, then ConvNeXt blocks on the
    latent pixels.

    The published configs give a number n of blocks that stands for 2 floor(n/2) + 1; here the true numbers.
    """

    family: str = "dimr"
    convnext_depth: int = number(21, least=1, most=10_000)
    convnext_size: int = number(480, least=1, most=10**6)  # channels of the ConvNeXt stage
    max_side: int = number(16, least=1, most=10_000)  # patches a side of the trained shape: the tables of positions
    positions: str = one_of("resize", "crop")  # of other shapes: the tables resized (bicubic), or their corner

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size != 2:
            raise UserError(f"model.patch_size: {self.patch_size} is not 2, the step between dimr's two resolutions")
        for key in ("depth", "convnext_depth"):
            if getattr(self, key) % 2 == 0:
                raise UserError(
                    f"model.{key}: {getattr(self, key)} is even; valid: an odd number, a middle block and as many "
                    "before as after it"
                )

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the Transformer stage's gated MLPs."""
        return MLP_RATIO * self.hidden_size

    @property
    def convnext_mlp_hidden_size(self) -> int:
        """Width of the ConvNeXt stage's gated MLPs."""
        return MLP_RATIO * self.convnext_size

    @property
    def objective(self) -> str:
        return "scaled_linear"

    @property
    def tp_divides(self) -> dict[str, int]:
        widths = {name: getattr(self, name) for name in ("mlp_hidden_size", "convnext_mlp_hidden_size")}
        return {"num_heads": self.num_heads, **widths}

    @property
    def cuts_tokens(self) -> bool:
        return False  # convolutions need whole images, and every image has a class token besides

    @property
    def scales(self) -> tuple[tuple[int, float], ...]:
        return ((2, 0.25), (1, 1.0))
