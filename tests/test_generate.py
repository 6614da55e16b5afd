"""Generation: image i depends on (seed, i) alone; requests that cannot be met are refused; files are what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import ParallelConfig, SamplingConfig
from fitscale.data.pictures import write_contact_sheet
from fitscale.eval.commands import parse_classes
from fitscale.eval.folder import SHEET_IMAGES, write_samples
from fitscale.eval.generate import Generated, Request, generate, patches
from fitscale.model.build import build_network
from fitscale.parallel.groups import init_parallel
from tests.tiny import OVERRIDES


@pytest.fixture(scope="module")
def config():
    return load_config(OVERRIDES)


@pytest.fixture(scope="module")
def model(config):
    return random_model(config)


def random_model(config):
    """A tiny network of random weights, so that every input shows in the output."""
    init_parallel(ParallelConfig(), "cpu")
    torch.manual_seed(0)
    model = build_network(config.model, ParallelConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
            )
        model.final_layer.linear.weight.mul_(0.3)  # so that the images keep to the grey levels between the ends
    return model.requires_grad_(False)


REQUESTS = [Request(i, i % 10, 3 + i % 4, 4 + i % 3) for i in range(9)]


@pytest.mark.parametrize("method", ["euler", "dopri5", "sde"])
def test_an_image_depends_on_its_index_alone(model, config, method):
    config = replace(config, sampling=SamplingConfig(method=method, steps=4))
    together = {made.index: made.image for made in generate(model, config, REQUESTS, seed=3)}
    assert sorted(together) == list(range(9))
    assert all(len(np.unique(image)) > 5 for image in together.values())
    for request in (REQUESTS[7], REQUESTS[2]):
        (alone,) = generate(model, config, [request], seed=3)
        assert alone.image.shape == (request.rows, request.cols, 1)
        difference = np.abs(alone.image.astype(int) - together[request.index].astype(int))
        assert difference.max() <= 1  # rounding at the edge of a grey level
    (other,) = generate(model, config, [REQUESTS[7]], seed=4)
    assert np.abs(other.image.astype(int) - together[7].astype(int)).max() > 1


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_fit_v1_is_sampled_by_its_own_methods(method):
    settings = ("model.family=fit", "flow.kind=ddpm", f"sampling.method={method}", "sampling.steps=10")
    config = load_config([*OVERRIDES, *settings, "sampling.guidance.scale=2"])
    made = list(generate(random_model(config), config, REQUESTS[:3], seed=0))
    assert [(image.nfe, image.network_evaluations) for image in made] == [(10, 20)] * 3
    assert [image.image.shape for image in made] == [(r.rows, r.cols, 1) for r in REQUESTS[:3]]
    assert all(len(np.unique(image.image)) > 1 for image in made)  # untrained: most pixels end at black or white


def test_evaluations_of_the_function_and_of_the_network_are_told_apart(model, config):
    plain = replace(config, sampling=SamplingConfig(method="heun", steps=3))
    (made,) = generate(model, plain, REQUESTS[:1], seed=0)
    assert (made.nfe, made.network_evaluations) == (6, 6)
    guided = load_config([*OVERRIDES, "sampling.guidance.scale=2", "sampling.method=heun", "sampling.steps=3"])
    (made,) = generate(model, guided, REQUESTS[:1], seed=0)
    assert (made.nfe, made.network_evaluations) == (6, 12)


def test_classes_and_sizes_are_checked(config):
    assert parse_classes("3,5-7", 10) == [3, 5, 6, 7]
    assert parse_classes("all", 3) == [0, 1, 2]
    for text, message in (
        ("10", "0 to 9"),
        ("cat", "neither"),
        ("5-3", "out of range"),
        ("²", "neither"),
        ("0-999999999", "range"),
    ):
        with pytest.raises(UserError, match=message):
            parse_classes(text, 10)
    latent = load_config(["model.name=b"])
    assert patches(latent, 256, 384) == (16, 24)
    with pytest.raises(UserError, match="nearest are 240 and 256"):
        patches(latent, 250, 256)
    with pytest.raises(UserError, match="more than 16777216 tokens"):
        patches(latent, 16 * 10**9, 16)


def test_a_contact_sheet_enlarges_small_images_without_smoothing(tmp_path):
    image = np.zeros((8, 5, 1), dtype=np.uint8)
    image[0, 0] = 255
    write_contact_sheet(tmp_path / "sheet.png", [image] * 6, list("012345"), "six")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert pixels.shape[0] > 96 and {0, 255} <= set(np.unique(pixels))
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["sheet.png"]'  # no temporary left


def test_a_large_number_of_samples_streams_to_the_npz_and_shows_the_first(tmp_path):
    number = SHEET_IMAGES + 30
    drawn = (Generated(i, np.full((2, 3, 1), i, dtype=np.uint8), 4, 8) for i in range(number))
    nfe = write_samples(tmp_path / "out", drawn, [i % 10 for i in range(number)], {"seed": 0}, "many")
    assert nfe == [4] * number
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        assert np.array_equal(
            arrays["arr_0"], np.arange(number, dtype=np.uint8)[:, None, None, None] * np.ones((2, 3, 3), np.uint8)
        )
    assert len(list((tmp_path / "out").glob("0*.png"))) == number
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["network_evaluations"] == [8] * number


def test_a_failed_sample_leaves_nothing(tmp_path):
    def drawn():
        yield Generated(0, np.zeros((2, 3, 1), dtype=np.uint8), 1, 1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_samples(tmp_path / "out", drawn(), [0, 1], {}, "none")
    assert list(tmp_path.iterdir()) == []
