"""Fetching shards of a remote set before they are needed.

The shards of a window are all needed within its first step, so without this every window would begin with a wait for
all of them. While a window is read, a thread brings those of the next into the cache.
"""

import contextlib
import os
import threading

from fitscale.config.errors import UserError
from fitscale.data.index import Shard
from fitscale.data.storage import Storage
from fitscale.data.stream import ImageStream


class ShardPrefetcher:
    """One process's fetching for one stream."""

    def __init__(self, stream: ImageStream) -> None:
        self.stream = stream
        self._asked: list[Shard] = []

    def fetch_after(self, place: int) -> None:
        """Begin to fetch what comes after the window of image `place`, unless this is so already.

        Nothing is fetched that would push the window before it out of the cache.
        """
        storage = self.stream.index.storage
        if not storage.remote:
            return
        shards = self.stream.shards_ahead(place)
        if shards == self._asked or 2 * sum(shard.bytes for shard in shards) > storage.cache.size_gb * 1e9:
            return
        self._asked = shards
        first = os.getpid() % len(shards)  # the processes of a machine begin at different ones
        threading.Thread(target=_fetch, args=(storage, shards[first:] + shards[:first]), daemon=True).start()


def _fetch(storage: Storage, shards: list[Shard]) -> None:
    with contextlib.suppress(UserError, OSError):  # who reads it will meet the same error, and report it
        for shard in shards:
            storage.local(shard.name, shard.bytes, shard.checksum)
