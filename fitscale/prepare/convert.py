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
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fitscale.config.errors import UserError
from fitscale.config.files import write_atomic
from fitscale.data.index import Scanned, build_index, scan
from fitscale.data.scan import key_hash
from fitscale.data.shards import DATASET_FILE, Sample, ShardSetMeta, Variant, write_shard
from fitscale.prepare.listing import Item, Source
from fitscale.prepare.preprocess import MULTIPLE, RESIZE, Picture, Rejected, pictures, with_flips
from fitscale.prepare.sources import list_source

STORES = ("moments", "sample")


@dataclass(frozen=True)
class Job:
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
        if self.store not in STORES:
            raise UserError(f"--store: {self.store!r} is not one of {', '.join(STORES)}")
        for name in ("images_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: {getattr(self, name)} is below 1")


def is_finished(job: Job, out: Path) -> bool:
    """Whether `out` holds this job's finished shards.

    Raises:
        UserError: it holds something else.
    """
    record = out / "job.json"
    if not record.is_file():
        if out.exists() and (not out.is_dir() or any(_foreign(path) for path in out.iterdir())):
            raise UserError(f"{out}: is not empty and holds no shards begun by this tool; choose another folder")
        return False
    held, wanted = json.loads(record.read_text()), asdict(job)
    differing = [f"{key} {held.get(key)!r}, not {value!r}" for key, value in wanted.items() if held.get(key) != value]
    if differing:
        raise UserError(f"{out}: was begun with other options ({'; '.join(differing)}); choose another folder")
    return (out / "index.json").is_file()


def _foreign(path: Path) -> bool:
    """Whether a worker that is just starting on the same folder cannot have put this there."""
    return path.name != "job.json" and not path.name.startswith(".")


class Converter:
    """One worker's share of a job, in the folder `out`."""

    def __init__(self, job: Job, out: Path, device: str = "cpu", threads: int = 1) -> None:
        self.job, self.out, self.threads = job, out, threads
        self.source = list_source(Path(job.source))
        self.encoder = None if job.encoder == "pixels" else _load_encoder(job.encoder, device)
        self.dtype = "uint8" if self.encoder is None else self.encoder.dtype  # of the encoder's arithmetic
        self.meta = self._meta(self.source)
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
            tqdm(total=images, desc=f"worker {worker}/{workers}", unit="image", mininterval=1.0) as bar,
            ThreadPoolExecutor(self.threads) as pool,
        ):
            for chunk in mine:
                if not self._done(chunk):
                    self._convert(chunk, pool, bar)
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
        mine = asdict(self.job) | {"items": len(self.source), "listing": self.source.fingerprint}
        mine["dtype"] = self.dtype
        if not record.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(record, json.dumps(mine, indent=1) + "\n")
            return
        held = json.loads(record.read_text())
        if not mine.keys() <= held.keys():
            raise UserError(
                f"{self.out}: was begun by an earlier version, whose order is not known; choose another folder"
            )
        if held["listing"] != mine["listing"]:
            raise UserError(
                f"{self.out}: was begun with other images ({held['items']} then, {mine['items']} now), labels or keys "
                f"in {self.job.source}; restore them, or choose another folder"
            )
        if held["dtype"] != self.dtype:
            raise UserError(
                f"{self.out}: was begun with an encoder in {held['dtype']}, this worker's is in {self.dtype}: "
                "on CUDA it is bfloat16, on a CPU float32 (--device)"
            )

    def _meta(self, source: Source) -> ShardSetMeta:
        job = self.job
        recipe: dict[str, Any] = {
            "preprocessing": "FiT (arXiv 2402.12376)",
            "side": job.side,
            "resize": RESIZE,
            "multiple": MULTIPLE,
            "encoder": job.encoder,
            "classes": source.classes,
        }
        if self.encoder is None:
            return ShardSetMeta("pixels", 1, 1.0, 3, source.num_classes, recipe)
        vae, moments = self.encoder, job.store == "moments"
        recipe["store"] = job.store
        return ShardSetMeta("vae", vae.factor, vae.scaling, vae.channels, source.num_classes, recipe, moments)

    def _items(self, chunk: int) -> list[Item]:
        return self.source.items(chunk * self.job.images_per_shard, (chunk + 1) * self.job.images_per_shard)

    def _part(self, chunk: int) -> Path:
        return self.out / ".parts" / f"{chunk:06d}.npz"

    def _convert(self, chunk: int, pool: ThreadPoolExecutor, bar: tqdm) -> None:  # type: ignore[type-arg]
        """Write one shard and then its part, unless another worker has done so meanwhile."""
        good: list[tuple[Item, list[Picture]]] = []
        rejected = []
        for item, found in pool.map(self._prepare, self._items(chunk)):
            bar.update()
            if isinstance(found, Rejected):
                rejected.append({"name": item.name, "key": item.key, "reason": str(found)})
            else:
                good.append((item, found))
        samples = list(self._samples(good))
        if self._done(chunk):  # another worker was faster
            return
        shard = self.out / f"shard-{chunk:06d}.tar"
        if good:
            write_shard(shard, samples, self.meta)
        _save_part(self._part(chunk), scan(shard, self.meta) if good else None, rejected)

    def _prepare(self, item: Item) -> tuple[Item, list[Picture] | Rejected]:
        try:
            if item.label is None:
                raise Rejected(item.problem)
            return item, pictures(item.read(), self.job.side)
        except Rejected as reason:
            return item, reason
        except MemoryError as error:
            raise UserError(
                f"{item.name}: memory was too short to decode it; start again, with more memory or fewer --threads"
            ) from error

    def _samples(self, good: list[tuple[Item, list[Picture]]]) -> Iterator[Sample]:
        encoded = self._encode(good)
        for number, (item, found) in enumerate(good):
            assert item.label is not None
            kinds = [(kind, flip) for picture in found for kind, flip in ((picture.kind, False), (picture.kind, True))]
            arrays = [encoded.pop((number, variant)) for variant in range(len(kinds))]
            yield Sample(item.key, item.label, [Variant(a, *kind) for a, kind in zip(arrays, kinds, strict=True)])

    def _encode(self, good: list[tuple[Item, list[Picture]]]) -> dict[tuple[int, int], np.ndarray]:
        """(number in `good`, variant) -> array to store; images of one shape are batched whatever their order."""
        if self.encoder is None:
            return {
                (number, variant): pixels.transpose(2, 0, 1)
                for number, (_, found) in enumerate(good)
                for variant, (pixels, _, _) in enumerate(with_flips(found))
            }
        by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, (_, found) in enumerate(good):
            for variant, picture in enumerate(found):
                by_shape[picture.pixels_HW3.shape] += [(number, 2 * variant), (number, 2 * variant + 1)]
        encoded = {}
        for places in by_shape.values():
            for start in range(0, len(places), self.job.batch_size):
                batch = places[start : start + self.job.batch_size]
                pixels = np.stack([_picture(good[number][1], variant) for number, variant in batch])
                for place, moments in zip(batch, self.encoder(pixels), strict=True):
                    encoded[place] = self._stored(moments, good[place[0]][0].key, place[1])
        return encoded

    def _stored(self, moments: np.ndarray, key: str, variant: int) -> np.ndarray:
        if self.job.store == "moments":
            return moments
        from fitscale.data.encode import draw_latent

        generator = np.random.Generator(np.random.Philox(key=np.array([key_hash(key), variant], dtype=np.uint64)))
        return draw_latent(moments, generator).astype(np.float16)

    def _join(self) -> None:
        """Make the folder a shard set. Two workers may end at once: one does it, the other finds it done."""
        parts = [self._part(chunk) for chunk in range(self.chunks)]
        with open(self.out / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._finished:
                return
            for left in (*self.out.glob(".shard-*.tmp"), *self.out.glob(".index.*")):  # by workers that were killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            rejected = [row for part in parts for row in _load_rejected(part)]
            self._check_complete(sum(map(_count_images, parts)), len(rejected))
            write_atomic(self.out / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rejected))
            if len(rejected) == len(self.source):
                where = self.out / "rejected.jsonl"
                raise UserError(
                    f"{self.job.source}: all {len(rejected)} images were rejected, the reasons are in {where}"
                )
            write_atomic(self.out / DATASET_FILE, json.dumps(asdict(self.meta), indent=1) + "\n")
            scanned = (one for one in map(_load_scanned, parts) if one is not None)
            build_index(self.out, scanned)
            shutil.rmtree(self.out / ".parts")
            (self.out / ".lock").unlink()

    def _check_complete(self, images: int, rejected: int) -> None:
        """Every item of the source is in a shard or rejected."""
        if images + rejected != len(self.source):
            raise UserError(
                f"{self.out}: its parts hold {images} images and {rejected} rejections, the source lists "
                f"{len(self.source)}; begin again in another folder"
            )


def _picture(found: list[Picture], variant: int) -> np.ndarray:
    """Variant number `variant` in the order of `with_flips`."""
    pixels = found[variant // 2].pixels_HW3
    return pixels[:, ::-1] if variant % 2 else pixels


def _load_encoder(name: str, device: str) -> Any:
    from fitscale.data.encode import Encoder

    return Encoder(name, device)


def _save_part(path: Path, scanned: Scanned | None, rejected: list[dict[str, str]]) -> None:
    buffer = io.BytesIO()
    arrays = {} if scanned is None else {"images": scanned.images, "variants": scanned.variants}
    place = None if scanned is None else [scanned.name, scanned.bytes, scanned.checksum]
    np.savez(buffer, about=np.array(json.dumps({"shard": place, "rejected": rejected})), **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def _load_rejected(path: Path) -> list[dict[str, str]]:
    with np.load(path) as part:
        return json.loads(str(part["about"]))["rejected"]


def _count_images(path: Path) -> int:
    with np.load(path) as part:
        return len(part["images"]) if "images" in part else 0


def _load_scanned(path: Path) -> Scanned | None:
    with np.load(path) as part:
        place = json.loads(str(part["about"]))["shard"]
        if place is None:
            return None
        name, size, digest = place
        return Scanned(name, size, digest, part["images"], part["variants"])
