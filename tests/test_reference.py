"""Reference statistics from outside: bounded, checked, never a pickle, and named where they are refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.config.schema_data import DataConfig
from fitscale.data.index import open_index
from fitscale.eval.reference import Reference, load_reference

F = 5
MU, SIGMA = np.arange(F, dtype=np.float64), np.eye(F)


class Net:
    """As a feature network that gives F features; what `load_reference` asks of it."""

    path, identity, num_features = Path("net.pt"), "0" * 64, F

    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return np.array([[*image.mean((0, 1)), *image.shape[:2]] for image in images], dtype=np.float64)


def load(path: Path) -> Reference:
    return load_reference(path, Net(), DataConfig(), path.parent / "kept", open_index)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def claiming(shape: str, descr: str = "<f8") -> bytes:
    """An .npy file that says it has this shape, and has none of its numbers."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(path: Path, compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, data in members.items():
            opened.writestr(f"{name}.npy", data)
    return path


def test_statistics_are_read_as_they_are(tmp_path):
    np.savez(tmp_path / "r.npz", mu=MU.astype(np.float32), sigma=SIGMA, other=np.array([object()]))
    found = load(tmp_path / "r.npz").statistics
    assert np.array_equal(found.mean_F, MU) and np.array_equal(found.cov_FF, SIGMA)


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [
        (npy(MU[:3]), npy(SIGMA)),
        (npy(MU), npy(SIGMA[:3])),
        (npy(MU), npy(np.zeros(F * F))),
        (npy(np.array(1.0)), npy(SIGMA)),
        (npy(MU * np.nan), npy(SIGMA)),
        (npy(MU), npy(SIGMA + np.inf)),
        (npy(MU), npy(-SIGMA)),
        (npy(MU), npy(np.triu(np.ones((F, F))))),
        (npy(MU + 1j), npy(SIGMA)),
        (npy(np.array(["x"] * F)), npy(SIGMA)),
        (npy(np.array([None] * F)), npy(SIGMA)),
        (npy(MU)[:-4], npy(SIGMA)),
        (npy(MU), npy(SIGMA)[:60]),
        (b"", npy(SIGMA)),
        (b"\x93NUMPY", npy(SIGMA)),
        (claiming("(1000000000000,)"), npy(SIGMA)),
        (claiming("(1000000000000,)", "|V0"), npy(SIGMA)),
        (claiming("(9223372036854775807, 9223372036854775807)"), npy(SIGMA)),
        (claiming("(-1,)"), npy(SIGMA)),
        (claiming("((" * 25 + "))" * 25), npy(SIGMA)),
        (npy(np.zeros(4_000_000)), npy(SIGMA)),
    ],
)
def test_statistics_that_cannot_be_right_are_one_line(tmp_path, mu, sigma):
    with pytest.raises(UserError, match=r"evaluation\.reference: .*r\.npz") as caught:
        load(archive(tmp_path / "r.npz", mu=mu, sigma=sigma))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04N.", npy(MU), b"\0" * 1000])
def test_what_is_no_archive_is_one_line(tmp_path, data):
    (tmp_path / "r.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"r\.npz: no \.npz with arrays mu and sigma"):
        load(tmp_path / "r.npz")


def test_every_cut_and_every_flipped_byte_is_refused_or_read(tmp_path):
    """A truncated archive is refused; a flipped byte of its arrays is caught by the archive's own checksums."""
    whole = archive(tmp_path / "r.npz", zipfile.ZIP_STORED, mu=npy(MU), sigma=npy(SIGMA)).read_bytes()
    rng = np.random.default_rng(0)
    for length in range(0, len(whole), 7):
        (tmp_path / "r.npz").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"r\.npz"):
            load(tmp_path / "r.npz")
    for place in rng.integers(0, len(whole), 200):
        (tmp_path / "r.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        try:
            found = load(tmp_path / "r.npz").statistics
        except UserError:
            continue
        assert np.array_equal(found.mean_F, MU) and np.array_equal(found.cov_FF, SIGMA)


def test_a_damaged_image_is_named(tmp_path):
    """Cut and flipped at many places: Pillow raises nearly anything, or draws what is left."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    for suffix in ("png", "jpg", "webp", "bmp"):
        file = folder / f"b.{suffix}"
        Image.fromarray(pixels).save(file)
        whole = file.read_bytes()
        refused = 0
        for place in np.random.default_rng(1).integers(0, len(whole), 60):
            flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
            for data in (whole[:place], flipped):
                file.write_bytes(data)
                try:
                    load(folder)
                except UserError as error:
                    assert str(error).startswith(f"evaluation.reference: {file} cannot be read as an image")
                    refused += 1
        assert refused
        file.unlink()


def test_an_image_larger_than_memory_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read as an image: .*pixels"):
        load(tmp_path / "images")
