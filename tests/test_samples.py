"""Samples along the curve: which checkpoint a folder belongs to, and what is drawn of it."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fitscale.config.errors import UserError
from fitscale.scaling.fit.question import Question
from fitscale.scaling.fit.study import study
from fitscale.scaling.report.files import write_report
from fitscale.scaling.report.samples import find_folders, mosaic, placed, read_folder, samples_along_the_curve
from fitscale.scaling.rows.runs import collect
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool
from tests.sample_folders import write_samples
from tests.synthetic_runs import write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, lambda flops, _: 50 * (flops / 1e12) ** -0.3, run_noise=0.02, point_noise=0.01)
    for size, step in (("l", 4000), ("xs", 4000), ("xs", 400)):
        write_samples(folder / f"{size}-seed0" / "samples" / f"at-{step}", folder / f"{size}-seed0", step)
    return folder


@pytest.fixture(scope="module")
def answer(sweep):
    return study(collect([sweep]), Question(laws=("power",), resamples=20))


def test_folders_are_placed_at_their_checkpoints_in_order_of_compute(sweep, answer):
    places = placed(answer, [read_folder(path) for path in find_folders([sweep])])
    assert [(place.row["run"], place.row["step"]) for place in places] == [
        ("xs-seed0", 400),
        ("xs-seed0", 4000),
        ("l-seed0", 4000),
    ]
    assert all(place.folder.step == place.row["step"] for place in places)
    assert all(place.folder.run.name == place.row["run"] for place in places)
    drawn = samples_along_the_curve(answer, places)
    assert drawn["png"].startswith(b"\x89PNG") and drawn["svg"].count(b"<image") == len(places)
    assert drawn == samples_along_the_curve(answer, places), "the same data must give the same bytes"


def test_the_number_over_images_is_of_images_made_alike(sweep, tmp_path):
    """Guidance 1.5 under a curve of guidance 1: its own number where it was measured, else none."""
    table = collect([sweep])
    guided = table[(table["metric"] == "fd") & (table["size"] == "l")].assign(key_guidance="1.50", value=7.25)
    resized = guided.assign(key_resolution="10x8", value=6.5)
    answer = study(validate(pd.concat([table, guided])), Question(laws=("power",), where={"key_guidance": "1"}))
    guided_l, guided_xs, plain = (
        read_folder(write_samples(tmp_path / name, sweep / f"{size}-seed0", 4000, guidance=guidance))
        for name, size, guidance in (("a", "l", 1.5), ("b", "xs", 1.5), ("c", "l", 1))
    )
    values = {
        place.folder.path.name: (place.value, place.on_curve) for place in placed(answer, [guided_l, guided_xs, plain])
    }
    on_curve = answer.rows[(answer.rows["run"] == "l-seed0") & (answer.rows["step"] == 4000)]["value"].iloc[0]
    assert values == {"a": (7.25, False), "b": (None, False), "c": (on_curve, True)}
    drawn = samples_along_the_curve(answer, placed(answer, [guided_l, guided_xs, plain]))["svg"].decode()
    assert "measured 7.25" in drawn and "not measured so" in drawn and f"measured {on_curve:.4g}" in drawn
    assert guided_l.made_as(resized.iloc[0]) and not guided_l.made_as(resized.assign(key_resolution="9x7").iloc[0])
    for part, other in {"sampler": "heun", "steps": "20", "weights": "raw", "rope": "yarn"}.items():
        row = guided.assign(**{f"key_{part}": other}).iloc[0]
        told = read_folder(write_samples(tmp_path / part, sweep / "l-seed0", 4000, **{part: "other"}))
        assert guided_l.made_as(row) and not told.made_as(row), "what a record does not say is not held against it"


@pytest.mark.parametrize("shape", [(10, 8), (120, 90, 3)])
def test_a_mosaic_shows_the_images_in_two_columns(tmp_path, shape):
    folder = read_folder(write_samples(tmp_path / "drawn", tmp_path / "run", 1, shape=shape))
    shown = mosaic(folder.images)
    height, width = (side // n for side, n in zip(shown.shape[:2], (3, 2), strict=True))
    centres = [
        shown[height // 2 + row * height, width // 2 + column * width] for row in range(3) for column in range(2)
    ]
    expected = [(255 * index // 5) / 255 for index in range(5)] + [1.0]
    np.testing.assert_allclose(centres, np.repeat(np.array(expected)[:, None], 3, axis=1), atol=1e-6)


def test_what_is_no_sample_folder_or_no_checkpoint_of_the_study_is_refused(sweep, answer, tmp_path):
    with pytest.raises(UserError, match="not a folder that `fitscale sample` wrote"):
        read_folder(tmp_path)
    other = read_folder(write_samples(tmp_path / "other", sweep / "l-seed0", 17))
    with pytest.raises(UserError, match="l-seed0 at step 17 is not among the rows"):
        placed(answer, [other])
    damaged = write_samples(tmp_path / "damaged", sweep / "l-seed0", 4000)
    (damaged / "000001_class1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"000001_class1\.png: not a readable PNG"):
        mosaic(read_folder(damaged).images)


def test_samples_in_run_directories_are_found_and_what_cannot_be_placed_is_named(sweep, tmp_path):
    arguments = ["fit_scaling", sweep, "--law", "power", "--resamples", "20", "--from-step", "1000", "-o", tmp_path]
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").is_file()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("not drawn: ")]
    assert "at-400:" in line


@pytest.mark.parametrize(
    "record",
    [
        *("[]", "{}", "[" * 100_000, '{"sampling": []}', '{"sampling": {"guidance": {"scale": NaN}}, "step": 1}', "\0"),
        '{"run": 5, "step": 1, "height": 8, "width": 8, "sampling": {"guidance": {"scale": 1}}}',
        '{"run": "a", "step": 1e999, "height": 8, "width": 8, "sampling": {"guidance": {"scale": 1}}}',
        '{"run": "a", "step": "x", "height": 8, "width": 8, "sampling": {"guidance": {"scale": 1}}}',
    ],
)
def test_a_record_of_samples_that_is_none_is_refused(tmp_path, record):
    folder = write_samples(tmp_path / "drawn", tmp_path / "run", 1)
    (folder / "samples.json").write_text(record)
    with pytest.raises(UserError, match="drawn: not a folder that `fitscale sample` wrote: ") as refused:
        read_folder(folder)
    assert len(str(refused.value)) < 1200


def test_images_that_differ_or_are_too_large_and_sheets_that_are_none_are_refused(sweep, answer, tmp_path):
    folder = write_samples(tmp_path / "drawn", sweep / "l-seed0", 4000)
    Image.fromarray(np.zeros((10, 9), dtype=np.uint8)).save(folder / "000003_class3.png")
    with pytest.raises(UserError, match=r"000003_class3\.png: not of the size of 000000_class0\.png"):
        mosaic(read_folder(folder).images)
    Image.fromarray(np.zeros((1, 5000), dtype=np.uint8)).save(folder / "000003_class3.png")
    with pytest.raises(UserError, match=r"000003_class3\.png: 5000 x 1 pixels; at most 4096 a side"):
        mosaic(read_folder(folder).images)
    other = write_samples(tmp_path / "other", sweep / "l-seed0", 4000)
    (other / "contact_sheet.png").write_text("<script>")
    with pytest.raises(UserError, match=r"contact_sheet\.png: not a PNG"):
        write_report(answer, tmp_path / "report", [read_folder(other)])
    assert not (tmp_path / "report").exists()
