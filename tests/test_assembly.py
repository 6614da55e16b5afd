"""Whose parts make a tensor whole, and who writes it; whole checkpoints are compared in tests/distributed."""

import pytest

from fitscale.train.assembly import Part, covering


def test_partitions_are_taken_in_order():
    kept = [Part(1, 0, 6, 4), Part(0, 0, 0, 6), Part(2, 1, 0, 10)]
    assert covering(kept, 0, 10, number=3) == [Part(0, 0, 0, 6), Part(1, 0, 6, 4)]
    assert covering(kept, 1, 10, number=3) == [Part(2, 1, 0, 10)]


def test_of_replicas_the_parameters_number_chooses():
    kept = [Part(rank, 0, 0, 5) for rank in range(3)]
    assert [covering(kept, 0, 5, number)[0].rank for number in range(4)] == [0, 1, 2, 0]


def test_a_tensor_that_nobody_keeps_whole_is_no_tensor():
    with pytest.raises(AssertionError, match="element 6 of 10"):
        covering([Part(0, 0, 0, 6), Part(1, 0, 7, 3)], 0, 10, number=0)
