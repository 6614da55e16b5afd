"""The arguments of `fitscale sample` and `fitscale evaluate`, without torch, so that --help answers at once."""

import argparse
from pathlib import Path

from fitscale.config.schema_sampling import DDPM_SAMPLERS, DPM_SAMPLERS, LAST_STEPS, ODE_SAMPLERS, SPACINGS
from fitscale.model.common.rope_config import ROPE_METHODS


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, from which checkpoint, and how; what is not given comes from the run's config."""
    text = "run directory, or .safetensors file of tools/convert_checkpoint.py"
    parser.add_argument("run", type=Path, metavar="RUN", help=text)
    parser.add_argument("--height", type=int, required=True, help="of the images, in pixels")
    parser.add_argument("--width", type=int, required=True, help="of the images, in pixels")
    parser.add_argument("--count", type=int, default=16, help="number of images (default: 16)")
    parser.add_argument(
        "--classes", default="all", help="labels, dealt out in turn: 0,7,3 or 0-9 or all (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i depends on this seed and on i alone (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="folder for the images (default: a new one in RUN/samples, FILE_samples)"
    )
    _add_checkpoint(parser)
    _add_sampler(parser)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, of which checkpoints; what is not given comes from the run's config."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--samples", type=int, help="generated images per Frechet distance")
    parser.add_argument(
        "--features",
        action="append",
        metavar="[NAME=]PATH",
        help="TorchScript feature network: a program, which runs (evaluation.trusted); several with a name each",
    )
    parser.add_argument(
        "--reference",
        action="append",
        metavar="[NAME=]PATH",
        help="image folder, shards, or .npz with mu and sigma; NAME=: for that network alone",
    )
    parser.add_argument("--height", type=int, help="of generated images, in pixels (default: sizes of the dataset)")
    parser.add_argument("--width", type=int, help="of generated images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the generated images (default: 0)")
    parser.add_argument("--force", action="store_true", help="measure again what has been measured")
    _add_checkpoint(parser, "(default: every evaluation step that has a checkpoint)")
    _add_sampler(parser)


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Which samplings to compare, on which checkpoint."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; its evaluation.features decide")
    parser.add_argument(
        "--over",
        nargs="+",
        required=True,
        metavar="KEY=VALUES",
        help="keys below sampling, each with first:last[:points] or a,b,c: guidance.scale=1:4 steps=10,20",
    )
    parser.add_argument("--metric", default="fd", help="the least of which is the best (default: fd)")
    parser.add_argument("--samples", type=int, default=2048, help="images at every point (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="of the images of all points (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for table and plot (default: one in RUN/tune)")
    _add_checkpoint(parser)


def _add_checkpoint(parser: argparse.ArgumentParser, default: str = "(default: the newest)") -> None:
    parser.add_argument("--step", type=int, help=f"checkpoint to use {default}")
    parser.add_argument("--weights", help="raw, ema (the first average) or ema_<decay> (default: the run's)")
    parser.add_argument("--tensor-parallel-size", type=int, help="ranks that hold one model between them (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_sampler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=ODE_SAMPLERS + DDPM_SAMPLERS + DPM_SAMPLERS, help="sampler")
    parser.add_argument("--steps", type=int, help="integration steps")
    parser.add_argument("--spacing", choices=SPACINGS, help="which of the 1000 steps ddpm and ddim take")
    parser.add_argument("--last-step", choices=LAST_STEPS, help="how sde and sde_heun end")
    parser.add_argument("--shift-base-tokens", type=int, help="images of more tokens than this stay longer at noise")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 = none")
    parser.add_argument("--power", type=float, help="exponent of the power-cosine guidance scale; 0 = constant")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times where guidance acts; 0 noise, 1 data"
    )
    parser.add_argument("--guide", metavar="PATH", help="weaker model instead of no class: run directory, .safetensors")
    parser.add_argument("--guide-step", type=int, help="checkpoint of the run directory in --guide")
    parser.add_argument("--guide-weights", help="of the run directory in --guide: raw, ema or ema_<decay>")
    parser.add_argument("--rope", choices=ROPE_METHODS, help="how RoPE is stretched beyond the trained sizes")
    parser.add_argument("--decouple", action="store_true", help="with --rope: rows and columns by their own lengths")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of shards with their index")
    parser.add_argument("--patch-size", type=int, default=2, help="latent pixels a side of a token (2)")
    parser.add_argument("--batch", type=int, default=256, help="images of a global batch (256)")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share a global batch (8)")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="most tokens in a pack (16384)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (SHARDS/report)")
    parser.add_argument("--vae", help="local folder or hub name of the AutoencoderKL, for a contact sheet of latents")
    parser.add_argument("--verify", action="store_true", help="read every shard and check its checksum")
