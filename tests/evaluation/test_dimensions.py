"""What an evaluation says of each dimension of preference, and how a sweep shows what one costs the other."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from softpref.disk import content_hash
from softpref.errors import ConfigError
from softpref.evaluation.addresses import evaluation_folders
from softpref.evaluation.curves import curves
from softpref.evaluation.interactive import frontier_data
from softpref.evaluation.report import chips
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.scoring import score_sequences
from softpref.lm.tokenization import stop_token_ids, tokenize_row
from softpref.records.model import earlier_folders, load_metadata, save_metadata

from tests.evaluations import evaluation, evaluations


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    """The world's dataset judged by `warm`, its own reward, and by `short`, which turns half of it round."""
    folder = tmp_path_factory.mktemp("judged") / "dataset"
    lines = [json.loads(line) for line in (world.dataset / "outcomes.jsonl").read_text().splitlines()]
    warm = np.array(lines[0]["rewards"])
    short = np.where(np.arange(len(warm)) % 2, warm, -warm)
    rank = dict(zip(lines[0]["completions"], short, strict=True))
    splits = {}
    for name, rows in load_from_disk(str(world.dataset)).items():
        splits[name] = Dataset.from_list(
            [
                {**row, "completions": by, "dimension": dimension}
                for row in rows
                for dimension, by in (
                    ("warm", row["completions"]),
                    ("short", sorted(row["completions"], key=lambda text: -rank[text])),
                )
            ]
        )
    DatasetDict(splits).save_to_disk(str(folder))
    (folder / "stats.json").write_text(
        json.dumps({"dataset_hash": "abc", "dimensions": {"short": 180, "warm": 180}})
    )
    with open(folder / "outcomes.jsonl", "w") as file:
        for line in lines:
            dimensions = {"warm": warm.tolist(), "short": short.tolist()}
            file.write(
                json.dumps({**line, "rewards": (warm + short).tolist(), "dimensions": dimensions}) + "\n"
            )
    return folder


@pytest.fixture(scope="module")
def policy(world, tmp_path_factory):
    """The world's policy with two rounds of dpo behind it."""
    folder = tmp_path_factory.mktemp("policy") / "policy"
    shutil.copytree(world.policy, folder)
    own = {"method": "dpo", "alpha": 1.0, "beta": 0.5, "anchor": 0.0, "kl_beta": 0.0, "dataset_hash": "abc"}
    began = content_hash(*sorted(world.reference.glob("*.safetensors")))
    lineage = [
        {**own, "dimension": "warm", "dimension_weights": [], "reference_hash": began},
        {**own, "dimension": "short", "dimension_weights": [0.5], "reference_hash": ""},
    ]
    save_metadata(folder, {**load_metadata(folder), **own, "lineage": lineage})
    return folder


def test_a_report_states_the_order_of_the_rounds_and_the_weights():
    for order in (["warm", "short"], ["short", "warm"]):
        said = chips(evaluation(dimensions=order, dimension_weights=[0.5]))
        assert said[-3:-1] == [", then ".join(order), "λ 0.5"]
    assert not [one for one in chips(evaluation()) if "then" in one or "λ" in one]


@pytest.fixture(scope="module")
def found(world, judged, policy, evaluating, tmp_path_factory):
    import softpref.tracking

    from tests.evaluation.conftest import Recorder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "calls", [], raising=False)
        patch.setattr(softpref.tracking, "Tracker", Recorder)
        folder = tmp_path_factory.mktemp("found") / "evaluation"
        return {"folder": folder, **evaluating(world, folder, dataset=judged, policy=policy)}


def scored(folder, prompts):
    """Log-probabilities of every answer of each prompt: by prompt and answer."""
    model, tokenizer = load_model(str(folder)).eval(), load_tokenizer(str(folder))
    known = {}
    for prompt, answers in prompts.items():
        rows = tokenize_row(tokenizer, prompt, answers, stop_ids=stop_token_ids(tokenizer, model))
        logps = score_sequences(model, [(row.prompt, row.completion) for row in rows]).tolist()
        known |= dict(zip(((prompt, answer) for answer in answers), logps, strict=True))
    return known


def test_each_dimension_has_its_accuracy_and_rewards(world, judged, policy, found):
    outcomes = {}
    for line in map(json.loads, (judged / "outcomes.jsonl").read_text().splitlines()):
        outcomes[line["prompt"]] = line
    rows = list(load_from_disk(str(judged))["test"])
    prompts = {row["prompt"]: outcomes[row["prompt"]]["completions"] for row in rows}
    ours, theirs = scored(policy, prompts), scored(world.reference, prompts)
    metrics = found["metrics"]
    for name in ("warm", "short"):
        own = [row for row in rows if row["dimension"] == name]
        margins = [
            [
                known[row["prompt"], row["completions"][0]] - known[row["prompt"], row["completions"][1]]
                for row in own
            ]
            for known in (ours, theirs)
        ]
        policys, references = map(np.array, margins)
        for what, values in (
            ("preference", policys),
            ("reference", references),
            ("relative", policys - references),
        ):
            assert metrics[f"{what}_accuracy/{name}"]["value"] == pytest.approx((values > 0).mean())
        expected = []
        for prompt, answers in prompts.items():
            logps = np.array([ours[prompt, answer] for answer in answers])
            shares = np.exp(logps - np.logaddexp.reduce(logps))
            expected.append(shares @ np.array(outcomes[prompt]["dimensions"][name]))
        assert found["exact"][f"expected_reward/{name}"]["value"] == pytest.approx(
            np.mean(expected), abs=1e-5
        )
    lines = map(json.loads, (found["folder"] / "samples.jsonl").read_text().splitlines())
    drawn = {line["prompt"]: [sample["text"].strip() for sample in line["policy"]] for line in lines}
    for name in ("warm", "short"):
        means = []
        for prompt, texts in drawn.items():
            rewards = dict(zip(prompts[prompt], outcomes[prompt]["dimensions"][name], strict=True))
            outside = min(rewards.values()) - 1
            means.append(np.mean([rewards.get(text, outside) for text in texts]))
        assert metrics[f"expected_reward/{name}"]["value"] == pytest.approx(np.mean(means))
    assert (found["dimensions"], found["dimension_weights"]) == (["warm", "short"], [0.5])
    assert "implied_accuracy" not in metrics  # needs the model between the rounds


def test_the_optimum_is_that_of_both_rounds(world, judged, found):
    lines = [json.loads(line) for line in (judged / "outcomes.jsonl").read_text().splitlines()]
    held_out = {*load_from_disk(str(judged))["test"]["prompt"]}
    prompts = {line["prompt"]: line["completions"] for line in lines if line["prompt"] in held_out}
    theirs = scored(world.reference, prompts)
    rewards = {name: np.array(values) for name, values in lines[0]["dimensions"].items()}
    best = {name: [] for name in rewards}
    for prompt, answers in prompts.items():
        logits = np.array([theirs[prompt, answer] for answer in answers])
        logits += (1 / 0.5 + 0.5 / 0.5) * rewards["warm"] + rewards["short"] / 0.5
        shares = np.exp(logits - np.logaddexp.reduce(logits))
        for name, values in rewards.items():
            best[name].append(shares @ values)
    for name, values in best.items():
        figure = found["exact"][f"optimum_expected_reward/{name}"]
        assert figure["value"] == pytest.approx(np.mean(values), abs=1e-5)


def test_beside_another_reference_the_optimum_is_not_known(
    world, judged, policy, evaluating, tmp_path, recorded
):
    other = evaluating(world, tmp_path / "evaluation", dataset=judged, policy=policy, reference=world.policy)
    assert other["exact"]["kl_optimum_to_policy"]["value"] is None
    assert other["exact"]["expected_reward/warm"]["value"] is not None
    assert any("not the model that the first round (warm) began with" in one for one in other["warnings"])


def member(order, weight, rewards):
    """Expected rewards and theory's, by dimension."""
    exact = {f"expected_reward/{name}": {"value": value} for name, value in rewards.items()}
    exact |= {f"optimum_expected_reward/{name}": {"value": value + 0.1} for name, value in rewards.items()}
    exact |= {f"reference_expected_reward/{name}": {"value": 0.0} for name in rewards}
    exact |= {"entropy": {"value": 1.0}, "expected_reward": {"value": sum(rewards.values())}}
    return {
        "name": f"{order[0]}-{weight}",
        "dimensions": list(order),
        "dimension_weights": [weight] * (len(order) - 1),
        "exact": exact,
    }


def test_a_sweep_over_weights_is_a_curve_for_each_order():
    members = evaluations(
        [
            member(order, weight, {"warm": weight, "short": 1 - weight})
            for order in (("warm", "short"), ("short", "warm"))
            for weight in (1.0, 0.0, 0.5)
        ]
    )
    drawn = curves(members)
    assert [(curve.name, curve.symbol) for curve in drawn] == [
        ("SPO, short, then warm, α = 1", "λ"),
        ("SPO, warm, then short, α = 1", "λ"),
    ]
    assert [one.dimension_weights for one in drawn[0].members] == [[0.0], [0.5], [1.0]]
    data = frontier_data(members, None)
    assert data["views"][0] == {
        "title": "short for warm",
        "x": "exact/expected_reward/warm",
        "y": "exact/expected_reward/short",
    }
    shown = data["curves"][0]["members"][1]
    assert shown["label"] == "0.5"
    assert shown["values"]["exact/expected_reward/warm"][0] == 0.5
    assert shown["optimum"]["exact/expected_reward/warm"] == pytest.approx(0.6)
    keys = {axis["key"] for axis in data["axes"]}
    assert not any("optimum" in key or "reference" in key for key in keys)
    assert data["reference"]["exact/expected_reward/warm"] == 0.0


def test_the_models_of_earlier_rounds_are_evaluated_and_compared_with_the_last(
    world, judged, policy, evaluating, tmp_path, recorded
):
    whole = tmp_path / "policy"
    shutil.copytree(policy, whole)
    shutil.copytree(world.reference, whole / "round-1")
    metadata = load_metadata(policy)
    first = {**metadata, "name": "first", "lineage": metadata["lineage"][:1]}
    save_metadata(whole / "round-1", first)
    output = tmp_path / "evaluation"
    last = evaluating(world, output, dataset=judged, policy=whole)
    [folder] = earlier_folders(output)
    inner = json.loads((folder / "evaluation.json").read_text())
    assert (inner["name"], inner["dimensions"], inner["model_uri"]) == (
        "first",
        ["warm"],
        f"{whole}/round-1",
    )
    assert inner["metrics"]["kl_sequence"]["value"] == pytest.approx(0, abs=1e-6)  # it is the first reference
    assert inner["evaluation_id"] == last["evaluation_id"]
    assert "implied_accuracy" in inner["metrics"]  # one round's preferences follow from model and reference
    assert evaluation_folders([output]) == [output, folder]
    tracked = {name for call in recorded if call[0] == "metrics" for name in call[1]}
    assert {"eval/round-1/preference_accuracy/warm", "eval/preference_accuracy/warm"} <= tracked
    (whole / "round-1" / "softpref.json").unlink()
    with pytest.raises(ConfigError, match="not a complete model of a round"):
        evaluating(world, tmp_path / "other", dataset=judged, policy=whole)
