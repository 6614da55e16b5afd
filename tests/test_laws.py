"""What laws say: their value and its derivatives, however small or large."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from fitscale.scaling.fit.laws import LAWS, NO_FLOOR

THETA = {
    "power": [3.0, 0.4],
    "offset": [3.0, 0.4, 2.0],
    "additive": [3.0, 0.34, 2.0, 0.28, 1.7],
    "tied": [3.0, 0.3, 2.0, 1.7],
    "separable": [3.0, 0.2, 0.15, 1.7],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("power", 3 - 0.4 * 2),
        ("offset", np.log(np.exp(3 - 0.4 * 2) + 2)),
        ("additive", np.log(np.exp(3 - 0.34 * 2) + np.exp(2 - 0.28 * 5) + 1.7)),
        ("tied", np.log(np.exp(3 - 0.3 * 2) + np.exp(2 - 0.3 * 5) + 1.7)),
        ("separable", np.log(np.exp(3 - 0.2 * 2 - 0.15 * 5) + 1.7)),
    ],
)
def test_a_law_is_its_formula(name, value):
    law = LAWS[name]
    assert len(law.parameters) == len(THETA[name]) and law.floor == (law.parameters[-1] == "e")
    found, _ = law.evaluate(np.array([THETA[name]]), np.array([[2.0, 5.0]])[:, : len(law.inputs)])
    assert found[0, 0] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_jacobian_is_the_derivative(name):
    law = LAWS[name]
    theta = np.array(THETA[name])
    x = np.random.default_rng(0).normal(size=(5, len(law.inputs)))
    jacobian = law.evaluate(theta[None], x)[1][0]
    numeric = approx_fprime(theta, lambda t: law.evaluate(t[None], x)[0][0], 1e-7)
    np.testing.assert_allclose(jacobian, numeric, atol=1e-5)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("amplitude", [-2000.0, 2000.0])
def test_terms_too_small_or_too_large_for_a_float_are_added(name, amplitude):
    law = LAWS[name]
    theta = np.zeros(len(law.parameters))  # exponents and floor 0: the metric is the terms' amplitude
    theta[[law.parameters.index(name) for name in law.terms]] = amplitude
    with np.errstate(all="raise", under="ignore"):
        value, jacobian = law.evaluate(theta[None], np.ones((3, len(law.inputs))))
    terms = amplitude + np.log(len(law.terms))
    np.testing.assert_allclose(value, max(terms, np.log(NO_FLOOR)) if law.floor else terms)
    assert np.isfinite(jacobian).all()
