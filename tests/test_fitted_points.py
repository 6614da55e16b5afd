"""Which rows a law of compute speaks of."""

import pandas as pd

from fitscale.scaling.rows.fitted_points import chosen


def test_frontier_last_and_all():
    data = pd.DataFrame(
        {"run": list("aaabbb"), "train_flops": [1, 2, 3, 2, 3, 4], "value": [9.0, 8.0, 7.9, 8.5, 7.0, 7.0]}
    )
    data = data.assign(size=data["run"]).sample(frac=1, random_state=3)
    frontier = data[chosen(data, "frontier")].sort_values("train_flops")
    assert list(zip(frontier["run"], frontier["value"], strict=True)) == [("a", 9.0), ("a", 8.0), ("b", 7.0)]
    assert sorted(data.loc[chosen(data, "last"), "train_flops"]) == [3, 4]
    assert chosen(data, "all").all()


def test_replicates_stand_or_fall_together_on_the_frontier():
    data = pd.DataFrame(
        {
            "run": ["s0", "s1", "s0", "s1", "b0", "b1", "c"],
            "size": ["s", "s", "s", "s", "b", "b", "b"],
            "lr": [1e-4] * 6 + [2e-4],
            "train_flops": [100.0, 100.2, 200.0, 200.4, 200.1, 199.9, 200.6],
            "value": [9.0, 11.0, 7.0, 7.5, 6.0, 18.0, 7.2],
        }
    )
    assert list(chosen(data, "frontier")) == [True, True, True, True, False, False, True]
    assert list(chosen(data.iloc[:6].drop(columns="lr"), "frontier")) == [True, True, True, True, False, False]
    shuffled = data.sample(frac=1, random_state=1)
    assert list(chosen(shuffled, "frontier").sort_index()) == list(chosen(data, "frontier"))
