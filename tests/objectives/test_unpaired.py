"""The loss of single completions against its formula and slopes, written a second time in numpy."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from softpref.objectives import kto_loss, ordered_pairs

pytestmark = pytest.mark.fast

LOGPS = np.array([-3.0, -4.0, -2.5, -1.0, -60.0, -45.0])
REF_LOGPS = np.array([-3.5, -3.6, -2.0, -2.2, -52.0, -48.0])
DESIRABLE = np.array([1.0, 0.0, 1.0, 0.0, 0.3, 0.5])
OFFSETS = np.array([0.3, -0.2, 0.0, 0.5, 1.0, -1.0])


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("kl", [-0.7, 0.0, 1.3])
@pytest.mark.parametrize("moved", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, 1.5)])
def test_it_and_its_gradient_are_those_of_the_formula(beta, kl, moved, weights):
    logps, ref_logps = (torch.tensor(values, requires_grad=True) for values in (LOGPS, REF_LOGPS))
    drift = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    losses = kto_loss(
        logps,
        ref_logps,
        torch.tensor(DESIRABLE),
        drift,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        offsets=torch.tensor(OFFSETS) if moved else None,
    )
    gained = beta * (LOGPS - REF_LOGPS) - OFFSETS * moved - beta * max(0.0, kl)
    good, bad = weights[0] * DESIRABLE, weights[1] * (1 - DESIRABLE)
    np.testing.assert_allclose(
        losses.detach(), good * (1 - expit(gained)) + bad * (1 - expit(-gained)), rtol=1e-12
    )
    gradients = torch.autograd.grad(losses.sum(), [logps, ref_logps, drift], allow_unused=True)
    slope = expit(gained) * expit(-gained)
    np.testing.assert_allclose(gradients[0], beta * (bad - good) * slope, rtol=1e-11, atol=1e-14)
    assert gradients[1:] == (None, None)


def test_extreme_log_ratios_have_the_values_of_float64():
    logps, ref = np.array([-1e5, -3.5, -700.0, 0.0]), np.array([-3.5, -1e5, -650.0, 0.0])
    for beta in (1e-3, 0.1, 30.0):
        fine, coarse = (
            kto_loss(
                torch.tensor(logps, dtype=dtype),
                torch.tensor(ref, dtype=dtype),
                torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype),
                2.0,
                beta=beta,
            )
            for dtype in (torch.float64, torch.float32)
        )
        assert coarse.dtype == torch.float32
        torch.testing.assert_close(coarse.double(), fine, rtol=1e-4, atol=1e-6)


def test_a_group_of_one_decides_no_pair():
    for kind in ("ranking", "best_of_n"):
        places, groups = ordered_pairs(torch.tensor([1, 1]), kind)
        assert places.tolist() == groups.tolist() == []
        assert places.dtype == groups.dtype == torch.long


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": -1.0}, {"desirable_weight": -0.1}, {"undesirable_weight": -0.1}]
)
def test_what_the_formula_does_not_allow_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        kto_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), 0.0, **{"beta": 0.1, **options})
