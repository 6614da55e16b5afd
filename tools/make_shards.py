"""Make shards for training, or index shards that are there.

python tools/make_shards.py digits data/digits
python tools/make_shards.py index data/digits
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.config.main import exit_code
from fitscale.data.digits import SCALES, digits_meta, write_digits
from fitscale.data.index import build_index, open_index


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.run(options))


def make_digits(options: argparse.Namespace) -> None:
    """Write scikit-learn's digits; a folder that holds the same ones already is left as it is."""
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(out, options)
        return
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        write_digits(temporary, tuple(options.scales), options.images_per_shard)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    digits.add_argument("--images-per-shard", type=int, default=256)
    digits.set_defaults(run=make_digits)
    index = verbs.add_parser(
        "index",
        help="index (again) the webdataset shards of a folder that has a dataset.json",
        epilog="example: python tools/make_shards.py index data/digits",
    )
    index.add_argument("shards", type=Path, metavar="SHARDS", help="folder of *.tar")
    index.set_defaults(run=make_index)
    return parser


def _check_same(out: Path, options: argparse.Namespace) -> None:
    """Raise UserError unless `out` is what these options write."""
    if not (out / "index.json").is_file():
        raise UserError(f"{out}: is not empty and holds no finished shards; choose another folder, or remove it")
    meta = open_index(out).meta
    wanted = digits_meta(tuple(options.scales)).recipe
    per_shard = max(shard.images for shard in meta.shards)
    if meta.recipe != wanted or per_shard != min(options.images_per_shard, meta.num_images):
        raise UserError(
            f"{out}: holds other shards ({json.dumps(meta.recipe)}, {per_shard} images a shard); "
            "choose another folder, or remove it"
        )
    print(f"{out}: finished before, {_summary(out)}")


def _summary(folder: Path) -> str:
    meta = open_index(folder).meta
    areas = sorted(height * width for height, width, count in meta.sizes for _ in range(count))
    return (
        f"{meta.num_images} images in {meta.num_variants} variants, {len(meta.shards)} shards; "
        f"latent pixels (tokens at patch size 1): min {areas[0]}, median {areas[len(areas) // 2]}, max {areas[-1]}"
    )


if __name__ == "__main__":
    sys.exit(main())
