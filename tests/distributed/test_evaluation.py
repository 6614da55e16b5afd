"""Evaluation by any number of ranks and starts: the same bytes of evaluations.jsonl, whoever is killed on the way."""

import io
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.run.chunks import chunk_progress
from fitscale.run.layout import RunDir
from fitscale.run.progress import progress
from tests.distributed.spawn import main_here, run_ranks, start_ranks, train_here
from tests.kills import die_after
from tests.test_evaluate import METRICS
from tests.tiny import tiny_config
from tests.waiting import wait_until

CHUNK_IMAGES = 48
Compute = Callable[[int], Mapping[str, np.ndarray]]
ARGUMENTS = ("--step", 4, "--samples", 200)


class Eye(torch.nn.Module):
    """A feature network of a few sums, so that no test need train one; with spatial features and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.linspace(-1, 1, 50).reshape(5, 10))

    def forward(self, images: Tensor, return_features: bool = False, return_spatial: bool = False):
        pixels = images[:, 0].float() / 255.0
        rows, cols = pixels.mean(2), pixels.mean(1)
        sums = [pixels.mean(dim=[1, 2]), pixels.std(dim=[1, 2]), rows.std(1), cols.std(1), rows[:, 0]]
        features = torch.stack(sums, 1)
        spatial = torch.stack([rows[:, 0], rows[:, -1], cols[:, 0]], 1)
        return features, spatial, torch.softmax(4.0 * features @ self.mix, 1)


@pytest.fixture(scope="module")
def eye(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("eye") / "net.pt"
    torch.jit.script(Eye()).save(str(path))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_shards, eye) -> RunDir:
    folder = tmp_path_factory.mktemp("trained") / "run"
    overrides = (
        "run.steps=4",
        "model.hidden_size=48",
        "evaluation.points=1",
        "evaluation.first_step=4",
        "sampling.steps=2",
    )
    overrides += (f"evaluation.features={eye}", f"evaluation.reference={digits_shards}")
    run_ranks(train_here, 1, tiny_config(folder, digits_shards, *overrides, "evaluation.validation_images=150"))
    return RunDir(folder)


def evaluate(path: Path, *arguments: object) -> None:
    """In a spawned process: with small chunks."""
    from fitscale.eval import requests, validation

    requests.chunk_ranges.__defaults__ = (CHUNK_IMAGES,)
    validation.CHUNK_IMAGES = 50
    main_here("evaluate", path, *ARGUMENTS, *arguments)


def evaluate_and_die(path: Path, calls: list[int]) -> None:
    """In a spawned process: end so many function calls into the first chunk that this rank works at."""
    die_in_a_chunk(lambda: die_after(calls[int(os.environ["RANK"])]))
    evaluate(path)


def die_in_a_chunk(begin: Callable[[], None]) -> None:
    """In a spawned process: call `begin` when it has claimed a chunk that is not finished."""
    from fitscale.run.chunks import ChunkFolder

    finish = ChunkFolder._finish

    def watched(folder: ChunkFolder, number: int, compute: Compute) -> bool:
        return finish(folder, number, lambda claimed: (begin(), compute(claimed))[1])

    ChunkFolder._finish = watched  # type: ignore[assignment,method-assign]


def evaluate_and_die_first(path: Path) -> None:
    """In a spawned process: rank 0 ends in its first chunk; rank 1 begins when that is claimed."""
    from fitscale.run.chunks import ChunkFolder

    if os.environ["RANK"] == "0":
        die_in_a_chunk(lambda: os.kill(os.getpid(), signal.SIGKILL))
    else:
        work = ChunkFolder.work

        def second(folder: ChunkFolder, *arguments: Any) -> None:
            wait_until(lambda: (path / "claimed").exists() or any(folder.path.glob("*.claim")), "rank 0 to claim")
            (path / "claimed").touch()
            work(folder, *arguments)

        ChunkFolder.work = second  # type: ignore[method-assign]
    evaluate(path)


@pytest.fixture(scope="module")
def expected(trained, tmp_path_factory) -> bytes:
    copy = RunDir(tmp_path_factory.mktemp("expected") / "run")
    shutil.copytree(trained.path, copy.path)
    run_ranks(evaluate, 1, copy.path)
    assert [row["metric"] for row in read_jsonl(copy.evaluations)] == [*METRICS[:2], "fd_infinity", *METRICS[2:]]
    return copy.evaluations.read_bytes()


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_are_the_same_bytes_for_any_number_of_ranks(trained, expected, tmp_path, ranks):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    run_ranks(evaluate, ranks, copy.path)
    assert copy.evaluations.read_bytes() == expected
    assert not list(copy.evaluation_folder.iterdir())


def test_rows_are_the_same_bytes_after_kills_of_random_ranks(trained, expected, tmp_path):
    """Every start ends with its ranks killed, each somewhere in its first chunk; what is finished by then stays."""
    copy, chance = RunDir(tmp_path / "run"), random.Random(5)
    shutil.copytree(trained.path, copy.path)
    for _ in range(3):
        processes = start_ranks(evaluate_and_die, 2, copy.path, [chance.randrange(3_000) for _ in range(2)])
        for process in processes:
            process.join()
        assert -signal.SIGKILL in [process.exitcode for process in processes]
    assert not copy.evaluations.exists() or copy.evaluations.read_bytes() != expected
    run_ranks(evaluate, 2, copy.path)
    assert copy.evaluations.read_bytes() == expected
    assert not list(copy.evaluation_folder.iterdir())


def test_a_rank_that_dies_leaves_its_chunks_to_the_others(trained, expected, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    first, second = start_ranks(evaluate_and_die_first, 2, copy.path)
    for process in (first, second):
        process.join()
    assert first.exitcode == -signal.SIGKILL and second.exitcode == 0
    assert copy.evaluations.read_bytes() == expected


def test_two_launches_at_once_add_the_rows_once(trained, expected, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    launches = [start_ranks(evaluate, 1, copy.path) for _ in range(2)]
    for (process,) in launches:
        process.join()
        assert process.exitcode == 0
    assert copy.evaluations.read_bytes() == expected


def test_a_truncated_chunk_is_named_and_made_again(trained, expected, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    (told,) = run_ranks(evaluate_with_a_truncated_chunk, 1, copy.path)
    assert "chunk-000002.npz: damaged" in told and copy.evaluations.read_bytes() == expected


def evaluate_with_a_truncated_chunk(path: Path) -> str:
    from fitscale.eval import ranks

    work, cut = ranks.ChunkFolder.work, []

    def truncating(folder: ranks.ChunkFolder, *arguments: object) -> None:
        work(folder, *arguments)  # type: ignore[arg-type]
        if folder.count == 5 and not cut:
            cut.append(folder.file(2))
            cut[0].write_bytes(cut[0].read_bytes()[:1000])

    ranks.ChunkFolder.work = truncating  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()) as out:
        evaluate(path)
    return out.getvalue()


def test_networks_by_name_see_the_same_images(trained, eye, expected, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    run_ranks(evaluate, 1, copy.path, "--features", f"one={eye}", "--features", f"two={eye}")
    rows = {row["metric"]: row["value"] for row in read_jsonl(copy.evaluations)}
    (copy.path / "alone.jsonl").write_bytes(expected)
    for row in read_jsonl(copy.path / "alone.jsonl")[1:]:
        assert rows[f"{row['metric']}/one"] == rows[f"{row['metric']}/two"] == row["value"]
    text = copy.config.read_text()
    assert f"features: {eye}" in text
    copy.config.write_text(text.replace(f"features: {eye}", f"features: {{one: {eye}, two: {eye}}}"))
    config = load_config([str(copy.config), "evaluation.samples=200", "evaluation.validation_images=150"])
    assert config.evaluation.networks == {"one": str(eye), "two": str(eye)}
    assert progress(config, copy).pending == []
    assert progress(load_config([str(copy.config)]), copy).pending == [4], "other numbers of images"


def test_tensor_parallel_ranks_draw_the_same_images_to_rounding(trained, expected, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    run_ranks(evaluate, 2, copy.path, "--tensor-parallel-size", 2)
    found = {row["metric"]: row["value"] for row in read_jsonl(copy.evaluations)}
    alone = copy.path / "alone.jsonl"
    alone.write_bytes(expected)
    for row in read_jsonl(alone):
        assert found[row["metric"]] == pytest.approx(row["value"], rel=0.02), row["metric"]
    assert found["validation_loss"] == pytest.approx(read_jsonl(alone)[0]["value"], rel=1e-5)


def test_samples_are_the_same_for_any_number_of_ranks(trained, tmp_path):
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        run_ranks(sample, ranks, trained.path, out)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(files) == 103 and sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def sample(path: Path, out: Path, *arguments: object) -> None:
    from fitscale.eval import requests

    requests.chunk_ranges.__defaults__ = (CHUNK_IMAGES,)
    main_here("sample", path, "--height", 6, "--width", 4, "--count", 100, "--out", out, *arguments)


def sample_in_a_group(path: Path, out: Path) -> int:
    from fitscale.parallel.layers import tp_size

    sample(path, out, "--tensor-parallel-size", 2)
    return tp_size()


def sample_and_die(path: Path, out: Path) -> None:
    """In a spawned process: of class 3, until the second chunk."""
    numbers = iter(range(2))
    die_in_a_chunk(lambda: next(numbers) and os.kill(os.getpid(), signal.SIGKILL))
    sample(path, out, "--classes", 3)


def test_what_a_killed_sample_has_drawn_is_of_use_to_the_same_alone(trained, tmp_path):
    (process,) = start_ranks(sample_and_die, 1, trained.path, tmp_path / "out")
    process.join()
    (chunks,) = tmp_path.iterdir()
    assert process.exitcode == -signal.SIGKILL and chunks.name.startswith(".out.chunks-")
    for out in ("out", "fresh"):
        run_ranks(sample, 1, trained.path, tmp_path / out, "--classes", 5)
    assert chunks.exists(), "it waits for the command that began it"
    files = sorted((tmp_path / "fresh").glob("*.png"))
    assert len(files) == 101
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    run_ranks(sample, 1, trained.path, tmp_path / "out", "--classes", 3)
    assert not chunks.exists() and len(list((tmp_path / "out").glob("*_class3.png"))) == 100


def test_tensor_parallel_ranks_sample_as_one(trained, tmp_path):
    run_ranks(sample, 1, trained.path, tmp_path / "one")
    assert run_ranks(sample_in_a_group, 2, trained.path, tmp_path / "two") == [2, 2], "ranks that hold one model"
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1


def test_a_disk_that_is_full_when_chunks_are_put_together_is_told(trained, expected, tmp_path):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    (told,) = run_ranks(evaluate_on_a_full_disk, 1, copy.path)
    assert told.splitlines()[-1].endswith("cannot be written (No space left on device)")
    work, _ = chunk_progress(copy.evaluation_folder), run_ranks(evaluate, 1, copy.path)
    assert [(one.what, one.done, one.count) for one in work] == [("samples", 5, 5)], "nothing is lost"
    assert copy.evaluations.read_bytes() == expected


def evaluate_on_a_full_disk(path: Path) -> str:
    """In a spawned process: the file in which what was said is put together takes nothing."""
    from fitscale.cli import main
    from fitscale.eval import requests, samples, validation

    requests.chunk_ranges.__defaults__ = (CHUNK_IMAGES,)
    validation.CHUNK_IMAGES = 50
    samples.TemporaryFile = lambda dir: open("/dev/full", "wb")  # noqa: SIM115
    with redirect_stderr(io.StringIO()) as told:
        assert main(["evaluate", str(path), *map(str, ARGUMENTS)]) == 2
    return told.getvalue()


def test_a_checkpoint_that_is_being_evaluated_is_not_deleted(trained, tmp_path):
    from fitscale.run.chunks import ChunkFolder
    from fitscale.train.checkpoint import prune_checkpoints

    copy = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, copy.path)
    shutil.copytree(copy.checkpoint_path(4), copy.checkpoint_path(9))
    (only,) = {checkpoint.path.name for checkpoint in copy.checkpoints()} - {"step-00000009"}
    work = ChunkFolder(copy.evaluation_folder / "one", 3)
    work.open({"step": 4, "what": "samples"})
    prune_checkpoints(copy, 1, set())
    assert (copy.checkpoint_folder / only).exists() and len(chunk_progress(copy.evaluation_folder)) == 1
    work.clear()
    prune_checkpoints(copy, 1, set())
    assert not (copy.checkpoint_folder / only).exists()
