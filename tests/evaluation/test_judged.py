"""Evaluations by each kind of judge: what is measured of samples, and of the judge."""

import json

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from softpref.errors import ConfigError
from softpref.lm.loading import load_model, load_tokenizer, with_reward_heads
from softpref.records.evaluation import read_samples
from softpref.records.model import save_metadata

from tests.evaluation.conftest import ANSWERS, METRICS, REWARDS


@pytest.mark.usefixtures("recorded")
def test_without_outcomes_a_trained_judge_speaks_and_says_how_well(world, evaluating, tmp_path):
    evaluation = evaluating(world, tmp_path / "out", dataset=world.plain)
    assert evaluation["judge"]["name"] == "bradley-terry"
    assert evaluation["judge"]["accuracy"]["value"] > 0.6
    assert any("learned from the very pairs" in warning for warning in evaluation["warnings"])
    assert evaluation["exact"] is None
    with pytest.raises(ConfigError, match=r"expert.*outcomes.jsonl"):
        evaluating(world, tmp_path / "expert", dataset=world.plain, judge="expert")


def test_a_reward_model_judges_and_is_measured_beside_length_and_the_reference(
    world, evaluating, tmp_path, recorded
):
    tokenizer = load_tokenizer(world.policy)
    torch.manual_seed(0)
    model = with_reward_heads(load_model(world.policy), 1, tokenizer.pad_token_id)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    options = {"judge": "reward-model", "judge_model": str(tmp_path / "judge"), "device": "cpu"}
    found = evaluating(world, tmp_path / "out", dataset=world.plain, split="validation", **options)
    rows = load_from_disk(str(world.plain))["validation"]
    right, longer = [], []
    for row in rows:  # one text at a time, by transformers alone
        scores = []
        for completion in row["completions"]:
            text = tokenizer(row["prompt"] + completion + " </s>", return_tensors="pt")
            scores.append(model(input_ids=text["input_ids"]).logits.item())
        right.append(scores[0] > scores[1])
        better, worse = map(len, row["completions"])
        longer.append((better > worse) + 0.5 * (better == worse))
    judge = {name: one and one["value"] for name, one in found["judge"].items() if name.endswith("accuracy")}
    assert judge["accuracy"] == pytest.approx(np.mean(right))
    assert judge["longer_accuracy"] == pytest.approx(np.mean(longer))
    assert judge["reference_accuracy"] == found["metrics"]["reference_accuracy"]["value"]
    tracked = {
        name: value for call, values in recorded if call == "metrics" for name, value in values.items()
    }
    assert tracked["eval/judge/accuracy"] == judge["accuracy"]
    assert not any("the very pairs" in warning for warning in found["warnings"])


def test_the_heads_of_a_reward_model_say_how_much_of_a_win_is_sure(
    world, evaluating, tmp_path, recorded, monkeypatch
):
    """The right values: one text at a time, by transformers alone."""
    monkeypatch.setattr("softpref.evaluation.quality.LEAST_PROMPTS", 3)  # as many as this world holds out
    tokenizer = load_tokenizer(world.policy)
    torch.manual_seed(0)
    model = with_reward_heads(load_model(world.policy), 4, tokenizer.pad_token_id)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    save_metadata(tmp_path / "judge", {"stage": "judge", "heads": 4})
    options = {"judge": "reward-model", "judge_model": str(tmp_path / "judge"), "device": "cpu"}
    found = evaluating(world, tmp_path / "out", dataset=world.plain, samples_per_prompt=3, **options)
    rates = []
    for record in read_samples(tmp_path / "out", 1000):
        ours, theirs = (
            torch.stack(
                [
                    model(**tokenizer(record.prompt + one.text + " </s>", return_tensors="pt")).logits[0]
                    for one in side
                ]
            ).detach()
            for side in (record.policy, record.reference)
        )
        assert [one.heads for one in record.policy] == [pytest.approx(row, abs=1e-5) for row in ours.tolist()]
        rates.append((ours[:, None] - theirs).sigmoid().mean((0, 1)).numpy())
    sure = found["metrics"]["sure_win_rate"]
    assert sure["value"] == pytest.approx(np.percentile(np.mean(rates, axis=0), 10), abs=1e-5)
    assert sure["low"] < sure["value"] < found["metrics"]["win_rate"]["value"]
    tracked = {
        name: value for call, values in recorded if call == "metrics" for name, value in values.items()
    }
    assert tracked["eval/sure_win_rate"] == sure["value"]
    assert (tracked["eval/low/sure_win_rate"], tracked["eval/high/sure_win_rate"]) == (
        sure["low"],
        sure["high"],
    )
    said = f"By nine of ten of its heads the policy wins more than {sure['value']:.0%} of comparisons"
    assert said in (tmp_path / "out" / "report.html").read_text()


def test_a_language_model_judges_pairs_and_what_it_cannot_tell_is_absent(
    world, evaluating, tmp_path, recorded, monkeypatch
):
    """The endpoint judges by the planted rewards, so the figures are known from the samples."""
    pytest.importorskip("openai")
    from softpref.evaluation import compare

    from tests.served import ChatEndpoint, marked_texts, served

    known = dict(zip(ANSWERS, REWARDS, strict=True))

    def reward(text):
        return known.get(text.strip(), len(text) / 20 - 3)

    def chance(first, second):
        return 1 / (1 + np.exp(reward(second) - reward(first)))

    def reply(messages):
        _, first, second = marked_texts(messages)
        a = chance(first, second)
        return ("A" if a > 0.5 else "B"), [("A", {"A": np.log(a), "B": np.log(1 - a)})]

    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    endpoint = ChatEndpoint(reply)
    common = {"dataset": world.plain, "judge": "llm", "judge_model": "wise"}
    with served(endpoint.answer) as url:
        options = {"url": f"{url}/v1", "cache": str(tmp_path / "answers.sqlite3")}
        found = evaluating(world, tmp_path / "whole", **common, judge_options=options)
        asked = len(endpoint.requests)
        limited = options | {"cache": "none", "max_requests": 50}
        cut = evaluating(world, tmp_path / "cut", **common, judge_validation_pairs=20, judge_options=limited)
    metrics = found["metrics"]
    scored = {"expected_reward", "reference_expected_reward", "best_of_8", "reference_best_of_8"}
    scored |= {"good_diversity", "reference_good_diversity"}
    assert set(metrics) == METRICS - scored | {"position_consistency"}
    lines = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    pairs = [
        [(ours, theirs["text"]) for ours, theirs in zip(line["policy"], line["reference"], strict=True)][:4]
        for line in lines
    ]
    expected = [[chance(ours["text"], theirs) for ours, theirs in group] for group in pairs]
    assert [[ours["win"] for ours, _ in group] for group in pairs] == [pytest.approx(e) for e in expected]
    assert metrics["win_rate"]["value"] == pytest.approx(np.mean(expected))
    assert found["by_prompt"].keys() == {"win_rate", "vote_divergence"}
    assert found["by_prompt"]["win_rate"] == pytest.approx(np.mean(expected, axis=1))
    assert metrics["position_consistency"]["value"] == 1.0
    assert not [ours for line in lines for ours in line["policy"][4:] if "win" in ours or ours["score"]]

    rows = load_from_disk(str(world.plain))["validation"]
    right = [reward(better) > reward(worse) for better, worse in rows["completions"]]
    assert found["judge"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert found["judge"]["accuracy"]["n"] == len(right) == 60
    assert found["judge"]["usage"]["requests"] == asked <= 2 * (60 + 12)

    assert cut["judge"]["accuracy"]["n"] == 20
    assert cut["judge"]["usage"]["requests"] <= 50
    assert 0 < cut["metrics"]["win_rate"]["n"] < 12
    assert any(
        "pairs of samples unjudged: its budget of 50 requests" in warning for warning in cut["warnings"]
    )
    for folder in ("whole", "cut"):
        page = (tmp_path / folder / "report.html").read_text()
        assert "Position consistency" in page
        assert "requests" in page
    evaluations = [str(tmp_path / "whole")]
    with pytest.raises(ConfigError, match=r"the judge 'llm' .* set selection_rule to win_rate"):
        compare.run(evaluations, str(tmp_path / "refused"), "expected_reward")
    compared = compare.run(evaluations, str(tmp_path / "compared"), "win_rate", required=False)
    assert compared.chosen == found["name"] or "judge" in compared.reason
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if key.encode() in path.read_bytes()]
    assert f"{url}/v1" in (tmp_path / "whole" / "parameters.yaml").read_text()
