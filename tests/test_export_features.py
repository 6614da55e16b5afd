"""Feature networks from weight files, against the libraries that the weights belong to. All weights here are random."""

import importlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fitscale.eval.features import FeatureNet
from tests.programs import run_tool
from tools.export_features import Dinov2

IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def smooth(height, width):
    """An image like a photograph, (H, W, 3): what is enlarged and made smaller again loses little."""
    coarse = noise(1, 3, 6, 6).float()
    return functional.interpolate(coarse, (height, width), mode="bilinear")[0].movedim(0, -1).byte().numpy()


def library(name):
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside a torch of another build is a RuntimeError
        pytest.skip(f"the extra `features` is not installed, or does not fit this torch: {error}")


def inception_with(state):
    """pytorch-fid's builder with other weights than those it would fetch; None = as they are drawn."""
    from torchvision.models import Inception3

    inception = library("pytorch_fid.inception")
    with patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        if state is not None:
            return inception.InceptionV3([3])
        with patch.object(Inception3, "load_state_dict"):
            return inception.fid_inception_v3()


def test_inception_is_that_of_pytorch_fid(tmp_path):
    library("pytorch_fid.inception")
    torch.manual_seed(0)
    drawn = inception_with(None).eval()
    for module in drawn.modules():  # so that no layer fades out
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        drawn.train()(torch.rand(2, 3, 299, 299) * 2 - 1)
    drawn.eval()
    torch.save(drawn.state_dict(), tmp_path / "weights.pth")
    done = run_tool("export_features", "inception", tmp_path / "weights.pth", tmp_path / "inception.pt")
    assert done.returncode == 0, done.stderr
    net = FeatureNet(tmp_path / "inception.pt")
    assert (net.num_features, net.num_spatial, net.num_scores) == (2048, 7 * 17 * 17, 1008)

    images = noise(2, 3, 20, 30)
    first_branch = []
    drawn.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: first_branch.append(output))
    with torch.no_grad():
        features = inception_with(drawn.state_dict()).eval()(images / 255)[0].flatten(1)
        scaled = functional.interpolate(images / 255, (299, 299), mode="bilinear")
        logits = drawn(2 * scaled - 1) - drawn.fc.bias
    said = net.look(images)
    spread = features.std().item()
    assert spread > 1e-3
    torch.testing.assert_close(said["features"], features, rtol=1e-4, atol=1e-4 * spread)
    torch.testing.assert_close(said["scores"], logits.softmax(1), rtol=1e-4, atol=1e-7)
    spatial = first_branch[0][:, :7].movedim(1, -1).reshape(2, -1)
    torch.testing.assert_close(said["spatial"], spatial, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small DINOv2 of transformers, and the network exported from its folder."""
    transformers = library("transformers")
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    about = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2, "image_size": 40}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**about, initializer_range=0.5)).eval()
    model.save_pretrained(folder)
    done = run_tool("export_features", "dinov2", folder, folder / "dinov2.pt")
    assert done.returncode == 0, done.stderr
    return model, FeatureNet(folder / "dinov2.pt")


def class_token(model, images_NHW3):
    mean, std = IMAGENET
    with torch.no_grad():
        return model(((torch.from_numpy(images_NHW3) / 255 - mean) / std).movedim(-1, 1)).pooler_output


def test_dinov2_is_that_of_transformers(dinov2):
    """Images of the network's own size; its positions, learned for another, are interpolated as transformers does."""
    model, net = dinov2
    images = noise(3, 32, 32, 3)
    assert (net.num_features, net.num_spatial, net.num_scores) == (16, 0, 0)
    torch.testing.assert_close(net.look(images.movedim(-1, 1))["features"], class_token(model, images.numpy()))


@pytest.mark.parametrize("size", [(50, 71), (20, 16)])
def test_dinov2_scales_images_as_pillow_does(size):
    """But for its rounding between two passes: no level is off by more than 1, where other bicubics are by 7."""
    image = smooth(*size)
    mean, std = IMAGENET
    pixels = Dinov2(torch.nn.Identity(), 32)(torch.from_numpy(image).movedim(-1, 0)[None], return_features=True)
    levels = (pixels[0].movedim(0, -1) * std + mean) * 255
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)).astype(np.float32)
    assert np.abs(levels.numpy() - expected).max() < 1.01


@pytest.mark.parametrize("network", ["inception", "dinov2"])
def test_what_is_no_weights_is_told_in_a_line(tmp_path, network):
    library({"inception": "pytorch_fid.inception", "dinov2": "transformers"}[network])
    (tmp_path / "text.pth").write_text("hello")
    done = run_tool("export_features", network, tmp_path / "text.pth", tmp_path / "out.pt")
    assert done.returncode == 2 and "text.pth" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.pt").exists()


def test_a_folder_that_is_not_there_is_no_name_to_look_up(tmp_path):
    done = run_tool("export_features", "dinov2", tmp_path / "dinov2-large", tmp_path / "out.pt")
    assert done.returncode == 2 and "dinov2-large: no such folder; `hf download " in done.stderr
    assert "huggingface.co" not in done.stderr and len(done.stderr.splitlines()) == 1
