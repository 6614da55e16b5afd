"""Tokens and arrays are each other's exact inverse; decoding gives back the stored pixels."""

import logging.handlers

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitscale.config.errors import UserError
from fitscale.config.schema_data import LatentConfig
from fitscale.data.encode import Decoder, patchify, to_float, unpatchify

PIXELS = LatentConfig(kind="pixels", factor=1, scaling=1.0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Folder of a tiny AutoencoderKL with random weights, factor 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, sample_size=16, **blocks)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder, model.eval()


def test_channel_order_is_c_p1_p2_in_raster_order():
    image = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    tokens = patchify(image, 2)
    assert tokens.shape == (6, 8)
    for row in range(2):
        for col in range(3):
            patch = image[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert tokens[3 * row + col].tolist() == patch.reshape(-1).tolist()


@given(channels=st.integers(1, 4), rows=st.integers(1, 5), cols=st.integers(1, 5), patch=st.integers(1, 4))
def test_unpatchify_inverts_patchify_for_numpy_and_torch(channels, rows, cols, patch):
    image = np.random.default_rng(0).standard_normal((channels, rows * patch, cols * patch))
    np.testing.assert_array_equal(unpatchify(patchify(image, patch), rows, cols, patch), image)
    tokens = patchify(torch.from_numpy(image), patch)
    np.testing.assert_array_equal(tokens.numpy(), patchify(image, patch))
    assert torch.equal(unpatchify(tokens, rows, cols, patch), torch.from_numpy(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_all_pixel_levels_come_back(channels):
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(channels, axis=0)
    trained_on = to_float(stored)
    assert trained_on.dtype == np.float32 and (trained_on.min(), trained_on.max()) == (-1, 1)
    decoded = Decoder(PIXELS)(torch.from_numpy(trained_on))
    assert decoded.shape == (16, 16, channels) and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, stored.transpose(1, 2, 0))


def test_pixels_beyond_the_range_are_clipped_and_batches_decoded_whole():
    values = torch.tensor([-3.0, -1.004, 1.004, 9.0]).reshape(2, 1, 1, 2)
    np.testing.assert_array_equal(Decoder(PIXELS)(values)[..., 0], [[[0, 0]], [[255, 255]]])


def test_latents_stay_as_stored():
    stored = np.array([[[1.5, -7.0]]], np.float16)
    np.testing.assert_array_equal(to_float(stored), stored.astype(np.float32), strict=True)


def test_latents_are_unscaled_and_decoded_by_the_vae(vae):
    folder, model = vae
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    decoder = Decoder(LatentConfig(vae=str(folder), factor=2, scaling=0.5))
    with torch.no_grad():
        expected = model.decode(latents * 2).sample
    levels = ((expected + 1) * 127.5).round().clip(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    assert levels.shape == (2, 6, 10, 3)
    np.testing.assert_array_equal(decoder(latents), levels)
    np.testing.assert_allclose(
        decoder(latents[0]).astype(int), levels[0], atol=1
    )  # alone: convolutions may round apart


def test_a_missing_vae_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.latent.vae: needed to decode"):
        Decoder(LatentConfig())
    with pytest.raises(UserError, match=r"data.latent.vae: no AutoencoderKL at .*nowhere"):
        Decoder(LatentConfig(vae=str(tmp_path / "nowhere")))


def test_notices_of_diffusers_are_not_shown(vae):
    """Such as one of a package that is of no use here. They are records of its logger, which prints them."""
    from diffusers.utils import logging as diffusers_logging

    seen = logging.handlers.BufferingHandler(100)
    diffusers_logging.add_handler(seen)
    try:
        Decoder(LatentConfig(vae=str(vae[0])))
    finally:
        diffusers_logging.remove_handler(seen)
    assert [record.getMessage() for record in seen.buffer] == []


def test_weights_in_a_pickle_are_not_loaded(vae, tmp_path):
    """diffusers would take a .bin where there is no .safetensors: unpickling it could run code."""
    _, model = vae
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert [path.name for path in tmp_path.glob("*.bin")]
    with pytest.raises(UserError, match=r"data\.latent\.vae: .*must be \.safetensors"):
        Decoder(LatentConfig(vae=str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda data: data[:-20]),
        ("config.json", lambda data: b"[" * 100_000),
        ("config.json", lambda data: data.replace(b'"latent_channels": 4', b'"latent_channels": 5')),
        ("config.json", lambda data: data.replace(b'"latent_channels": 4', b'"latent_channels": "x"')),
        ("diffusion_pytorch_model.safetensors", lambda data: data[:1000]),
        ("diffusion_pytorch_model.safetensors", lambda data: b"\xff" * 8 + data[8:]),
        ("diffusion_pytorch_model.safetensors", lambda data: b""),
    ],
)
def test_a_damaged_vae_is_one_line(vae, tmp_path, file, damage):
    folder, _ = vae
    whole = (folder / file).read_bytes()
    assert damage(whole) != whole
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(damage(whole) if path.name == file else path.read_bytes())
    with pytest.raises(UserError, match=r"data\.latent\.vae: ") as caught:
        Decoder(LatentConfig(vae=str(tmp_path)))
    assert "\n" not in str(caught.value)
