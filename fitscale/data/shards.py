"""Webdataset shards of tokens-to-be: writing them, and finding their members.

1. An image comes as a `Sample`: key, class label, and its variants (latents of a VAE, or plain pixels).
2. It is checked, and encoded to `<key>.json` and one `<key>.<n>.npy` per variant.
3. Samples fill `shard-000000.tar`, `shard-000001.tar` ..., each written under a temporary name and renamed when whole.
4. Last comes `dataset.json`, which says what the arrays are. `build_index` then makes the folder readable.

The same samples give the same bytes: times, users and modes in the tars are fixed. webdataset reads the shards as they
are.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from fitscale.config.checks import at_least, choice
from fitscale.config.errors import UserError
from fitscale.config.files import replacing, write_atomic

KINDS = ("resize", "crop", "scale")  # the index stores a kind by its position here
DTYPES = ("uint8", "float16", "float32")  # likewise
_KEY = re.compile(r"[^.\s]+")  # webdataset ends a key at its first dot


@dataclass(frozen=True)
class Variant:
    """One stored form of an image: (channels, height, width) in latent pixels."""

    array_CHW: np.ndarray
    kind: str = "scale"
    flip: bool = False


@dataclass(frozen=True)
class Sample:
    """One image. Of its variants an epoch draws one, each as likely as any other."""

    key: str
    label: int
    variants: Sequence[Variant]


@dataclass(frozen=True)
class ShardSetMeta:
    """What the arrays of a shard set are; `recipe` records how they were made (source, resizing, encoder)."""

    kind: str  # pixels or vae, as data.latent.kind
    factor: int  # image pixels per latent pixel, along one side
    scaling: float  # stored latent = scaling * (VAE's latent)
    channels: int
    num_classes: int
    recipe: dict[str, Any] = field(default_factory=dict)
    moments: bool = False  # arrays hold the mean of the VAE's posterior, then its standard deviation; training samples

    @property
    def stored_channels(self) -> int:
        """Channels of a stored array: twice `channels` where it holds moments."""
        return self.channels * (2 if self.moments else 1)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Array types that go with `kind`: pixels are uint8, latents float16 or float32."""
        return ("uint8",) if self.kind == "pixels" else ("float16", "float32")


def write_shards(folder: Path, samples: Iterable[Sample], meta: ShardSetMeta, images_per_shard: int = 1000) -> None:
    """Write `samples` into `folder`, at most `images_per_shard` in a shard and in memory; `dataset.json` comes last.

    An error leaves whole shards and no `dataset.json`, without which the folder is no shard set.

    Raises:
        UserError: `folder` holds shards already; a sample's label, key or array does not fit `meta`.
    """
    at_least("images per shard", images_per_shard, 1)
    if shard_files(folder):
        raise UserError(f"{folder}: holds shards already; choose an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(samples)
    for number, chunk in enumerate(iter(lambda: list(islice(rest, images_per_shard)), [])):
        write_shard(shard_path(folder, number), chunk, meta)
    write_meta(folder, meta)


def write_shard(path: Path, samples: Iterable[Sample], meta: ShardSetMeta) -> None:
    """Write one whole shard, replacing what is there; `path` appears when it is complete.

    Raises:
        UserError: a sample's label, key or array does not fit `meta`.
    """
    from webdataset import TarWriter  # imports torch, which readers of an index do not need

    with (
        replacing(path) as temporary,
        open(temporary, "wb") as stream,
        TarWriter(stream, compress=False, mtime=0, user="fitscale", group="fitscale") as tar,
    ):
        for sample in samples:
            check_sample(sample, meta)
            tar.write(_encoded(sample))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder by name, but for hidden ones, which are being written."""
    return sorted(folder.glob("[!.]*.tar"))


def write_meta(folder: Path, meta: ShardSetMeta) -> None:
    write_atomic(folder / "dataset.json", json.dumps(asdict(meta), indent=1) + "\n")


def read_set(folder: Path) -> tuple[ShardSetMeta, list[Path]]:
    """A folder's `dataset.json` and shards; UserError if there are none."""
    path = folder / "dataset.json"
    try:
        meta = ShardSetMeta(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; it says what the arrays are (kind, factor, scaling, channels, num_classes)"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the description of a shard set: {error}") from error
    if shards := shard_files(folder):
        return meta, shards
    raise UserError(f"{folder}: holds no shards (*.tar)")


def check_sample(sample: Sample, meta: ShardSetMeta) -> None:
    """Raise UserError, naming the sample, for whatever could not be trained on."""
    name = f"sample {sample.key!r}"
    if not _KEY.fullmatch(sample.key):
        raise UserError(f"{name}: a key may hold neither dots nor white space, and not be empty")
    if not 0 <= sample.label < meta.num_classes:
        raise UserError(f"{name}: label {sample.label} is outside 0 .. {meta.num_classes - 1}")
    for number, variant in enumerate(sample.variants):
        _check_variant(f"{name}, variant {number}", variant, meta)
    check_balance(name, [(variant.kind, variant.flip) for variant in sample.variants])


def check_balance(name: str, drawn: Iterable[tuple[str, bool]]) -> None:
    """An even draw among the variants must also be an even draw of kind and flip: as many variants of each.

    (FiT's preprocessing takes the resized and the cropped image in half of the draws each, and flips half.)
    """
    counts = Counter(drawn)
    if not counts or len(set(counts.values())) > 1:
        raise UserError(f"{name}: needs as many variants of every (kind, flip), and at least one; has {dict(counts)}")
    if len({kind for kind, _ in counts}) * len({flip for _, flip in counts}) != len(counts):
        raise UserError(f"{name}: where one kind has flips, every kind needs them; has {sorted(counts)}")


def _check_variant(name: str, variant: Variant, meta: ShardSetMeta) -> None:
    array = variant.array_CHW
    choice(f"{name}, kind", variant.kind, KINDS)
    if array.dtype.name not in meta.dtypes:
        raise UserError(f"{name}: {array.dtype.name} does not go with {meta.kind}, only {' or '.join(meta.dtypes)}")
    channels = meta.stored_channels
    if array.ndim != 3 or array.shape[0] != channels or not 1 <= min(array.shape) <= max(array.shape) < 2**16:
        raise UserError(f"{name}: shape {array.shape} is not ({channels}, height, width)")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: holds values that are not finite")


def _encoded(sample: Sample) -> dict[str, Any]:
    """The sample as webdataset's writer takes it; arrays in C order, little-endian."""
    described = [
        {"height": v.array_CHW.shape[1], "width": v.array_CHW.shape[2], "kind": v.kind, "flip": v.flip}
        for v in sample.variants
    ]
    arrays = [np.ascontiguousarray(v.array_CHW, v.array_CHW.dtype.newbyteorder("<")) for v in sample.variants]
    files = {f"{number}.npy": array for number, array in enumerate(arrays)}
    return {"__key__": sample.key, "json": {"label": int(sample.label), "variants": described}, **files}


def sample_files(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Each sample of a shard: its key, and by extension its files' places in the shard (offset, bytes) and data.

    Raises:
        UserError: as `tar_members`, or a member is no plain file.
    """
    with open(path, "rb") as shard:

        def read(member: tarfile.TarInfo) -> tuple[int, bytes]:
            if not member.isfile():
                raise UserError(f"{path}: {member.name} is no plain file")
            shard.seek(member.offset_data)
            return member.offset_data, shard.read(member.size)

        for key, members in groupby(tar_members(path), key=lambda member: split_name(member.name)[0]):
            yield key, {split_name(member.name)[1]: read(member) for member in members}


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a tar's member by webdataset's rule: the key ends at the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, in their order.

    tarfile takes a damaged or overwritten header, and a file cut between two members, for the end of the archive; here
    the end must be there, and nothing behind it.

    Raises:
        UserError: it is no tar, or is truncated or corrupt; names the member after which.
    """
    last = "the start"
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                    last = member.name
                    yield member
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("the tar's end is missing")
                while block := file.read(2**20):
                    if block.strip(tarfile.NUL):
                        raise tarfile.ReadError("more data follow the tar's end")
        except tarfile.TarError as error:
            raise UserError(f"{path}: truncated or corrupt after {last}, or no tar: {error}") from error
