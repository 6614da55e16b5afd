"""Sampling and evaluation of a real small run, through the program that a user calls."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from re import fullmatch

import numpy as np
import pytest
from PIL import Image

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config
from fitscale.prepare.digits import write_digits
from fitscale.run.layout import RunDir
from fitscale.run.progress import progress
from tests.conftest import ROOT
from tests.distributed.spawn import main_here, run_ranks, train_here
from tests.tiny import tiny_config

# Of a network that recognises digits; 40 images are too few for fd_infinity.
METRICS = ["validation_loss", "fd", "sfid", "kid", "precision", "recall", "density", "coverage"]
METRICS += ["inception_score", "recognised"]


def told_by(*arguments: object) -> str:
    """In a spawned process: what `main_here` prints."""
    with redirect_stdout(io.StringIO()) as out:
        main_here(*arguments)
    return out.getvalue()


def exit_code_of(*arguments: object) -> int:
    """In a spawned process, which no launcher ends: the program's exit code."""
    from fitscale.cli import main
    from fitscale.config import program as main_module

    main_module.GRACE_S = 0.0
    return main([str(argument) for argument in arguments])


def error_of(capfd, *arguments: object) -> str:
    """In this process: the error line of a call that must end with exit code 2."""
    from fitscale.cli import main

    assert main([str(argument) for argument in arguments]) == 2
    return capfd.readouterr().err


SAVE = "import sys, torch; from tools.train_digits_classifier import *; torch.manual_seed(0); "
SAVE += "save(DigitsNet().eval(), Path(sys.argv[1]))"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Of the demo's kind, untrained; the README's test trains one."""
    path = tmp_path_factory.mktemp("classifier") / "net.pt"
    subprocess.run([sys.executable, "-c", SAVE, path], check=True, cwd=ROOT)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_shards, classifier):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    overrides = ("run.steps=30", "evaluation.points=2", "evaluation.first_step=10", "optim.lr=3e-3")
    overrides += (f"evaluation.features={classifier}", f"evaluation.reference={digits_shards}")
    overrides += ("evaluation.samples=40", "sampling.steps=4", "evaluation.validation_images=64")
    overrides += ("model.rope.original_length=4",)  # so that RoPE is stretched where it is asked for
    run_ranks(train_here, 1, tiny_config(folder, digits_shards, *overrides))
    return RunDir(folder)


def test_the_same_classifier_has_the_same_bytes(classifier, tmp_path):
    """Its hash is in the key of every result: a second training must not make results incomparable."""
    subprocess.run([sys.executable, "-c", SAVE, tmp_path / "again.pt"], check=True, cwd=ROOT)
    assert (tmp_path / "again.pt").read_bytes() == classifier.read_bytes()


def test_evaluate_measures_once_and_says_under_what_circumstances(run):
    run_ranks(main_here, 1, "evaluate", run.path)
    rows = read_jsonl(run.evaluations)
    assert [(row["step"], row["metric"]) for row in rows] == [(step, metric) for step in (10, 30) for metric in METRICS]
    assert {path.name for path in run.samples.glob("evaluated_*/*")} == {"step-00000010.png", "step-00000030.png"}
    assert not list(run.evaluation_folder.iterdir()), "chunks are cleared away when they have been folded"
    validation = [row["value"] for row in rows if row["metric"] == "validation_loss"]
    assert validation[1] < validation[0]
    assert all(row["key"]["guidance"] == 1.0 for row in rows if row["metric"] == "fd")
    assert rows[1]["key"]["reference"] and rows[1]["nfe"] == 4 and rows[1]["standard_error"] > 0
    assert rows[-1]["train_flops"] == run.checkpoints()[-1].meta["train_flops"] > 0
    before = run.evaluations.read_bytes()
    (told,) = run_ranks(told_by, 1, "evaluate", run.path)
    assert run.evaluations.read_bytes() == before
    assert "--force measures it again" in told
    run_ranks(main_here, 1, "evaluate", run.path, "--step", 30, "--guidance", 2)
    added = read_jsonl(run.evaluations)[len(rows) :]
    assert [row["metric"] for row in added] == METRICS[1:]
    assert {row["key"]["guidance"] for row in added} == {2.0}


def test_what_its_own_config_asks_for_finishes_a_run_and_nothing_else(run):
    config = load_config([str(run.config)])
    run.evaluations.rename(run.path / "before.jsonl")
    try:
        run_ranks(main_here, 1, "evaluate", run.path, "--samples", 8)
        run_ranks(main_here, 1, "evaluate", run.path, "--step", 30, "--weights", "raw")
        assert progress(config, run).pending == [10, 30]
        run_ranks(main_here, 1, "evaluate", run.path, "--step", 10)
        assert progress(config, run).pending == [30]
        run_ranks(main_here, 1, "evaluate", run.path, "--step", 30)
        assert progress(config, run).finished
    finally:
        (run.path / "before.jsonl").rename(run.evaluations)


def test_validation_loss_is_reproduced_to_the_bit(run):
    values = [
        row["value"]
        for _ in range(2)
        for row in run_ranks(evaluate_again, 1, run.path)[0]
        if row["metric"] == "validation_loss"
    ]
    assert values[0] == values[1]


def evaluate_again(path):
    main_here("evaluate", path, "--step", 10, "--force", "--samples", 8)
    return read_jsonl(RunDir(path).evaluations)[-len(METRICS) :]


def test_sample_writes_images_a_sheet_and_an_npz(run, tmp_path):
    out = tmp_path / "out"
    sample = ("sample", run.path, "--height", 9, "--width", 6, "--count", 5, "--classes", "3,4", "--out", out)
    run_ranks(main_here, 1, *sample, "--rope", "ntk-aware", "--decouple", "--guidance", 1.5, "--power", 2)
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["000000_class3.png", "000001_class4.png"] and "contact_sheet.png" in names
    with np.load(out / "samples.npz") as arrays:
        images = arrays["arr_0"]
    assert images.shape == (5, 9, 6, 3) and images.dtype == np.uint8
    with Image.open(out / "000000_class3.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), images[0])
    settings = json.loads((out / "samples.json").read_text())
    assert settings["nfe"] == [4] * 5 and settings["network_evaluations"] == [8] * 5
    assert settings["model"]["rope"]["method"] == "ntk-aware" and settings["sampling"]["guidance"]["power"] == 2


def test_a_second_sample_replaces_the_first_whole(run, tmp_path):
    out = tmp_path / "out"
    sample = ("sample", run.path, "--height", 7, "--width", 5, "--out", out)
    run_ranks(main_here, 1, *sample, "--count", 4)
    run_ranks(main_here, 1, *sample, "--count", 2, "--seed", 1)
    assert sorted(path.name for path in out.glob("0*.png")) == ["000000_class0.png", "000001_class1.png"]
    assert json.loads((out / "samples.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left


def test_a_folder_of_samples_has_a_name_that_reads(run):
    sample = ("sample", run.path, "--height", 7, "--width", 5, "--count", 1)
    run_ranks(main_here, 1, *sample, "--method", "dopri5", "--guidance", 1.5, "--power", 2, "--classes", "3")
    (folder,) = run.samples.glob("step-*")
    assert folder.name == "step-00000030_ema_0.9_7x5_dopri5-4-points_guidance-1.5_power-2_seed-0_classes-3"
    more = ("--interval", 0.2, 0.8, "--guide", run.path, "--guide-step", 10, "--guide-weights", "raw")
    more += ("--shift-base-tokens", 16, "--method", "sde", "--last-step", "euler")
    run_ranks(main_here, 1, *sample, "--guidance", 1.5, *more)
    (other,) = set(run.samples.glob("step-*")) - {folder}
    name = "step-00000030_ema_0.9_7x5_sde-4-steps-euler-shift-16_guidance-1.5_interval-0.2-0.8_guide-[0-9a-f]{8}_seed-0"
    assert fullmatch(name, other.name)
    assert json.loads((other / "samples.json").read_text())["network_evaluations"] == [6]  # twice at two of four times


def test_nothing_to_measure_is_said_with_what_would_change_it(run, tmp_path, capfd):
    from fitscale.cli import main

    copy = RunDir(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    text = copy.config.read_text()
    off = {"holdout_fraction: 0.1": "holdout_fraction: 0.0"}
    off[f"features: {load_config([str(run.config)]).evaluation.features}"] = "features: null"
    for old, new in off.items():
        assert old in text
        text = text.replace(old, new)
    copy.config.write_text(text)
    assert main(["evaluate", str(copy.path)]) == 0
    told = capfd.readouterr().out
    assert told.startswith("nothing to measure: ") and told.count("\n") == 1
    assert all(part in told for part in ("--features", "--reference", "data.holdout_fraction = 0"))


def test_rope_of_generated_images_is_part_of_their_key_alone(run):
    run_ranks(main_here, 1, "evaluate", run.path, "--step", 30, "--rope", "yarn", "--decouple", "--samples", 8)
    fd = [row for row in read_jsonl(run.evaluations) if row["metric"] == "fd"][-1]
    assert (fd["key"]["rope"], fd["key"]["samples"]) == ("yarn decoupled", 8)
    run_ranks(main_here, 1, "evaluate", run.path, "--step", 30, "--samples", 8)
    plain = [row for row in read_jsonl(run.evaluations) if row["metric"] == "fd"][-1]
    assert plain["key"]["rope"] != fd["key"]["rope"] and plain["value"] != fd["value"]
    losses = [row for row in read_jsonl(run.evaluations) if row["metric"] == "validation_loss"]
    assert all("rope" not in row["key"] and len(row["key"]["data"]) == 16 for row in losses)


def test_the_shards_that_decide_labels_and_sizes_are_part_of_the_key(run, digits_shards, tmp_path):
    copy, other = RunDir(tmp_path / "run"), tmp_path / "shards"
    shutil.copytree(run.path, copy.path)
    copy.evaluations.unlink(missing_ok=True)
    write_digits(other, (1.0,), 256)
    text = copy.config.read_text()
    for shards in (digits_shards, other):
        copy.config.write_text(text.replace(f"shards: {digits_shards}", f"shards: {shards}"))
        run_ranks(main_here, 1, "evaluate", copy.path, "--step", 30, "--samples", 8)
    first, second = [row["key"] for row in read_jsonl(copy.evaluations) if row["metric"] == "fd"]
    assert first["reference"] == second["reference"] and len(first["data"]) == 16
    assert {name for name in first if first[name] != second[name]} == {"data"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", 11), "no complete checkpoint of step 11; it has 10, 30"),
        (("--weights", "ema_0.5"), "it has ema_0.9, raw"),
        (("--classes", "10"), "classes are 0 to 9"),
        (("--decouple",), "goes with --rope"),
        (("--method", "ddpm"), "cannot sample"),
        (("--spacing", "leading"), "goes with ddpm and ddim, not with euler"),
        (("--count", 0), "--count"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_one_message(run, tmp_path, capfd, arguments, message):
    out = tmp_path / "out"
    text = error_of(capfd, "sample", run.path, "--height", 8, "--width", 8, "--out", out, *arguments)
    assert message in text and text.startswith("error: ") and text.count("\n") == 1
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(run, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    text = error_of(capfd, "sample", run.path, "--height", 8, "--width", 8, "--out", tmp_path)
    assert "no folder of samples" in text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("below", ["notes.txt", "notes.txt/out", "a" * 300, "b" * 300 + "/out"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_drawn(run, tmp_path, capfd, below):
    (tmp_path / "notes.txt").write_text("mine")
    text = error_of(capfd, "sample", run.path, "--height", 8, "--width", 8, "--out", tmp_path / below)
    assert "error: --out: " in text and text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_evaluation_that_cannot_be_made_is_one_message(run, tmp_path, capfd):
    assert "--samples: 0 is outside 2 to" in error_of(capfd, "evaluate", run.path, "--samples", 0)
    assert "not a run directory" in error_of(capfd, "evaluate", tmp_path)
    assert "no such file" in error_of(capfd, "evaluate", run.path, "--features", tmp_path / "no.pt", "--samples", 9)
    bad = tmp_path / "stats.npz"
    np.savez(bad, mu=np.zeros(3), sigma=np.eye(3))
    assert "statistics of (3,) and (3, 3)" in error_of(capfd, "evaluate", run.path, "--reference", bad, "--samples", 9)
