"""Registration in a real MLflow store of small models that nobody trained."""

import json
import resource
import time
from pathlib import Path

import pytest
from softpref.errors import ConfigError, DataError, DiskError
from softpref.records.registration import Registration
from softpref.registry.config import RegistryConfig
from softpref.registry.served import model_hash
from softpref.registry.stage import decision_markdown, run
from softpref.tracking import Tracker

from tests.served import free_port


def config(store, **changes):
    return RegistryConfig("story", tracking_uri=store, **changes)


@pytest.fixture
def model(tmp_path, write_model):
    return write_model(tmp_path / "model")


@pytest.fixture
def evaluation(tmp_path, write_evaluation):
    return write_evaluation(tmp_path / "evaluation")


def versions(client):
    return sorted(client.search_model_versions("name = 'story'"), key=lambda version: int(version.version))


def test_a_full_disk_is_called_so_also_where_the_store_met_it(
    tmp_path, store, model, evaluation, client, file_limit
):
    file_limit(20_000)
    with pytest.raises(DiskError, match="and give the same command again"):
        run(config(store), model, evaluation, tmp_path / "registration")
    file_limit(resource.RLIM_INFINITY)
    assert run(config(store), model, evaluation, tmp_path / "registration").version == "1"
    assert len(versions(client)) == 1


def test_registered_version_says_where_it_comes_from_and_how_good_it_is(
    tmp_path, store, client, write_model, write_evaluation
):
    with Tracker(tmp_path / "run", experiment="sweep", run_name="alpha-0.5", tracking_uri=store) as tracker:
        assert tracker.flush(30)
    model = write_model(tmp_path / "model", run_id=tracker.run_id)
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "comparison.json").write_text(
        json.dumps({"rule": "best win rate", "chosen": "alpha-0.5", "reason": "highest", "members": []})
    )
    decision = run(
        config(store),
        model,
        write_evaluation(tmp_path / "evaluation", example="a small fox"),
        tmp_path / "registration",
        tmp_path / "comparison",
    )
    assert vars(decision) == json.loads((tmp_path / "registration" / "registration.json").read_text())
    assert (decision.registered, decision.champion, decision.version) == (True, True, "1")
    assert decision.aliases == ["challenger", "champion"]
    (version,) = versions(client)
    assert version.run_id == tracker.run_id
    assert version.tags["alpha"] == "0.5"
    assert version.tags["method"] == "spo"
    assert version.tags["dataset_hash"] == "d" * 64
    assert version.tags["evaluation_id"] == "e" * 16
    assert version.tags["code_version"] == "0.1.0"
    assert version.tags["win_rate"] == "0.7 [0.65, 0.75], n=400"
    assert version.tags["exact.entropy"] == "4.2 [4.1, 4.3], n=400"
    assert version.tags["chosen_by"] == "best win rate"
    assert "spo, alpha 0.5" in version.description
    assert "| win_rate (share) | 0.7 [0.65, 0.75], n=400 |" in version.description
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert logged.source_run_id == tracker.run_id
    assert logged.experiment_id == client.get_experiment_by_name("sweep").experiment_id
    assert Path(logged.artifact_location.removeprefix("file://")).is_relative_to(tmp_path)
    example = Path(logged.artifact_location.removeprefix("file://")) / "input_example.json"
    assert json.loads(example.read_text()) == {"prompt": "a small fox"}
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_champion_changes_only_for_a_better_model_on_the_same_evaluation(
    tmp_path, store, client, write_model, write_evaluation
):
    def register(number, win_rate, **changes):
        model = write_model(tmp_path / f"model-{number}", seed=number)
        evaluation = write_evaluation(tmp_path / f"evaluation-{number}", win_rate=win_rate, **changes)
        decision = run(config(store), model, evaluation, tmp_path / f"registration-{number}")
        return decision, client.get_registered_model("story").aliases

    assert register(1, (0.7, 0.65, 0.75))[1] == {"challenger": 1, "champion": 1}
    decision, aliases = register(2, (0.6, 0.55, 0.65))
    assert aliases == {"challenger": 2, "champion": 1}
    assert "does not beat" in decision.reason
    decision, aliases = register(3, (0.9, 0.85, 0.95), evaluation_id="another")
    assert aliases == {"challenger": 3, "champion": 1}
    assert "not comparable" in decision.reason
    assert register(4, (0.8, 0.75, 0.85))[1] == {"challenger": 4, "champion": 4}
    with pytest.raises(DataError, match=r"not registered: win_rate is 0\.5"):
        register(5, (0.5, 0.45, 0.55))
    assert client.get_registered_model("story").aliases == {"challenger": 4, "champion": 4}
    assert len(versions(client)) == 4


def test_what_keeps_two_models_from_being_compared_is_in_their_versions(
    tmp_path, store, client, write_model, write_evaluation
):
    parts = {"data": "d1", "judge": "expert f1", "reference": "r1", "settings": {"samples_per_prompt": 32}}
    for number in (1, 2):
        model = write_model(tmp_path / f"model-{number}", seed=number)
        evaluated_on = parts | {"reference": f"r{number}"}
        identity = {"evaluation_id": f"e{number}", "evaluated_on": evaluated_on}
        evaluation = write_evaluation(tmp_path / f"evaluation-{number}", **identity)
        decision = run(config(store), model, evaluation, tmp_path / f"registration-{number}")
        assert json.loads(client.get_model_version("story", str(number)).tags["evaluated_on"]) == evaluated_on
    assert "version 1, was evaluated against another reference (its weights differ)" in decision.reason
    assert client.get_registered_model("story").aliases == {"challenger": 2, "champion": 1}


def test_an_older_version_registered_again_takes_no_newer_ones_place(
    tmp_path, store, client, write_model, write_evaluation
):
    models = [write_model(tmp_path / f"model-{number}", seed=number) for number in (1, 2, 3)]
    rates = [(0.7, 0.65, 0.75), (0.6, 0.55, 0.65), (0.6, 0.55, 0.65)]
    evaluations = [write_evaluation(tmp_path / f"e-{i}", win_rate=rate) for i, rate in enumerate(rates)]
    for number, (model, evaluation) in enumerate(zip(models, evaluations, strict=True)):
        run(config(store), model, evaluation, tmp_path / f"registration-{number}")
    assert client.get_registered_model("story").aliases == {"challenger": 3, "champion": 1}

    second = run(config(store), models[1], evaluations[1], tmp_path / "again")
    assert (second.reused, second.version, second.aliases) == (True, "2", [])
    assert "challenger stays at version 3, which is newer" in second.reason
    assert "mlflow models serve -m models:/story/2 " in decision_markdown(second)
    first = run(config(store), models[0], evaluations[0], tmp_path / "once more")
    assert (first.reused, first.champion, first.aliases) == (True, True, ["champion"])
    assert client.get_registered_model("story").aliases == {"challenger": 3, "champion": 1}


def test_failed_gate_needs_no_server(tmp_path, model, write_evaluation):
    evaluation = write_evaluation(tmp_path / "evaluation", win_rate=(0.5, 0.5, 0.5))
    with pytest.raises(DataError, match=r"alpha-0\.5 is not registered: .*not above min_win_rate = 0\.5"):
        run(config("http://127.0.0.1:1"), model, evaluation, tmp_path / "out")
    decision = Registration.read(tmp_path / "out")
    assert not decision.registered
    assert "min_win_rate" in decision.reason


def test_a_coin_promotes_nobody_and_registers_nobody_that_the_gate_asks_for_a_win_rate(
    tmp_path, store, client, model, write_evaluation
):
    accuracy = {"value": 0.51, "low": 0.46, "high": 0.56, "n": 40, "unit": "probability"}
    coin = write_evaluation(tmp_path / "coin", judge={"name": "bradley-terry", "accuracy": accuracy})
    with pytest.raises(DataError, match="no better than a coin"):
        run(config(store), model, coin, tmp_path / "out")
    assert versions(client) == []
    decision = run(config(store, min_win_rate=None), model, coin, tmp_path / "out")
    assert (decision.aliases, decision.champion) == (["challenger"], False)
    assert "nobody becomes champion by this judge" in decision.reason


def test_the_next_that_passes_the_gate_is_registered_and_its_version_says_why(
    tmp_path, store, client, write_model, write_evaluation
):
    """As a sweep does it: the comparison chooses, with the gate's limits; the chosen model is registered."""
    from softpref.evaluation import compare

    models, evaluations = {}, []
    for name, alpha, rate in (("sharp", 0.5, (0.6, 0.55, 0.65)), ("soft", 2.0, (0.6, 0.5, 0.7))):
        models[name] = write_model(tmp_path / name, name=name, alpha=alpha)
        rates = {"by_prompt": {"win_rate": 4 * [0.59, 0.6, 0.61]}, "settings": {"confidence": 0.95}}
        rates |= {"rounds": 1, "train_on": "preferences", "extrapolation": 0.0, "softmax_frontier": None}
        identity = {"name": name, "alpha": alpha, "model_uri": str(models[name]), "exact": None}
        value, low, high = rate
        shown = ("expected_reward", "reference_expected_reward", "kl_sequence", "entropy_sequence")
        metrics = {one: {"value": 1.0, "low": 0.5, "high": 1.5, "n": 400, "unit": "nats"} for one in shown}
        metrics["win_rate"] = {"value": value, "low": low, "high": high, "n": 400, "unit": "probability"}
        written = write_evaluation(tmp_path / f"e-{name}", metrics=metrics, **rates, **identity)
        evaluations.append(str(written))
    assert compare.run(evaluations, str(tmp_path / "any"), "win_rate").chosen == "soft"
    limits = config(store).limits
    compare.run(evaluations, str(tmp_path / "comparison"), "win_rate", limits=limits)

    decision = run(
        config(store),
        models["sharp"],
        tmp_path / "comparison" / "chosen",
        tmp_path / "out",
        tmp_path / "comparison",
    )
    assert (decision.registered, decision.champion) == (True, True)
    (version,) = versions(client)
    assert version.tags["name"] == "sharp"
    why = "The rule ranks higher, but the gate refuses: soft (win_rate is 0.6 [0.5, 0.7], n=400"
    assert why in version.tags["chosen_because"]
    assert "the gate refuses: soft" in version.description


@pytest.mark.parametrize("crash", ["register_model", "set_registered_model_alias"])
def test_retry_after_a_crash_registers_nothing_twice(
    crash, tmp_path, store, client, model, evaluation, monkeypatch
):
    import mlflow

    def crashing(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow if crash == "register_model" else mlflow.MlflowClient, crash, crashing)
        with pytest.raises(KeyboardInterrupt):
            run(config(store), model, evaluation, tmp_path / "out")
    decision = run(config(store), model, evaluation, tmp_path / "out")
    again = run(config(store), model, evaluation, tmp_path / "out")
    assert decision.reused is (crash != "register_model")
    assert again.reused
    assert again.reason == "this version is the champion already"
    (version,) = versions(client)
    assert client.get_registered_model("story").aliases == {"challenger": 1, "champion": 1}
    experiment = client.get_experiment_by_name("softpref").experiment_id
    ready = [one for one in client.search_logged_models([experiment]) if one.status == "READY"]
    assert [f"models:/{one.model_id}" for one in ready] == [version.source]


def test_unreachable_server_is_said_in_seconds(tmp_path, model, evaluation):
    uri = f"http://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=uri) as error:
        run(config(uri), model, evaluation, tmp_path / "out")
    assert time.monotonic() - begun < 15
    assert str(model) in str(error.value)


def test_adapter_is_merged_before_it_is_registered(tmp_path, store, write_model, write_evaluation):
    import mlflow
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = write_model(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    (adapter / "softpref.json").write_text(json.dumps({"name": "alpha-0.5", "adapter": True}))
    decision = run(config(store), adapter, write_evaluation(tmp_path / "evaluation"), tmp_path / "out")

    mlflow.set_tracking_uri(store)
    registered = mlflow.transformers.load_model(decision.model_uri, return_type="components")["model"]
    ids = torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(registered(ids).logits, adapted.eval()(ids).logits)
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert not torch.allclose(registered(ids).logits, plain)


def test_an_evaluation_of_another_run_under_the_same_name_is_refused(
    tmp_path, store, write_model, write_evaluation
):
    model = write_model(tmp_path / "model", run_id="a" * 32)
    evaluation = write_evaluation(tmp_path / "evaluation", run_id="b" * 32)
    with pytest.raises(ConfigError, match=f"of run {'a' * 32}, but .* of run {'b' * 32} with the same name"):
        run(config(store), model, evaluation, tmp_path / "registration")


def test_an_extrapolated_model_is_registered_as_itself_and_only_with_its_own_evaluation(
    tmp_path, store, client, write_model, write_evaluation
):
    policy = write_model(tmp_path / "policy", run_id="a" * 32, extrapolation=0.0)
    own = {"name": "alpha-0.5-expo-0.5", "extrapolation": 0.5, "run_id": "a" * 32}
    model = write_model(policy / "extrapolated-0.5", seed=1, **own)  # as the registry's importer gives it
    aligned = write_evaluation(tmp_path / "evaluation", run_id="a" * 32, extrapolation=0.0)
    evaluation = write_evaluation(aligned / "extrapolated-0.5", **own)
    (tmp_path / "comparison.json").write_text(json.dumps({"chosen": own["name"], "rule": "", "reason": ""}))

    with pytest.raises(ConfigError, match=r"'alpha-0\.5-expo-0\.5', but the evaluation is of 'alpha-0\.5'"):
        run(config(store), model, aligned, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'alpha-0\.5', but the evaluation is of 'alpha-0\.5-expo-0\.5'"):
        run(config(store), policy, evaluation, tmp_path / "out", tmp_path)
    other = write_evaluation(tmp_path / "other", **{**own, "extrapolation": 0.3})
    with pytest.raises(ConfigError, match=r"is extrapolated by 0\.5, but .* a model extrapolated by 0\.3"):
        run(config(store), model, other, tmp_path / "out")

    decision = run(config(store), model, evaluation, tmp_path / "registration", tmp_path)
    assert decision.registered
    (version,) = versions(client)
    assert (version.tags["name"], version.tags["extrapolation"]) == (own["name"], "0.5")
    assert decision.model_hash != model_hash(policy)
    (policy / "extrapolated-0.5").rename(tmp_path / "apart")
    assert model_hash(tmp_path / "apart") == decision.model_hash


def test_folders_that_do_not_belong_together_are_refused(
    tmp_path, store, model, evaluation, write_evaluation
):
    other = write_evaluation(tmp_path / "other", name="alpha-2")
    with pytest.raises(ConfigError, match=r"'alpha-0\.5', but the evaluation is of 'alpha-2'"):
        run(config(store), model, other, tmp_path / "out")
    (tmp_path / "comparison.json").write_text(json.dumps({"chosen": "dpo"}))
    with pytest.raises(ConfigError, match="the comparison chose 'dpo'"):
        run(config(store), model, evaluation, tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation\.json does not exist"):
        run(config(store), model, tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="absent"):
        run(config(store), tmp_path / "absent", evaluation, tmp_path / "out")
    with pytest.raises(ConfigError, match="no chat template"):
        run(config(store, task="chat"), model, evaluation, tmp_path / "out")


def test_component_registers_and_explains(tmp_path, store, client, model, evaluation, capsys):
    from kfp import dsl
    from softpref.registry.component import register_model

    def artifact(kind, name, path):
        return kind(name=name, uri=str(path))

    outputs = {
        "decision": artifact(dsl.Markdown, "decision", tmp_path / "decision.md"),
        "registered": artifact(dsl.Artifact, "registered", tmp_path / "registered"),
        "metrics": artifact(dsl.Metrics, "metrics", tmp_path / "metrics"),
    }
    register_model.python_func(
        model=artifact(dsl.Model, "model", model),
        evaluation=artifact(dsl.Artifact, "evaluation", evaluation),
        registered_model_name="story",
        tracking_uri=store,
        overrides={"beyond_noise": True},
        **outputs,
    )
    assert client.get_registered_model("story").aliases == {"challenger": 1, "champion": 1}
    text = (tmp_path / "decision.md").read_text()
    serve = "mlflow models serve -m models:/story@champion --env-manager local -p 5001"
    assert f"MLFLOW_TRACKING_URI={store} \\\n{serve}" in text
    assert f"[softpref] serve:    MLFLOW_TRACKING_URI={store} {serve}" in capsys.readouterr().out
    title = {"display_name": "registration: story, version 1"}
    assert outputs["metrics"].metadata == {"champion": 1, "version": 1, **title}
    said = outputs["registered"].metadata
    assert (said["model_uri"], said["version"]) == ("models:/story/1", "1")
    assert (said["model_name"], said["aliases"]) == ("story", "challenger, champion")
    assert outputs["decision"].metadata["title"] == "story, version 1"
    assert json.loads((tmp_path / "registered" / "registration.json").read_text())["registered"]
