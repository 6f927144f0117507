"""What a training log says of a run that goes wrong."""

import pytest
from softpref.spo import SPOConfig
from softpref.spo.health import health_warnings


@pytest.fixture
def args(tmp_path):
    return SPOConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(("share", "said"), [(0.2, False), (0.3, True), (0.9, True)])
def test_a_quarter_of_saturated_pairs_is_said_at_the_first_log_and_once(args, share, said):
    found = health_warnings(args, {"rewards/saturated": share}, [], ended=False)
    assert [text[:3] for text in found] == ([f"{share:.0%}"] if said else [])
    assert not health_warnings(
        args, {"rewards/saturated": share}, [{"rewards/saturated": share}], ended=False
    )


def test_an_end_token_that_lost_half_a_nat_is_said_when_training_ends(args):
    logged = [{"logps/end": -0.1 - 0.1 * step} for step in range(20)]
    assert not health_warnings(args, {}, logged, ended=False)
    [said] = health_warnings(args, {}, logged, ended=True)
    assert "has fallen by 1.6 nats" in said
    assert not health_warnings(args, {}, [{"logps/end": -0.1}] * 20, ended=True)
