"""The training stage around the trainer: which rows and which judge it takes, what it refuses at once."""

import json
import math
import re

import pytest
from safetensors import safe_open
from softpref.lm.checkpoints import seal_checkpoint
from softpref.records.model import load_metadata
from softpref.spo.stage import headline

PROMPTS = ["ab", "cd", "ef"]
ANSWERS = ["a", "b", "ca", "db"]
QUICK = {
    "max_prompt_length": 16,
    "max_completion_length": 6,
    "cut_rows": "keep",
    "samples_per_refresh": 8,
    "sampling_interval": 2,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "save_strategy": "no",
}


def pairs(prompts=PROMPTS):
    return [
        {"prompt": prompt, "completions": [better, worse], "kind": "pairwise", "probability": None}
        for prompt in prompts
        for better, worse in (("a", "b"), ("ca", "db"))
    ]


def outcomes(prompts):
    weights = [0.25] * 4
    return [
        {"prompt": prompt, "completions": ANSWERS, "rewards": [1.0, 0.0, 2.0, -1.0], "weights": weights}
        for prompt in prompts
    ]


def metrics(folder):
    lines = map(json.loads, (folder / "tracking.jsonl").read_text().splitlines())
    return [line["values"] for line in lines if line["kind"] == "metrics"]


@pytest.mark.parametrize("judge", ["expert", "bradley-terry", "auto"])
def test_a_run_in_rounds_has_its_judge_from_the_dataset_and_says_what_it_is(
    tmp_path, write_dataset, command, judge
):
    known = None if judge == "bradley-terry" else outcomes(PROMPTS)
    dataset = write_dataset(tmp_path / "data", {"train": pairs(), "validation": pairs()}, outcomes=known)
    options = {"method": "sppo", "beta": 1.0, "rounds": 2, "train_on": "samples", "judge": judge}
    assert command("policy", dataset, **QUICK, **options) == 0
    said = load_metadata(tmp_path / "policy")
    assert (said["rounds"], said["train_on"], said["judge"]) == (2, "samples", judge)
    rounds = [values["round"] for values in metrics(tmp_path / "policy") if "round" in values]
    assert sorted(set(rounds)) == [1, 2]
    assert any("eval_rewards/margins" in values for values in metrics(tmp_path / "policy"))


def test_a_prompt_that_the_judge_does_not_know_is_refused_before_a_model_is_loaded(
    tmp_path, write_dataset, command, capsys, monkeypatch
):
    monkeypatch.setattr("softpref.spo.stage.loaded", lambda *arguments, **options: pytest.fail("loaded"))
    dataset = write_dataset(tmp_path / "data", {"train": pairs()}, outcomes=outcomes(PROMPTS[:2]))
    assert command("policy", dataset, **QUICK, rounds=3) == 2  # it would be asked in round 2
    assert "has no prompt 'ef'; use the judge 'bradley-terry'" in capsys.readouterr().err


def test_self_play_learns_from_demonstrations_where_there_are_some(
    tmp_path, write_dataset, command, monkeypatch, capsys
):
    from softpref.spo import stage

    seen = []
    make = stage.SPOTrainer

    def recorded(*arguments, **options):
        seen.append(list(options["train_dataset"]))
        return make(*arguments, **options)

    monkeypatch.setattr(stage, "SPOTrainer", recorded)
    options = {**QUICK, "train_on": "self_play", "beta": 0.0}
    demonstrations = [{"prompt": "gh", "completion": "abc"}, {"prompt": "ab", "completion": "c"}]
    with_some = write_dataset(tmp_path / "with", {"train": pairs()}, sft={"train": demonstrations})
    without = write_dataset(tmp_path / "without", {"train": pairs()})
    assert command("one", with_some, **options) == 0
    assert command("two", without, **options) == 0
    assert seen[0] == demonstrations
    assert [row["prompt"] for row in seen[1]] == [row["prompt"] for row in pairs()]
    held_out = write_dataset(tmp_path / "held-out", {"train": pairs()}, sft={"validation": demonstrations})
    capsys.readouterr()
    assert command("three", held_out, **options) == 2
    assert "holds no training demonstration, which self-play learns from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "beta"),
    [
        ("ropo", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("tdpo1", 1.0),
        ("simpo", 2.0),
        ("cpo", 0.5),
        ("orpo", 0.5),
        ("kto", 1.0),
    ],
)
def test_a_method_learns_what_is_preferred_and_the_model_says_what_it_is(
    tmp_path, write_dataset, command, method, beta
):
    dataset = write_dataset(tmp_path / "data", {"train": pairs(), "validation": pairs()})
    options = {**QUICK, "num_train_epochs": 25, "eval_strategy": "epoch", "per_device_eval_batch_size": 6}
    weight = {} if method == "kto" else {"nll_weight": 0.25}
    assert command("policy", dataset, **options, method=method, beta=beta, **weight) == 0
    said = load_metadata(tmp_path / "policy")
    assert (said["method"], said["beta"]) == (method, beta)
    assert said["nll_weight"] == weight.get("nll_weight")
    logged = [values for values in metrics(tmp_path / "policy") if "eval_rewards/accuracies" in values]
    assert logged[-1]["eval_rewards/accuracies"] == 1
    assert logged[-1]["eval_rewards/margins"] > logged[0]["eval_rewards/margins"] + 0.2
    assert logged[-1]["eval_loss"] < logged[0]["eval_loss"]


def test_members_of_a_sweep_share_kept_log_probabilities(tmp_path, write_dataset, command):
    dataset = write_dataset(tmp_path / "data", {"train": pairs(), "validation": pairs(PROMPTS[:1])})
    ended = []
    for name, cache in (("live", ""), ("first", "kept"), ("second", "kept")):
        folder = str(tmp_path / cache) if cache else ""
        assert command(name, dataset, **QUICK, method="dpo", reference_cache=folder) == 0
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as content:
            ended.append(content.get_tensor("lm_head.weight"))
    assert len(list((tmp_path / "kept").iterdir())) == 2  # training and validation rows
    assert bool((ended[1] == ended[2]).all())
    assert float((ended[0] - ended[1]).abs().max()) < 1e-4


def test_a_run_in_rounds_is_not_continued_with_other_rounds(tmp_path, write_dataset, command, capsys):
    dataset = write_dataset(tmp_path / "data", {"train": pairs()}, outcomes=outcomes(PROMPTS))
    options = {**QUICK, "train_on": "samples", "rounds": 2, "save_strategy": "steps", "save_steps": 1}
    started = tmp_path / "started" / "checkpoints"  # as a killed run leaves it
    (started / "checkpoint-1").mkdir(parents=True)
    (started / "checkpoint-1" / "training_loss.json").write_text('{"summed_loss": 1}')
    seal_checkpoint(started / "checkpoint-1")
    (started / "run.json").write_text(json.dumps({"rounds": 3, "judge": "expert"}))
    assert command("started", dataset, **options) == 2
    error = capsys.readouterr().err
    assert "rounds: 3 there, 2 here" in error
    assert "judge: 'expert' there, 'auto' here" in error


@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_a_run_returns_what_people_compare_and_its_headline_fits_one_page(
    tmp_path, write_dataset, command, method
):
    dataset = write_dataset(tmp_path / "data", {"train": pairs(), "validation": pairs()})
    file = tmp_path / "result.json"
    options = {**QUICK, "method": method, "alpha": 0.5, "beta": 0.1}
    assert command("policy", dataset, "--result", str(file), **options) == 0
    found = headline(load_metadata(tmp_path / "policy"), json.loads(file.read_text())["result"])
    shared = {"beta", "train_loss", "eval_loss", "eval_rewards/accuracies", "rewards/saturated"}
    of_samples = {"kl/sequence", "entropy", "completions/mean_length", "sampling/ess"}
    assert set(found) == shared | (of_samples | {"alpha"} if method == "spo" else set())
    logged = [values for values in metrics(tmp_path / "policy") if "kl/sequence" in values]
    for name in of_samples & set(found):
        assert found[name] == pytest.approx(logged[-1][name], rel=1e-5)


def test_the_headline_holds_finite_numbers_alone():
    spo = {"method": "spo", "alpha": 0.5, "beta": 0.1}
    assert headline(spo, {"eval_loss": math.nan, "train_loss": 1.0, "train_runtime": 3.0}) == {
        "alpha": 0.5,
        "beta": 0.1,
        "train_loss": 1.0,
    }


def test_a_log_gets_lines_of_progress_with_the_models_name(
    tmp_path, write_dataset, command, capsys, monkeypatch
):
    monkeypatch.setattr("softpref.progress._SECONDS", 0.0)
    dataset = write_dataset(tmp_path / "data", {"train": pairs(), "validation": pairs()})
    options = {**QUICK, "per_device_train_batch_size": 1, "disable_tqdm": False}
    assert command("policy", dataset, "--name", "mine", **options) == 0
    lines = capsys.readouterr().err.splitlines()
    steps = [line for line in lines if line.startswith("mine: step ")]
    assert len(steps) == 6
    assert re.fullmatch(r"mine: step 2 of 6, loss [\d.]+, \d+ s left", steps[1])
    assert re.fullmatch(r"mine: step 6 of 6, loss [\d.]+, took \d+ s", steps[-1])
    assert "tokenizing training rows: row 1 of 6, 0 s left" in lines
    assert any(line.startswith("mine, evaluation: batch 1 of ") for line in lines)
    assert not any("%|" in line or "grad_norm" in line for line in lines)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("q_proj,nonsense", r"names nonsense, which the model does not have; it has: .*k_proj, .*v_proj"),
        ("q_proj, v_prj ,", r"names v_prj, .*; nearest: .*v_proj"),
        ("roj", r"names roj, which the model does not have"),
    ],
)
def test_a_lora_target_that_the_model_does_not_have_is_named_before_training(
    tmp_path, write_dataset, command, capsys, targets, says
):
    dataset = write_dataset(tmp_path / "data", {"train": pairs()})
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": targets}
    assert command("policy", dataset, **QUICK, **lora) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "policy" / "tracking.jsonl").exists()


def test_lora_targets_are_modules_by_their_last_names(tmp_path, write_dataset, command):
    dataset = write_dataset(tmp_path / "data", {"train": pairs()})
    lora = {
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": "q_proj, mlp.up_proj",
        "merge_adapter": False,
    }
    assert command("policy", dataset, **QUICK, **lora) == 0
    with safe_open(tmp_path / "policy" / "adapter_model.safetensors", "pt") as file:
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
    assert adapted == {"q_proj", "up_proj"}


def test_rows_that_take_no_part_are_in_the_result_and_in_the_models_description(
    tmp_path, write_dataset, command, capsys
):
    long = {"prompt": "gh", "completions": ["abcdef", "a"], "kind": "pairwise", "probability": None}
    dataset = write_dataset(tmp_path / "data", {"train": [*pairs(), long]})
    assert command("policy", dataset, **{**QUICK, "cut_rows": "leave_out"}) == 0
    counts = {"given": 7, "left_out": 1, "cut_completion": 1}
    said = load_metadata(tmp_path / "policy")
    assert (said["row_counts"], said["cut_rows"]) == ({"train": counts}, "leave_out")
    printed = capsys.readouterr().out
    for name, count in counts.items():
        assert f'"rows/{name}": {count}.0' in printed
