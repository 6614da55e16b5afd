"""Options of 2-D rotary position embeddings (rope.py), for the configs of the backbones that have them. No torch."""

from dataclasses import dataclass

from fitscale.config.checks import at_least, choice

ROPE_METHODS = ("normal", "linear", "ntk-aware", "ntk-aware-pro1", "ntk-aware-pro2", "ntk-by-parts", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """2-D rotary position embedding and how it is stretched beyond the sizes trained on."""

    theta: float = 10000.0
    method: str = "normal"
    decouple: bool = False  # scale rows and columns by their own lengths (the papers' "Vision" variants)
    original_length: int = 16  # patches per axis that the model was trained on

    def __post_init__(self) -> None:
        choice("model.rope.method", self.method, ROPE_METHODS)
        at_least("model.rope.theta", self.theta, 1.0)
        # ntk-aware-pro1 and -pro2 divide by the logarithm of the trained length
        at_least("model.rope.original_length", self.original_length, 2 if "pro" in self.method else 1)

    def __str__(self) -> str:
        return self.method + (" decoupled" if self.decouple else "")
