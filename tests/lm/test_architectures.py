"""Each kind of architecture is trained, sampled and saved as transformers itself computes it."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


@pytest.mark.parametrize("name", architectures.FAST)
def test_training_samples_and_checkpoints_are_those_of_one_forward_pass(name):
    result = architectures.measure(name)
    assert not result.refusal
    assert result.training <= architectures.LOGPS_LIMIT
    assert result.ess >= architectures.ESS_LIMIT
    assert result.sampling <= 1e-3
    assert not result.tokens
    assert result.fresh_ess >= architectures.ESS_LIMIT
    assert result.loaded <= architectures.LOGPS_LIMIT


@pytest.mark.parametrize(("name", "cached"), [("GPT-2", True), ("Mamba", True), ("RWKV", False)])
def test_a_cache_is_used_where_it_is_right_and_only_there(name, cached, caplog):
    from softpref.lm.decoding import decodes

    model, _ = architectures.build(name)
    assert decodes(model) is cached
    assert ("drawn without a cache" in caplog.text) is not cached
