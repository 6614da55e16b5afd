"""Reference statistics from outside: bounded, checked, never a pickle, and named where they are refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.config.schema_data import DataConfig
from fitscale.data.index import open_index
from fitscale.eval.images import NpzImages
from fitscale.eval.reference import Reference, load_reference

F = 5
MU, SIGMA = np.arange(F, dtype=np.float64), np.eye(F)


class Net:
    """As a feature network that gives F features; what `load_reference` asks of it."""

    path, identity, device, num_features, num_spatial = Path("net.pt"), "0" * 64, torch.device("cpu"), F, 0

    def look(self, images_N3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        size = torch.tensor(images_N3HW.shape[2:]).expand(len(images_N3HW), 2)
        return {"features": torch.cat([images_N3HW.float().mean((2, 3)), size], dim=1)}


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
    found = load(tmp_path / "r.npz").seen.statistics
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
            found = load(tmp_path / "r.npz").seen.statistics
        except UserError:
            continue
        assert np.array_equal(found.mean_F, MU) and np.array_equal(found.cov_FF, SIGMA)


def test_a_damaged_image_is_named_and_left_out(tmp_path, capfd):
    """Cut and flipped at many places: Pillow raises nearly anything, or draws what is left."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in "ac":
        Image.fromarray(pixels // 2).save(folder / f"{name}.png")
    rng = np.random.default_rng(1)
    for suffix in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(pixels).save(folder / f"b.{suffix}")
        whole = (folder / f"b.{suffix}").read_bytes()
        (folder / f"b.{suffix}").unlink()
        for number, place in enumerate(rng.integers(0, len(whole), 40)):
            flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
            (folder / f"b-{number}-cut.{suffix}").write_bytes(whole[:place])
            (folder / f"b-{number}-flipped.{suffix}").write_bytes(flipped)
    found = load(folder)
    told = capfd.readouterr().out.splitlines()
    broken = [line for line in told if line.startswith("evaluation.reference: ")]
    assert f"{len(broken)} images of the reference cannot be read and are left out:" in told
    assert len(broken) > 100 and all("cannot be read as an image" in line for line in broken)
    assert len(found.seen.features_NF) == 2 + 4 * 80 - len(broken)
    assert load(folder).identity == found.identity and "left out" not in capfd.readouterr().out, "kept: made once"


def test_a_folder_without_two_images_that_can_be_read_is_refused(tmp_path):
    """An image larger than memory is refused before it is decoded."""
    (tmp_path / "images").mkdir()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "b.png")
    with pytest.raises(UserError, match="2 or more images"):
        load(tmp_path / "images")
    assert not list((tmp_path / "kept").glob("*.npz"))


def test_images_of_an_archive_give_features_and_its_statistics_stay(tmp_path, monkeypatch):
    """ADM's reference files hold 10,000 images, and mu and sigma of the whole data set."""
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "both.npz", arr_0=images, mu=MU, sigma=SIGMA)
    seen = load(tmp_path / "both.npz").seen
    assert np.array_equal(seen.statistics.mean_F, MU) and seen.features_NF.shape == (20, F)
    np.testing.assert_allclose(seen.features_NF[:, :3], images.mean((1, 2)), rtol=1e-6)
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    alone = load(tmp_path / "images.npz").seen
    np.testing.assert_allclose(alone.statistics.mean_F[:3], images.reshape(20, -1, 3).mean((0, 1)), rtol=1e-6)
    source, opened = NpzImages(tmp_path / "images.npz", "0"), []
    monkeypatch.setattr(source, "_opened", lambda: opened.append(1) or NpzImages._opened(source))
    assert all(np.array_equal(source.read(number), image) for number, image in enumerate(images))
    assert np.array_equal(source.read(3), images[3]) and len(opened) == 2, "in order, the archive is read once"
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    assert np.array_equal(load(folder).seen.features_NF, alone.features_NF)


@pytest.mark.parametrize(
    "images",
    [
        npy(np.zeros((3, 4, 4, 2), np.uint8)),
        npy(np.zeros((3, 4, 4, 3), np.float32)),
        npy(np.zeros((3, 4), np.uint8)),
        npy(np.zeros((0, 4, 4, 3), np.uint8)),
        npy(np.asfortranarray(np.zeros((3, 4, 4, 3), np.uint8))),
        claiming("(1000000000, 256, 256, 3)", "|u1"),
        claiming("(9223372036854775807, 256, 256, 3)", "|u1"),
        npy(np.zeros((3, 4, 4, 3), np.uint8))[:-1],
        b"",
    ],
)
def test_images_of_an_archive_that_are_none_are_refused(tmp_path, images):
    with pytest.raises(UserError, match=r"evaluation\.reference: .*r\.npz"):
        load(archive(tmp_path / "r.npz", arr_0=images))
