"""fitscale.api: a run or a file, and an image, in a few lines of Python."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fitscale import api
from fitscale.config.errors import UserError
from tests.distributed.spawn import run_ranks
from tests.programs import run_tool

THEN = Path(__file__).parent / "data" / "version_0_1"


@pytest.fixture(scope="module", params=["fitv2", "fit"])
def run(request, tmp_path_factory) -> Path:
    """A finished run that an earlier version made."""
    return shutil.copytree(THEN, tmp_path_factory.mktemp("api") / "then") / "runs" / request.param


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def sample(run: Path, *arguments: object) -> None:
    from fitscale.cli import main

    os.chdir(run.parent.parent)
    assert main(["sample", str(run), *map(str, arguments)]) == 0


def test_the_five_lines_of_the_readme(run, tmp_path):
    model = api.load(run)
    images = model.draw([3, 5], height=8, width=4, guidance=1.5, steps=4)
    images[0].save(tmp_path / "three.png")
    assert images[0].size == (4, 8) and len(images) == 2
    out = ("--out", tmp_path / "out", "--steps", 4, "--guidance", 1.5)
    run_ranks(sample, 1, run, "--height", 8, "--width", 4, "--count", 2, "--classes", "3,5", *out)
    with Image.open(tmp_path / "out" / "000000_class3.png") as drawn:
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(images[0]).astype(int)).max() <= 1


def test_an_exported_file_says_what_it_is(run, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run_tool("convert_checkpoint", run, out, "--weights", "raw").returncode == 0
    asked = ([3], 8, 4)
    expected = pixels(api.load(run, weights="raw").draw(*asked, steps=4))
    assert np.array_equal(pixels(api.load(out).draw(*asked, steps=4)), expected)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(out), bare)
    with pytest.raises(UserError, match="weights of another model"):
        api.load(bare)
    assert np.array_equal(pixels(api.load(bare, str(run / "config.yaml")).draw(*asked, steps=4)), expected)


def test_mistakes_are_one_message(run, tmp_path):
    model = api.load(run)
    for message, asked, options in (
        (r"labels: 9 is not one of 0 to 6, or 7 for no class", ([9], 8, 4), {}),
        (r"--height: 7 is not a multiple of 2", ([1], 7, 4), {}),
        (r"sampling.method: nothing is not one of|sampling.method: 'nothing'", ([1], 8, 4), {"method": "nothing"}),
    ):
        with pytest.raises(UserError, match=message):
            model.draw(*asked, **options)
    with pytest.raises(UserError, match="not a run directory"):
        api.load(tmp_path / "nowhere")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"broken.safetensors: cannot be read as safetensors weights"):
        api.load(tmp_path / "broken.safetensors")
    tensors = load_file(next((run / "checkpoints").glob("*/weights/raw/*")))
    for text, message in (
        ("{", "x: model: not JSON"),
        ("[" * 100_000, "x: model: not JSON"),
        ("[]", "x: model: must hold a JSON object"),
        ('{"dpth": 1}', "dpth"),
    ):
        save_file(tensors, tmp_path / "x", {"model": text})
        with pytest.raises(UserError, match=message):
            api.load(tmp_path / "x")
