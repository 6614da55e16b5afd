"""What a run is made of: frozen dataclasses, checked on construction, without torch.

`load.py` builds them from YAML files and overrides. Every section names its units; a value that cannot be right
raises `UserError` with the key's full path and the values that would be valid.
"""

from dataclasses import dataclass, field, replace
from math import gcd
from re import fullmatch
from typing import Any

from fitscale.config.checks import Section, number, one_of
from fitscale.config.errors import UserError
from fitscale.config.schema_data import DataConfig
from fitscale.config.schema_sampling import DDPM_SAMPLERS, DPM_SAMPLERS, ODE_SAMPLERS, SamplingConfig

_OWN_TIMES = {"rectified": "logit_normal", "ddpm": "uniform", "scaled_linear": "uniform"}
_SAMPLERS = {"rectified": ODE_SAMPLERS, "ddpm": DDPM_SAMPLERS, "scaled_linear": DPM_SAMPLERS}


@dataclass(frozen=True)
class ModelConfig(Section, path="model"):
    """What every backbone's config has; `family` names the backbone, whose own class adds the rest (`fitscale.model`).

    How a backbone divides over tensor-parallel ranks, which objective it learns and what its network answers are
    properties that its class overrides.
    """

    name: str = "b"
    family: str = "fitv2"
    depth: int = number(15, least=1, most=10_000)
    hidden_size: int = number(768, least=1, most=10**6)
    num_heads: int = number(12, least=1, most=10_000)
    patch_size: int = number(2, least=1, most=1000)  # side of a square patch, in latent pixels
    in_channels: int = number(4, least=1, most=10_000)  # channels of a latent (VAE) or of an image (pixels)
    num_classes: int = number(1000, least=1, most=10**8)  # without the extra "no class" row

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size: {self.hidden_size} is not a multiple of model.num_heads = {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def token_channels(self) -> int:
        """Numbers in one input token: patch_size^2 * in_channels."""
        return self.patch_size**2 * self.in_channels

    @property
    def kind(self) -> str:
        """What laws tell apart: the family, and what else makes runs of it another model at the same size."""
        return self.family

    @property
    def objective(self) -> str:
        """The `flow.kind` that the network is made for."""
        return "rectified"

    @property
    def tp_divides(self) -> dict[str, int]:
        """What a tensor-parallel size has to divide, by key."""
        return {"num_heads": self.num_heads}

    @property
    def cuts_tokens(self) -> bool:
        """Whether the network can cut a pack's tokens over tensor-parallel ranks (`parallel.sequence_parallel`)."""
        return True

    @property
    def scales(self) -> tuple[tuple[int, float], ...]:
        """(pixels along a side that one number of the output stands for, weight in the loss) of every output."""
        return ((1, 1.0),)

    @property
    def positions(self) -> str:
        """Where the network's knowledge of positions comes from, for the comparability key."""
        return "own"

    def to_sample(self) -> "ModelConfig":
        """The form in which a network that only samples holds this model's weights."""
        return self

    def with_positions(self, method: str, decouple: bool) -> "ModelConfig":
        """The same weights with RoPE stretched by `method`, to generate at sizes beyond those trained on."""
        raise UserError(f"--rope: models of family {self.family} have no RoPE to stretch")


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {}  # by family; filled by the registry of backbones, fitscale.model


@dataclass(frozen=True)
class BatchConfig(Section, path="batch"):
    """The global batch (part of the science) and how it is cut into packs (never part of the science)."""

    global_batch_size: int = number(256, least=1, most=10**7)  # images per optimizer step, over all ranks
    pack_tokens: int = number(16384, least=1, most=10**9)  # most tokens in one pack, padding included
    pad_multiple: int = number(1, least=1, most=10**6)  # packs are padded to one of this and of tensor_parallel_size


@dataclass(frozen=True)
class FlowConfig(Section, path="flow"):
    """The generative process that is learned."""

    # velocity of a straight path; epsilon with learned sigma (FiT); epsilon on latent diffusion's noise (DiMR)
    kind: str = one_of("rectified", "ddpm", "scaled_linear")
    time_distribution: str | None = one_of(None, "logit_normal", "uniform")  # None = the kind's own
    label_drop: float = number(0.1, least=0.0, below=1.0)  # share of labels replaced by "no class" in training

    @property
    def times(self) -> str:
        """`time_distribution`, or the kind's own."""
        return self.time_distribution or _OWN_TIMES[self.kind]

    def check_new_run(self) -> None:
        """Raises UserError for what runs of earlier versions hold, and can go on with, but no new run may have."""
        if self.kind != "rectified" and self.times != "uniform":
            raise UserError(
                f"flow.time_distribution: {self.times} does not go with flow.kind = {self.kind}, which draws its "
                "steps uniformly; leave it out, or give uniform"
            )


@dataclass(frozen=True)
class LossConfig(Section, path="loss"):
    """`image`: mean over an image's tokens, then over images; `token`: large images weigh more."""

    reduction: str = one_of("image", "token")


@dataclass(frozen=True)
class OptimConfig(Section, path="optim"):
    """AdamW, its schedule, and the EMA of the weights."""

    lr: float = number(1e-4, least=0.0)
    betas: tuple[float, float] = number((0.9, 0.999), least=0.0, below=1.0)
    eps: float = number(1e-8, least=0.0)
    weight_decay: float = number(0.0, least=0.0)
    no_decay: list[str] = field(default_factory=list)  # parameters whose name contains one of these do not decay
    warmup_steps: int = number(0, least=0)
    schedule: str = one_of("constant", "cosine")  # after the warm-up; cosine falls to zero at run.steps
    grad_clip: float | None = number(1.0, above=0)  # largest global gradient norm; None = whatever it is
    ema_decays: list[float] = number([0.9999], least=0.0, below=1.0)  # noqa: RUF009 (a field)
    trainable: list[str] = field(default_factory=list)  # only parameters whose name contains one of these; [] = all


@dataclass(frozen=True)
class ParallelConfig(Section, path="parallel"):
    """How one run is spread over ranks; changes speed and memory, never the result."""

    tensor_parallel_size: int = number(1, least=1, most=10_000)
    sequence_parallel: bool = False  # shard the token dimension between the tensor-parallel regions
    zero_stage: int = 1
    zero_hpz_partition_size: int = number(1, least=1, most=10_000)  # ranks of a node that hold a copy of the weights
    # between them, from which stage 3 gathers all but a step's first time (ZeRO++'s hpZ); 1 = no copy
    precision: str = one_of("auto", "fp32", "bf16")  # bf16 keeps fp32 master weights; auto = bf16 on cuda, else fp32
    compile: str = one_of("auto", "on", "off")  # fuse what is not a matrix product; auto = where a run is long enough
    offload_optimizer: bool = False  # keep the optimizer's state and step in host memory
    activation_checkpoint_every: int = number(0, least=0, most=10_000)  # recompute every k-th block backward; 0 = none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"parallel.zero_stage: {self.zero_stage} is not one of 0, 1, 2, 3")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise UserError(
                "parallel.zero_stage: stage 0 with precision = bf16 trains wrongly in DeepSpeed (no fp32 master "
                "weights, a dummy optimizer step at start); use stage 1, 2 or 3, or precision = fp32"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise UserError("parallel.offload_optimizer: needs parallel.zero_stage of 1, 2 or 3")
        if self.zero_hpz_partition_size > 1 and self.zero_stage < 3:
            raise UserError(
                f"parallel.zero_hpz_partition_size: {self.zero_hpz_partition_size} needs parallel.zero_stage of 3, the "
                "only one that shards weights"
            )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise UserError("parallel.sequence_parallel: needs parallel.tensor_parallel_size of 2 or more")

    def require_dp_size(self, dp_size: int) -> None:
        """Raises UserError unless `dp_size` data-parallel ranks divide as these settings say."""
        if dp_size % self.zero_hpz_partition_size:
            valid = ", ".join(str(n) for n in range(1, dp_size + 1) if dp_size % n == 0)
            raise UserError(
                f"parallel.zero_hpz_partition_size: {self.zero_hpz_partition_size} does not divide {dp_size} "
                f"data-parallel ranks; valid: {valid}"
            )

    def reduce_bucket(self, dp_size: int) -> int:
        """Gradients that `dp_size` data-parallel ranks sum at a time, in numbers: megatron-core's rule (its
        DistributedDataParallelConfig). Fewer leave the network idle; more are summed when the backward pass is over."""
        return max(40_000_000, 1_000_000 * dp_size)


@dataclass(frozen=True)
class CheckpointConfig(Section, path="checkpoint"):
    """When the state is saved. Besides these, every evaluation step and the last step are saved and kept."""

    every_steps: int = number(1000, least=1)
    keep_last: int = number(2, least=0)  # newest checkpoints kept for resuming; 0 keeps all


@dataclass(frozen=True)
class HealthConfig(Section, path="health"):
    """What a run does when something is wrong."""

    max_bad_steps: int = number(10, least=1)  # in a row, whose loss or gradient is not finite: then the run stops
    spike_factor: float = number(3.0, least=1.0)  # a loss so many times the median of the last 100 is reported
    timeout_min: float = number(30.0, above=0)  # minutes without progress on any rank after which the job ends


@dataclass(frozen=True)
class ProfileConfig(Section, path="profile"):
    """Which steps get a profiler's trace, in profile/ of the run directory."""

    first_step: int = number(10, least=1)  # counted from 1
    steps: int = number(0, least=0)  # how many; 0 = none


@dataclass(frozen=True)
class EvaluationConfig(Section, path="evaluation"):
    """Log-spaced evaluation steps and what is measured there."""

    points: int = number(6, least=0, most=10_000)  # evaluations, log-spaced from first_step to run.steps; 0 = none
    first_step: int = number(1000, least=1)
    weights: str = "ema"  # raw, ema (the first of optim.ema_decays) or ema_<decay>
    samples: int = number(50000, least=1, most=10**7)  # generated images per Frechet distance
    # TorchScript feature network, whose code runs, or several by name; None = no images are generated
    features: Any = None
    trusted: list[str] = field(default_factory=list)  # SHA-256 of the feature networks that may be loaded; [] = any
    reference: Any = None  # image folder, shards or .npz with mu and sigma; or one for each network, by its name
    tensor_parallel_size: int = number(1, least=1, most=10_000)  # ranks that hold one model between them, to sample
    validation_images: int = number(1024, least=0, most=10**7)  # held-out images of the validation loss
    validation_times: int = number(8, least=1, most=10_000)  # fixed times per image of the validation loss

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_paths("evaluation.features", self.features)
        _check_paths("evaluation.reference", self.reference)
        for entry in self.trusted:
            if not fullmatch("[0-9a-f]{64}", entry):
                raise UserError(f"evaluation.trusted: {entry!r} is no SHA-256, which is 64 digits of 0 to 9 and a to f")

    @property
    def networks(self) -> dict[str, str]:
        """Paths of the feature networks by name; of the only one that a plain path gives, the name is empty."""
        return self.features if isinstance(self.features, dict) else {"": self.features} if self.features else {}

    def reference_of(self, network: str) -> str:
        """The path of what images seen through `network` are compared with; UserError if there is none."""
        path = self.reference.get(network) if isinstance(self.reference, dict) else self.reference
        if path is None:
            key = f"evaluation.reference.{network}" if isinstance(self.reference, dict) else "evaluation.reference"
            raise UserError(f"{key}: needed with evaluation.features: an image folder, shards or .npz")
        return str(path)

    def steps(self, last_step: int) -> list[int]:
        """Evaluation steps of a run of `last_step` steps, ascending; the last is `last_step` itself."""
        if self.points == 0:
            return []
        first = min(self.first_step, last_step)
        count = max(self.points - 1, 1)
        spaced = {round(last_step * (first / last_step) ** (1 - i / count)) for i in range(self.points)}
        return sorted(spaced | {last_step})


def _check_paths(key: str, value: Any) -> None:
    """Raises UserError unless `value` is None, a path, or paths by name."""
    if isinstance(value, dict):
        for name, path in value.items():
            if not fullmatch("[A-Za-z0-9_-]{1,50}", str(name)) or not isinstance(path, str):
                raise UserError(f"{key}.{name}: {path!r}; valid: name: path, the name of letters, digits, - and _")
    elif not isinstance(value, str | None):
        raise UserError(f"{key}: {value!r} is neither a path nor paths by name, {{inception: PATH, dinov2: PATH}}")


@dataclass(frozen=True)
class WandbConfig(Section, path="wandb"):
    """Mirror of metrics, evaluations and contact sheets at Weights & Biases."""

    mode: str = one_of("off", "offline", "online")
    project: str = "fitscale"
    entity: str | None = None


@dataclass(frozen=True)
class RunConfig(Section, path="run"):
    """The run itself."""

    name: str = "run"
    dir: str = ""  # run directory: the complete record of the run
    seed: int = number(0, least=0, most=2**63 - 1)
    steps: int = number(400000, least=1)
    device: str = one_of("auto", "cpu", "cuda")  # auto = cuda where there is one
    init_weights: str | None = None  # safetensors in the published names to start from
    reset: list[str] = field(default_factory=list)  # of init_weights: names that contain one of these start afresh
    log_every: int = number(1, least=1)  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset and self.init_weights is None:
            raise UserError("run.reset: needs run.init_weights; without them every parameter starts afresh")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result, and its layout."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=lambda: MODEL_CONFIGS[ModelConfig.family]())
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        # config.yaml of a run names what was used, whatever a later version's default is
        object.__setattr__(self, "flow", replace(self.flow, time_distribution=self.flow.times))
        self._check_flow()
        self._check_tensor_parallel()

    def _check_flow(self) -> None:
        kind, model = self.flow.kind, self.model
        if kind != model.objective:
            raise UserError(
                f"flow.kind: {kind} does not go with model.family = {model.family}; valid: {model.objective}"
            )
        valid = _SAMPLERS[kind]
        if self.sampling.method not in valid:
            raise UserError(
                f"sampling.method: {self.sampling.method} cannot sample flow.kind = {kind}; valid: {', '.join(valid)}"
            )
        in_channels, guided = self.model.in_channels, self.sampling.guidance.guided_channels(self.model.in_channels)
        if guided > in_channels:
            raise UserError(f"sampling.guidance.channels: {guided} is more than model.in_channels = {in_channels}")

    def _check_tensor_parallel(self) -> None:
        if self.parallel.sequence_parallel and not self.model.cuts_tokens:
            raise UserError(
                f"parallel.sequence_parallel: true does not go with model.family = {self.model.family}, whose images "
                "stay whole; valid: false"
            )
        divides = self.model.tp_divides
        for section in ("parallel", "evaluation"):
            tp = getattr(self, section).tensor_parallel_size
            for key, value in divides.items():
                if value % tp:
                    common = gcd(*divides.values())
                    valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                    raise UserError(
                        f"{section}.tensor_parallel_size: model.{key} = {value} does not divide by {tp}; valid: {valid}"
                    )
