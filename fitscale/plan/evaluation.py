"""What an evaluation will take, before a device-hour is spent: from the config alone, or from what runs have measured.

1. A sampler evaluates its function so many times an image; a guided evaluation is two passes of the network.
2. A pass costs the network's MACs, each image with its own tokens, and no less than Python needs to launch its kernels,
   which the images of a pack share.
3. The image is decoded from its latent, and seen through every feature network.
4. Images are cut into chunks of a fixed number, and ranks take chunks: the busiest rank decides.

Reading the reference is not planned (it is done once for all runs), nor is loading the network. FLOPs are 2 a MAC.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fitscale.config.files import read_jsonl
from fitscale.config.schema import Config
from fitscale.config.schema_sampling import ADAPTIVE_SAMPLERS, SamplingConfig
from fitscale.model import flops
from fitscale.plan.layout import Machine, resolve_compile
from fitscale.plan.memory import block_count
from fitscale.plan.step import FORWARD_KERNELS, KERNEL_S, Images
from fitscale.run.layout import EVALUATIONS, RunDir

CHUNK_IMAGES = 512  # generated in a chunk; the last one may have fewer
HELD_OUT_CHUNK_IMAGES = 128  # of the validation loss: each is seen at several times
# MACs of decoding, for each pixel of an image: of the decoder of Stable Diffusion's AutoencoderKL (diffusers; channels
# 128, 256, 512, 512, two layers a block) at 256 x 256 pixels, counted on the meta device with torch.utils.flop_counter,
# whose FLOPs are 2 a MAC. At 128 x 128 and 512 x 512 it is 4,734,624 and 4,796,064.
DECODER_MACS_PER_PIXEL = 4_746_912
# MACs of a feature network, for an image: of Inception v3 at 299 x 299, as torchvision states them. What a network
# really takes only its file knows; it is little beside the sampling.
FEATURE_MACS = 5.71e9
# Function evaluations of dopri5 at rtol 1e-3 and atol 1e-6, assumed until an evaluation has measured its own: mean of
# 64 guided images (scale 1.5) of the demo's size s after 600 steps (60 without guidance). `fitscale sample RUN --method
# dopri5 --guidance 1.5 --height 8 --width 8 --count 64` says it of any run.
DOPRI5_EVALUATIONS = 65


@dataclass(frozen=True)
class FunctionEvaluations:
    """Function evaluations of one image (NFE), and how that is known."""

    number: float
    source: str


@dataclass(frozen=True)
class EvaluationPlan:
    """One evaluation on `machine`, a rank a device; `..._s` of one image, by one rank or tensor-parallel group."""

    machine: Machine
    groups: int  # of ranks, each of which takes chunks
    samples: int  # images that are generated; 0 where no feature network looks at them
    evaluations: FunctionEvaluations
    passes: float  # of the network for an image, guidance included
    network_s: float
    decode_s: float
    features_s: float
    held_out: int  # images of the validation loss
    held_out_s: float

    @property
    def chunks(self) -> int:
        return -(-self.samples // CHUNK_IMAGES)

    @property
    def image_s(self) -> float:
        """Of a generated image."""
        return self.network_s + self.decode_s + self.features_s

    @property
    def seconds(self) -> float:
        """From the first chunk to the end of the last, in the busiest group."""
        held_out = _busiest(self.held_out, HELD_OUT_CHUNK_IMAGES, self.groups)
        return _busiest(self.samples, CHUNK_IMAGES, self.groups) * self.image_s + held_out * self.held_out_s

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.machine.gpus / 3600

    def __str__(self) -> str:
        """In a line: without what is not measured."""
        if not self.samples:
            return f"{self.held_out:,} held-out images" if self.held_out else "nothing is measured"
        parts = {"network": self.network_s, "decoding": self.decode_s, "features": self.features_s}
        shares = ", ".join(f"{name} {part / self.image_s:.0%}" for name, part in parts.items())
        return (
            f"{self.samples:,} images in {self.chunks} chunks, {self.evaluations.number:g} function evaluations each "
            f"({self.evaluations.source}), {self.passes:g} passes of the network; {shares}"
        )


def plan_evaluation(config: Config, machine: Machine, images: Images, utilisation: float) -> EvaluationPlan:
    """Plan one evaluation of `config` on `machine`.

    Args:
        images: whose sizes are generated.
        utilisation: share of the device's peak that the networks reach while they compute: of training, if not
            measured.
    """
    evaluation = config.evaluation
    networks, held_out = len(evaluation.networks), evaluation.validation_images * (config.data.holdout_fraction > 0)
    found, tp = function_evaluations(config), evaluation.tensor_parallel_size
    per_mac_s = flops.FLOPS_PER_MAC / (machine.device.peak_flops_per_s * utilisation)
    passes = found.number * (1 + guided_share(config.sampling))
    tokens = sum(tokens * share for tokens, share in images.shares.items())
    forward = sum(share * _forward_macs(config, tokens) for tokens, share in images.shares.items())
    # The two passes of a guided evaluation are one call, on twice the pack.
    kernels = FORWARD_KERNELS[resolve_compile(config, machine.has_gpus).parallel.compile]
    launched_s = block_count(config) * kernels * KERNEL_S / max(1.0, config.batch.pack_tokens // tokens)
    return EvaluationPlan(
        machine=machine,
        samples=evaluation.samples if networks else 0,
        evaluations=found,
        passes=passes,
        groups=max(1, machine.gpus // tp),
        network_s=_together(machine, passes * forward * per_mac_s / tp, found.number * launched_s),
        decode_s=decoder_macs(config, tokens) * per_mac_s,
        features_s=networks * FEATURE_MACS * per_mac_s,
        held_out=held_out,
        held_out_s=evaluation.validation_times * _together(machine, forward * per_mac_s / tp, launched_s),
    )


def function_evaluations(config: Config) -> FunctionEvaluations:
    """How often the sampler of `config` evaluates its function for an image.

    Of an adaptive sampler what evaluations of this run have found, or of those beside it, as in a sweep; else an
    assumed number.
    """
    sampling = config.sampling
    if sampling.method not in ADAPTIVE_SAMPLERS:
        return FunctionEvaluations(_of_steps(sampling), f"{sampling.method}, {sampling.steps} steps")
    run = RunDir(Path(config.run.dir))
    for name, runs in (("this run", [run]), ("the runs beside it", _beside(run))) if config.run.dir else ():
        if measured := [nfe for one in runs for nfe in _measured(one, sampling)]:
            mean = sum(measured) / len(measured)
            return FunctionEvaluations(mean, f"{sampling.method}, measured in {len(measured)} rows of {name}")
    return FunctionEvaluations(DOPRI5_EVALUATIONS, f"{sampling.method}, assumed: nothing is measured yet")


def _of_steps(sampling: SamplingConfig) -> int:
    """As `flow.sampler` has it for methods whose steps are given."""
    of_last_step = 0 if sampling.last_step == "none" else 1
    counts = {
        "heun": 2 * sampling.steps,
        "sde": sampling.steps - 1 + of_last_step,
        "sde_heun": 2 * (sampling.steps - 1) + of_last_step,
    }
    return counts.get(sampling.method, sampling.steps)


def _measured(run: RunDir, sampling: SamplingConfig) -> Iterator[float]:
    """Function evaluations in the rows of `run` that were sampled so."""
    asked = {
        "sampler": sampling.method,
        "tolerances": [sampling.rtol, sampling.atol],
        "guidance": sampling.guidance.scale,
    }
    for row in read_jsonl(run.evaluations, **EVALUATIONS):
        if isinstance(row.get("nfe"), int | float) and all(
            row["key"].get(name) == value for name, value in asked.items()
        ):
            yield row["nfe"]


def _beside(run: RunDir) -> list[RunDir]:
    return [RunDir(path.parent) for path in sorted(run.path.parent.glob("*/evaluations.jsonl"))]


def guided_share(sampling: SamplingConfig) -> float:
    """Share of the function evaluations that take a second pass, as if they were equal in time; one of a weaker guide
    counts as one of the network."""
    low, high = sampling.guidance.interval
    return 0.0 if sampling.guidance.scale == 1.0 else high - low


def decoder_macs(config: Config, tokens: float) -> float:
    """MACs of decoding an image of `tokens` tokens; 0 where the model makes pixels."""
    latent = config.data.latent
    side = config.model.patch_size * latent.factor  # pixels of a token
    return tokens * side**2 * DECODER_MACS_PER_PIXEL if latent.kind == "vae" else 0.0


def _forward_macs(config: Config, tokens: int) -> int:
    return flops.linear_macs(config.model, tokens) + flops.mixing_macs(config.model, tokens)


def _together(machine: Machine, busy_s: float, launch_s: float) -> float:
    """A GPU computes while Python launches; a CPU does one after the other."""
    return max(busy_s, launch_s) if machine.has_gpus else busy_s + launch_s


def _busiest(images: int, chunk: int, groups: int) -> int:
    """Images of the group that takes most chunks of so many."""
    chunks = -(-images // chunk)
    return min(images, -(-chunks // groups) * chunk)
