"""What a shard set's arrays are, against what a config and other shard sets say that they are.

A config need not repeat it: `load_run` takes from the shards what the arguments leave out. What they do say is compared
when a run starts. A VAE is the same if its weights are, wherever its folder is; where those are not at hand (a hub's
name, shards of an earlier version), if the last part of its name is.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import Config
from fitscale.config.schema_data import DataConfig, LatentConfig
from fitscale.data.index import Index, OpenIndex, open_index
from fitscale.data.shards import ShardSetMeta
from fitscale.data.storage import Cache, checksum_of
from fitscale.run.layout import RunDir

LATENT = ("kind", "factor", "scaling")  # of a shard set, and of data.latent
MOST_TOKENS = 1 << 24  # of an image, to draw


def load_run(arguments: Sequence[str], open_index: OpenIndex = open_index) -> Config:
    """`load_config` for a run, with what its shards say for what `arguments` leave out: kind, factor and scaling of the
    arrays, their VAE, channels and classes. A run that was begun keeps what its own config says.

    Raises:
        UserError: as `load_config`; a shard set that is there cannot be opened.
    """
    config = load_config(arguments)
    begun = RunDir(Path(config.run.dir)).config if config.run.dir else None
    if begun and begun.is_file():
        there = load_config([str(begun)])
        latent, model = there.data.latent, there.model
        own = {"kind": latent.kind, "factor": latent.factor, "scaling": latent.scaling, "vae": latent.vae}
        return load_config([_defaults(own, model.in_channels, model.num_classes), *arguments])
    sets = [source.shards for source in config.data.sources.values()]
    if not sets or any("://" not in shards and not Path(shards).exists() for shards in sets):
        return config  # a plan may be made without; a run says what is missing
    metas = [index.meta for index in indices_of(config.data, open_index)]
    own = {key: getattr(metas[0], key) for key in LATENT} | {"vae": next(filter(None, map(encoder_of, metas)), None)}
    return load_config([_defaults(own, metas[0].channels, max(meta.num_classes for meta in metas)), *arguments])


def _defaults(latent: dict[str, Any], channels: int, classes: int) -> dict[str, Any]:
    return {"data": {"latent": latent}, "model": {"in_channels": channels, "num_classes": classes}}


def patches(config: Config, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of a height x width pixel image.

    Raises:
        UserError: a side is no multiple of the patch, and names the nearest that are; or an image is too large.
    """
    multiple = config.model.patch_size * config.data.latent.factor
    for name, side in (("--height", height), ("--width", width)):
        if side < 1 or side % multiple:
            low = max(side // multiple, 1) * multiple
            raise UserError(
                f"{name}: {side} is not a multiple of {multiple} (model.patch_size {config.model.patch_size} x "
                f"data.latent.factor {config.data.latent.factor}); the nearest are {low} and {low + multiple}"
            )
    rows, cols = height // multiple, width // multiple
    if rows * cols > MOST_TOKENS:
        raise UserError(f"--height, --width: {height} x {width} pixels are more than {MOST_TOKENS} tokens")
    return rows, cols


def indices_of(data: DataConfig, open_index: OpenIndex = open_index) -> list[Index]:
    """The indices of a config's shard sets, in their order.

    Raises:
        UserError: one cannot be opened; the arrays of two are not of one kind.
    """
    cache = Cache(Path(data.cache_dir), data.cache_gb)
    indices = [open_index(source.shards, cache) for source in data.sources.values()]
    for one in indices[1:]:
        for key in (*LATENT, "channels"):
            left, right = getattr(indices[0].meta, key), getattr(one.meta, key)
            _require(left == right, f"data.mixture: {key} {left} in {_name(indices[0])}, {right} in {_name(one)}")
        left, right = encoder_of(indices[0].meta), encoder_of(one.meta)
        same = left is None or right is None or _is_same(left, _hash(indices[0].meta), right, _hash(one.meta))
        _require(same, f"data.mixture: encoded by {left} in {_name(indices[0])}, by {right} in {_name(one)}")
    return indices


def require_latent(latent: LatentConfig, index: Index) -> None:
    """Raise UserError unless the arrays of `index` are what `data.latent` says."""
    meta = index.meta
    for key in LATENT:
        wanted, stored = getattr(latent, key), getattr(meta, key)
        said = f"the config says {wanted}, the shards in {_name(index)} have {stored}"
        _require(wanted == stored, f"data.latent.{key}: {said}")
    encoder = encoder_of(meta)
    same = not latent.vae or not encoder or _is_same(encoder, _hash(meta), latent.vae, vae_hash(latent.vae))
    _require(
        same, f"data.latent.vae: the config says {latent.vae}, the shards in {_name(index)} were encoded by {encoder}"
    )


def require_classes(config: Config, indices: Sequence[Index]) -> None:
    """Raise UserError unless the model has as many classes as the shards, or at least, if the run was begun so."""
    stored, said = max(index.meta.num_classes for index in indices), config.model.num_classes
    begun = bool(config.run.dir) and RunDir(Path(config.run.dir)).config.is_file()
    _require(
        said == stored or (begun and said > stored),
        f"model.num_classes: {said}, but the shards in {', '.join(map(_name, indices))} have labels of {stored} "
        "classes (num_classes in dataset.json; after a change there, python tools/make_shards.py index)",
    )


def encoder_of(meta: ShardSetMeta) -> str | None:
    """The VAE that made the arrays, where the shard set knows it."""
    encoder = meta.recipe.get("encoder")
    return encoder if meta.kind == "vae" and isinstance(encoder, str) else None


@cache
def vae_hash(name: str) -> str | None:
    """A hash of a VAE's weights; None where `name` is no local folder."""
    files = sorted(path for ending in ("safetensors", "bin") for path in Path(name).glob(f"*.{ending}"))
    return hashlib.blake2b("".join(map(checksum_of, files)).encode(), digest_size=16).hexdigest() if files else None


def _hash(meta: ShardSetMeta) -> str | None:
    return meta.recipe.get("encoder_hash")


def _is_same(left: str, left_hash: str | None, right: str, right_hash: str | None) -> bool:
    if left_hash and right_hash:
        return left_hash == right_hash
    return Path(left).name == Path(right).name


def _require(right: bool, wrong: str) -> None:
    if not right:
        raise UserError(wrong)


def _name(index: Index) -> str:
    return index.storage.location
