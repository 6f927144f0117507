"""Settings that would train something else than what was meant are refused before anything is loaded."""

import pytest
from softpref.config import build_config, parse_overrides
from softpref.errors import ConfigError
from softpref.spo import SPOConfig, SPOTrainer


@pytest.fixture
def layers(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.5}, r"alpha must be at least 0.*got -0\.5"),
        ({"alpha": float("nan")}, "alpha must be at least 0"),
        ({"alpha": float("inf")}, "alpha must be at least 0"),
        ({"beta": -0.1}, "beta must be"),
        ({"method": "dpo", "beta": 0.0}, "beta must be at least 0 for spo, above 0 for every other"),
        ({"method": "ppo"}, r"method must be 'spo' \| 'dpo'"),
        ({"kl_gradient": "k3"}, "kl_gradient must be"),
        ({"top_p": 0.9}, "top_p must be 1: .*own distribution"),
        ({"temperature": 0.7}, "temperature must be 1: "),
        ({"top_k": 50}, "top_k must be 0: "),
        ({"repetition_penalty": 1.1}, "repetition_penalty must be 1: "),
        ({"samples_per_refresh": 7, "sampling_interval": 8}, "at least sampling_interval"),
        ({"sampling_interval": 0}, "sampling_interval must be at least 1"),
        ({"label_smoothing": 0.5}, "label_smoothing must be"),
        ({"weight_exponent": -1.0}, "weight_exponent must be"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"learning_rate": -1e-6}, "learning_rate must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs must be at least 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"alhpa": 1.0}, "did you mean 'alpha'"),
        ({"sampling_intervall": 4}, "did you mean 'sampling_interval'"),
        ({"alpha": "soft"}, "alpha must be float"),
    ],
)
def test_a_wrong_parameter_is_refused_and_the_message_says_what_is_right(layers, options, message):
    with pytest.raises(ConfigError, match=message):
        build_config(SPOConfig, layers, options)


@pytest.mark.parametrize("name", ["method", "preference_kind", "soft_labels", "kl_gradient"])
def test_a_choice_is_checked_without_the_builder_too(layers, name):
    with pytest.raises(ConfigError, match=f"{name} must be .* or "):
        SPOConfig(**layers, **{name: "nonsense"})


def test_overrides_reach_spo_and_transformers_parameters_alike(layers):
    overrides = parse_overrides('{"alpha": 0.5, "warmup_steps": 3.0, "kl_gradient": "full"}')
    config = build_config(SPOConfig, layers, {"alpha": 2.0}, overrides)
    assert (config.alpha, config.warmup_steps, config.kl_gradient) == (0.5, 3, "full")


def test_the_policy_is_sampled_only_where_the_objective_needs_it(layers):
    assert SPOConfig(**layers).samples_policy
    assert not SPOConfig(**layers, beta=0.0).samples_policy
    assert not SPOConfig(**layers, method="dpo").samples_policy


def test_a_trainer_without_tokenizer_or_with_the_policy_as_its_own_reference_is_refused(
    layers, model, tokenizer, make_rows
):
    config, rows = SPOConfig(**layers), make_rows(2)
    with pytest.raises(ConfigError, match="needs processing_class"):
        SPOTrainer(model, config, train_dataset=rows)
    with pytest.raises(ConfigError, match="would move with it"):
        SPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer, ref_model=model)
