"""What the shards are, against what a config says: the default where it says nothing, refused where it differs."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fitscale.cli import main
from fitscale.config.errors import UserError, mistakes_in
from fitscale.config.load import load_config
from fitscale.data.batch_plan import open_plan
from fitscale.data.build_index import build_index
from fitscale.data.encoding import indices_of, load_run, require_latent
from fitscale.data.index import open_index
from fitscale.jobs.submission import look_at
from fitscale.jobs.sweep import SweepConfig, cells
from fitscale.parallel.groups import Topology
from fitscale.plan.preflight import open_data, require_encoding
from fitscale.run.claim import claim
from fitscale.train.start import start_table
from tests.shard_sets import LATENTS, PIXELS, indexed_set

VAE = "somebody/sd-vae-ft-ema"
TINY = [
    *("model.depth=2", "model.hidden_size=32", "model.num_heads=2"),
    *("batch.global_batch_size=8", "evaluation.points=0"),
]


def latents(folder: Path, images: int = 20, **recipe: object) -> Path:
    """Latents of a VAE at another scaling than the usual, of 7 classes."""
    folder.mkdir()
    indexed_set(folder, images, meta=replace(LATENTS, scaling=0.5, recipe={"encoder": VAE} | recipe))
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    return latents(tmp_path / "shards")


def config_of(shards: Path, *overrides: str):
    return load_run([*TINY, f"data.shards={shards}", *overrides])


def test_what_a_config_does_not_say_the_shards_do(shards, tmp_path, capsys):
    config = config_of(shards)
    assert (config.data.latent.kind, config.data.latent.scaling, config.data.latent.vae) == ("vae", 0.5, VAE)
    assert (config.model.num_classes, config.model.in_channels) == (7, 4)
    assert open_data(config).num_images == 20
    assert main(["config", *TINY, f"data.shards={shards}"]) == 0
    assert f"vae: {VAE}" in capsys.readouterr().out
    indexed_set(tmp_path / "pixels", 5, meta=PIXELS)
    config = config_of(tmp_path / "pixels")
    assert (config.data.latent.kind, config.data.latent.factor, config.model.in_channels) == ("pixels", 1, 3)
    assert load_run([*TINY, "data.shards=nowhere"]).model.num_classes == 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.latent.vae=somebody/sd-vae-ft-mse",
            "data.latent.vae: the config says somebody/sd-vae-ft-mse, the shards",
        ),
        ("model.num_classes=1000", "model.num_classes: 1000, but the shards in .* have labels of 7 classes"),
        ("model.num_classes=6", "model.num_classes: 6, but the shards"),
        ("data.latent.scaling=0.18215", "data.latent.scaling: the config says 0.18215, the shards in .* have 0.5"),
        ("model.in_channels=16", "model.in_channels: the config says 16"),
    ],
)
def test_what_a_config_says_otherwise_is_refused_by_every_start(shards, tmp_path, capsys, override, message):
    config = [*TINY, f"data.shards={shards}", f"run.dir={tmp_path / 'run'}", override]
    with pytest.raises(UserError, match=message):
        open_data(load_run(config))
    assert main(["train", *config]) == 2
    assert not (tmp_path / "run").exists() and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=f"cell a: {message}"):
        for cell in cells(SweepConfig("s", dir=str(tmp_path / "s"), cells={"a": config})):
            with mistakes_in("cell a"):
                look_at(cell, open_index)
    plan = open_plan(load_run(config[:-1]).data, seed=0, global_batch_size=8, patch_size=2)
    with pytest.raises(UserError, match=message):  # as an evaluation does
        require_encoding(load_run(config), plan)


def test_a_copy_of_the_vae_is_the_vae(tmp_path):
    """By its weights where they are at hand, else by the last part of its name."""
    folders = [tmp_path / "a" / "vae", tmp_path / "b" / "copied", tmp_path / "c" / "vae"]
    for folder, weights in zip(folders, (b"1", b"1", b"2"), strict=True):
        folder.mkdir(parents=True)
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    from fitscale.data.encoding import vae_hash

    index = open_index(latents(tmp_path / "shards", encoder=str(folders[0]), encoder_hash=vae_hash(str(folders[0]))))
    latent = load_config(["data.latent.scaling=0.5"]).data.latent
    require_latent(replace(latent, vae=str(folders[1])), index)
    require_latent(replace(latent, vae="hub/vae"), index)
    for other in (str(folders[2]), "hub/another"):
        with pytest.raises(UserError, match=r"data.latent.vae: "):
            require_latent(replace(latent, vae=other), index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "x/sd-vae-ft-mse"}, f"encoded by {VAE} in"),
        ({"scaling": 0.18215}, "scaling 0.5 in"),
        ({"factor": 4}, "factor 8 in"),
    ],
)
def test_sets_of_a_mixture_are_encoded_alike(shards, tmp_path, change, message):
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    content = json.loads((other / "dataset.json").read_text())
    content["recipe"] |= {"encoder": change.pop("encoder", f"/mirror/{Path(VAE).name}")}
    (other / "dataset.json").write_text(json.dumps(content | change))
    build_index(other)
    sets = [f"data.mixture.{name}.shards={folder}" for name, folder in (("a", shards), ("b", other))]
    with pytest.raises(UserError, match=f"data.mixture: {message}"):
        indices_of(load_config(sets).data)
    with pytest.raises(UserError, match=f"data.mixture: {message}"):
        load_run([*TINY, *sets])


def test_a_run_that_was_begun_goes_on_with_what_it_says(shards, tmp_path):
    own = ("model.num_classes=1000", "data.latent.scaling=0.5", f"data.shards={shards}")
    claim(load_config([*TINY, *own, f"run.dir={tmp_path / 'run'}"]))
    config = config_of(shards, f"run.dir={tmp_path / 'run'}")
    assert config.model.num_classes == 1000 and config.data.latent.vae is None
    claim(config)
    open_data(config)


def test_tokens_per_image_are_the_same_wherever_they_are_told(tmp_path, capsys):
    config = config_of(latents(tmp_path / "others", 31))
    assert main(["data", config.data.shards, "--out", str(tmp_path / "report")]) == 0
    mean = capsys.readouterr().out.split("mean ")[1].split(",")[0]
    alone = Topology(0, 1, 0, 1, 0, 1, torch.device("cpu"))
    table = start_table(config, alone, open_data(config), 0)
    assert f"{mean} tokens each on average" in table


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.num_workers=9223372036854775808", "data.num_workers"),
        ("data.num_workers=100000", "data.num_workers: 100000 is too large, the most is 1,000"),
        ("data.prefetch_steps=100000", "data.prefetch_steps"),
        ("data.mixture=[]", "data.mixture"),
        ("data.mixture=7", "data.mixture"),
        ("data.mixture={a: []}", "data.mixture"),
        ("data.mixture={a: {shards: x, weight: .nan}}", "data.mixture"),
        ("data.latent.scaling=.nan", "data.latent.scaling"),
        ("data.cache_gb=.inf", "data.cache_gb"),
    ],
)
def test_values_that_cannot_be_are_told_by_their_key(capsys, override, message):
    with pytest.raises(UserError, match=message):
        load_config([override])
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["config", override]) == 2
    assert capsys.readouterr().err.count("\n") == 1
