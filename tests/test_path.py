"""Draws belong to the image: they depend on (seed, step, slot) alone; the path runs from noise at 0 to data at 1."""

import numpy as np
import torch
from scipy import stats

from fitscale.flow import path

TRAIN = {"times": "logit_normal", "label_drop": 0.1}


def test_draws_do_not_depend_on_the_pack():
    whole = path.draws(3, 7, [5, 2, -1, 9], [4, 6, 2, 3], 8, **TRAIN)
    alone = path.draws(3, 7, [2], [6], 8, **TRAIN)
    assert torch.equal(whole.noise_TC[4:10], alone.noise_TC)
    assert whole.t_S[1] == alone.t_S[0]
    assert whole.drop_S[1] == alone.drop_S[0]


def test_padding_draws_zeros():
    drawn = path.draws(0, 0, [-1, 0], [3, 2], 4, **TRAIN)
    assert drawn.t_S[0] == 0
    assert not drawn.drop_S[0]
    assert torch.count_nonzero(drawn.noise_TC[:3]) == 0
    assert torch.count_nonzero(drawn.noise_TC[3:]) == 8


def test_every_key_changes_the_draws():
    def noise(seed, step, slot, stream):
        return path.image_generator(seed, step, slot, stream).standard_normal(4)

    train, other = path.TRAIN, path.SAMPLER_NOISE
    keys = [(0, 0, 0, train), (1, 0, 0, train), (0, 1, 0, train), (0, 0, 1, train), (0, 0, 0, other)]
    drawn = np.array([noise(*key) for key in keys])
    assert len(np.unique(drawn)) == drawn.size


def test_a_longer_image_keeps_the_time_and_the_first_noise():
    short = path.draws(0, 0, [1], [2], 4, **TRAIN)
    long = path.draws(0, 0, [1], [5], 4, **TRAIN)
    assert short.t_S[0] == long.t_S[0]
    assert torch.equal(short.noise_TC, long.noise_TC[:2])


def test_times_and_drops_have_their_distributions():
    slots, lengths = list(range(4000)), [1] * 4000
    logit = path.draws(0, 0, slots, lengths, 1, **TRAIN)
    uniform = path.draws(0, 0, slots, lengths, 1, times="uniform", label_drop=0.0)
    assert stats.kstest(torch.logit(logit.t_S.double()).numpy(), "norm").pvalue > 0.01
    assert stats.kstest(uniform.t_S.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(logit.noise_TC.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(logit.drop_S.float().mean() - 0.1) < 0.02
    assert not uniform.drop_S.any()


def test_path_ends_and_velocity():
    data, noise = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(path.interpolate(data, noise, torch.zeros(3, 1)), noise)
    assert torch.equal(path.interpolate(data, noise, torch.ones(3, 1)), data)
    slope = path.interpolate(data, noise, torch.full((3, 1), 0.75)) - path.interpolate(
        data, noise, torch.full((3, 1), 0.25)
    )
    torch.testing.assert_close(slope * 2, path.velocity(data, noise))
