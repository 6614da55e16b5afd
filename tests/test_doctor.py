"""`fitscale doctor`: every question gets its line, what is wrong gets told what to do, and nothing raises."""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fitscale import doctor
from fitscale.cli import main
from fitscale.config.load import load_config
from tests.tiny import tiny_config

THEN = Path(__file__).parent / "data" / "version_0_1"


@pytest.fixture
def shards(tmp_path) -> Path:
    """A copy of a small shard set."""
    return shutil.copytree(THEN / "shards", tmp_path / "shards")


@pytest.fixture
def answer(capsys):
    """What the doctor says to one question: (ok, its lines)."""

    def ask(title, question):
        report = doctor.Report()
        report.ask(title, question)
        text = capsys.readouterr().out
        assert text.startswith("not ok" if report.wrong else "ok  ") and report.asked == 1
        assert ("what to do: " in text) == bool(report.wrong) and "Traceback" not in text
        return not report.wrong, text

    return ask


def config_of(shards: Path, *overrides: str):
    """The config that goes with them, as tests/data has it."""
    run = shards.parent / "run"
    return load_config([str(THEN / "runs/fitv2/config.yaml"), f"data.shards={shards}", f"run.dir={run}", *overrides])


def program(folder: Path, name: str, text: str) -> None:
    """A program on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_all_that_can_be_wrong_is_said_and_nothing_is_left_behind(shards, tmp_path, capsys, monkeypatch):
    """Slurm is absent, a shard is cut short, the run directory cannot be, the reference is missing: all at once."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    (shards / "shard-000001.tar").write_bytes(b"cut short")
    (tmp_path / "file").touch()
    (tmp_path / "features.pt").touch()
    (tmp_path / "profile.yaml").write_text("partition: gpu\n")
    before = sorted(tmp_path.rglob("*"))
    overrides = [f"data.shards={shards}", f"run.dir={tmp_path}/file/run", "evaluation.points=2", "run.device=cpu"]
    overrides += [f"evaluation.features={tmp_path}/features.pt", f"evaluation.reference={tmp_path}/none.npz"]
    arguments = ["doctor", "--cluster", f"{tmp_path}/profile.yaml", str(THEN / "runs/fitv2/config.yaml"), *overrides]
    assert main(arguments) == 2
    told = capsys.readouterr()
    lines = told.out.splitlines()
    wrong = {line.split()[2]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("not ok")}
    assert set(wrong) == {"slurm", "run.dir", "shards", "evaluation"} and lines[-1].startswith("4 of ")
    assert all(what.strip().startswith("what to do: ") for what in wrong.values())
    assert "no sbatch on PATH" in told.out and "shard-000001.tar: the shard has 9 bytes" in told.out
    assert "none.npz: no such file" in told.out and "ok      ranks      gloo: two ranks" in told.out
    assert "Traceback" not in told.out + told.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_that_is_none_is_one_answer(answer):
    ok, text = answer("config", partial(doctor.read_config, ["model.dept=3"]))
    assert not ok and "model.dept=3" in text and "Did you mean" in text


@pytest.mark.parametrize(("partition", "well"), [("gpu", True), ("gup", False)])
def test_a_partition_is_looked_up(partition, well, tmp_path, answer, monkeypatch):
    for name, text in {"sbatch": "", "sinfo": "echo cpu; echo gpu"}.items():
        program(tmp_path / "bin", name, text)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "profile.yaml").write_text(f"partition: {partition}\n")
    ok, text = answer("slurm", partial(doctor.slurm, str(tmp_path / "profile.yaml")))
    assert ok == well and partition in text
    assert well or "it has: cpu, gpu" in text


def test_a_slurm_that_does_not_answer(tmp_path, answer, monkeypatch):
    for name in ("sbatch", "sinfo"):
        program(tmp_path / "bin", name, "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "profile.yaml").write_text("partition: gpu\n")
    ok, text = answer("slurm", partial(doctor.slurm, str(tmp_path / "profile.yaml")))
    assert not ok and "Unable to contact" in text


def test_packages_are_held_against_what_the_package_requires(tmp_path, answer, monkeypatch):
    """The metadata of another fitscale, found first."""
    assert answer("packages", doctor.packages)[0]
    (tmp_path / "fitscale-9.dist-info").mkdir()
    required = ["numpy<1", "torch>=2", "no-such-package>=1,<2", "nor-this; extra == 'dev'"]
    text = "".join(f"Requires-Dist: {one}\n" for one in required)
    (tmp_path / "fitscale-9.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: fitscale\nVersion: 9\n{text}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ok, text = answer("packages", doctor.packages)
    assert not ok and f"numpy {np.__version__} (needed: <1)" in text
    assert "no-such-package missing (needed: <2,>=1)" in text and "torch" not in text and "nor-this" not in text


def test_disk_counts_the_checkpoints_that_stay(shards, answer):
    config = config_of(
        shards, "run.steps=1000", "evaluation.points=3", "evaluation.first_step=10", "checkpoint.keep_last=2"
    )
    ok, text = answer("disk", partial(doctor.disk, config))
    assert ok and "needed for 6 checkpoints of" in text  # 10, 100, 1000; two to resume from, one in the making
    huge = [f"model.{key}" for key in ("depth=40", "hidden_size=2304", "num_heads=36")]
    many = config_of(shards, *huge, "run.steps=100000", "evaluation.points=1000", "evaluation.first_step=1")
    ok, text = answer("disk", partial(doctor.disk, many))
    assert not ok and "evaluation.points" in text


def test_a_cache_is_asked_for_where_shards_come_from_a_url(tmp_path, answer):
    local = tiny_config(tmp_path / "run", tmp_path)
    assert "not used" in answer("cache", partial(doctor.cache, local))[1]
    remote = ["data.shards=s3://bucket/set", f"data.cache_dir={tmp_path}/cache"]
    assert answer(
        "cache", partial(doctor.cache, tiny_config(tmp_path / "run", tmp_path, *remote, "data.cache_gb=1e-9"))
    )[0]
    ok, text = answer(
        "cache", partial(doctor.cache, tiny_config(tmp_path / "run", tmp_path, *remote, "data.cache_gb=1e9"))
    )
    assert not ok and "data.cache_gb" in text and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "images for training"),
        (["model.in_channels=4"], "model.in_channels"),
        (["model.num_classes=3"], "model.num_classes"),
        (["data.latent.kind=vae", "data.latent.factor=8", "data.latent.scaling=0.2"], "data.latent.kind"),
    ],
)
def test_shards_are_held_against_the_config(overrides, said, shards, answer):
    ok, text = answer("shards", partial(doctor.shards, config_of(shards, *overrides)))
    assert ok == (not overrides) and said in text


def test_an_image_that_cannot_be_read_is_found(shards, answer):
    tar = shards / "shard-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    ok, text = answer("shards", partial(doctor.shards, config_of(shards)))
    assert not ok and "truncated or corrupt" in text


def test_what_evaluation_compares_with_is_hashed(shards, tmp_path, answer):
    (tmp_path / "features.pt").write_bytes(b"network")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3))
    files = [f"evaluation.features={tmp_path}/features.pt", f"evaluation.reference={tmp_path}/reference.npz"]
    config = config_of(shards, *files, "evaluation.points=2")
    ok, text = answer("evaluation", partial(doctor.compared, config))
    assert not ok and "has no array sigma" in text
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    ok, text = answer("evaluation", partial(doctor.compared, config))
    assert ok and hashlib.sha256(b"network").hexdigest() in text and text.count("sha256") == 2
    only = config_of(shards, *files, "evaluation.points=2", f"evaluation.trusted=[{'f' * 64}]")
    ok, text = answer("evaluation", partial(doctor.compared, only))
    assert not ok and "evaluation.trusted does not name" in text
    (tmp_path / "reference.npz").write_bytes((tmp_path / "reference.npz").read_bytes()[:100])
    assert not answer("evaluation", partial(doctor.compared, config))[0]
    on_shards = config_of(shards, files[0], f"evaluation.reference={shards}", "evaluation.points=2")
    assert "40 images in shards" in answer("evaluation", partial(doctor.compared, on_shards))[1]


def test_a_gpu_that_is_asked_for_and_absent(answer, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA was initialised before its devices could be hidden")
    ok, text = answer("device", partial(doctor.device, "cuda"))
    assert not ok and "sees no CUDA device" in text
