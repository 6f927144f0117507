"""A registered model is a base model: it comes back whole, by alias or version; its version is recorded."""

import json
import shutil

import pytest
import torch
from softpref.errors import ConfigError
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.sources import local_source, pin_model, source_name
from softpref.records.model import load_metadata
from softpref.registry.config import RegistryConfig
from softpref.registry.stage import run


@pytest.fixture
def register(tmp_path, store, cache, write_model, write_evaluation):
    """`register(seed)`: a further version of the model `story`, champion where it wins more; its folder."""

    def put(seed):
        folder = write_model(tmp_path / f"model-{seed}", seed=seed)
        better = 0.7 + 0.1 * seed
        evaluation = write_evaluation(
            tmp_path / f"evaluation-{seed}", win_rate=(better, better - 0.01, better + 0.01)
        )
        config = RegistryConfig("story", tracking_uri=store, min_win_rate=0.5)
        decision = run(config, folder, evaluation, tmp_path / f"registration-{seed}")
        assert decision.champion
        return folder

    return put


def logged(tmp_path):
    """Where the store keeps the files of the only registered model."""
    (folder,) = tmp_path.glob("mlartifacts/*/models/*/artifacts")
    return folder


def same_weights(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_an_alias_is_the_version_that_bears_it_and_comes_back_as_it_was_registered(
    register, store, monkeypatch
):
    first = register(0)
    assert pin_model("models:/story@champion", tracking_uri=store).source == "models:/story/1"
    second = register(1)
    pinned = pin_model("models:/story@champion", "v1", tracking_uri=store)
    assert (pinned.source, pinned.revision) == ("models:/story/2", "v1")
    assert pinned.fingerprint != pin_model("models:/story/1", tracking_uri=store).fingerprint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for source, folder in (("models:/story@champion", second), ("models:/story/1", first)):
        assert same_weights(load_model(source), load_model(str(folder)))
        words = "a small fox"
        assert load_tokenizer(source)(words)["input_ids"] == load_tokenizer(str(folder))(words)["input_ids"]
        assert load_metadata(local_source(source)) == load_metadata(folder)
    assert source_name("models:/story@champion") == "models:/story/2"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("models:/story@champoin", "alias champoin not found"),
        ("models:/story/9", "version=9. not found"),
        ("models:/nobody@champion", "name=nobody not found"),
    ],
)
def test_what_the_registry_does_not_have_is_refused(register, store, source, message):
    register(0)
    for look in (pin_model, local_source):
        with pytest.raises(ConfigError, match=message):
            look(source, tracking_uri=store)


def test_a_registry_that_does_not_answer_leaves_the_alias_as_it_is(caplog):
    nowhere = "http://127.0.0.1:9"
    assert pin_model("models:/story@champion", tracking_uri=nowhere) == ("models:/story@champion", None, "")
    assert "will not be noticed" in caplog.text
    with pytest.raises(ConfigError, match=r"MLflow at http://127\.0\.0\.1:9.*MLFLOW_TRACKING_URI"):
        local_source("models:/story@champion", tracking_uri=nowhere)


def test_a_tokenizer_that_mlflow_keeps_apart_joins_its_checkpoint(register, store, tmp_path):
    folder = register(0)
    kept = logged(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (kept / "model" / name).unlink()
        assert (kept / "components" / "tokenizer" / name).is_file()
    base = local_source("models:/story/1", tracking_uri=store)
    assert load_tokenizer(base)("a fox")["input_ids"] == load_tokenizer(str(folder))("a fox")["input_ids"]


def test_pickled_weights_and_models_of_another_flavor_are_refused(register, store, tmp_path):
    register(0)
    kept = logged(tmp_path)
    (kept / "model" / "model.safetensors").rename(kept / "model" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model models:/story/1: .*unpickling can run code"):
        local_source("models:/story/1", tracking_uri=store)
    shutil.rmtree(kept.parents[4] / "cache")
    shutil.rmtree(kept / "model")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        local_source("models:/story/1", tracking_uri=store)


@pytest.fixture
def dataset(tmp_path):
    from softpref.data.config import DataConfig
    from softpref.data.stage import run

    rows = [
        {"prompt": f"a {who} fox ", "chosen": "went home", "rejected": "home"}
        for who in ("small", "mad", "tall", "calm", "smart", "late", "lame", "warm")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(str(tmp_path / "rows.jsonl"), validation_fraction=0.2, test_fraction=0.2)
    run(config, str(tmp_path / "data"))
    return str(tmp_path / "data")


def test_the_champion_is_the_reference_without_further_training(register, store, tmp_path, dataset):
    from softpref.sft.config import SFTConfig
    from softpref.sft.stage import run

    folder = register(0)
    config = SFTConfig(
        base_model="models:/story@champion", num_train_epochs=0, use_cpu=True, disable_tqdm=True
    )
    metrics = run(config, dataset_dir=dataset, output_dir=str(tmp_path / "reference"), tracking_uri=store)
    assert metrics["eval_loss"] > 0
    assert load_metadata(tmp_path / "reference")["base_model"] == "models:/story/1"
    assert same_weights(load_model(str(tmp_path / "reference")), load_model(str(folder)))


def test_the_champion_is_aligned_further_and_evaluated(register, store, tmp_path, dataset):
    from softpref.evaluation import stage as evaluation
    from softpref.evaluation.config import EvaluationConfig
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import run

    register(0)
    settings = SPOConfig(
        alpha=0.5,
        max_steps=1,
        samples_per_refresh=4,
        sampling_interval=1,
        max_prompt_length=32,
        max_completion_length=8,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
    )
    run(
        settings,
        dataset_dir=dataset,
        reference_dir="models:/story@champion",
        output_dir=str(tmp_path / "policy"),
        tracking_uri=store,
    )
    metadata = load_metadata(tmp_path / "policy")
    assert (metadata["stage"], metadata["base_model"]) == ("train", "models:/story/1")
    found = evaluation.run(
        EvaluationConfig(judge="bradley-terry", samples_per_prompt=2, tracking_uri=store),
        dataset_dir=dataset,
        reference_dir="models:/story@champion",
        policy_dir=str(tmp_path / "policy"),
        output_dir=str(tmp_path / "evaluation"),
    )
    assert found.reference_uri == "models:/story/1"
    assert found.metrics["win_rate"].value is not None
