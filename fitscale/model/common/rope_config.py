"""Options of rotary position embeddings (rope.py), for the configs of the backbones that have them. No torch."""

from dataclasses import dataclass

from fitscale.config.checks import Section, at_least, number, one_of

RASTER_ROPE_METHODS = ("normal", "linear", "ntk-aware")
ROPE_METHODS = ("normal", "linear", "ntk-aware", "ntk-aware-pro1", "ntk-aware-pro2", "ntk-by-parts", "yarn")


@dataclass(frozen=True)
class RopeConfig(Section, path="model.rope"):
    """2-D rotary position embedding and how it is stretched beyond the sizes trained on."""

    theta: float = number(10000.0, least=1.0)
    method: str = one_of(*ROPE_METHODS)
    decouple: bool = False  # scale rows and columns by their own lengths (the papers' "Vision" variants)
    original_length: int = number(16, least=1, most=10**6)  # patches per axis that the model was trained on

    def __post_init__(self) -> None:
        super().__post_init__()
        # ntk-aware-pro1 and -pro2 divide by the logarithm of the trained length
        if "pro" in self.method:
            at_least("model.rope.original_length", self.original_length, 2)

    def __str__(self) -> str:
        return self.method + (" decoupled" if self.decouple else "")


@dataclass(frozen=True)
class RasterRopeConfig(Section, path="model.rope"):
    """1-D rotary position embedding over a patch's number in raster order, and its stretching beyond trained sizes."""

    theta: float = number(10000.0, least=1.0)
    method: str = one_of(*RASTER_ROPE_METHODS)
    original_length: int = number(256, least=1, most=10**6)  # patches of an image that the model was trained on

    def __str__(self) -> str:
        return f"raster {self.method}"


AnyRopeConfig = RopeConfig | RasterRopeConfig
