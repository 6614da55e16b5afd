"""Generation: image i depends on (seed, i) alone; requests that cannot be met are refused; files are what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.config.load import load_config
from fitscale.config.schema import ParallelConfig
from fitscale.config.schema_sampling import SamplingConfig
from fitscale.data.encoding import patches
from fitscale.data.pictures import write_contact_sheet
from fitscale.eval import generate as generation
from fitscale.eval.commands import parse_classes
from fitscale.eval.draw import Networks
from fitscale.eval.folder import SHEET_IMAGES, Generated, write_samples
from fitscale.eval.generate import Images, Seen, generate
from fitscale.eval.requests import Request, chunk_ranges
from fitscale.model.build import build_network
from fitscale.parallel.groups import init_parallel
from tests.photographs import tiny_vae
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


def keep(images: Images) -> dict[str, np.ndarray]:
    """Everything, and in what company the image was decoded."""
    pixels = images.pixels_NCHW.movedim(1, -1).numpy()
    return {"image": pixels, "index": np.array([request.index for request in images.requests])}


def draw(model, config, requests: list[Request], seed: int) -> list[Seen]:
    return generate(Networks(model), config, requests, seed, keep)


REQUESTS = [Request(i, i % 10, 3 + i % 4, 4 + i % 3) for i in range(9)]


@pytest.mark.parametrize("method", ["euler", "dopri5", "sde"])
def test_an_image_depends_on_its_index_alone(model, config, method):
    config = replace(config, sampling=SamplingConfig(method=method, steps=4))
    seen = draw(model, config, REQUESTS, 3)
    assert [int(one.kept["index"]) for one in seen] == list(range(9)), "in the order of the requests"
    together = [one.kept["image"] for one in seen]
    assert all(len(np.unique(image)) > 5 for image in together)
    for request in (REQUESTS[7], REQUESTS[2]):
        (alone,) = draw(model, config, [request], 3)
        assert alone.kept["image"].shape == (request.rows, request.cols, 1)
        difference = np.abs(alone.kept["image"].astype(int) - together[request.index].astype(int))
        assert difference.max() <= 1  # rounding at the edge of a grey level
    (other,) = draw(model, config, [REQUESTS[7]], 4)
    assert np.abs(other.kept["image"].astype(int) - together[7].astype(int)).max() > 1


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_fit_v1_is_sampled_by_its_own_methods(method):
    settings = ("model.family=fit", "flow.kind=ddpm", f"sampling.method={method}", "sampling.steps=10")
    config = load_config([*OVERRIDES, *settings, "sampling.guidance.scale=2"])
    made = draw(random_model(config), config, REQUESTS[:3], 0)
    assert [(one.nfe, one.network_evaluations) for one in made] == [(10, 20)] * 3
    assert [one.kept["image"].shape for one in made] == [(r.rows, r.cols, 1) for r in REQUESTS[:3]]
    assert all(len(np.unique(one.kept["image"])) > 1 for one in made)  # untrained: most pixels end at black or white


def test_evaluations_of_the_function_and_of_the_network_are_told_apart(model, config):
    plain = replace(config, sampling=SamplingConfig(method="heun", steps=3))
    (made,) = draw(model, plain, REQUESTS[:1], 0)
    assert (made.nfe, made.network_evaluations) == (6, 6)
    guided = load_config([*OVERRIDES, "sampling.guidance.scale=2", "sampling.method=heun", "sampling.steps=3"])
    (made,) = draw(model, guided, REQUESTS[:1], 0)
    assert (made.nfe, made.network_evaluations) == (6, 12)


def test_images_of_one_size_are_decoded_together_and_the_rest_at_the_end(model, config, monkeypatch):
    """The batches follow from the requests alone: one size after the other, full ones as they come about."""
    monkeypatch.setattr(generation, "BATCH_IMAGES", 3)
    batches: list[list[int]] = []

    def look(images: Images) -> dict[str, np.ndarray]:
        batches.append([request.index for request in images.requests])
        return keep(images)

    requests = [Request(i, 0, 3, 4 if i % 3 else 5) for i in range(11)]
    seen = generate(Networks(model), replace(config, sampling=SamplingConfig(steps=1)), requests, 0, look)
    assert batches == [[1, 2, 4], [5, 7, 8], [0, 3, 6], [10], [9]]
    assert [int(one.kept["index"]) for one in seen] == list(range(11))


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_latents_are_decoded_in_batches_on_the_device(tmp_path, monkeypatch, device):
    """As one by one on the CPU, but for the rounding of a grey level, and never on their way through the host."""
    tiny_vae(tmp_path)
    latent = ("data.latent.kind=vae", "data.latent.factor=8", "data.latent.scaling=0.5", f"data.latent.vae={tmp_path}")
    config = load_config([*OVERRIDES, *latent, "model.in_channels=4", "sampling.steps=2"])
    model, requests = random_model(config), [Request(i, 0, 2, 3 if i % 2 else 2) for i in range(5)]
    seen_on = set()

    def look(images: Images) -> dict[str, np.ndarray]:
        seen_on.add(images.pixels_NCHW.device.type)
        return {"image": images.pixels_NCHW.cpu().numpy()}

    together = generate(Networks(model.to(device)), config, requests, 0, look)
    assert seen_on == {device} and together[1].kept["image"].shape == (3, 16, 24)
    monkeypatch.setattr(generation, "BATCH_IMAGES", 1)
    alone = generate(Networks(model.to("cpu")), config, requests, 0, look)
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.kept["image"].astype(int) - other.kept["image"].astype(int)).max() <= 1


def test_what_goes_wrong_with_an_image_is_raised(model, config):
    def look(images: Images) -> dict[str, np.ndarray]:
        raise UserError("evaluation.features: no")

    with pytest.raises(UserError, match=r"evaluation\.features: no"):
        generate(Networks(model), replace(config, sampling=SamplingConfig(steps=1)), REQUESTS, 0, look)


def test_requests_are_cut_into_chunks_of_one_content():
    assert chunk_ranges(1100) == [range(512), range(512, 1024), range(1024, 1100)]
    assert chunk_ranges(512) == [range(512)] and chunk_ranges(0) == []


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
