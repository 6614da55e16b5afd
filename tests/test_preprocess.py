"""FiT's preprocessing: sizes by the rule, pixels kept where they can be, every kind of file read as a person would."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fitscale.prepare.preprocess import Rejected, area_limited, decode, pictures
from tests.photographs import broken_files, encoded, photograph, sixteen_bits


@settings(max_examples=300, deadline=None)
@given(st.integers(16, 6000), st.integers(16, 6000), st.sampled_from([256, 512]))
def test_area_is_limited_and_the_aspect_ratio_kept(height, width, side):
    new_height, new_width = area_limited(height, width, side)
    assert new_height * new_width <= side * side
    if height * width <= side * side:
        assert (new_height, new_width) == (height, width)
    else:
        assert (new_height + 1) * (new_width + 1) > side * side
        scale = (side * side / (height * width)) ** 0.5
        assert new_height == pytest.approx(height * scale, abs=1) and new_width == pytest.approx(width * scale, abs=1)


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [
        (375, 500, 256, [("resize", 208, 288), ("crop", 256, 256)]),  # 221.7 x 295.6 within the area
        (500, 375, 512, [("resize", 496, 368)]),  # fits: only cut to multiples of 16
        (200, 300, 256, [("resize", 192, 288)]),
        (256, 1000, 256, [("resize", 128, 496)]),  # one side does not exceed 256: no crop
        (257, 1000, 256, [("resize", 128, 496), ("crop", 256, 256)]),
        (256, 256, 256, [("resize", 256, 256)]),
        (16, 16, 256, [("resize", 16, 16)]),
    ],
)
def test_sizes_and_variants(height, width, side, expected):
    found = pictures(encoded(photograph(0, height, width), "BMP"), side)
    assert [(one.kind, *one.pixels_HW3.shape[:2]) for one in found if not one.flip] == expected
    assert all(one.pixels_HW3.shape[2] == 3 and one.pixels_HW3.dtype == np.uint8 for one in found)


def test_a_small_image_keeps_its_pixels():
    image = photograph(3, 57, 83)
    found, _ = pictures(encoded(image, "PNG"), 256)
    np.testing.assert_array_equal(found.pixels_HW3, np.asarray(image)[4:52, 1:81])


def test_large_images_are_resized_with_lanczos():
    image = photograph(4, 600, 800)
    resize, _, crop, _ = pictures(encoded(image, "PNG"), 256)
    lanczos = np.asarray(image.resize((295, 221), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize.pixels_HW3, lanczos[6:214, 3:291])
    covering = np.asarray(image.resize((341, 256), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(crop.pixels_HW3, covering[:, 42:298])


def test_flips_are_variants_of_their_own():
    found = pictures(encoded(photograph(5, 300, 400), "PNG"), 256)
    assert [(one.kind, one.flip) for one in found] == [
        *(("resize", False), ("resize", True), ("crop", False), ("crop", True))
    ]
    np.testing.assert_array_equal(found[1].pixels_HW3, found[0].pixels_HW3[:, ::-1])
    np.testing.assert_array_equal(found[3].pixels_HW3, found[2].pixels_HW3[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.asarray(Image.effect_noise((48, 32), 60).convert("RGB"))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's Transpose that stores it so
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, "PNG", exif=exif))), upright)


def test_colour_modes_become_rgb():
    image = photograph(6, 40, 40)
    grey = np.asarray(image.convert("L"))[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image.convert("L"), "PNG"))), grey)
    np.testing.assert_array_equal(np.asarray(decode(encoded(sixteen_bits(image), "PNG"))), grey)
    np.testing.assert_array_equal(np.asarray(decode(encoded(sixteen_bits(image), "TIFF"))), grey)
    cmyk = np.asarray(decode(encoded(image.convert("CMYK"), "JPEG", quality=100))).astype(int)
    assert np.abs(cmyk - np.asarray(image)).mean() < 4
    assert set(np.unique(np.asarray(decode(encoded(image.convert("1"), "PNG"))))) <= {0, 255}


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert (np.asarray(decode(encoded(clear, "PNG"))) == 255).all()
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    assert np.asarray(decode(encoded(half, "PNG")))[0, 0].tolist() == [255, 127, 127]
    palette = Image.new("P", (32, 32))
    palette.putpalette([0, 0, 255])
    assert np.asarray(decode(encoded(palette, "PNG", transparency=0)))[0, 0].tolist() == [255, 255, 255]


def test_of_an_animation_the_first_frame():
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_rejected_with_a_reason(name):
    with pytest.raises(Rejected) as caught:
        pictures(broken_files()[name], 256)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_reasons_say_what_is_wrong():
    files = broken_files()
    expected = {
        "empty.jpg": "the file is empty",
        "bomb.png": "too large: more than 268,435,456 pixels",
        "tiny.png": "too narrow: 8 x 8 pixels",
        "floats.tif": "floating-point pixels",
        "half.jpg": "damaged: OSError: image file is truncated",
        "text.jpg": "not an image",
    }
    for name, reason in expected.items():
        with pytest.raises(Rejected, match=reason):
            pictures(files[name], 256)


def test_odd_metadata_does_not_reject_an_image():
    data = encoded(photograph(7, 32, 32), "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 40)
    assert decode(data).size == (32, 32)
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif() is not None
