"""Shards and run directories that earlier versions wrote are read, evaluated and gone on with as they were then."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.data.index import ShardReader, open_index
from fitscale.prepare.verify import verify
from fitscale.run.layout import RunDir
from fitscale.run.progress import progress
from tests.distributed.spawn import run_ranks
from tests.shard_sets import sample

VERSIONS = [Path(__file__).parent / "data" / "version_0_1"]
FAMILIES = ["fitv2", "fit"]


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def folder(request, tmp_path) -> Path:
    """A copy to write into."""
    return shutil.copytree(request.param, tmp_path / "then")


def call(folder: Path, *arguments: str) -> None:
    """In a spawned process, from within `folder`: the program's main."""
    from fitscale.cli import main

    os.chdir(folder)
    assert main(list(arguments)) == 0


def test_shards_are_read(folder):
    index = open_index(folder / "shards")
    assert verify(index).startswith("2 shards verified") and "an earlier version made it" in verify(index)
    reader, found = ShardReader(index), {}
    for image, row in enumerate(index.images):
        found[index.key(image)] = int(row["label"]), reader.read(image, int(row["first_variant"]))
    written = [sample(number) for number in range(40)]
    assert found.keys() == {one.key for one in written}
    for one in written:
        label, stored = found[one.key]
        assert label == one.label and np.array_equal(stored, one.variants[0].array_CHW)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_with_the_steps_it_would_have_taken(folder, family):
    run = RunDir(folder / "runs" / family)
    assert progress(load_config([str(run.config)]), run).finished
    run_ranks(call, 1, folder, "train", str(run.config), f"run.dir={run.path}", "run.steps=6")
    ours, theirs = read_jsonl(run.metrics), read_jsonl(run.path / "continued.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "images", "tokens", "train_flops"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-5), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_evaluated_and_sampled_under_its_own_keys(folder, family):
    run = RunDir(folder / "runs" / family)
    before = read_jsonl(run.evaluations)
    run_ranks(call, 1, folder, "evaluate", str(run.path))
    assert read_jsonl(run.evaluations) == before, "measured again under another key"
    run_ranks(call, 1, folder, "evaluate", str(run.path), "--force")
    again = read_jsonl(run.evaluations)[len(before) :]
    assert [row["key"] for row in again] == [row["key"] for row in before]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in before], rel=1e-4)
    size = ("--height", "8", "--width", "4", "--count", "2", "--steps", "3")
    run_ranks(call, 1, folder, "sample", str(run.path), *size, "--out", str(folder / "out"))
    assert json.loads((folder / "out" / "samples.json").read_text())["step"] == 4
