"""Settings that would train something else than what was meant are refused before anything is loaded."""

import pytest
from softpref.config import build_config, parse_overrides
from softpref.errors import ConfigError
from softpref.sft.config import SFTConfig
from softpref.spo import SPOConfig, SPOTrainer
from transformers import HfArgumentParser

pytestmark = pytest.mark.fast


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
        ({"kl_gradient": "k3"}, "kl_gradient must be token, full, or a number from 0"),
        ({"kl_gradient": 1.5}, "kl_gradient must be token, full, or a number from 0"),
        ({"kl_gradient": "nan"}, "kl_gradient must be token, full, or a number from 0"),
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
        ({"min_ess": 1.0}, "min_ess must be a fraction"),
        (
            {"refresh": "adaptive", "samples_per_refresh": 16, "sampling_interval": 8},
            "min_ess must be above 0.5 where a step's slice holds 2 samples",
        ),
        ({"max_importance_ratio": 0.5}, "max_importance_ratio must be at least 1"),
        ({"reverse_kl_limit": 0.0}, "reverse_kl_limit must be above 0 nats"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be at least 1"),
        ({"completions_per_prompt": 1}, "completions_per_prompt must be at least 2"),
        ({"rounds": 2, "num_train_epochs": 1.5}, "num_train_epochs must be a whole number"),
        ({"rounds": 2, "num_train_epochs": float("inf")}, "num_train_epochs must be at least 0, got inf"),
        ({"rounds": 2, "round_reference": "previous"}, "round_reference must be initial for spo"),
        ({"method": "dpo", "rounds": 2, "reference_cache": "c"}, "reference_cache must be empty"),
        (
            {"rounds": 2, "dataloader_persistent_workers": True, "dataloader_num_workers": 1},
            "dataloader_persistent_workers must be off",
        ),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be random or seq"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"extrapolation": "0.5", "use_peft": True, "merge_adapter": False}, "extrapolation must be empty"),
        ({"method": "ropo", "ropo_alpha": 0.0}, "ropo_alpha must be above 0"),
        ({"method": "sppo", "initial_share": 1.5}, "initial_share must be from 0 to 1"),
        ({"train_on": "self_play", "opponent_history": 0}, "opponent_history must be at least 1"),
        ({"method": "simpo", "simpo_gamma": -0.1}, "simpo_gamma must be at least 0"),
        ({"method": "dpo", "nll_weight": -0.1}, "nll_weight must be at least 0"),
        ({"method": "kto", "desirable_weight": -1.0}, "desirable_weight must be at least 0"),
        ({"method": "simpo", "beta": 0.0}, "beta must be at least 0 for spo, above 0"),
        (
            {"method": "simpo", "rounds": 2, "round_reference": "previous"},
            "round_reference must be initial for simpo",
        ),
        ({"alhpa": 1.0}, "did you mean 'alpha'"),
        ({"sampling_intervall": 4}, "did you mean 'sampling_interval'"),
        ({"alpha": "soft"}, "alpha must be float"),
    ],
)
def test_a_wrong_parameter_is_refused_and_the_message_says_what_is_right(layers, options, message):
    with pytest.raises(ConfigError, match=message):
        build_config(SPOConfig, layers, options)


@pytest.mark.parametrize(
    "name", ["method", "preference_kind", "soft_labels", "kl_gradient", "kl_on", "sppo_completions"]
)
def test_a_choice_is_checked_without_the_builder_too(layers, name):
    with pytest.raises(ConfigError, match=f"{name} must be .* or "):
        SPOConfig(**layers, **{name: "nonsense"})


IDLE = [
    ({"method": "dpo"}, {"weight_exponent": 0.5}, "it is an option of spo, and the method is dpo"),
    ({"method": "dpo"}, {"tdpo_alpha": 0.1}, "it is an option of tdpo"),
    ({"method": "ipo"}, {"label_smoothing": 0.1}, "it is an option of dpo, rdpo"),
    ({"method": "tdpo1"}, {"tdpo_alpha": 0.1}, "it is an option of tdpo, and the method is tdpo1"),
    ({"method": "dpo"}, {"ropo_alpha": 2.0}, "it is an option of ropo"),
    ({"method": "cpo"}, {"simpo_gamma": 0.1}, "it is an option of simpo"),
    ({"method": "dpo"}, {"sppo_completions": "extremes"}, "it is an option of sppo"),
    ({"method": "dpo"}, {"undesirable_weight": 2.0}, "it is an option of kto"),
    ({"method": "kto"}, {"reference_cache": "c"}, "the loss takes no log-probabilities of the reference"),
    ({"method": "kto"}, {"soft_labels": "geometric"}, "it is an option of spo, dpo, rdpo, ipo, slic, ropo,"),
    ({"method": "sppo"}, {"nll_weight": 0.5}, "it is an option of dpo, rdpo, ipo, slic, ropo, apo_zero,"),
    ({"method": "spo"}, {"nll_weight": 0.5}, "it is an option of dpo, rdpo, ipo, slic, ropo, apo_zero,"),
    ({"method": "sppo"}, {"soft_labels": "geometric"}, "it is an option of spo, dpo, rdpo, ipo, slic, ropo,"),
    ({"method": "tdpo1"}, {"reference_cache": "c"}, "the loss takes no log-probabilities of the reference"),
    ({"method": "simpo"}, {"reference_cache": "c"}, "the loss takes no log-probabilities of the reference"),
    ({"method": "tdpo"}, {"reference_cache": "c"}, "the loss takes no log-probabilities of the reference"),
    ({"beta": 0.0}, {"kl_gradient": "full"}, "there is no KL term without a beta above 0"),
    ({"beta": 0.0}, {"refresh": "adaptive"}, "there is no KL term without a beta above 0"),
    ({"beta": 0.0}, {"max_importance_ratio": 2.0}, "there is no KL term without a beta above 0"),
    ({"beta": 0.0}, {"reverse_kl_limit": 2.0}, "there is no KL term without a beta above 0"),
    ({"beta": 0.0}, {"kl_on": "data"}, "there is no KL term without a beta above 0"),
    ({"method": "dpo"}, {"kl_on": "data"}, "there is no KL term without a beta above 0"),
    ({"kl_on": "none"}, {"beta": 0.1}, "there is no KL term where kl_on is none"),
    ({"kl_on": "none", "method": "dpo"}, {"kl_beta": 0.1}, "there is no KL term where kl_on is none"),
    ({"kl_on": "none"}, {"kl_gradient": "full"}, "there is no KL term where kl_on is none"),
    ({"kl_on": "data"}, {"kl_gradient": "full"}, "along the rows' own completions where kl_on is data"),
    ({"kl_on": "data"}, {"kl_prompts": "both"}, "along the rows' own completions where kl_on is data"),
    ({"kl_on": "data"}, {"sampling_engine": "vllm"}, "nothing is sampled"),
    ({"beta": 0.0}, {"kl_prompts": "both"}, "there is no KL term without a beta above 0"),
    ({}, {"weight_scores": "token"}, "without a weight_exponent"),
    ({}, {"min_ess": 0.3}, "refresh is not adaptive"),
    ({}, {"judge": "expert"}, "no completion is drawn and judged"),
    ({"train_on": "self_play"}, {"completions_per_prompt": 4}, "no completion is drawn and judged"),
    ({"method": "dpo"}, {"round_reference": "previous"}, "no row is drawn"),
    ({"method": "dpo", "rounds": 2}, {"initial_share": 0.5}, "the reference is the initial model alone"),
    ({"rounds": 2}, {"opponent_history": 2}, "there is no self-play of several rounds"),
    ({"train_on": "self_play"}, {"opponent_history": 2}, "there is no self-play of several rounds"),
    ({"method": "dpo"}, {"label_smoothing_factor": 0.1}, "label_smoothing is what dpo and rdpo take"),
]
NEEDED = [
    {"method": "spo", "weight_exponent": 0.5, "weight_scores": "token", "kl_gradient": "full"},
    {"refresh": "adaptive", "min_ess": 0.3, "max_importance_ratio": 2.0, "kl_prompts": "both"},
    {"method": "tdpo", "tdpo_alpha": 0.1, "soft_labels": "geometric"},
    {"method": "ropo", "ropo_alpha": 2.0, "soft_labels": "geometric", "reference_cache": "c"},
    {"method": "simpo", "simpo_gamma": 0.1, "nll_weight": 0.5},
    {"method": "sppo", "sppo_completions": "extremes"},
    {"method": "kto", "desirable_weight": 0.5, "undesirable_weight": 2.0},
    {"method": "rdpo", "label_smoothing": 0.1, "reference_cache": "c"},
    {"method": "dpo", "rounds": 2, "completions_per_prompt": 4, "judge": "expert"},
    {"method": "dpo", "train_on": "self_play", "round_reference": "previous"},
    {"method": "dpo", "train_on": "self_play", "round_reference": "previous", "initial_share": 0.5},
    {"method": "dpo", "train_on": "self_play", "rounds": 3, "opponent_history": 2},
    {"kl_on": "data"},
    {"reverse_kl_limit": 2.0},
    {"method": "dpo", "kl_beta": 0.1, "kl_on": "data", "rounds": 2, "sampling_engine": "vllm"},
    {"kl_on": "none", "beta": 0.0},
    {"method": "dpo", "kl_on": "none"},
    # of a sweep's recipe, for the models beside it
    {"method": "dpo", "kl_gradient": "full", "kl_prompts": "both", "refresh": "adaptive", "min_ess": 0.3},
]


@pytest.mark.parametrize(("others", "option", "reason"), IDLE)
def test_an_option_that_does_nothing_is_said_aloud(layers, caplog, others, option, reason):
    ((name, value),) = option.items()
    SPOConfig(**layers, **others)
    assert not caplog.records
    SPOConfig(**layers, **others, **option)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name}={value!r} has no effect: ")
    assert reason in record.getMessage()


@pytest.mark.parametrize("options", NEEDED)
def test_an_option_that_does_something_is_not(layers, caplog, options):
    SPOConfig(**layers, **options)
    assert not caplog.records


def test_overrides_reach_spo_and_transformers_parameters_alike(layers):
    overrides = parse_overrides('{"alpha": 0.5, "warmup_steps": 3.0, "kl_gradient": "full"}')
    config = build_config(SPOConfig, layers, {"alpha": 2.0}, overrides)
    assert (config.alpha, config.warmup_steps, config.kl_gradient) == (0.5, 3, "full")


def test_the_methods_that_may_be_named_are_those_that_training_knows():
    from typing import get_args, get_type_hints

    from softpref.spo.checks import METHODS

    assert set(get_args(get_type_hints(SPOConfig)["method"])) == set(METHODS)


def test_the_likelihood_weighs_what_each_method_publishes_unless_it_is_said(layers):
    weights = {
        method: SPOConfig(**layers, method=method).likelihood_weight
        for method in ("dpo", "cpo", "orpo", "simpo")
    }
    assert weights == {"dpo": 0, "cpo": 1, "orpo": 1, "simpo": 0}
    assert SPOConfig(**layers, method="cpo", nll_weight=0.0).likelihood_weight == 0
    assert SPOConfig(**layers, method="dpo", nll_weight=0.3).likelihood_weight == 0.3


@pytest.mark.parametrize(("given", "read"), [("full", "full"), ("0.7", 0.7), (1, 1.0), (0.25, 0.25)])
def test_an_estimator_is_a_name_or_a_number(layers, given, read):
    assert build_config(SPOConfig, layers, {"kl_gradient": given}).kl_gradient == read


def test_the_policy_is_sampled_only_where_the_objective_needs_it(layers):
    assert SPOConfig(**layers).samples_policy
    assert not SPOConfig(**layers, beta=0.0).samples_policy
    assert not SPOConfig(**layers, method="dpo").samples_policy
    assert SPOConfig(**layers, method="dpo", kl_beta=0.1).samples_policy
    assert not SPOConfig(**layers, kl_on="data").samples_policy
    assert not SPOConfig(**layers, kl_on="none").samples_policy


def test_a_trainer_without_tokenizer_or_with_the_policy_as_its_own_reference_is_refused(
    layers, model, tokenizer, make_rows
):
    config, rows = SPOConfig(**layers), make_rows(2)
    with pytest.raises(ConfigError, match="needs processing_class"):
        SPOTrainer(model, config, train_dataset=rows)
    with pytest.raises(ConfigError, match="would move with it"):
        SPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer, ref_model=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**32}, "seed must be from 0 to 4294967295"),
        ({"adam_beta1": 2}, "adam_beta1 must be from 0 to 1, below 1"),
        ({"adam_epsilon": float("inf")}, "adam_epsilon must be at least 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be at least 0"),
        ({"max_grad_norm": -1}, "max_grad_norm must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"optim": "lomo"}, "needs the package lomo-optim"),
        ({"report_to": "nonsense"}, "report_to must be none"),
    ],
)
def test_what_transformers_takes_and_training_does_not_bear_is_refused_at_once(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        SPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [
        ("adamw_torch_8bit", "torchao"),
        ("galore_adamw_8bit", "galore-torch"),
        ("paged_lion_32bit", "bitsandbytes"),
        ("stable_adamw", "torch-optimi"),
    ],
)
def test_an_optimizer_whose_package_is_absent_is_refused_with_the_packages_name(
    layers, monkeypatch, optimizer, package
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{optimizer} needs the package {package}, which"):
        SPOConfig(**layers, optim=optimizer)


@pytest.mark.parametrize("config", [SPOConfig, SFTConfig])
def test_transformers_own_parser_reads_the_configuration(config, tmp_path):
    base = ["--base_model", "owner/name"] if config is SFTConfig else ["--alpha", "0.5"]
    (read,) = HfArgumentParser(config).parse_args_into_dataclasses(
        [*base, "--output_dir", str(tmp_path), "--learning-rate", "1e-4", "--use_cpu"],
        look_for_args_file=False,
    )
    assert (read.learning_rate, read.use_cpu, read.report_to) == (1e-4, True, [])
    assert read == build_config(
        config,
        {name: getattr(read, name) for name in ("learning_rate", "use_cpu", "output_dir")},
        dict([[base[0][2:], base[1]]]),
    )
