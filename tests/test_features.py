"""Feature networks: any TorchScript file that follows the convention, images of any size, in any order."""

import hashlib

import numpy as np
import pytest
import torch

from fitscale.cli import main
from fitscale.config.errors import UserError
from fitscale.data.pictures import rgb
from fitscale.eval.features import FeatureNet


class Brightness(torch.nn.Module):
    """Features: mean of each channel, height, width. Scores: 4 numbers."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8
        means = images.float().mean((2, 3))
        if return_features:
            sides = torch.tensor([[float(images.shape[2]), float(images.shape[3])]]).expand(len(images), 2)
            return torch.cat([means, sides], 1)
        return torch.cat([means, means[:, :1]], 1)


class Places(torch.nn.Module):
    """Features: mean of each channel. Spatial: the four corners of the first. Scores: logits of 3 classes."""

    def forward(
        self, images: torch.Tensor, return_features: bool = False, return_spatial: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        means = images.float().mean((2, 3))
        if return_spatial:
            corners = images[:, 0, :: images.shape[2] - 1, :: images.shape[3] - 1]
            return means, corners.flatten(1).float(), means / 100
        return means if return_features else means / 100


class Probabilities(torch.nn.Module):
    """Two classes: brightness of two channels, in images 99 high they do not add up; a bias unless it is turned off."""

    def forward(
        self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        means = images.float().mean((2, 3)) + 1
        if return_features:
            return means
        share = means[:, :1] / (means[:, :1] + means[:, 1:2])
        shifted = share if no_output_bias else share * 0.5
        return torch.cat([shifted, (1 - shifted) * (0.5 if images.shape[2] == 99 else 1.0)], 1)


class Unclassified(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) if return_features else torch.zeros([images.shape[0], 0])


class OnlySpatial(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_spatial: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return images.float().mean((2, 3)), images.float().mean((2, 3))


class RunsAtLoading(torch.nn.Module):
    """What its file says runs while it is loaded, before anything is asked of it."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3))

    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 0, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        print("the network's own code")
        self.training = state[1]


class Answers(torch.nn.Module):
    """Answers with `rows` x 3 numbers, all `value`."""

    def __init__(self, rows: int, value: float) -> None:
        super().__init__()
        self.rows, self.value = rows, value

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.full((self.rows, 3), self.value)


class NoFeatures(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


@pytest.fixture
def file(tmp_path):
    torch.jit.script(Brightness()).save(tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_images_of_any_size_are_looked_at_on_their_own(file):
    net = FeatureNet(file)
    assert (net.num_features, net.num_spatial, net.num_scores) == (5, 0, 4)
    for height, width in [(4, 6), (8, 8), (5, 3)]:
        images = noise(3, height, width)
        expected = [[*image.float().mean((1, 2)), height, width] for image in images]
        torch.testing.assert_close(net.look(images)["features"], torch.tensor(expected))


def saved(tmp_path, net):
    torch.jit.script(net).save(tmp_path / "net.pt")
    return FeatureNet(tmp_path / "net.pt")


def noise(count=4, height=6, width=6):
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def test_spatial_features_come_with_the_rest(tmp_path):
    net, images = saved(tmp_path, Places()), noise()
    said = net.look(images)
    assert (net.num_features, net.num_spatial, net.num_scores) == (3, 4, 3)
    assert {answer.dtype for answer in said.values()} == {torch.float32}
    assert torch.equal(said["spatial"], images[:, 0, ::5, ::5].flatten(1).float())
    torch.testing.assert_close(said["features"], images.float().mean((2, 3)))
    torch.testing.assert_close(said["scores"], (said["features"] / 100).softmax(1))


def test_probabilities_stay_as_they_are_and_have_no_bias(tmp_path):
    images = noise()
    said = saved(tmp_path, Probabilities()).look(images)
    means = images.float().mean((2, 3)) + 1
    torch.testing.assert_close(said["scores"][:, 0], means[:, 0] / (means[:, 0] + means[:, 1]))


def test_scores_that_are_no_probabilities_any_more_are_refused(tmp_path):
    net = saved(tmp_path, Probabilities())
    with pytest.raises(UserError, match="class probabilities at first, and now"):
        net.look(noise(height=99))


def test_a_network_without_classes_has_no_scores(tmp_path):
    net = saved(tmp_path, Unclassified())
    assert net.num_scores == 0 and [*net.look(noise())] == ["features"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_says_the_same_on_a_gpu(tmp_path):
    torch.jit.save(torch.jit.freeze(torch.jit.script(Places().eval())), tmp_path / "net.pt")
    said = FeatureNet(tmp_path / "net.pt", "cuda").look(noise().cuda())
    expected = FeatureNet(tmp_path / "net.pt").look(noise())
    assert {answer.device.type for answer in said.values()} == {"cuda"}
    torch.testing.assert_close({what: answer.cpu() for what, answer in said.items()}, expected)


def test_an_answer_of_another_kind_is_told_with_the_name_of_the_network(tmp_path):
    torch.jit.script(OnlySpatial()).save(tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"evaluation\.features\.eye: .*return_spatial=True\) -> \(features, spatial"):
        FeatureNet(tmp_path / "net.pt", name="eye")


def test_grey_becomes_three_channels():
    assert rgb(np.full((4, 4, 1), 7)).tolist() == np.full((4, 4, 3), 7).tolist()
    assert rgb(np.zeros((2, 4, 4, 3))).shape == (2, 4, 4, 3)


def test_identity_is_the_hash_of_the_file(file):
    assert FeatureNet(file).identity == hashlib.sha256(file.read_bytes()).hexdigest()


def test_wrong_files_are_named(file, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        FeatureNet(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt is not a TorchScript file"):
        FeatureNet(tmp_path / "text.pt")
    torch.jit.script(NoFeatures()).save(tmp_path / "other.pt")
    with pytest.raises(UserError, match="return_features=True"):
        FeatureNet(tmp_path / "other.pt")


def test_a_network_is_a_program_whose_hash_is_told_before_it_runs(tmp_path, capfd):
    path = tmp_path / "net.pt"
    torch.jit.script(RunsAtLoading()).save(path)
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    capfd.readouterr()
    FeatureNet(path, trusted=["0" * 64, identity])
    told, ran = capfd.readouterr().out.splitlines()
    assert identity in told and ran == "the network's own code"


def test_a_network_that_is_not_trusted_never_runs(tmp_path, capfd):
    path = tmp_path / "net.pt"
    torch.jit.script(RunsAtLoading()).save(path)
    capfd.readouterr()
    with pytest.raises(UserError, match=f"evaluation.trusted does not name: its sha256 is {hash_of(path)}"):
        FeatureNet(path, trusted=["0" * 64])
    assert "own code" not in capfd.readouterr().out


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_damaged_network_is_named(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"net\.pt is not a TorchScript file"):
        FeatureNet(file)


@pytest.mark.parametrize(("rows", "value"), [(3, 0.0), (2, float("nan")), (2, float("inf"))])
def test_answers_that_are_no_features_are_refused(tmp_path, rows, value):
    torch.jit.script(Answers(rows, value)).save(tmp_path / "net.pt")
    with pytest.raises(UserError, match="one row of finite numbers an image"):
        FeatureNet(tmp_path / "net.pt")


def test_the_help_says_that_a_network_is_a_program(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "TorchScript feature network: a program, which runs" in " ".join(capsys.readouterr().out.split())
