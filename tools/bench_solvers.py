"""Error of samplers at equal numbers of function evaluations, in float64.

python tools/bench_solvers.py
python tools/bench_solvers.py --run runs/digits

Of a velocity in closed form: the data are a mixture of 20 Gaussians in 16 dimensions, of 10 classes. Or of a run's
newest checkpoint, for 24 images of one size. Guided and not. An error is the root mean square distance of samples from
where the flow itself takes the same noise (dopri5 with tolerances of 1e-10); of a run, of the median image from 300
steps of Heun. Multistep solvers from diffusers take its flow schedules, which start at t = 0.001.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from fitscale.config.program import exit_code
from fitscale.config.schema_sampling import GuidanceConfig, SamplingConfig
from fitscale.flow.pack import PackShape, starts
from fitscale.flow.sampler import sample

DIMENSIONS, CLASSES, SAMPLES = 16, 10, 1000
EVALUATIONS = (10, 20, 50)
SCALES = (1.0, 1.5, 4.0)
IMAGES = 24  # of a run
Velocity = Callable[[Tensor, float], Tensor]


class Mixture:
    """Gaussians of different spreads; the velocity of the straight path to all of them, or to those of a class."""

    def __init__(self, spread: float) -> None:
        chance = torch.Generator().manual_seed(0)
        self.means_KD = torch.randn(2 * CLASSES, DIMENSIONS, generator=chance, dtype=torch.float64)
        self.spread_K = spread * (0.5 + torch.rand(2 * CLASSES, generator=chance, dtype=torch.float64))

    def velocity(self, x_ND: Tensor, t: float, classes_N: Tensor | None = None) -> Tensor:
        variance_K = t**2 * self.spread_K**2 + (1 - t) ** 2
        away_NKD = x_ND[:, None] - t * self.means_KD
        log_NK = -away_NKD.square().sum(2) / (2 * variance_K) - DIMENSIONS / 2 * variance_K.log()
        if classes_N is not None:
            others_NK = torch.arange(2 * CLASSES) % CLASSES != classes_N[:, None]
            log_NK = log_NK.masked_fill(others_NK, -torch.inf)
        each_NKD = self.means_KD + ((t * self.spread_K**2 - (1 - t)) / variance_K)[:, None] * away_NKD
        return (log_NK.softmax(1)[:, :, None] * each_NKD).sum(1)

    def guided(self, scale: float) -> Velocity:
        classes_N = torch.arange(SAMPLES) % CLASSES

        def velocity(x_ND: Tensor, t: float) -> Tensor:
            t = min(t, 1.0)
            conditional = self.velocity(x_ND, t, classes_N)
            if scale == 1:
                return conditional
            without = self.velocity(x_ND, t)
            return without + scale * (conditional - without)

        return velocity


def ours(method: str, evaluations_a_step: int = 1, **settings: float) -> Callable[[Velocity, Tensor, int], Tensor]:
    """A method of `flow.sampler`."""

    def integrate(velocity: Velocity, x_ND: Tensor, evaluations: int) -> Tensor:
        rows = len(x_ND)
        pack = PackShape(torch.zeros(1, dtype=torch.int64), torch.tensor([[rows, 1]]), starts([rows]), (0,))
        sampling = SamplingConfig(method, evaluations // evaluations_a_step, **settings)  # type: ignore[arg-type]
        return sample(lambda x, t_S, _: velocity(x, float(t_S)), x_ND, sampling, pack, 0).x_TC

    return integrate


def adams_bashforth_3(velocity: Velocity, x_ND: Tensor, evaluations: int) -> Tensor:
    """Equal steps; the first two are of lower order."""
    weights, past = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12)), []
    for i in range(evaluations):
        past = [velocity(x_ND, i / evaluations), *past][:3]
        x_ND = x_ND + sum(w * v for w, v in zip(weights[len(past) - 1], past, strict=True)) / evaluations
    return x_ND


def dpm_solver(velocity: Velocity, x_ND: Tensor, evaluations: int) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095) on equal steps from t = 0: lower order at the first two and the last."""
    grid = [i / evaluations for i in range(evaluations + 1)]
    lambdas = torch.logit(torch.tensor(grid, dtype=torch.float64)).tolist()
    before = x_ND
    for i, (t, following) in enumerate(pairwise(grid)):
        data = x_ND + (1 - t) * velocity(x_ND, t)
        step = lambdas[i + 1] - lambdas[i]
        inner = 1 < i < evaluations - 1
        ratio = (lambdas[i] - lambdas[i - 1]) / step if inner else 1.0
        aim = data + (data - before) / (2 * ratio) if inner else data
        left = (1 - following) / (1 - t)
        x_ND = left * x_ND + (following - left * t) * aim
        before = data
    return x_ND


def scheduler(name: str) -> Callable[[Velocity, Tensor, int], Tensor]:
    """A multistep scheduler of diffusers."""

    def integrate(velocity: Velocity, x_ND: Tensor, evaluations: int) -> Tensor:
        import diffusers

        made = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True)
        made.set_timesteps(evaluations)
        for sigma, timestep in zip(made.sigmas.tolist(), made.timesteps, strict=False):
            towards_noise = -velocity(x_ND, 1 - sigma)
            x_ND = made.step(towards_noise, timestep, x_ND, return_dict=False)[0]
        return x_ND

    return integrate


METHODS: dict[str, Callable[[Velocity, Tensor, int], Tensor]] = {
    "euler": ours("euler"),
    "heun": ours("heun", 2),
    "ab2 (Adams-Bashforth)": ours("ab2"),
    "Adams-Bashforth 3": adams_bashforth_3,
    "DPM-Solver++(2M) from t = 0": dpm_solver,
    "DPM-Solver++(2M), diffusers": scheduler("DPMSolverMultistepScheduler"),
    "UniPC, diffusers": scheduler("UniPCMultistepScheduler"),
}


def network(run: Path, side: int = 10, images: int = IMAGES) -> tuple[Callable[[float], Velocity], Tensor]:
    """Guided velocity of a run's newest checkpoint, by scale, and noise: of images of `side` x `side` patches."""
    from fitscale.eval.checkpoints import find_checkpoint, load_networks, open_run, weights_name
    from fitscale.flow.guidance import Guided
    from fitscale.flow.path import INITIAL_NOISE, image_noise
    from fitscale.model.common.layout import pack_layout

    config, folder = open_run(run)
    checkpoint = find_checkpoint(folder, None)
    weights = checkpoint.weights(weights_name(config, checkpoint, config.evaluation.weights))
    model = load_networks(config, weights, "cpu").model.double()
    lengths = [side**2] * images
    labels_S, sizes_S2 = torch.arange(images) % config.model.num_classes, torch.full((images, 2), side)
    pack = PackShape(labels_S, sizes_S2, starts(lengths), tuple(range(images)))

    def answer(x_TC: Tensor, t_S: Tensor, pack: PackShape) -> Tensor:
        return model(x_TC, t_S, pack.labels_S, pack_layout(pack.sizes_S2, pack.cu_seqlens, x_TC.device))[-1].double()

    def guided(scale: float) -> Velocity:
        about = {"no_class": config.model.num_classes, "patch_size": config.model.patch_size}
        model_fn = Guided(answer, GuidanceConfig(scale), model_time=lambda t_S: t_S, **about)
        return lambda x_TC, t: model_fn(x_TC, torch.full((images,), t, dtype=torch.float64), pack)

    noise_TC = image_noise(0, 0, range(images), lengths, config.model.token_channels, stream=INITIAL_NOISE)
    return guided, noise_TC.double()


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    chance = torch.Generator().manual_seed(1)
    noise_ND = torch.randn(SAMPLES, DIMENSIONS, generator=chance, dtype=torch.float64)
    cases = {f"spread {spread}": (Mixture(spread).guided, noise_ND) for spread in (0.5, 0.1)}
    exactly, images = partial(ours("dopri5", rtol=1e-10, atol=1e-10), evaluations=2), 1
    if options.run:
        cases = {options.run.name: network(options.run)}
        exactly, images = partial(ours("heun", 2), evaluations=600), IMAGES
    print("| velocity | guidance | method | " + " | ".join(f"{n} evaluations" for n in EVALUATIONS) + " |")
    print("|---|---:|---|" + "---:|" * len(EVALUATIONS))
    for case, (guided, start_ND) in cases.items():
        for scale in SCALES:
            velocity = guided(scale)
            exact_ND = exactly(velocity, start_ND)
            for name, integrate in METHODS.items():
                away = [integrate(velocity, start_ND, n).sub(exact_ND).view(images, -1) for n in EVALUATIONS]
                errors = [float(each.square().mean(1).sqrt().median()) for each in away]
                print(f"| {case} | {scale} | {name} | " + " | ".join(f"{error:.2g}" for error in errors) + " |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
