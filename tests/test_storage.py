"""Shards behind any fsspec URL: the same bytes, a bounded cache, patience with a bad store, clear words at the end."""

import http.client
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fitscale.config.errors import PassingError, UserError
from fitscale.config.files import read_jsonl
from fitscale.data import storage
from fitscale.data.index import ShardReader, open_index
from fitscale.data.loader import READ_HERE, make_loader
from fitscale.data.packing import PackRule
from fitscale.data.storage import Cache, retried
from fitscale.prepare.verify import verify
from fitscale.run.layout import RunDir
from tests.shard_sets import indexed_set, plan_of
from tests.tiny import tiny_config
from tests.waiting import LIMIT_S, wait_until


class Unsteady(MemoryFileSystem):
    """memory:// that fails the first `failures` fetches, and stalls `stall_s` in every `every`-th."""

    protocol = "unsteady"
    failures, every, stall_s, fetches = 0, 0, 0.0, 0

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("unsteady://").strip("/")

    def get_file(self, rpath, lpath, **kwargs):
        cls = type(self)
        cls.fetches += 1
        if cls.failures:
            cls.failures -= 1
            raise OSError("connection reset")
        if cls.every and cls.fetches % cls.every == 0:
            time.sleep(cls.stall_s)
        return super().get_file(rpath, lpath, **kwargs)


fsspec.register_implementation("unsteady", Unsteady, clobber=True)


@pytest.fixture
def remote(tmp_path):
    """A shard set of 6 shards at unsteady://set, and its local original."""
    folder = tmp_path / "original"
    folder.mkdir()
    local = indexed_set(folder, 60)
    Unsteady.failures = Unsteady.every = Unsteady.fetches = 0
    Unsteady.store.clear()
    for path in folder.iterdir():
        Unsteady().pipe_file(f"/set/{path.name}", path.read_bytes())
    yield local
    Unsteady.failures = Unsteady.every = 0


def read_all(index) -> list[np.ndarray]:
    reader = ShardReader(index)
    return [reader.read(image, int(row["first_variant"])) for image, row in enumerate(index.images)]


def load(index, **changes):
    data = replace(READ_HERE, **changes)
    return make_loader(plan_of(index, window_shards=2), PackRule(512), range(6), data)


def test_a_url_reads_as_the_folder_does(remote, tmp_path):
    index = open_index("unsteady://set", Cache(tmp_path / "cache"))
    assert index.meta == remote.meta
    for ours, theirs in zip(read_all(index), read_all(remote), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    fetched = Unsteady.fetches
    read_all(open_index("unsteady://set", Cache(tmp_path / "cache")))
    assert Unsteady.fetches == fetched + 1  # index.json alone: the rest is in the cache
    assert "unsteady://set/shard-00000" in index.describe(0)
    assert len(list(load(index))) == 6


def test_the_cache_is_bounded_and_serves_all_the_same(remote, tmp_path):
    shard = remote.meta.shards[0].bytes
    index = open_index("unsteady://set", Cache(tmp_path / "cache", 2.5 * shard / 1e9))
    for ours, theirs in zip(read_all(index), read_all(remote), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert 1 <= len(list((tmp_path / "cache").rglob("*.tar"))) <= 2


def test_what_another_process_is_fetching_is_not_evicted(remote, tmp_path):
    shard = remote.meta.shards[0].bytes
    index = open_index("unsteady://set", Cache(tmp_path / "cache", 1.5 * shard / 1e9))
    coming = index.storage.folder / ".shard-000000.tar.1.tmp.tar"
    coming.write_bytes(bytes(shard))
    read_all(index)
    assert coming.is_file() and len(list((tmp_path / "cache").rglob("shard-*.tar"))) == 1


def test_new_contents_at_the_same_url_are_never_mixed_with_old(remote, tmp_path):
    read_all(open_index("unsteady://set", Cache(tmp_path / "cache")))
    other = tmp_path / "other"
    other.mkdir()
    changed = indexed_set(other, 30)
    for path in other.iterdir():
        Unsteady().pipe_file(f"/set/{path.name}", path.read_bytes())
    again = open_index("unsteady://set", Cache(tmp_path / "cache"))
    for ours, theirs in zip(read_all(again), read_all(changed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_passing_errors_are_tried_again(remote, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    Unsteady.failures = 3
    assert open_index("unsteady://set", Cache(tmp_path / "cache")).meta == remote.meta
    assert waits == [0.5, 1.0, 2.0]


def test_lasting_errors_end_in_one_message(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    Unsteady.failures = 100
    with pytest.raises(
        PassingError, match=r"unsteady://set/index.json: cannot be read after 5 attempts: connection reset"
    ):
        open_index("unsteady://set", Cache(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob(".*"))
    with pytest.raises(FileNotFoundError):
        retried((tmp_path / "none").read_bytes, "none")


def test_processes_that_need_the_same_file_fetch_it_once(remote, tmp_path):
    index = open_index("unsteady://set", Cache(tmp_path / "cache"))
    before, Unsteady.every, Unsteady.stall_s = Unsteady.fetches, 1, 0.2
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(index.shard_path, [0] * 4))
    assert Unsteady.fetches == before + 1
    assert {path.read_bytes() for path in paths} == {(remote.storage.folder / remote.meta.shards[0].name).read_bytes()}


@pytest.mark.parametrize("room", [True, False])
def test_the_next_window_is_fetched_while_one_is_read(remote, tmp_path, room):
    """Windows of 2 shards; the cache holds the one that is read and the next, or lacks the room."""
    cache = Cache(tmp_path / "cache", 1.0 if room else 3 * remote.meta.shards[0].bytes / 1e9)
    index = open_index("unsteady://set", cache)
    before = set(threading.enumerate())
    next(load(index))
    for fetching in set(threading.enumerate()) - before:
        fetching.join(LIMIT_S)
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == (4 if room else 2)


@pytest.mark.parametrize(
    ("url", "message"),
    [("unsteady://nothing", "holds no index"), ("nosuch://x", "nosuch://x/index.json: Protocol not known")],
)
def test_wrong_urls(remote, tmp_path, url, message):
    with pytest.raises(UserError, match=message):
        open_index(url, Cache(tmp_path / "cache"))


@pytest.mark.parametrize("workers", [0, 2])
def test_reads_that_stall_are_hidden_by_readers_that_work_ahead(remote, tmp_path, monkeypatch, workers):
    """Two readers work up to 2 steps each ahead; while one stalls in the fifth step, those before it are trained on."""
    fifth = [step.batch.images_B.tolist() for step in load(remote)][4]
    read, reads, goes_on = ShardReader.read, tmp_path / "reads", tmp_path / "goes on"

    def stalling_read(self, image, variant):
        with open(reads, "a") as file:
            file.write(f"{image}\n")
        if image in fifth:
            wait_until(goes_on.exists, "the training steps before it")
        return read(self, image, variant)

    monkeypatch.setattr(ShardReader, "read", stalling_read)
    steps = load(remote, num_workers=workers, prefetch_steps=2)
    next(steps)
    if workers == 0:
        assert len(reads.read_text().split()) == 10  # read when asked: every step would wait for its own
        return
    wait_until(lambda: {str(image) for image in fifth} & set(reads.read_text().split()), "a reader four steps ahead")
    assert [next(steps).step for _ in range(3)] == [1, 2, 3]
    goes_on.touch()
    assert [step.step for step in steps] == [4, 5]


def corrupt(folder, index, image: int) -> str:
    variant = index.variants[int(index.images[image]["first_variant"])]
    path = folder / index.meta.shards[int(index.images[image]["shard"])].name
    data = bytearray(path.read_bytes())
    for row in index.variants[int(index.images[image]["first_variant"]) :][: int(index.images[image]["variants"])]:
        data[int(row["offset"])] ^= 1
    path.write_bytes(data)
    assert variant["length"] > 0
    return index.key(image)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_sample_stops_or_is_skipped_and_named(tmp_path, workers):
    index = indexed_set(tmp_path, 60)
    calm = list(load(index))
    key = corrupt(tmp_path, index, 7)
    with pytest.raises(UserError, match=f"{key}.*checksum differs"):
        list(load(index, num_workers=workers))
    steps = list(load(index, num_workers=workers, on_error="skip"))
    named = [problem for step in steps for problem in step.skipped]
    assert len(named) == 1 and key in named[0] and "checksum differs" in named[0]
    for step, whole in zip(steps, calm, strict=True):
        for pack, other in zip(step.packs, whole.packs, strict=True):
            lost = (pack.slots_S != other.slots_S).nonzero().ravel().tolist()
            assert len(lost) == len(step.skipped) * (1 if len(step.packs) == 1 else len(lost))
            for place in lost:
                a, b = pack.cu_seqlens[place : place + 2].tolist()
                assert pack.slots_S[place] == -1 and not pack.tokens_TC[a:b].any()
            kept = [n for n in range(len(pack.slots_S)) if n not in lost]
            assert all(
                (pack.tokens_TC[a:b] == other.tokens_TC[a:b]).all()
                for n in kept
                for a, b in [pack.cu_seqlens[n : n + 2].tolist()]
            )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("page", "content"), [(0, b"\xff"), (1, b"\0")], ids=["the first header", "a later header"])
def test_a_corrupt_sample_is_skipped_though_its_shard_no_longer_tells_its_key(tmp_path, workers, page, content):
    index = indexed_set(tmp_path, 60)
    path = tmp_path / index.meta.shards[2].name
    data = bytearray(path.read_bytes())
    data[page * 4096 : (page + 1) * 4096] = content * 4096
    path.write_bytes(data)
    steps = list(load(index, num_workers=workers, on_error="skip"))
    named = [problem for step in steps for problem in step.skipped]
    assert len(steps) == 6 and named
    assert all(str(path) in problem and "checksum differs" in problem for problem in named)
    assert any(re.search(r"image 'row 2\d of the index' in", problem) for problem in named)
    assert all(index.key(image) for image in range(60))  # as the trainer names the images of a loss spike
    with pytest.raises(UserError, match="checksum differs"):
        list(load(index, num_workers=workers))


class Stumbling(BaseHTTPRequestHandler):
    """Serves the files of a folder; the first replies for a file have the faults listed for it."""

    def do_GET(self):
        path = self.server.folder / self.path.strip("/")
        self.server.asked.append(path.name)
        fault = self.server.faults.get(path.name, [])[:1]
        del self.server.faults.get(path.name, [])[:1]
        if fault == ["busy"] or not path.is_file():
            return self.send_error(503 if fault else 404)
        data = path.read_bytes()
        data = data[: len(data) // 2] if fault == ["short"] else data
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        data = data[: len(data) // 2] if fault == ["cut"] else data
        self.wfile.write(bytes(len(data)) if fault == ["zeros"] else data)

    def log_message(self, *_):
        pass


class StandardHTTP(fsspec.AbstractFileSystem):
    """HTTP by the standard library, whose errors are no OSErrors; as aiohttp's, by which fsspec reads http://."""

    protocol = "standardhttp"

    def get_file(self, rpath, lpath, **kwargs):
        host, _, path = rpath.partition("/")
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", f"/{path}")
        with connection.getresponse() as reply:
            if reply.status == 404:
                raise FileNotFoundError(rpath)
            if reply.status != 200:
                raise http.client.HTTPException(f"{reply.status}, message={reply.reason!r}")
            Path(lpath).write_bytes(reply.read())


fsspec.register_implementation("standardhttp", StandardHTTP, clobber=True)


@pytest.fixture(params=["standardhttp", "http"])
def server(request, tmp_path, monkeypatch):
    """A web server of 6 shards, with `url`, `faults` (file -> faults of its first replies) and `asked` (files)."""
    if request.param == "http":
        pytest.importorskip("aiohttp")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), Stumbling) as server:
        server.folder, server.faults, server.asked = tmp_path / "served", {}, []
        server.original = indexed_set(server.folder, 60)
        server.url = f"{request.param}://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def same_images(index, other) -> bool:
    return all((ours == theirs).all() for ours, theirs in zip(read_all(index), read_all(other), strict=True))


@pytest.mark.parametrize("fault", ["busy", "cut", "short", "zeros"])
def test_what_a_web_server_sends_badly_is_asked_for_again(server, tmp_path, fault):
    files = ["shard-000002.tar"] if fault == "zeros" else ["images.npy", "variants.npy", "shard-000002.tar"]
    server.faults = {name: [fault] for name in files}
    assert same_images(open_index(server.url, Cache(tmp_path / "cache")), server.original)
    assert not any(server.faults.values()) and server.asked.count("shard-000002.tar") == 2
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_web_server_that_stays_busy_or_sends_too_little_is_one_message(server, tmp_path):
    server.faults = {"index.json": ["busy"] * 5, "shard-000002.tar": ["short"] * 5}
    with pytest.raises(UserError, match=r"/index.json: cannot be read after 5 attempts: \w+: 503, message="):
        open_index(server.url, Cache(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"/shard-000002.tar: cannot be read after 5 attempts: \d+ bytes came, .* \d+"):
        read_all(open_index(server.url, Cache(tmp_path / "cache")))


@pytest.mark.parametrize("name", ["shard-000002.tar", "images.npy", "variants.npy"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_copy_in_the_cache_is_replaced_but_not_before_another_is_there(server, tmp_path, name, share):
    read_all(open_index(server.url, Cache(tmp_path / "cache")))
    (copy,) = (tmp_path / "cache").rglob(name)
    copy.write_bytes(damaged := copy.read_bytes()[: int(share * copy.stat().st_size)])
    server.faults = {name: ["busy"] * 5}
    with pytest.raises(UserError, match=f"/{name}: cannot be read after 5 attempts: \\w+: 503"):
        read_all(open_index(server.url, Cache(tmp_path / "cache")))
    assert copy.read_bytes() == damaged
    assert same_images(open_index(server.url, Cache(tmp_path / "cache")), server.original)
    asked = server.asked.count(name)
    read_all(open_index(server.url, Cache(tmp_path / "cache")))
    assert server.asked.count(name) == asked


def test_bytes_that_the_store_itself_has_wrong_are_told_by_their_images(server, tmp_path):
    index = open_index(server.url, Cache(tmp_path / "cache"))
    key = corrupt(server.folder, server.original, 7)
    named = [problem for step in load(index, on_error="skip") for problem in step.skipped]
    assert len(named) == 1 and key in named[0] and server.asked.count("shard-000000.tar") == 2
    with pytest.raises(UserError, match=r"wrong checksums in 1 shards: shard-000000.tar"):
        verify(index)


def test_training_counts_and_names_what_it_skips(tmp_path, digits_shards):
    import shutil

    from tests.distributed.spawn import run_ranks, train_here

    shutil.copytree(digits_shards, tmp_path / "shards")
    index = open_index(tmp_path / "shards")
    keys = {corrupt(tmp_path / "shards", index, image) for image in range(200, len(index.images), 40)}
    options = ("run.steps=8", "data.on_error=skip", "checkpoint.every_steps=100")
    run_ranks(train_here, 1, tiny_config(tmp_path / "run", tmp_path / "shards", *options))
    events = [row for row in read_jsonl(RunDir(tmp_path / "run").events) if row["event"] == "sample skipped"]
    assert events and [row["skipped_by_rank"] for row in events] == list(range(1, len(events) + 1))
    assert all(any(repr(key) in row["problem"] for key in keys) for row in events)
    assert all(row["loss"] is not None for row in read_jsonl(RunDir(tmp_path / "run").metrics))
    assert all(row["data_wait_s"] >= 0 for row in read_jsonl(RunDir(tmp_path / "run").throughput))
