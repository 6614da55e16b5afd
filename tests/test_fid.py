"""FID-infinity, tuned guidance and the rule for the EMA, on rows of a runs table."""

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import sqrtm

from fitscale.config.errors import UserError
from fitscale.scaling.rows.fid import ema_rule, infinity, tuned_guidance
from fitscale.scaling.rows.refusals import Refusal
from fitscale.scaling.rows.selection import select
from fitscale.scaling.rows.table import validate
from tests.programs import run_tool


def rows(**columns):
    length = max(len(values) for values in columns.values())
    base = {"run": ["a"] * length, "size": ["s"] * length, "train_flops": [1e18] * length, "metric": ["fd"] * length}
    return validate(pd.DataFrame({**base, "step": [1000] * length, **columns}))


def frechet(first_ND, second_ND):
    difference = first_ND.mean(0) - second_ND.mean(0)
    one, two = (np.cov(sample.T) for sample in (first_ND, second_ND))
    return difference @ difference + np.trace(one + two - 2 * np.real(sqrtm(one @ two)))


def test_a_line_in_one_over_samples_is_extrapolated_exactly():
    counts = [5000, 10000, 50000]
    (row,) = infinity(rows(samples=counts, value=[4 + 9000 / n for n in counts], key_samples=counts)).itertuples()
    assert row.value == pytest.approx(4, abs=1e-9) and row.metric == "fd_infinity" and row.key_samples == "infinity"
    assert row.standard_error == pytest.approx(0, abs=1e-9)


def test_the_bias_of_few_samples_is_removed():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(20000, 24))
    counts = [200, 400, 800, 1600]
    values = [np.mean([frechet(rng.normal(0.3, 1, (n, 24)), reference) for _ in range(8)]) for n in counts]
    truth = 24 * 0.3**2
    (estimate,) = infinity(rows(samples=counts, value=values))["value"]
    assert values[0] > 1.2 * truth
    assert abs(estimate - truth) < abs(values[-1] - truth) / 2


def test_two_sample_counts_are_too_few():
    with pytest.raises(Refusal, match="no checkpoint is measured at 3 sample counts"):
        infinity(rows(samples=[5000, 10000], value=[5.0, 4.5]))


def test_tuned_guidance_is_the_least_and_shows_its_cost():
    table = rows(value=[20.0, 9.0, 11.0], samples=[50000] * 3, key_guidance=["1.0", "1.5", "2.0"])
    (row,) = tuned_guidance(table).itertuples()
    assert (row.value, row.samples, row.metric, row.key_guidance) == (9.0, 150000, "fd_tuned", "best of 3")
    with pytest.raises(Refusal, match="more than one guidance scale"):
        tuned_guidance(table.iloc[:1])
    assert len(select(pd.concat([table, tuned_guidance(table)]), "fd", {"key_guidance": "1"}).rows) == 1


def test_the_ema_of_a_constant_share_of_training():
    table = rows(
        step=[1000, 1000, 100000, 100000],
        weights=["ema_0.99", "ema_0.9999"] * 2,
        value=[4.0, 3.0, 2.0, 1.0],
        key_weights=["ema_0.99", "ema_0.9999"] * 2,
    )
    chosen = ema_rule(table, share=0.1)
    assert list(chosen["value"]) == [4.0, 1.0]
    assert set(chosen["key_weights"]) == {"ema 0.1 of training"}
    with pytest.raises(Refusal, match="ema_<decay>"):
        ema_rule(table.assign(weights="raw"), share=0.1)


def test_without_steps_checkpoints_are_told_apart_by_their_compute():
    """A table of others may hold no steps; mixed up, a run's checkpoints would make one line or one best guidance."""
    counts = [5000, 10000, 50000]
    runs = pd.concat(
        [
            rows(samples=counts, value=[floor + 9000 / n for n in counts], train_flops=[compute] * 3, step=[None] * 3)
            for floor, compute in ((4, 1e18), (3, 2e18))
        ]
    )
    assert infinity(runs)["value"].tolist() == pytest.approx([4, 3])
    scales = pd.concat([runs.iloc[[0, 3]].assign(key_guidance="1.0"), runs.iloc[[1, 4]].assign(key_guidance="2.0")])
    assert tuned_guidance(scales)["train_flops"].tolist() == [1e18, 2e18]


def test_derived_rows_from_the_shell(tmp_path):
    counts = [5000, 10000, 50000]
    table = rows(
        samples=[*counts, 50000],
        value=[*(4 + 9000 / n for n in counts), 2.0],
        key_samples=[*counts, 50000],
        key_guidance=["1.0"] * 3 + ["1.5"],
    )
    table.to_csv(tmp_path / "runs.csv", index=False)
    command = ["collect_runs", str(tmp_path / "runs.csv"), "--infinity", "fd", "--tuned", "fd"]
    done = run_tool(*command, "-o", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "out.csv").set_index("metric")["value"]
    assert found["fd_infinity"] == pytest.approx(4) and found["fd_tuned"] == 2.0 and len(found) == 6
    failed = run_tool(*command, "--ema-share", "0.1", "--check")
    assert failed.returncode == 2 and "ema_<decay>" in failed.stderr


def test_what_a_table_lacks_is_said():
    table = rows(value=[20.0, 9.0], weights=["ema_0.99", "ema_0.9999"], step=[None, None])
    with pytest.raises(UserError, match="column step is missing in 2 of 2 rows"):
        ema_rule(table, share=0.1)
    with pytest.raises(UserError, match="no column key_guidance"):
        tuned_guidance(table)
    for share in (-1.0, 0.0, np.nan, 2.0):
        with pytest.raises(UserError, match=r"--ema-share: .* above 0 and at most 1"):
            ema_rule(table, share)


def test_rows_without_a_value_are_no_measurements():
    scales = rows(value=[np.nan, np.nan, 9.0, 8.0], key_guidance=["1", "2"] * 2, step=[1, 1, 2, 2])
    (best,) = tuned_guidance(scales)["value"]
    assert best == 8.0
    counts = [5000, 10000, 50000, None, 20000]
    values = [*(4 + 9000 / n for n in counts[:3]), 5.0, np.nan]
    (row,) = infinity(rows(samples=counts, value=values, key_samples=counts)).itertuples()
    assert row.value == pytest.approx(4)


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_table_that_cannot_be_written_is_one_message(tmp_path, name):
    rows(value=[20.0, 9.0], step=[1, 2]).to_csv(tmp_path / "runs.csv", index=False)
    (tmp_path / name).mkdir()
    done = run_tool("collect_runs", tmp_path / "runs.csv", "-o", tmp_path / name)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / name}: cannot be written (Is a directory)\n")
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", name}
