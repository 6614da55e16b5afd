"""The sampling section of a config: how images are drawn from a trained network."""

from dataclasses import dataclass, field

from fitscale.config.checks import Section, number, one_of
from fitscale.config.errors import UserError

ODE_SAMPLERS = ("euler", "heun", "ab2", "dopri5", "sde", "sde_heun")
SDE_SAMPLERS = ("sde", "sde_heun")
DDPM_SAMPLERS = ("ddpm", "ddim")
DPM_SAMPLERS = ("dpm_solver_pp",)
ADAPTIVE_SAMPLERS = ("dopri5",)  # choose the steps of each image by its error
LAST_STEPS = ("mean", "euler", "none")
SPACINGS = ("linspace", "leading", "trailing")
_PUBLISHED_SPACING = {"ddpm": "linspace", "ddim": "leading"}  # respacing "N" and "ddimN" of FiT v1's and DiT's code


@dataclass(frozen=True)
class GuidanceConfig(Section, path="sampling.guidance"):
    """Away from "no class" (classifier-free guidance), or from a weaker model's answer (autoguidance)."""

    scale: float = 1.0  # 1 = no guidance
    channels: int | None = number(None, least=1)  # acts on the latent's first so many; None = see `guided_channels`
    power: float = number(0.0, least=0.0)  # exponent p of the power-cosine scale; 0 = constant scale
    towards: str = one_of("noise", "data")  # where the power-cosine scale is `scale`; at the other end it is 1
    interval: tuple[float, float] = number((0.0, 1.0), least=0.0, most=1.0)  # of flow times (1 = data) where it acts
    guide: str | None = None  # weaker model instead of "no class": run directory, or .safetensors in published names
    guide_step: int | None = number(None, least=0)  # its checkpoint, needed with a run directory
    guide_weights: str | None = None  # of a run directory: raw, ema or ema_<decay>; None = what it evaluates

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.interval
        if low >= high:
            raise UserError(f"sampling.guidance.interval: {low:g} is not below {high:g}; valid: [low, high], 1 is data")
        self._check_guide()

    def _check_guide(self) -> None:
        is_file = self.guide is not None and self.guide.endswith(".safetensors")
        for name in ("guide_step", "guide_weights"):
            if getattr(self, name) is not None and (self.guide is None or is_file):
                raise UserError(f"sampling.guidance.{name}: goes with a run directory in sampling.guidance.guide")
        if self.guide is not None and not is_file and self.guide_step is None:
            raise UserError(
                f"sampling.guidance.guide_step: needed with the run directory {self.guide}, whose newest checkpoint "
                "does not stay the same"
            )

    def guided_channels(self, in_channels: int) -> int:
        """How many of `in_channels` are guided: `channels`, or all by a guide, or as in the published code (3 of 4)."""
        if self.channels is None:
            return min(3, in_channels) if self.guide is None else in_channels
        return self.channels


@dataclass(frozen=True)
class SamplingConfig(Section, path="sampling"):
    """How images are drawn from a trained model."""

    method: str = one_of(*ODE_SAMPLERS, *DDPM_SAMPLERS, *DPM_SAMPLERS)
    steps: int = number(50, least=1, most=10**6)  # of integration; dopri5 chooses its own
    last_step: str | None = one_of(None, *LAST_STEPS)  # of sde and sde_heun (`flow.sampler`); None = mean
    shift_base_tokens: int | None = number(None, least=1)  # images of more tokens stay longer at noise; None = none do
    spacing: str | None = one_of(None, *SPACINGS)  # of ddpm's and ddim's steps; None = published: linspace, leading
    rtol: float = 1e-3  # dopri5
    atol: float = 1e-6  # dopri5
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spacing is not None and self.method not in DDPM_SAMPLERS:
            raise UserError(f"sampling.spacing: goes with {' and '.join(DDPM_SAMPLERS)}, not with {self.method}")
        if self.last_step is not None and self.method not in SDE_SAMPLERS:
            raise UserError(f"sampling.last_step: goes with {' and '.join(SDE_SAMPLERS)}, not with {self.method}")
        unshifted = (*ADAPTIVE_SAMPLERS, *DDPM_SAMPLERS, *DPM_SAMPLERS)
        if self.shift_base_tokens is not None and self.method in unshifted:
            valid = ", ".join(method for method in ODE_SAMPLERS if method not in ADAPTIVE_SAMPLERS)
            raise UserError(f"sampling.shift_base_tokens: goes with {valid}, not with {self.method}")

    @property
    def timestep_spacing(self) -> str | None:
        """`spacing`, or the published one; None for methods that take no steps of a DDPM."""
        return self.spacing or _PUBLISHED_SPACING.get(self.method)
