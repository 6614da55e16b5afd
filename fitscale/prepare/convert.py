"""From images to shards, by any number of workers, each of which may be killed at any time.

1. The source's items, in their stable order, are cut into chunks; chunk c becomes `shard-<c>.tar` and no other does.
2. Worker i of n does the chunks c with c mod n = i: decode, preprocess, encode batch by shape, write, scan. What has
   been done since it began, by whoever, it leaves as it is.
3. A finished chunk leaves its rows of the index and its rejections under `.parts/`, written after the shard. A worker
   that starts again does the chunks without one; as a chunk's content depends on the chunk alone, so do the shards.
4. Whoever finds all chunks done joins the parts: `rejected.jsonl`, then the index, which makes the folder a shard set.

So the shards are the same bytes for one worker and for a hundred, interrupted or not.
"""

import fcntl
import json
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fitscale.config.bars import bar
from fitscale.config.checks import at_least, choice
from fitscale.config.errors import UserError
from fitscale.config.files import parse_json, read_json, replacing, write_atomic
from fitscale.data.build_index import Scanned, build_index, scan_shard
from fitscale.data.encoding import vae_hash
from fitscale.data.index import key_hash
from fitscale.data.index_file import IMAGE, VARIANT
from fitscale.data.pictures import in_batches
from fitscale.data.shards import Sample, ShardSetMeta, Variant, shard_path, write_meta, write_shard
from fitscale.prepare.listing import Item
from fitscale.prepare.preprocess import MULTIPLE, RESIZE, Rejected, pictures
from fitscale.prepare.sources import list_source

STORES = ("moments", "sample")


@dataclass(frozen=True)
class Conversion:
    """What decides the shards' contents; the same for every worker and every start.

    It is kept in `job.json`, beside the number of the source's items, a hash of their keys and labels, and the type
    that the encoder computes in.
    """

    source: str
    side: int  # FiT's target side in image pixels: at most side^2 pixels an image
    encoder: str  # "pixels", or a local folder or hub name of an AutoencoderKL
    store: str  # of a VAE: "moments" (training draws the latent) or one fixed "sample"
    images_per_shard: int
    batch_size: int  # variants of one shape encoded at once

    def __post_init__(self) -> None:
        if self.side < MULTIPLE or self.side % MULTIPLE:
            raise UserError(f"--side: {self.side} is not a multiple of {MULTIPLE} above 0")
        choice("--store", self.store, STORES)
        at_least("--images-per-shard", self.images_per_shard, 1)
        at_least("--batch-size", self.batch_size, 1)


def is_finished(job: Conversion, out: Path) -> bool:
    """Whether `out` holds this job's finished shards.

    Raises:
        UserError: it holds something else.
    """
    record = out / "job.json"
    if not record.is_file():
        names = [path.name for path in out.iterdir()] if out.is_dir() else []
        # job.json and hidden files may be of a worker that is just starting on the same folder
        if out.is_file() or any(name != "job.json" and not name.startswith(".") for name in names):
            raise UserError(f"{out}: is not empty and holds no shards begun by this tool; choose another folder")
        return False
    _check_record(record, asdict(job))
    return (out / "index.json").is_file()


def _check_record(record: Path, mine: dict[str, Any]) -> None:
    """Raise UserError unless the `job.json` at `record` says what `mine` does."""
    held = read_json(record)
    differing = [key for key, value in mine.items() if key in held and held[key] != value]
    if not mine.keys() <= held.keys():
        begun = "by an earlier version, whose order is not known"
    elif "listing" in differing:
        begun = f"with other images ({held['items']} then, {mine['items']} now), labels or keys in {mine['source']}"
    elif "dtype" in differing:
        begun = f"with an encoder in {held['dtype']}, this worker's is in {mine['dtype']} (CUDA bfloat16, CPU float32)"
    elif differing:
        begun = f"with other options ({'; '.join(f'{key} {held[key]!r}, not {mine[key]!r}' for key in differing)})"
    else:
        return
    raise UserError(f"{record.parent}: was begun {begun}; go on as it was begun, or choose another folder")


class Converter:
    """One worker's share of a job, in the folder `out`."""

    def __init__(self, job: Conversion, out: Path, device: str = "cpu", threads: int = 1) -> None:
        self.job, self.out, self.threads = job, out, threads
        self.source = list_source(Path(job.source))
        self.encoder: Any = None
        if job.encoder != "pixels":
            from fitscale.data.encode import Encoder  # imports torch

            self.encoder = Encoder(job.encoder, device)
        self.dtype = self.encoder.dtype if self.encoder else "uint8"  # of the encoder's arithmetic
        self.meta = self._meta()
        self.chunks = -(-len(self.source) // job.images_per_shard)

    def run(self, worker: int, workers: int) -> int:
        """Do what is left of this worker's chunks, then join the parts if all are there; returns how many are not.

        Raises:
            UserError: there is no such worker; `out` was begun with another listing of the source; all its images were
                rejected.
        """
        if not 0 <= worker < workers:
            raise UserError(f"--worker: {worker} is not one of 0 .. {workers - 1}")
        if self._finished:  # while this worker listed the source and loaded its encoder
            return 0
        self._begin()
        mine = [chunk for chunk in range(worker, self.chunks, workers) if not self._part(chunk).is_file()]
        per_shard = self.job.images_per_shard
        images = sum(min(per_shard, len(self.source) - chunk * per_shard) for chunk in mine)
        with (
            bar(images, f"worker {worker}/{workers}", "image") as shown,
            ThreadPoolExecutor(self.threads) as pool,
        ):
            for chunk in mine:
                if not self._done(chunk):
                    self._convert(chunk, pool, shown)
        missing = sum(not self._part(chunk).is_file() for chunk in range(self.chunks))
        if self._finished:  # another worker joined the parts in the meantime
            return 0
        if not missing:
            self._join()
        return missing

    @property
    def _finished(self) -> bool:
        return (self.out / "index.json").is_file()

    def _done(self, chunk: int) -> bool:
        """Whether a worker has finished this chunk: its part is there, or the index, before which no part goes."""
        return self._part(chunk).is_file() or self._finished

    def _begin(self) -> None:
        """Write `job.json`, or make sure that the worker who did lists the same items and encodes alike."""
        record = self.out / "job.json"
        mine = asdict(self.job) | {"items": len(self.source), "listing": self.source.fingerprint, "dtype": self.dtype}
        if record.is_file():
            _check_record(record, mine)
        else:
            write_atomic(record, json.dumps(mine, indent=1) + "\n")

    def _meta(self) -> ShardSetMeta:
        recipe: dict[str, Any] = {
            "preprocessing": "FiT (arXiv 2402.12376)",
            "side": self.job.side,
            "resize": RESIZE,
            "multiple": MULTIPLE,
            "encoder": self.job.encoder,
            "classes": self.source.classes,
        }
        if self.encoder is None:
            return ShardSetMeta("pixels", 1, 1.0, 3, self.source.num_classes, recipe)
        vae, moments = self.encoder, self.job.store == "moments"
        recipe |= {"store": self.job.store, "encoder_hash": vae_hash(self.job.encoder)}
        if Path(self.job.encoder).is_dir():  # it is found from any folder
            recipe["encoder"] = str(Path(self.job.encoder).resolve())
        return ShardSetMeta("vae", vae.factor, vae.scaling, vae.channels, self.source.num_classes, recipe, moments)

    def _part(self, chunk: int) -> Path:
        return self.out / ".parts" / f"{chunk:06d}.npz"

    def _convert(self, chunk: int, pool: ThreadPoolExecutor, shown: tqdm) -> None:  # type: ignore[type-arg]
        """Write one shard and then its part, unless another worker has done so meanwhile."""
        good: list[tuple[Item, list[Variant]]] = []
        rejected = []
        size = self.job.images_per_shard
        for item, found in pool.map(self._prepare, self.source.items(chunk * size, (chunk + 1) * size)):
            shown.update()
            if isinstance(found, Rejected):
                rejected.append({"name": item.name, "key": item.key, "reason": str(found)})
            else:
                good.append((item, found))
        shard = shard_path(self.out, chunk)
        shown.set_postfix_str(f"encoding {shard.name}")
        samples = self._samples(good)
        if self._done(chunk):  # another worker was faster
            return
        shown.set_postfix_str(f"writing {shard.name}")
        if good:
            write_shard(shard, samples, self.meta)
        shown.set_postfix_str(f"checking {shard.name}")
        _save_part(self._part(chunk), scan_shard(shard, self.meta) if good else None, rejected)

    def _prepare(self, item: Item) -> tuple[Item, list[Variant] | Rejected]:
        if isinstance(item.label, Rejected):
            return item, item.label
        try:
            return item, pictures(item.read(), self.job.side)
        except Rejected as reason:
            return item, reason
        except MemoryError as error:
            raise UserError(
                f"{item.name}: memory was too short to decode it; start again, with more memory or fewer --threads"
            ) from error

    def _samples(self, good: list[tuple[Item, list[Variant]]]) -> list[Sample]:
        encoded = iter(self._encode([variant.array_CHW for _, found in good for variant in found]))
        samples = []
        for item, found in good:
            assert isinstance(item.label, int)
            variants = [self._stored(variant, next(encoded), item.key, n) for n, variant in enumerate(found)]
            samples.append(Sample(item.key, item.label, variants))
        return samples

    def _encode(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The encoder's arrays, in batches of one shape; without an encoder the pixels as they are."""
        if self.encoder is None:
            return arrays
        pixels_HW3 = [array.transpose(1, 2, 0) for array in arrays]
        return in_batches(self.encoder, pixels_HW3, self.job.batch_size)

    def _stored(self, variant: Variant, array: np.ndarray, key: str, number: int) -> Variant:
        """The variant with the encoder's array: its moments, or one latent drawn for this key and number."""
        if self.encoder is not None and self.job.store == "sample":
            from fitscale.data.encode import draw_latent

            generator = np.random.Generator(np.random.Philox(key=np.array([key_hash(key), number], dtype=np.uint64)))
            array = draw_latent(array, generator).astype(np.float16)
        return replace(variant, array_CHW=array)

    def _join(self) -> None:
        """Make the folder a shard set. Two workers may end at once: one does it, the other finds it done."""
        parts = [self._part(chunk) for chunk in range(self.chunks)]
        with open(self.out / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._finished:
                return
            for left in self.out.glob(".*.tmp*"):  # by workers that were killed
                left.unlink()
            images, rejected = 0, []
            for scanned, reasons in map(_load_part, bar(len(parts), "joining", "shard", iterable=parts)):
                images += len(scanned.images) if scanned else 0
                rejected += reasons
            if images + len(rejected) != len(self.source):
                raise UserError(
                    f"{self.out}: its parts hold {images} images and {len(rejected)} rejections, the source lists "
                    f"{len(self.source)}; begin again in another folder"
                )
            write_atomic(self.out / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rejected))
            if not images:
                where = self.out / "rejected.jsonl"
                raise UserError(
                    f"{self.job.source}: all {len(rejected)} images were rejected, the reasons are in {where}"
                )
            write_meta(self.out, self.meta)
            listed = bar(len(parts), "index", "shard", iterable=parts)
            build_index(self.out, (scanned for scanned, _ in map(_load_part, listed) if scanned))
            shutil.rmtree(self.out / ".parts")
            (self.out / ".lock").unlink()


def _save_part(path: Path, scanned: Scanned | None, rejected: list[dict[str, str]]) -> None:
    arrays = {"images": scanned.images, "variants": scanned.variants} if scanned else {}
    shard = [scanned.name, scanned.bytes, scanned.checksum] if scanned else None
    with replacing(path) as temporary:
        np.savez(temporary, about=np.array(json.dumps({"shard": shard, "rejected": rejected})), **arrays)  # type: ignore[arg-type]


def _load_part(path: Path) -> tuple[Scanned | None, list[dict[str, str]]]:
    """What `_save_part` saved, unpacked: no array outgrows the file. UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(member.file_size for member in packed.infolist()) > path.stat().st_size:
                raise UserError("it is packed, which no part is")
        with np.load(path) as part:
            about = parse_json(str(part["about"]).encode(), "its text")
            if about["shard"] is None:
                return None, about["rejected"]
            name, size, checksum = about["shard"]
            images, variants = part["images"].astype(IMAGE), part["variants"].astype(VARIANT)
            return Scanned(name, size, checksum, images, variants), about["rejected"]
    except (ValueError, LookupError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and start again: its shard is made anew") from error
