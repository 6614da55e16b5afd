"""The schema of the runs table."""

import pandas as pd
import pytest

from fitscale.config.errors import UserError
from fitscale.scaling.rows.table import key_columns, validate


def test_schema_is_checked():
    with pytest.raises(UserError, match="unknown columns fid"):
        validate(pd.DataFrame({"run": ["a"], "fid": [1.0]}))
    with pytest.raises(UserError, match="columns size, train_flops"):
        validate(pd.DataFrame({"run": ["a"], "metric": ["fd"], "value": [1.0]}))
    whole = {"run": ["a"], "size": ["s"], "train_flops": [1.0], "metric": ["fd"], "value": ["many"]}
    with pytest.raises(UserError, match=r"row 0, column value: 'many' is not a number .* \(the metric\)"):
        validate(pd.DataFrame(whole))
    assert key_columns(validate(pd.DataFrame({**whole, "value": [1], "key_b": ["x"], "key_a": [1]}))) == [
        "key_a",
        "key_b",
    ]
