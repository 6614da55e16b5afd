"""Make shards for training, or index shards that are there.

python tools/make_shards.py images /data/imagenet/train data/in1k_256 --encoder stabilityai/sd-vae-ft-ema
python tools/make_shards.py digits data/digits
python tools/make_shards.py index data/digits
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from fitscale.config.errors import UserError
from fitscale.config.files import replacing
from fitscale.config.program import exit_code
from fitscale.data.build_index import build_index
from fitscale.data.index import open_index
from fitscale.prepare.convert import STORES, Conversion, Converter, is_finished
from fitscale.prepare.digits import SCALES, digits_meta, write_digits
from fitscale.prepare.published_layout import import_layout
from fitscale.prepare.shard_report import summary
from fitscale.prepare.workers import WorkerRank, find_worker


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.run(options))


def make_digits(options: argparse.Namespace) -> None:
    """Write scikit-learn's digits; a folder that holds the same ones already is left as it is."""
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(out, options)
        return
    print(f"{out}: scikit-learn's digits, cropped and scaled", flush=True)
    with replacing(out) as temporary:
        write_digits(temporary, tuple(options.scales), options.images_per_shard, options.multiple)
    print(f"{out}: {_summary(out)}")


def make_images(options: argparse.Namespace) -> None:
    """This worker's share of the shards of `source`; what is finished is not done again."""
    source = str(options.source.resolve())
    job = Conversion(source, options.side, options.encoder, options.store, options.images_per_shard, options.batch_size)
    out: Path = options.out
    worker = _worker(options)
    if not is_finished(job, out):
        print(f"{out}: {worker}", flush=True)
        device = _device(options)
        converter = Converter(job, out, device, options.threads)
        if options.encoder != "pixels":
            print(f"{out}: worker {worker.rank} encodes on {device} in {converter.dtype}", flush=True)
        missing = converter.run(worker.rank, worker.workers)
        if missing:
            print(f"{out}: worker {worker.rank} of {worker.workers} is done, {missing} shards are left to others")
            return
    print(f"{out}: finished, {_summary(out)}\n{summary(out)}")


def _worker(options: argparse.Namespace) -> WorkerRank:
    if (options.worker is None) != (options.workers is None):
        raise UserError("--worker and --workers go together")
    if options.worker is not None:
        return WorkerRank(options.worker, options.workers, "--worker")
    return find_worker(os.environ)


def _device(options: argparse.Namespace) -> str:
    """The device of this process among those of its node: torchrun's, or srun's where it shows more than one."""
    if options.encoder == "pixels":
        return "cpu"
    import torch

    if options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError("--device: no CUDA device can be used here; --device cpu does without, in float32")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{local % torch.cuda.device_count()}"


def make_published(options: argparse.Namespace) -> None:
    """Shards of a data set in the published FiT layout; OUT appears when they are whole."""
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; choose another folder, or remove it")
    with replacing(out) as temporary:
        import_layout(options.source, temporary, options.tokens, options.images_per_shard)
    print(f"{out}: {_summary(out)}")


def make_index(options: argparse.Namespace) -> None:
    """Read the shards of a folder and write their index."""
    build_index(options.shards)
    print(f"{options.shards}: {_summary(options.shards)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    digits = verbs.add_parser(
        "digits",
        help="scikit-learn's handwritten digits, cropped to their ink, at several scales",
        epilog="example: python tools/make_shards.py digits data/digits --scales 0.75 1 1.25",
    )
    digits.add_argument("out", type=Path, metavar="OUT", help="folder to write: new, empty, or finished before")
    digits.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of the 8-pixel scans")
    digits.add_argument("--multiple", type=int, default=1, help="sides are multiples of so many pixels (1)")
    digits.add_argument("--images-per-shard", type=int, default=256)
    digits.set_defaults(run=make_digits)
    _add_images(verbs)
    published = verbs.add_parser(
        "published",
        help="a data set in the layout of the published FiT code (folders of .safetensors)",
        epilog="example: python tools/make_shards.py published /data/imagenet_fit data/in1k_256",
    )
    published.add_argument(
        "source", type=Path, metavar="SRC", help="folder with from_16_to_N, greater_than_N_resize ..."
    )
    published.add_argument("out", type=Path, metavar="OUT", help="folder to write: new or empty")
    published.add_argument("--tokens", type=int, default=256, help="N of the folders' names (256)")
    published.add_argument("--images-per-shard", type=int, default=1000)
    published.set_defaults(run=make_published)
    index = verbs.add_parser(
        "index",
        help="index (again) the webdataset shards of a folder that has a dataset.json",
        epilog="example: python tools/make_shards.py index data/digits",
    )
    index.add_argument("shards", type=Path, metavar="SHARDS", help="folder of *.tar")
    index.set_defaults(run=make_index)
    return parser


def _add_images(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    images = verbs.add_parser(
        "images",
        help="images of any size, as FiT prepares them, encoded by a VAE or as pixels; goes on where it was stopped",
        epilog="example: torchrun --nproc-per-node 8 tools/make_shards.py images /data/imagenet/train data/in1k_256 "
        "--encoder stabilityai/sd-vae-ft-ema",
    )
    images.add_argument(
        "source", type=Path, metavar="SRC", help="folder of images, of tars or of Parquet files; such a file; a list"
    )
    images.add_argument("out", type=Path, metavar="OUT", help="folder to write: new, empty, or begun before")
    images.add_argument("--side", type=int, default=256, help="target side: at most side^2 pixels an image (256)")
    images.add_argument(
        "--encoder", required=True, help="pixels, or the local folder or hub name of a diffusers AutoencoderKL"
    )
    images.add_argument(
        "--store", default="moments", choices=STORES, help="of a VAE: mean and deviation (default), or one drawn latent"
    )
    images.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="of a VAE; auto: cuda where there is one"
    )
    images.add_argument("--images-per-shard", type=int, default=1000)
    images.add_argument("--batch-size", type=int, default=32, help="images of one shape encoded at once (32)")
    images.add_argument(
        "--worker", type=int, help="this worker's number from 0; default: torchrun's, srun's or the Slurm array's"
    )
    images.add_argument("--workers", type=int, help="how many workers share the work")
    images.add_argument("--threads", type=int, default=4, help="threads that decode and resize (4)")
    images.set_defaults(run=make_images)


def _check_same(out: Path, options: argparse.Namespace) -> None:
    """Raise UserError unless `out` is what these options write."""
    if not (out / "index.json").is_file():
        raise UserError(f"{out}: is not empty and holds no finished shards; choose another folder, or remove it")
    meta = open_index(out).meta
    wanted = digits_meta(tuple(options.scales), options.multiple).recipe
    per_shard = max(shard.images for shard in meta.shards)
    if meta.recipe != wanted or per_shard != min(options.images_per_shard, meta.num_images):
        raise UserError(
            f"{out}: holds other shards ({json.dumps(meta.recipe)}, {per_shard} images a shard); "
            "choose another folder, or remove it"
        )
    print(f"{out}: finished before, {_summary(out)}")


def _summary(folder: Path) -> str:
    meta = open_index(folder).meta
    areas, counts = np.array(sorted((height * width, count) for height, width, count in meta.sizes)).T
    median = areas[np.searchsorted(np.cumsum(counts), meta.num_variants // 2, side="right")]
    return (
        f"{meta.num_images} images in {meta.num_variants} variants, {len(meta.shards)} shards; "
        f"latent pixels (tokens at patch size 1): min {areas[0]}, median {median}, max {areas[-1]}"
    )


if __name__ == "__main__":
    sys.exit(main())
