"""Whether a shard set is what its index says: index.json, the rows beside it and the shards, against each other."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np

from fitscale.config.bars import bar
from fitscale.config.errors import UserError
from fitscale.data.build_index import Scanned, scan_shard
from fitscale.data.index import Index
from fitscale.data.index_file import IMAGES, VARIANTS, size_counts
from fitscale.data.shards import ShardSetMeta, read_set
from fitscale.data.storage import checksum_of

MOST_NAMED = 8  # problems in the message


def verify(index: Index) -> str:
    """Read every shard, and compare every row with what the shard holds; returns what was found right, in words.

    Raises:
        UserError: at the end, naming every shard whose bytes are not those that were indexed, and what else differs.
    """
    meta, damaged, first_variant = index.meta, [], 0
    counts = Counter[tuple[int, int]]()
    problems = list(_wrong_files(index))
    for number, shard in enumerate(bar(len(meta.shards), "verify", "shard", iterable=meta.shards)):
        path, rows = index.shard_path(number), index.images[shard.first_image : shard.first_image + shard.images]
        if checksum_of(path) != shard.checksum:
            damaged.append(shard.name)
        else:
            try:
                scanned = scan_shard(path, meta)
                problems += _wrong_rows(index, number, scanned, first_variant)
                counts.update({size: count for size, count, _ in size_counts(scanned.images, scanned.variants)})
            except UserError as error:
                problems.append(str(error))
        first_variant += int(rows["variants"].sum(dtype=np.int64))
    if not damaged and not problems and sorted((*size, count) for size, count in counts.items()) != list(meta.sizes):
        problems.append("index.json: its sizes are not those of the variants")
    if damaged:
        problems.insert(0, f"wrong checksums in {len(damaged)} shards: {', '.join(damaged)}")
    if problems:
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise UserError(f"{index.storage.location}: {'; '.join(problems[:MOST_NAMED])}{more}")
    old = "" if meta.checksums else "; the index has no checksums of its own rows: an earlier version made it"
    return f"{len(meta.shards)} shards verified: every checksum is right, index.json and all rows agree with them{old}"


def _wrong_files(index: Index) -> Iterator[str]:
    """What is wrong with index.json, images.npy and variants.npy by themselves."""
    meta, folder = index.meta, index.storage.folder
    if not index.storage.remote and (folder / "dataset.json").is_file():
        described, _ = read_set(folder)
        for field in fields(ShardSetMeta):
            if getattr(meta, field.name) != getattr(described, field.name):
                yield f"index.json: its {field.name} is not that of dataset.json"
    for name, rows in ((IMAGES, index.images), (VARIANTS, index.variants)):
        if meta.checksums and checksum_of(Path(str(rows.filename))) != meta.checksums[name]:
            yield f"{name}: wrong checksum"


def _wrong_rows(index: Index, number: int, scanned: Scanned, first_variant: int) -> Iterator[str]:
    """The first row of each kind that is not what the shard gives."""
    shard = index.meta.shards[number]
    scanned.images["shard"] = number
    scanned.images["first_variant"] += first_variant
    pairs = (
        (IMAGES, index.images, scanned.images, shard.first_image),
        (VARIANTS, index.variants, scanned.variants, first_variant),
    )
    for name, rows, found, start in pairs:
        said = rows[start : start + len(found)]
        if len(said) != len(found) or (name == IMAGES and len(found) != shard.images):
            yield f"{shard.name}: holds {len(found)} rows of {name}, the index has others"
        elif (wrong := said != found).any():
            row = int(np.argmax(wrong))
            key = next(key for key in found.dtype.names or () if said[row][key] != found[row][key])
            yield f"{name}: row {start + row} says {key} {said[row][key]}, {shard.name} holds {found[row][key]}"
