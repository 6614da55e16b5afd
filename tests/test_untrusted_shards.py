"""Shard sets from outside: what is crafted is refused in one line, and what was changed is found."""

import contextlib
import io
import json
import random
import shutil
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fitscale.cli import main
from fitscale.config.errors import UserError
from fitscale.data import storage
from fitscale.data.build_index import build_index
from fitscale.data.index import ShardReader, open_index
from fitscale.data.loader import make_loader
from fitscale.data.packing import PackRule
from fitscale.data.storage import Cache
from fitscale.prepare.sources import list_source
from fitscale.prepare.verify import verify
from tests.shard_sets import indexed_set, plan_of


class Store(MemoryFileSystem):
    """memory:// under another name, so that no test sees another's files."""

    protocol = "untrusted"
    store, pseudo_dirs = {}, [""]  # type: ignore[var-annotated]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("untrusted://").strip("/")


fsspec.register_implementation("untrusted", Store, clobber=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A shard set of 3 shards with 4 images each."""
    indexed_set(tmp_path / "set", 12, images_per_shard=4)
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    Store.store.clear()


def serve(folder: Path) -> str:
    for path in folder.iterdir():
        Store().pipe_file(f"/set/{path.name}", path.read_bytes())
    return "untrusted://set"


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_rows(path: Path, change: Callable[[np.ndarray], object]) -> None:
    rows = np.load(path)
    change(rows)
    np.save(path, rows)


def without_checksums(folder: Path) -> None:
    """As version 0.1 wrote it."""
    edit(folder / "index.json", lambda index: [index.pop("checksums", None), index.pop("draws", None)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_all(index) -> None:
    """All that training does with a shard set, for two epochs."""
    plan = plan_of(index, batch=8, window_shards=2, holdout_fraction=0.1)
    for _ in make_loader(plan, PackRule(64), range(3)):
        pass
    reader = ShardReader(index)
    for image in range(len(index.images)):
        reader.read(image, int(index.images[image]["first_variant"]))


# --- names, and what is fetched


@pytest.mark.parametrize(
    "name",
    ["{victim}", "../victim.tar", "sub/x.tar", "..", ".x.tar", "x\n.tar", "x\0.tar", "a\\b.tar", "index.json", "", 7],
)
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_shard_has_a_plain_name_and_nothing_else_is_written(folder, tmp_path, name, where):
    victim = tmp_path / "victim.tar"
    victim.write_text("mine")
    name = name.format(victim=victim) if isinstance(name, str) else name
    shard = (folder / "shard-000001.tar").read_bytes()
    edit(folder / "index.json", lambda index: index["shards"][1].update(name=name))
    location = serve(folder)
    if str(name).endswith(".tar"):
        Store().pipe_file(f"/set/{name}", shard)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"index\.json: shards: .* is no plain name of a file"):
        read_all(open_index(location if where == "remote" else folder, Cache(tmp_path / "cache")))
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith("cache/")} == before


def test_copies_have_names_of_ours(folder, tmp_path):
    names = ["réseau.tar", "a::file:b.tar", "shard-000000.tar"]  # the last is another's name in the cache
    for number, name in enumerate(names):
        (folder / f"shard-{number:06d}.tar").rename(folder / f"-{number}")
        edit(folder / "index.json", lambda index, number=number, name=name: index["shards"][number].update(name=name))
    for number, name in enumerate(names):
        (folder / f"-{number}").rename(folder / name)
    index = open_index(serve(folder), Cache(tmp_path / "cache"))
    read_all(index)
    copies = sorted(path.name for path in index.storage.folder.iterdir())
    assert copies == ["images.npy", *(f"shard-{number:06d}.tar" for number in range(3)), "variants.npy"]
    verify(index)


@pytest.mark.parametrize("name", ["images.npy", "variants.npy"])
def test_rows_without_their_checksum_are_refused_and_replace_nothing(folder, tmp_path, name):
    index = open_index(serve(folder), Cache(tmp_path / "cache"))
    copy = index.storage.folder / name
    copy.write_bytes(damaged := copy.read_bytes()[:-1])
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    Store().pipe_file(f"/set/{name}", bytes(data))
    with pytest.raises(UserError, match=rf"untrusted://set/{name}: came twice without the checksum"):
        open_index("untrusted://set", Cache(tmp_path / "cache"))
    assert copy.read_bytes() == damaged and not list((tmp_path / "cache").rglob(".*"))


def test_a_shard_without_its_checksum_never_has_a_verified_name(folder, tmp_path):
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[600] ^= 1
    serve(folder)
    Store().pipe_file("/set/shard-000001.tar", bytes(data))
    index = open_index("untrusted://set", Cache(tmp_path / "cache"))
    names = [index.shard_path(number).name for number in range(3)]
    assert names == ["shard-000000.tar", "unverified-shard-000001.tar", "shard-000002.tar"]


class Endless(fsspec.AbstractFileSystem):
    """A store whose index is the set's and whose shards never end."""

    protocol = "endless"
    index: dict[str, bytes] = {}  # noqa: RUF012
    served = 0

    def _open(self, path, mode="rb", **_):
        name = path.rsplit("/")[-1]
        return io.BytesIO(self.index[name]) if name in self.index else Zeros()

    def isdir(self, path):
        return False


class Zeros(io.BytesIO):
    def read(self, size=-1):
        Endless.served += 2**20
        return bytes(2**20) if Endless.served < 2**29 else b""


fsspec.register_implementation("endless", Endless, clobber=True)


def test_no_more_is_read_than_the_index_says(folder, tmp_path, monkeypatch):
    Endless.index = {name: data for name, data in files(folder).items() if not name.endswith(".tar")}
    index = open_index("endless://set", Cache(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"shard-000000.tar: cannot be read after 5 attempts: more than \d+ bytes came"):
        index.shard_path(0)
    assert Endless.served <= 5 * 2**20  # a piece of each attempt
    Endless.index, Endless.served = {}, 0
    monkeypatch.setattr("fitscale.data.index.MOST_BYTES", 2**21)
    with pytest.raises(UserError, match=r"index.json: cannot be read after 5 attempts: more than \d+ bytes"):
        open_index("endless://set", Cache(tmp_path / "other"))
    assert Endless.served <= 5 * 3 * 2**20 and not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/set", "http:// is not encrypted; use https://"),
        ("ftp://example.com/set", "ftp:// is not encrypted"),
        ("simplecache::https://example.com/set", "without ::"),
    ],
)
def test_only_safe_connections_are_opened(tmp_path, url, message):
    with pytest.raises(UserError, match=message):
        open_index(url, Cache(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"client_kwargs": {"verify": False}}, "verify=False would leave the store's certificate unchecked"),
        ({"endpoint_url": "http://minio.example.com:9000"}, "http:// is not encrypted"),
    ],
)
def test_a_store_whose_options_switch_tls_off_is_refused(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setitem(fsspec.config.conf, "untrusted", options)
    with pytest.raises(UserError, match=message):
        open_index(serve(folder), Cache(tmp_path / "cache"))


class Elsewhere(BaseHTTPRequestHandler):
    """A server that sends everybody somewhere else."""

    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", self.server.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere():
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://192.0.2.1/index.json", r"leads to 'http://192.0.2.1/index.json': http:// is not encrypted"),
        ("file:///etc/passwd", "cannot be read after 5 attempts: NonHttpUrlRedirectClientError"),
    ],
)
def test_a_redirect_may_not_leave_for_an_unencrypted_place_or_a_file(elsewhere, tmp_path, target, message):
    elsewhere.target = target
    with pytest.raises(UserError, match=message):
        open_index(f"http://127.0.0.1:{elsewhere.server_port}/set", Cache(tmp_path / "cache"))


def test_a_certificate_is_verified_and_no_redirect_leaves_tls(elsewhere, tmp_path, monkeypatch):
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=localhost"
    alternative = "-addext subjectAltName=DNS:localhost"
    if subprocess.run(f"{request} {alternative}", shell=True, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    elsewhere.socket = context.wrap_socket(elsewhere.socket, server_side=True)
    elsewhere.target = "http://127.0.0.1/index.json"
    url = f"https://localhost:{elsewhere.server_port}/set"
    with pytest.raises(UserError, match=r"cannot be read after 5 attempts.*CERTIFICATE_VERIFY_FAILED"):
        open_index(url, Cache(tmp_path / "cache"))
    monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": ssl.create_default_context(cafile=tmp_path / "cert")})
    with pytest.raises(UserError, match=r"leads away from https://, to 'http://127.0.0.1/index.json'"):
        open_index(url, Cache(tmp_path / "cache"))


# --- crafted files


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            one = tarfile.TarInfo(name)
            one.size = len(data)
            tar.addfile(one, io.BytesIO(data))


def raw_header(name: str, kind: bytes, size: int) -> bytes:
    one = tarfile.TarInfo(name)
    one.type, one.size = kind, size
    return one.tobuf(tarfile.GNU_FORMAT)


DESCRIBED = b'{"label": 0, "variants": [{"height": 2, "width": 2, "kind": "resize", "flip": false}]}'
SHAPE = "{{'descr': '|u1', 'fortran_order': False, 'shape': {}, }}\n"
SAMPLES = {
    "a terabyte announced": [("a.json", DESCRIBED), ("a.0.npy", npy(SHAPE.format("(3, 2, 166666666667)")))],
    "a negative side": [("a.json", DESCRIBED), ("a.0.npy", npy(SHAPE.format("(3, -2, -2)"), bytes(12)))],
    "objects": [("a.json", DESCRIBED), ("a.0.npy", npy(SHAPE.format("(3, 2, 2)").replace("|u1", "|O"), bytes(96)))],
    "a deep header": [("a.json", DESCRIBED), ("a.0.npy", npy("-" * 60_000 + "1"))],
    "an archive for an array": [("a.json", DESCRIBED), ("a.0.npy", b"PK\x03\x04" + bytes(40))],
    "nested JSON": [("a.json", b"[" * 200_000), ("a.0.npy", b"")],
    "nested objects": [("a.json", b'{"label":' * 200_000), ("a.0.npy", b"")],
    "a number for an object": [("a.json", b"7"), ("a.0.npy", b"")],
    "variants that are a number": [("a.json", b'{"label": 0, "variants": 7}'), ("a.0.npy", b"")],
    "an endless label": [("a.json", DESCRIBED.replace(b"0,", b"9" * 5000 + b",")), ("a.0.npy", b"")],
    "bytes that are no text": [("a.json", b'{"label": "\xff\xfe"}'), ("a.0.npy", b"")],
}


@pytest.mark.parametrize("crafted", SAMPLES)
def test_a_crafted_sample_is_named(folder, crafted):
    tar_of(folder / "shard-000001.tar", SAMPLES[crafted])
    with pytest.raises(UserError, match=r"shard-000001\.tar: sample 0 \(a\) is corrupt"):
        build_index(folder)


TARS = {
    "an exabyte member": raw_header("a.json", tarfile.REGTYPE, 2**60),
    "a member of negative size": raw_header("a.json", tarfile.REGTYPE, -1024),
    "a name of an exabyte": raw_header("a", tarfile.GNUTYPE_LONGNAME, 2**60),
    "a name of negative size": raw_header("a", tarfile.GNUTYPE_LONGNAME, -512),
    "attributes of an exabyte": raw_header("a", tarfile.XHDTYPE, 2**60),
    "names of names": (raw_header("a", tarfile.GNUTYPE_LONGNAME, 2) + b"x\0" + bytes(510)) * 3000,
    "attributes that are none": raw_header("a", tarfile.XHDTYPE, 512) + b"99999999999 x=\n" * 34 + b"xx",
}


@pytest.mark.parametrize("crafted", TARS)
def test_a_crafted_tar_is_named(folder, crafted):
    (folder / "shard-000001.tar").write_bytes(TARS[crafted] + bytes(4096))
    with pytest.raises(UserError, match=r"shard-000001\.tar: truncated or corrupt after the start"):
        build_index(folder)
    with pytest.raises(UserError, match=r"shard-000001\.tar: truncated or corrupt"):
        list_source(folder)


def test_labels_in_a_source_that_are_crafted_are_reasons_to_reject(tmp_path):
    labels = [b'{"label": ' * 200_000, b'{"label": 1e999}', b"[1]", b"\xff"]
    members = [one for n, text in enumerate(labels) for one in ((f"{n}.json", text), (f"{n}.png", b"an image"))]
    tar_of(tmp_path / "a.tar", members)
    source = list_source(tmp_path / "a.tar")
    assert all(isinstance(item.label, UserError) for item in source.items(0, 4)) and len(source) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{",
        b"[" * 500_000,
        b"[]",
        b'{"version": 1, "images": "x"}',
        b'{"version": 1, "shards": "x", "sizes": []}',
        b'{"version": 1, "shards": [7], "sizes": []}',
        b'{"version": [[1]]}',
    ],
)
def test_an_index_that_is_none_is_one_line(folder, content):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json: (not an index|version)") as raised:
        open_index(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(images="x"), "images"),
        (lambda index: index.update(channels=10**12), "channels: 1000000000000 is not a whole number"),
        (lambda index: index.update(num_classes="7"), "num_classes: '7' is not"),
        (lambda index: index.update(scaling=float("nan")), "scaling: nan"),
        (lambda index: index.update(kind=["pixels"]), "kind"),
        (lambda index: index["shards"][1].update(images=-4), "images of shard-000001.tar"),
        (lambda index: index["shards"][1].update(images=2**62), "images of shard-000001.tar"),
        (lambda index: index["shards"][1].update(bytes=2**70), "bytes of shard-000001.tar"),
        (lambda index: index["shards"][1].update(checksum="x"), "checksum of shard-000001.tar"),
        (lambda index: index["shards"][2].update(first_image=0), "first_image of shard-000002.tar"),
        (lambda index: index["shards"][2].update(name="shard-000000.tar"), "named twice"),
        (lambda index: index["sizes"].append([1, 1, 1]), "sizes: must be ascending"),
        (lambda index: index["sizes"].insert(0, [0, 1, 1]), "sizes, height: 0"),
        (lambda index: index.update(shards=[]), "images: 0 is not"),
        (lambda index: index["draws"].pop(), "draws: must be"),
        (lambda index: index["checksums"].update({"images.npy": 7}), "checksum of images.npy: 7"),
        (lambda index: index["checksums"].update({"../x": "0" * 32}), "checksums: must be those of"),
    ],
)
def test_values_of_an_index_that_cannot_be_are_named(folder, change, message):
    edit(folder / "index.json", change)
    with pytest.raises(UserError, match=rf"index\.json: .*{message}"):
        open_index(folder)


HEADERS = {
    "an archive": b"PK\x03\x04" + bytes(100),
    "a terabyte announced": npy(SHAPE.format("(1000000000000,)")),
    "a deep header": npy("-" * 60_000 + "1"),
    "nothing": b"",
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("name", ["images.npy", "variants.npy"])
def test_rows_with_another_header_are_not_parsed(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: does not go with index.json"):
        open_index(folder)


VALUES = {
    "images.npy": {"label": (-1, 7), "shard": (3, 2**32 - 1), "variants": (0, 65535), "first_variant": (2**64 - 1,)},
    "variants.npy": {
        "offset": (2**64 - 1,),
        "length": (0, 2**32 - 1),
        "dtype": (1, 255),
        "kind": (3,),
        "height": (0, 7),
    },
}
ROWS = [(name, key, value) for name, keys in VALUES.items() for key, values in keys.items() for value in values]


@pytest.mark.parametrize(("name", "key", "value"), ROWS)
def test_rows_that_cannot_be_are_named(folder, name, key, value):
    """They pass where they are mapped, as those of 100 million images do; not where something is drawn from them."""

    def change(rows):
        rows[key][5] = value

    without_checksums(folder)
    edit_rows(folder / name, change)
    with pytest.raises(UserError, match=rf"{name}: row \d+ cannot be \(.*{key} "):
        read_all(open_index(folder))
    assert main(["data", str(folder), "--out", str(folder / "report")]) == 2


# --- damage is found


def shifted(rows):
    rows["label"] = (rows["label"] + 1) % 7


def swapped(rows):
    rows["height"], rows["width"] = rows["width"].copy(), rows["height"].copy()


def flipped(rows):
    rows["flip"] = ~rows["flip"]


@pytest.mark.parametrize("old", [False, True], ids=["with checksums", "version 0.1"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images.npy", shifted, r"images.npy: row 0 says label \d, shard-000000.tar holds \d"),
        ("variants.npy", swapped, r"variants.npy: row \d+ says height \d+, shard-00000\d.tar holds \d+"),
        ("variants.npy", flipped, "variants.npy: row 0 says flip"),
        ("images.npy", lambda rows: rows["key_hash"].sort(), "images.npy: row .* says key_hash"),
    ],
)
def test_verify_finds_rows_that_are_not_the_shards(folder, name, change, message, old):
    verify(open_index(folder))
    edit_rows(folder / name, change)
    if old:
        without_checksums(folder)
    with pytest.raises(UserError, match=message) as raised:
        verify(open_index(folder))
    assert (f"{name}: wrong checksum" in str(raised.value)) != old


def test_an_index_without_checksums_loads_and_verify_says_so(folder, capsys):
    draws = open_index(folder).draws
    without_checksums(folder)
    index = open_index(folder)
    np.testing.assert_allclose(index.draws, draws)
    read_all(index)
    assert "the index has no checksums of its own rows: an earlier version made it" in verify(index)


@pytest.mark.parametrize(("key", "value"), [("num_classes", 9), ("scaling", 0.5), ("recipe", {"encoder": "x"})])
def test_verify_compares_the_descriptions(folder, key, value):
    edit(folder / "dataset.json", lambda content: content.update({key: value}))
    with pytest.raises(UserError, match=f"index.json: its {key} is not that of dataset.json"):
        verify(open_index(folder))


# --- chance


MUTATIONS = 60
FUZZED = ["index.json", "images.npy", "variants.npy", "dataset.json", "shard-000001.tar"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes changed, removed, repeated or put in, or with a number or text in it replaced."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        place, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 8, 100])
        kind = rng.randrange(5)
        if kind == 0:
            content[place : place + length] = rng.randbytes(len(content[place : place + length]))
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = content[place : place + length]
        elif kind == 3:
            content[place:place] = rng.choice([b"\xff", b"\0" * 600, b"[" * 3000, b"-", b"e999", b"../", b'"', b"NaN"])
        else:
            numbers = [n for n, byte in enumerate(content[:4000]) if 48 <= byte < 58]
            if numbers:
                start = rng.choice(numbers)
                content[start : start + 1] = rng.choice([b"-1", b"999999999999", b"1e400", b'"x"', b"null", b"[]"])
        if not content:
            break
    return bytes(content)


def test_whatever_is_changed_there_is_an_answer_or_one_line(folder, tmp_path):
    """Seeded mutations of one file each, read as training, `--verify`, the indexer and the cache read them."""
    rng, original = random.Random(20261121), tmp_path / "original"
    shutil.copytree(folder, original)
    refused = 0
    for number in range(MUTATIONS):
        name = FUZZED[number % len(FUZZED)]
        (folder / name).write_bytes(mutate((original / name).read_bytes(), rng))
        if number % 3 == 0:
            Store.store.clear()
        location = serve(folder) if number % 3 == 0 else folder
        before = files(tmp_path)
        for action in (read_all, verify):
            try:
                action(open_index(location, Cache(tmp_path / "cache")))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
        after = {path: data for path, data in files(tmp_path).items() if not path.startswith("cache/")}
        assert after == {path: data for path, data in before.items() if not path.startswith("cache/")}
        if name in ("dataset.json", "shard-000001.tar"):
            with contextlib.suppress(UserError):
                build_index(folder)
        for path in original.iterdir():
            shutil.copyfile(path, folder / path.name)
    assert refused > MUTATIONS
