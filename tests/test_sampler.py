"""Samplers on data N(mean, spread^2), where the velocity and the answer are known in closed form."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy import stats
from torchdiffeq import odeint

from fitscale.config.errors import UserError
from fitscale.config.schema_sampling import SamplingConfig
from fitscale.flow.path import INITIAL_NOISE, image_noise
from fitscale.flow.sampler import ImageNoise, ddpm_timesteps, sample, shifted
from tests.dormand_prince import integrate
from tests.packs import of_tokens, pack_of

MEAN, SPREAD = 0.4, 0.3


def gaussian_velocity(x, t, spread=SPREAD):
    """Velocity of the straight path to N(MEAN, spread^2): E[data - noise | x_t]."""
    variance = t**2 * spread**2 + (1 - t) ** 2
    return MEAN + (t * spread**2 - (1 - t)) / variance * (x - t * MEAN)


def run(method, steps, *, seed=0, indices=(0,), lengths=(64,), model_fn=gaussian_velocity, **settings):
    noise = image_noise(seed, 0, indices, lengths, 4, stream=INITIAL_NOISE)
    pack = pack_of(indices, lengths)
    return noise, sample(of_tokens(model_fn), noise, SamplingConfig(method, steps, **settings), pack, seed)


def exact(noise):
    return MEAN + SPREAD * noise


@pytest.mark.parametrize("base", [None, 16])
@pytest.mark.parametrize(("method", "order", "evaluations"), [("euler", 1, 1), ("heun", 2, 2), ("ab2", 2, 1)])
def test_order_of_accuracy(method, order, evaluations, base):
    errors = []
    for steps in (40, 80):
        noise, sampled = run(method, steps, shift_base_tokens=base)
        assert sampled.nfe == [evaluations * steps]
        errors.append((sampled.x_TC - exact(noise)).abs().max().item())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_dopri5_follows_its_tolerances():
    noise, coarse = run("dopri5", 2, rtol=1e-3, atol=1e-6)
    _, fine = run("dopri5", 2, rtol=1e-6, atol=1e-7)
    assert (coarse.x_TC - exact(noise)).abs().max() < 2e-2
    assert (fine.x_TC - exact(noise)).abs().max() < 1e-4
    assert coarse.nfe < fine.nfe


@pytest.mark.parametrize(
    ("spread", "rtol", "refused"), [(0.3, 1e-3, 0), (0.3, 1e-5, 1), (0.1, 1e-3, 3), (0.1, 1e-5, 6), (0.05, 1e-5, 7)]
)
def test_dopri5_takes_and_refuses_the_steps_of_its_method(spread, rtol, refused):
    """In float64, where no decision is close enough to 1 for rounding to turn it."""
    velocity = partial(gaussian_velocity, spread=spread)
    noise = image_noise(0, 0, (0,), (64,), 4, stream=INITIAL_NOISE).double()
    sampling = SamplingConfig("dopri5", 2, rtol=rtol, atol=1e-6)
    ours = sample(of_tokens(velocity), noise, sampling, pack_of((0,), (64,)), 0)
    theirs = integrate(velocity, noise, rtol, 1e-6)
    assert sum(ratio > 1 for ratio in theirs.ratios) == refused
    assert min(abs(ratio - 1) for ratio in theirs.ratios) > 0.01
    assert ours.nfe == [2 + 6 * len(theirs.lengths)]
    torch.testing.assert_close(ours.x_TC, theirs.x_TC, atol=1e-9, rtol=0)


LENGTHS = (5, 64, 1, 17, 30)
SPREADS_S = torch.tensor([0.3, 0.02, 1.0, 0.1, 0.6], dtype=torch.float64)  # the smaller, the more steps


def of_different_difficulty(tried):
    """The velocity to a spread that the image's index decides; `tried` counts evaluations by pack."""

    def velocity(x_TC, t_S, pack):
        tried.append(pack.indices)
        spread_T1 = pack.spread(SPREADS_S[list(pack.indices)], x_TC)
        return gaussian_velocity(x_TC, pack.spread(t_S, x_TC), spread_T1)

    return velocity


def by_torchdiffeq(x_TC, spread, times, rtol, atol):
    """The sample of one image, and the number of evaluations."""
    calls = []
    velocity = lambda t, x: calls.append(t) or gaussian_velocity(x, t, spread)  # noqa: E731
    return odeint(velocity, x_TC, times, method="dopri5", rtol=rtol, atol=atol)[-1], len(calls)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-7, 1e-9), (0.0, 1e-2)])
@pytest.mark.parametrize("steps", [2, 20])
def test_dopri5_of_a_pack_is_torchdiffeqs_of_each_image(rtol, atol, steps):
    """To what one at a time gives, with as many evaluations: neither the pack nor the output points change a step."""
    noise = image_noise(0, 0, range(5), LENGTHS, 4, stream=INITIAL_NOISE).double()
    sampling, tried = SamplingConfig("dopri5", steps, rtol=rtol, atol=atol), []
    ours = sample(of_different_difficulty(tried), noise, sampling, pack_of(range(5), LENGTHS), 0)
    for index, (x, made) in enumerate(zip(noise.split(LENGTHS), ours.x_TC.split(LENGTHS), strict=True)):
        theirs, calls = by_torchdiffeq(x, SPREADS_S[index], torch.linspace(0.0, 1.0, steps), rtol, atol)
        torch.testing.assert_close(made, theirs, atol=1e-9, rtol=0)
        assert ours.nfe[index] == calls
    assert len(set(ours.nfe)) > 1 and len(tried) == max(ours.nfe)  # who has arrived is not carried along
    assert {len(indices) for indices in tried} == {5 - sum(nfe < n for nfe in ours.nfe) for n in set(ours.nfe)}


def test_dopri5_in_float32_does_not_feel_the_neighbours():
    """The solver's own arithmetic is the image's; what a network's matrix products round is another matter."""
    indices, noise = range(5), image_noise(0, 0, range(5), LENGTHS, 4, stream=INITIAL_NOISE)
    sampling = SamplingConfig("dopri5")
    together = sample(of_different_difficulty([]), noise, sampling, pack_of(indices, LENGTHS), 0)
    for index, (x, made) in enumerate(zip(noise.split(LENGTHS), together.x_TC.split(LENGTHS), strict=True)):
        alone = sample(of_different_difficulty([]), x, sampling, pack_of((index,), LENGTHS[index : index + 1]), 0)
        torch.testing.assert_close(made, alone.x_TC, atol=1e-6, rtol=0)
        assert alone.nfe == [together.nfe[index]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dopri5_says_for_which_image_it_finds_no_step(bad):
    def velocity(x_TC, t_S, pack):
        broken_S = torch.tensor([index == 9 and t > 0.3 for index, t in zip(pack.indices, t_S, strict=True)])
        return torch.where(pack.spread(broken_S, x_TC).bool(), bad, gaussian_velocity(x_TC, pack.spread(t_S, x_TC)))

    with pytest.raises(UserError, match=r"dopri5 finds no step for image 9 at t = 0\.[0-9]+: .*not finite"):
        sample(velocity, torch.ones(5, 4), SamplingConfig("dopri5"), pack_of((4, 9), (2, 3)), 0)


ONE = pack_of((0,), (64,))


def test_ab2_extends_a_line_through_two_velocities():
    """Of velocities that are a line in time every step but the first is exact, whatever the steps' lengths."""
    for base in (None, 16):
        noise, sampled = run("ab2", 4, model_fn=lambda x, t: 3 * t - 1 + 0 * x, shift_base_tokens=base)
        first = shifted(1 / 4, SamplingConfig(shift_base_tokens=base), ONE).item()
        torch.testing.assert_close(sampled.x_TC - noise, torch.full_like(noise, 0.5 - 1.5 * first**2))


def test_more_tokens_stay_longer_at_noise():
    """Stable Diffusion 3's equation 23, where its time is 1 at noise: sqrt(m / n) s / (1 + (sqrt(m / n) - 1) s)."""
    pack, base = pack_of((0, 1, 2), (64, 256, 1024)), 256
    for u in (0.0, 0.3, 0.5, 1.0):
        a, s = np.sqrt(np.array([64, 256, 1024]) / base), 1 - u
        times = shifted(u, SamplingConfig(shift_base_tokens=base), pack)
        np.testing.assert_allclose(times, 1 - a * s / (1 + (a - 1) * s), atol=1e-15)
    assert shifted(0.5, SamplingConfig(shift_base_tokens=base), pack).tolist() == pytest.approx([2 / 3, 0.5, 1 / 3])
    assert shifted(0.3, SamplingConfig(), pack).tolist() == [0.3] * 3


@pytest.mark.parametrize("method", ["euler", "heun", "ab2", "sde", "sde_heun"])
def test_a_shift_is_each_images_own(method):
    _, together = run(method, 7, indices=(4, 9), lengths=(50, 3), shift_base_tokens=10)
    _, alone = run(method, 7, indices=(9,), lengths=(3,), shift_base_tokens=10)
    assert torch.equal(together.x_TC[50:], alone.x_TC)
    assert not torch.equal(run(method, 7, indices=(9,), lengths=(3,))[1].x_TC, alone.x_TC)


def published_sde(method, last_step, steps, x, noise):
    """SiT's sampler as its code has it (transport/integrators.py and transport.py), for its linear path.

    `sigma` diffusion, score from velocity. Its Heun step looks at t = 1 without a last step, where its score is 0 / 0;
    here diffusion times score is multiplied out there.
    """
    last_size = 0.0 if last_step == "none" else 0.04
    times = torch.linspace(0, 1 - last_size, steps, dtype=torch.float64)
    dt = times[1] - times[0]

    def score(x, t):
        reverse_alpha_ratio, d_sigma, sigma = t, -1, 1 - t
        variance = sigma**2 - reverse_alpha_ratio * d_sigma * sigma
        return (reverse_alpha_ratio * gaussian_velocity(x, t) - x) / variance

    def drift(x, t):
        if t > 1 - 1e-9:
            return 2 * gaussian_velocity(x, torch.ones_like(t)) - x
        return gaussian_velocity(x, t) + (1 - t) * score(x, t)

    for step, t in enumerate(times[:-1]):
        dw = noise(step) * torch.sqrt(dt)
        if method == "sde":
            x = x + drift(x, t) * dt + torch.sqrt(2 * (1 - t)) * dw
        else:
            xhat = x + torch.sqrt(2 * (1 - t)) * dw
            k1 = drift(xhat, t)
            x = xhat + 0.5 * dt * (k1 + drift(xhat + dt * k1, t + dt))
    t = times[-1]
    lasts = {
        "mean": lambda: x + drift(x, t) * last_size,
        "euler": lambda: x + gaussian_velocity(x, t) * last_size,
        "tweedie": lambda: x / t + (1 - t) ** 2 / t * score(x, t),
        "none": lambda: x,
    }
    return lasts[last_step]()


@pytest.mark.parametrize(
    ("last_step", "published"), [("mean", "mean"), ("euler", "euler"), ("euler", "tweedie"), ("none", "none")]
)
@pytest.mark.parametrize("method", ["sde", "sde_heun"])
def test_sde_steps_and_ends_as_published(method, last_step, published):
    x = image_noise(3, 0, (5,), (6,), 4, stream=INITIAL_NOISE).double()
    drawn = lambda step: ImageNoise(3, (5,), (6,)).normal(step, x)  # noqa: E731
    sampling = SamplingConfig(method, 9, last_step=last_step)
    ours = sample(of_tokens(gaussian_velocity), x, sampling, pack_of((5,), (6,)), 3)
    torch.testing.assert_close(ours.x_TC, published_sde(method, published, 9, x, drawn), atol=1e-12, rtol=0)
    assert ours.nfe == [8 * (2 if method == "sde_heun" else 1) + (last_step != "none")]


@pytest.mark.parametrize(("method", "nfe"), [("sde", 100), ("sde_heun", 199)])
def test_sde_reaches_the_data_distribution(method, nfe):
    _, sampled = run(method, 100, lengths=(4096,))
    assert sampled.nfe == [nfe]
    values = (sampled.x_TC.flatten().numpy() - MEAN) / SPREAD
    assert values.mean() == pytest.approx(0, abs=0.03)
    assert values.std() == pytest.approx(1, abs=0.03)


def test_sde_forgets_its_start_but_the_ode_does_not():
    noise, ode = run("euler", 50, lengths=(512,))
    _, sde = run("sde", 50, lengths=(512,))
    assert np.corrcoef(noise.flatten(), ode.x_TC.flatten())[0, 1] > 0.999
    assert np.corrcoef(noise.flatten(), sde.x_TC.flatten())[0, 1] < 0.9


@pytest.mark.parametrize("method", ["euler", "heun", "ab2", "dopri5", "sde", "sde_heun", "ddpm", "ddim"])
def test_an_image_does_not_depend_on_its_pack(method):
    model_fn = ddpm_model if method.startswith("dd") else gaussian_velocity
    _, together = run(method, 10, indices=(4, 9), lengths=(5, 3), model_fn=model_fn)
    _, alone = run(method, 10, indices=(9,), lengths=(3,), model_fn=model_fn)
    assert torch.equal(together.x_TC[5:], alone.x_TC)


def ddpm_model(x, t):
    """Exact epsilon for data N(MEAN, SPREAD^2) under the DDPM's own schedule; the least variance."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[round((1 - float(t.ravel()[0])) * 1000)]
    variance = alpha_bar * SPREAD**2 + 1 - alpha_bar
    epsilon = (1 - alpha_bar).sqrt() / variance * (x - alpha_bar.sqrt() * MEAN)
    return torch.cat([epsilon, -torch.ones_like(x)], 1)


@pytest.mark.parametrize(("method", "steps"), [("ddpm", 250), ("ddim", 200)])
def test_ddpm_samplers_reach_the_data_distribution(method, steps):
    _, sampled = run(method, steps, lengths=(2048,), model_fn=ddpm_model)
    assert sampled.nfe == [steps]
    values = sampled.x_TC.flatten().numpy()
    assert values.mean() == pytest.approx(MEAN, abs=0.02)
    assert values.std() == pytest.approx(SPREAD, rel=0.05)
    assert stats.kstest((values - values.mean()) / values.std(), "norm").pvalue > 1e-3


def test_every_image_and_step_has_noise_of_its_own():
    noise, x_TC = ImageNoise(3, (4, 9), (1, 2)), torch.zeros(3, 4)
    drawn = [noise.of_each_image(step, x_TC) for step in (0, 1)]
    assert len(torch.cat(drawn).unique()) == 24
    assert torch.equal(drawn[1][1:], ImageNoise(3, (9,), (2,)).of_each_image(1, x_TC[1:]))


def test_ddpm_uses_the_learned_variance():
    def loud(x, t):
        output = ddpm_model(x, t)
        return torch.cat([output[:, :4], torch.ones_like(x)], 1)

    assert run("ddpm", 10, model_fn=loud)[1].x_TC.std() > 1.05 * run("ddpm", 10, model_fn=ddpm_model)[1].x_TC.std()


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [("sde", 1, "least is 2"), ("ddim", 300, "nearest that one takes are 334 and 250"), ("ddpm", 1001, "1000")],
)
def test_impossible_steps(method, steps, message):
    with pytest.raises(UserError, match=rf"sampling.steps.*{message}"):
        run(method, steps, model_fn=ddpm_model)


def published_respacing(text):
    """Steps kept of 1,000 by the respacing `text` of guided-diffusion, DiT and FiT v1; None where they refuse it."""
    if text.startswith("ddim"):
        strides = (range(0, 1000, stride) for stride in range(1, 1000))
        return next((set(kept) for kept in strides if len(kept) == int(text.removeprefix("ddim"))), None)
    count, kept, here = int(text), [], 0.0
    for _ in range(count):
        kept.append(round(here))
        here += 999 / (count - 1) if count > 1 else 1
    return set(kept)


def taken(steps, **settings):
    try:
        return ddpm_timesteps(SamplingConfig(steps=steps, **settings))
    except UserError:
        return None


def test_spacing_is_the_published_one_unless_another_is_named():
    for steps in range(1, 1001):
        for method, published in (("ddpm", f"{steps}"), ("ddim", f"ddim{steps}")):
            kept = published_respacing(published)
            assert taken(steps, method=method) == (None if kept is None else sorted(kept, reverse=True)), published
    assert taken(4, method="ddim") == taken(4, method="ddpm", spacing="leading") == [750, 500, 250, 0]
    assert taken(4, method="ddpm") == taken(4, method="ddim", spacing="linspace") == [999, 666, 333, 0]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_steps_as_diffusers_does(spacing):
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing=spacing)
    for steps in (4, 8, 125, 1000):
        scheduler.set_timesteps(steps)
        assert taken(steps, method="ddim", spacing=spacing) == scheduler.timesteps.tolist()
    scheduler.set_timesteps(20)
    x, sampled = run("ddim", 20, model_fn=ddpm_model, spacing=spacing)
    for index in scheduler.timesteps.tolist():
        x = scheduler.step(ddpm_model(x, torch.tensor(1 - index / 1000))[:, :4], index, x, return_dict=False)[0]
    torch.testing.assert_close(sampled.x_TC, x, atol=1e-5, rtol=1e-4)
