"""Reading single arrays out of shards by the byte ranges of their index."""

import os
import zlib
from collections import OrderedDict

import numpy as np

from fitscale.config.errors import UserError
from fitscale.data.index import Index
from fitscale.data.shards import DTYPES

OPEN_SHARDS = 64  # files a reader keeps open


class CorruptSample(UserError):
    """A single image cannot be used; the others of its shard may be fine."""


class ShardReader:
    """Reads variants of `index`'s images. Opens files when first read, so it may be made before workers are forked."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first

    def read(self, image: int, variant: int) -> np.ndarray:
        """The stored (channels, height, width) array of row `variant` of `index.variants`, read-only.

        Raises:
            CorruptSample: the bytes are not those that were indexed; names shard and sample.
            UserError: the shard cannot be read.
        """
        row = self.index.variants[variant]
        data = os.pread(self._file(int(self.index.images[image]["shard"])), int(row["length"]), int(row["offset"]))
        if zlib.crc32(data) != row["crc32"]:
            what = f"{len(data)} of {row['length']} bytes" if len(data) < row["length"] else "checksum differs"
            raise CorruptSample(f"{self.index.describe(image)} is truncated or corrupt: {what}")
        shape = (self.index.meta.stored_channels, int(row["height"]), int(row["width"]))
        return np.frombuffer(data, DTYPES[row["dtype"]]).reshape(shape)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(self.index.shard_path(shard), os.O_RDONLY)
        except OSError as error:
            path = self.index.storage.name_of(self.index.meta.shards[shard].name)
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        return self._open[shard]

    def __del__(self) -> None:
        self.close()
