"""The stage end to end on two tiny random models, as a function and as a KFP component."""

import html
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from softpref.config import build_config
from softpref.errors import ConfigError, DataError
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.meanings import title
from softpref.evaluation.measure import implied_preferences
from softpref.evaluation.stage import headline
from softpref.fitness import ailments
from softpref.lm.loading import load_model, load_tokenizer, with_reward_heads
from softpref.lm.tokenization import stop_token_ids, tokenize_row
from softpref.records.evaluation import Evaluation, read_samples
from softpref.records.model import load_metadata, save_metadata

METRICS = {
    "preference_accuracy", "preference_margin", "win_rate", "expected_reward", "reference_expected_reward",
    "kl_sequence", "entropy_sequence", "distinct_1", "distinct_2", "self_bleu", "perplexity",
    "completion_length", "truncated_fraction", "reference_truncated_fraction", "kl_token",
    "repetition", "reference_repetition", "cross_entropy", "reference_cross_entropy",
    "relative_accuracy", "relative_margin", "reference_accuracy", "implied_accuracy", "implied_log_loss",
    "vote_entropy", "vote_divergence", "overconfidence", "calibration_error", "calibration_floor",
    "length_controlled_win_rate", "best_of_8", "reference_best_of_8",
    *(
        f"{side}{name}"
        for side in ("", "reference_")
        for name in ("vendi_score", "distinct_answers", "mode_share", "compression_ratio", "good_diversity")
    ),
}  # fmt: skip
EXACT = {
    "kl_optimum_to_policy", "entropy", "optimum_entropy", "expected_reward", "optimum_expected_reward",
    "mass_on_set", "least_mass_on_set", "reference_mass_on_set",
}  # fmt: skip


@pytest.fixture
def evaluation(evaluated):
    return json.loads((evaluated / "evaluation.json").read_text())


def copy_policy(world, folder, **metadata):
    shutil.copytree(world.policy, folder)
    save_metadata(folder, load_metadata(folder) | metadata)
    return folder


def test_every_figure_has_value_interval_and_counts(evaluation):
    assert set(evaluation["metrics"]) == METRICS
    assert set(evaluation["exact"]) >= EXACT
    for figures in (evaluation["metrics"], evaluation["exact"]):
        for name, figure in figures.items():
            if name.endswith("best_of_8"):  # of six samples
                assert figure["value"] is None
                continue
            if name in ("least_mass_on_set", "calibration_floor"):  # nothing to resample
                assert (figure["low"], figure["high"]) == (None, None)
            else:
                assert figure["low"] <= figure["value"] <= figure["high"], name
            assert figure["n"] >= figure["prompts"] == 3, name


def test_evaluation_says_what_the_comparison_of_methods_needs(evaluation):
    assert (evaluation["rounds"], evaluation["train_on"], evaluation["extrapolation"]) == (
        1,
        "preferences",
        0,
    )
    reward, entropy = np.array(evaluation["softmax_frontier"]).T
    assert entropy[0] == pytest.approx(np.log(9))
    assert (np.diff(reward) > 0).all()
    assert (np.diff(entropy) < 0).all()
    assert evaluation["exact"]["entropy"]["value"] < np.log(9)


def test_the_headline_tells_models_apart_on_one_page(evaluation):
    found = headline(Evaluation.of(evaluation))
    assert (found["alpha"], found["beta"]) == (evaluation["alpha"], evaluation["beta"])
    mass = evaluation["exact"]["mass_on_set"]["value"]
    assert found["exact/mass_on_set"] == pytest.approx(mass, rel=1e-5)
    assert len(found) == 9

    baseline = headline(Evaluation.of(evaluation | {"method": "dpo", "exact": None}))
    assert "alpha" not in baseline
    assert "beta" in baseline
    assert {"self_bleu", "truncated_fraction", "expected_reward"} <= set(baseline)
    assert not [name for name in baseline if name.startswith("exact/")]


def test_the_headline_holds_finite_numbers_alone(evaluation):
    broken = {"value": float("nan"), "low": None, "high": None, "n": 1, "prompts": 1, "unit": ""}
    absent = broken | {"value": None}
    metrics = evaluation["metrics"] | {"kl_sequence": broken, "entropy_sequence": absent}
    assert set(headline(Evaluation.of(evaluation))) - set(
        headline(Evaluation.of(evaluation | {"metrics": metrics}))
    ) == {
        "kl_sequence",
        "entropy_sequence",
    }


@pytest.mark.usefixtures("recorded")
def test_the_optimum_follows_the_kind_of_rows_and_the_settings_of_training(world, evaluating, tmp_path):
    found = {}
    for kind, size in (("pairwise", 2), ("best_of_n", 4), ("ranking", 4)):
        dataset = shutil.copytree(world.dataset, tmp_path / kind)
        stats = {"dataset_hash": "abc", "kinds": {kind: 60}, "completions_per_row": {str(size): 60}}
        (dataset / "stats.json").write_text(json.dumps(stats))
        policy = copy_policy(
            world, tmp_path / f"{kind}-policy", beta=30.0
        )  # the reference is far off the set
        found[kind] = evaluating(world, tmp_path / f"{kind}-out", dataset=dataset, policy=policy)["exact"]
    optima = sorted(exact["optimum_entropy"]["value"] for exact in found.values())
    assert min(np.diff(optima)) > 1e-3
    assert len({exact["entropy"]["value"] for exact in found.values()}) == 1

    policy = copy_policy(world, tmp_path / "policy", extrapolation=0.5, rounds=2, train_on="samples")
    other = evaluating(world, tmp_path / "other", policy=policy)
    assert (other["rounds"], other["train_on"], other["extrapolation"]) == (2, "samples", 0.5)
    assert other["exact"]["optimum_entropy"]["value"] is None
    assert any("not known: the model is extrapolated" in text for text in other["warnings"])


def test_figures_agree_with_the_samples_written(evaluation, evaluated):
    lines = [json.loads(line) for line in (evaluated / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["tell me of cat ", "tell me of hen ", "tell me of <b> "]
    scores = [[sample["score"] for sample in line["policy"]] for line in lines]
    theirs = [[sample["score"] for sample in line["reference"]] for line in lines]
    metrics, by_prompt = evaluation["metrics"], evaluation["by_prompt"]
    assert np.shape(scores) == np.shape(theirs) == (3, 6)
    assert metrics["expected_reward"]["value"] == pytest.approx(np.mean(scores))
    assert metrics["reference_expected_reward"]["value"] == pytest.approx(np.mean(theirs))
    kl = [sample["kl"] for line in lines for sample in line["policy"]]
    assert metrics["kl_sequence"]["value"] == pytest.approx(np.mean(kl))
    assert by_prompt["expected_reward"] == pytest.approx(np.mean(scores, axis=1))
    assert metrics["win_rate"]["value"] == pytest.approx(np.mean(by_prompt["win_rate"]))


def test_report_is_one_page_with_all_text_escaped(evaluated):
    page = (evaluated / "report.html").read_text()
    assert "spo-1 &lt;&amp;&gt;" in page
    assert "tell me of &lt;b&gt;" in page
    assert "spo-1 <&>" not in page
    assert "of <b>" not in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert page.count("<svg") == 4


def test_every_figure_stands_on_the_page(evaluated, evaluation):
    page = html.unescape((evaluated / "report.html").read_text())
    for group in ("metrics", "exact"):
        for name, figure in evaluation[group].items():
            if not name.startswith(("reference_", "optimum_")):
                assert f'<th scope="row">{title(name)}</th>' in page
            if figure["value"] is not None:
                assert f'data-value="{figure["value"]}"' in page, name


def test_accuracies_go_by_the_policy_by_the_reference_and_by_their_difference(world, evaluation):
    """The right values: log-probabilities by transformers' own logits, one sequence at a time."""
    rows = load_from_disk(str(world.dataset))["test"]
    tokenizer = load_tokenizer(str(world.policy))
    logps = {side: [] for side in ("policy", "reference")}
    for side, found in logps.items():
        model = load_model(str(getattr(world, side))).eval()
        stops = stop_token_ids(tokenizer, model)
        for row in rows:
            pair = []
            for one in tokenize_row(tokenizer, row["prompt"], row["completions"], stop_ids=stops):
                ids = torch.tensor([[*one.prompt, *one.completion]])
                with torch.no_grad():
                    scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                pair.append(float(scores[-len(one.completion) :].sum()))
            found.append(pair)
    ours, theirs = (np.array(logps[side]) for side in ("policy", "reference"))
    shares = np.array([1.0 if share is None else share for share in rows["probability"]])
    side = np.sign(shares - 0.5)
    metrics = {name: figure["value"] for name, figure in evaluation["metrics"].items()}
    for name, scores in {"preference": ours, "relative": ours - theirs, "reference": theirs}.items():
        margins = (scores[:, 0] - scores[:, 1])[side != 0] * side[side != 0]
        assert metrics[f"{name}_accuracy"] == pytest.approx((margins > 0).mean()), name
    implied = 1 / (1 + np.exp(ours[:, 1] - ours[:, 0]))  # α = 1, anchor 0
    loss = -shares * np.log(implied) - (1 - shares) * np.log(1 - implied)
    assert metrics["implied_log_loss"] == pytest.approx(loss.mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"method": "spo", "alpha": 0.5, "anchor": 1.0, "beta": 0.1}, (0.5, 1.0)),
        ({"method": "spo", "alpha": 2.0}, (2.0, 0.0)),
        ({"method": "spo", "alpha": 0.0}, None),
        ({"method": "dpo", "beta": 0.1}, (0.1, 1.0)),
        ({"method": "ipo", "beta": 0.1}, None),
        ({}, None),
    ],
)
def test_only_a_loss_that_is_a_likelihood_of_preferences_implies_any(metadata, expected):
    assert implied_preferences(metadata) == expected


@pytest.mark.usefixtures("recorded")
def test_all_held_out_rows_count_and_max_prompts_limits_the_samples_alone(world, evaluating, tmp_path):
    metrics = evaluating(world, tmp_path / "out", max_prompts=2)["metrics"]
    assert metrics["preference_accuracy"]["prompts"] == 3
    assert metrics["kl_sequence"]["prompts"] == 2
    fewer = evaluating(world, tmp_path / "fewer", max_rows=20)["metrics"]
    assert fewer["preference_accuracy"]["n"] == 20


def test_few_prompts_and_strange_samples_are_warned_of(evaluation):
    text = " ".join(evaluation["warnings"])
    assert "Only 3 held-out prompts" in text
    assert "outside the set" in text


@pytest.mark.usefixtures("recorded")
def test_the_batch_size_changes_no_figure(evaluation, world, evaluating, tmp_path):
    again = evaluating(world, tmp_path / "again", batch_size=5)
    for name, figure in again["metrics"].items():
        assert figure["value"] == pytest.approx(evaluation["metrics"][name]["value"], abs=1e-4), name
    assert again["evaluation_id"] == evaluation["evaluation_id"]


@pytest.mark.usefixtures("recorded")
def test_evaluations_are_comparable_only_with_same_data_judge_and_reference(
    evaluation, world, evaluating, tmp_path
):
    others = {
        "judge": evaluating(world, tmp_path / "a", judge="bradley-terry"),
        "reference": evaluating(world, tmp_path / "b", reference=world.policy),
        "data": evaluating(world, tmp_path / "c", split="validation"),
        "settings": evaluating(world, tmp_path / "d", samples_per_prompt=2),
    }
    identities = [evaluation["evaluation_id"], *(other["evaluation_id"] for other in others.values())]
    assert len(set(identities)) == len(identities)
    for part, other in others.items():  # what differs can be told
        ours, theirs = evaluation["evaluated_on"], other["evaluated_on"]
        differing = {name for name in ours if ours[name] != theirs[name]}
        assert differing == ({"data", "settings"} if part == "data" else {part})


@pytest.mark.usefixtures("recorded")
def test_a_policy_that_is_the_reference_has_no_kl_and_wins_half(world, evaluating, tmp_path):
    policy = copy_policy(world, tmp_path / "policy")
    figures = evaluating(world, tmp_path / "out", policy=policy, reference=policy, samples_per_prompt=100)
    assert figures["metrics"]["kl_sequence"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert figures["metrics"]["win_rate"]["value"] == pytest.approx(0.5, abs=0.06)


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


def test_the_heads_of_a_reward_model_say_how_much_of_a_win_is_sure(world, evaluating, tmp_path, recorded):
    """The right values: one text at a time, by transformers alone."""
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


@pytest.mark.usefixtures("recorded")
def test_messages_are_evaluated_through_the_chat_template(world, evaluating, tmp_path):
    from datasets import DatasetDict, load_from_disk
    from transformers import AutoTokenizer

    def as_messages(row):
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
        }

    plain = load_from_disk(str(world.plain))
    DatasetDict({split: rows.map(as_messages) for split, rows in plain.items()}).save_to_disk(
        str(tmp_path / "chat")
    )
    policy = copy_policy(world, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s> {{ m.content }} of"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(policy)
    evaluation = evaluating(world, tmp_path / "out", dataset=tmp_path / "chat", policy=policy)
    assert evaluation["metrics"]["preference_accuracy"]["n"] == 60
    first = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "user: tell me of cat "


def test_figures_go_to_the_run_of_the_policy(world, evaluating, recorded, tmp_path):
    policy = copy_policy(world, tmp_path / "policy", run_id="run-of-training")
    evaluation = evaluating(world, tmp_path / "out", policy=policy)
    assert recorded[0][1]["run_id"] == evaluation["run_id"] == "run-of-training"
    logged = next(call[1] for call in recorded if call[0] == "metrics")
    assert logged["eval/win_rate"] == evaluation["metrics"]["win_rate"]["value"]
    assert logged["eval/exact/mass_on_set"] == evaluation["exact"]["mass_on_set"]["value"]
    assert {call[1] for call in recorded if call[0] == "artifact"} == {
        "evaluation.json",
        "samples.json",
        "samples.jsonl",
        "report.html",
    }
    assert ("dataset", "evaluation") in recorded


def test_extrapolated_models_are_evaluated_beside_their_policy(
    world, evaluating, evaluation, extrapolated, recorded, tmp_path, monkeypatch
):
    from softpref.lm import loading

    loaded = []
    load = loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda source, **how: loaded.append(source) or load(source, **how)
    )
    result = evaluating(world, tmp_path / "out", policy=extrapolated)
    assert loaded.count(str(world.reference)) == 1
    read = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("evaluation.json")
    }
    assert read["out"] == result
    for figures in ("metrics", "exact", "by_prompt", "evaluation_id"):  # as if nothing lay beside it
        assert result[figures] == evaluation[figures]
    for weight in (-0.5, 0.5):
        member = read[f"extrapolated-{weight:g}"]
        assert member["name"] == f"{result['name']}-expo-{weight:g}"
        assert member["extrapolation"] == weight
        assert member["run_id"] == "run-of-training"
        assert member["model_uri"] == f"{extrapolated}/extrapolated-{weight:g}"
        assert member["evaluation_id"] == result["evaluation_id"]
        expected = member["metrics"]["reference_expected_reward"]
        assert expected == result["metrics"]["reference_expected_reward"]
        assert f"extrapolated by {weight:g}" in (
            tmp_path / "out" / f"extrapolated-{weight:g}" / "report.html"
        ).read_text(encoding="utf-8")
    assert (
        read["extrapolated--0.5"]["metrics"]["kl_sequence"]["value"]
        < result["metrics"]["kl_sequence"]["value"]
        < read["extrapolated-0.5"]["metrics"]["kl_sequence"]["value"]
    )
    assert {options["run_id"] for kind, options in recorded if kind == "open"} == {"run-of-training"}
    logged = {name: value for call in recorded if call[0] == "metrics" for name, value in call[1].items()}
    assert logged["eval/win_rate"] == result["metrics"]["win_rate"]["value"]
    for weight in ("-0.5", "0.5"):
        figure = read[f"extrapolated-{weight}"]["metrics"]["win_rate"]["value"]
        assert logged[f"eval/expo-{weight}/win_rate"] == figure

    alone = evaluating(world, tmp_path / "alone", policy=extrapolated / "extrapolated-0.5")
    assert alone == read["extrapolated-0.5"]
    last = [call[1] for call in recorded if call[0] == "metrics"][-1]
    assert all(name.startswith("eval/expo-0.5/") for name in last)


@pytest.mark.usefixtures("recorded")
def test_a_half_written_extrapolated_model_is_refused(world, evaluating, tmp_path):
    policy = copy_policy(world, tmp_path / "policy")
    shutil.copytree(world.policy, policy / "extrapolated-0.5")
    with pytest.raises(ConfigError, match=r"extrapolated-0\.5 is not a complete extrapolated model"):
        evaluating(world, tmp_path / "out", policy=policy)


@pytest.mark.usefixtures("recorded")
def test_completions_that_outgrow_the_model_are_refused_before_any_is_drawn(
    world, evaluating, tmp_path, monkeypatch
):
    monkeypatch.setattr("softpref.evaluation.measure.draw", lambda *a, **k: pytest.fail("drew samples"))
    with pytest.raises(ConfigError, match=r"up to 4 tokens .* up to 61 .* 64 positions; lower max_new"):
        evaluating(world, tmp_path / "out", max_new_tokens=61)


@pytest.mark.usefixtures("recorded")
def test_a_reference_of_another_vocabulary_is_refused_before_any_is_drawn(
    world, evaluating, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("softpref.evaluation.measure.draw", lambda *a, **k: pytest.fail("drew samples"))
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    model = AutoModelForCausalLM.from_pretrained(reference)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(reference)
    with pytest.raises(ConfigError, match="give the reference that the policy was trained from"):
        evaluating(world, tmp_path / "out", reference=reference)


@pytest.mark.usefixtures("recorded")
def test_a_policy_of_other_data_is_warned_of(world, evaluating, tmp_path):
    policy = copy_policy(world, tmp_path / "policy", dataset_hash="xyz")
    evaluation = evaluating(world, tmp_path / "out", policy=policy, exact_prompts=0)
    assert any("another dataset" in text for text in evaluation["warnings"])
    assert evaluation["exact"] is None


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("anchor", "remedy"),
    [(0.0, "set anchor to 1 (softness relative to the reference)"), (1.0, "lower alpha")],
)
def test_saturation_in_training_is_said_in_the_report(world, evaluating, tmp_path, anchor, remedy):
    policy = copy_policy(world, tmp_path / "policy", saturated=0.93, anchor=anchor)
    evaluation = evaluating(world, tmp_path / "out", policy=policy, exact_prompts=0)
    [said] = [text for text in evaluation["warnings"] if "softness has no effect" in text]
    assert said.startswith("In training 93% of the pairs have a margin beyond 5 nats")
    assert said.endswith(f"{remedy}.")
    assert evaluation["anchor"] == anchor
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("Softness α = 1, relative to the reference" in page) is bool(anchor)


@pytest.mark.usefixtures("recorded")
def test_what_training_left_out_or_cut_is_said_in_the_report(world, evaluating, tmp_path):
    counts = {"given": 9, "left_out": 2, "cut_completion": 2, "cut_prompt": 3}
    policy = copy_policy(
        world, tmp_path / "policy", row_counts={"train": counts}, cut_rows="leave_out", max_prompt_length=2
    )
    evaluation = evaluating(world, tmp_path / "out", policy=policy, exact_prompts=0)
    said = [
        "2 of 9 training rows have a completion longer than max_completion_length, and were left out.",
        "3 of 9 training rows have a prompt longer than max_prompt_length, which lost its beginning.",
        "60 of 60 held-out rows have a prompt longer than max_prompt_length, which lost its beginning.",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    for text in said:
        assert text in evaluation["warnings"]
        assert text in page


def test_what_is_wrong_is_refused_before_a_model_is_loaded(
    world, evaluating, evaluated, tmp_path, monkeypatch
):
    monkeypatch.setattr("softpref.lm.loading.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(ConfigError, match="holds an evaluation already, of something else"):
        evaluating(world, evaluated, seed=7)
    with pytest.raises(ConfigError, match="holds no config"):
        evaluating(world, tmp_path / "a", policy=tmp_path)
    with pytest.raises(ConfigError, match="not a dataset folder"):
        evaluating(world, tmp_path / "b", dataset=tmp_path)
    with pytest.raises(DataError, match="no split 'tets'; it has train"):
        evaluating(world, tmp_path / "c", split="tets")
    with pytest.raises(ConfigError, match="set max_new_tokens"):
        evaluating(world, tmp_path / "d", policy=world.reference)
    with pytest.raises(ConfigError, match="there is no such folder"):
        evaluating(world, tmp_path / "e", policy="nowhere")


@pytest.mark.parametrize("tracked", [False, True])
def test_a_finished_evaluation_called_again_gives_its_figures_and_tracks_what_a_kill_left_out(
    world, evaluating, evaluated, recorded, tmp_path, monkeypatch, caplog, tracked
):
    monkeypatch.setattr("softpref.lm.loading.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr("softpref.tracking.is_finished", lambda folder: tracked)
    shutil.copytree(evaluated, tmp_path / "out")
    found = evaluating(world, tmp_path / "out")
    assert found == json.loads((evaluated / "evaluation.json").read_text())
    assert "holds this very evaluation, finished" in caplog.text
    figures = {name: value for call in recorded if call[0] == "metrics" for name, value in call[1].items()}
    assert figures.get("eval/win_rate") == (None if tracked else found["metrics"]["win_rate"]["value"])


@pytest.mark.usefixtures("recorded")
def test_an_evaluation_of_a_model_that_has_changed_is_not_taken_for_this_ones(
    world, evaluating, evaluated, tmp_path
):
    shutil.copytree(evaluated, tmp_path / "out")
    policy = copy_policy(world, tmp_path / "policy")
    evaluating(world, tmp_path / "out", policy=policy)  # wherever it lies
    file = policy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"of something else \(policy: '\w+' there, '\w+' here\)"):
        evaluating(world, tmp_path / "out", policy=policy)


def test_a_judge_that_cannot_be_had_is_refused_before_anything_is_imported(world, tmp_path):
    code = (
        "import sys; from softpref.cli import main; status = main(sys.argv[1:]); "
        "print(status, *{'datasets', 'torch', 'transformers', 'mlflow'} & set(sys.modules))"
    )
    folders = ["--dataset", world.plain, "--reference", world.reference, "--policy", world.policy]
    arguments = ["evaluate", *folders, "--output", tmp_path / "out", "--judge", "expert"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.split() == ["2"]
    assert "the judge 'expert' needs the dataset's outcomes.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples_per_prompt": 0}, "at least 1"),
        ({"confidence": 95}, "between 0 and 1"),
        ({"judge": "gpt"}, "bradley-terry"),
        ({"top_p": 0.9}, "no parameter 'top_p'"),
        ({"sample_per_prompt": 4}, "did you mean 'samples_per_prompt'"),
    ],
)
def test_wrong_parameters_are_refused_with_what_is_right(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config(EvaluationConfig, values)


def artifact(path, uri=""):
    return SimpleNamespace(path=str(path), uri=uri or f"file://{path}", metadata={})


def test_component_writes_artifacts_and_tracks_to_a_real_store(world, extrapolated, empty_store, tmp_path):
    import mlflow
    from softpref.evaluation.component import evaluate_model

    shutil.copy(empty_store, tmp_path / "own.db")
    store, logged = f"sqlite:///{tmp_path}/own.db", {}
    metrics = SimpleNamespace(log_metric=logged.__setitem__, metadata={})
    evaluation, report = artifact(tmp_path / "evaluation"), artifact(tmp_path / "report.html")
    policy = copy_policy(world, tmp_path / "policy")
    shutil.copytree(extrapolated / "extrapolated-0.5", policy / "extrapolated-0.5")
    evaluate_model.python_func(
        dataset=artifact(world.dataset),
        reference=artifact(world.reference),
        policy=artifact(policy, uri="s3://models/spo-1"),
        evaluation=evaluation,
        report=report,
        metrics=metrics,
        samples_per_prompt=4,
        experiment="component",
        tracking_uri=store,
        overrides={"bootstrap_samples": 100},
    )
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert written["model_uri"] == "s3://models/spo-1"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert logged == headline(Evaluation.of(written))
    assert logged["win_rate"] == float(f"{written['metrics']['win_rate']['value']:.6g}")
    assert metrics.metadata["model"] == evaluation.metadata["name"] == written["name"]
    assert len(logged) + len({*metrics.metadata} - {"display_name"}) <= 10  # one page of the UI's table
    assert {
        artifact.metadata["display_name"].split(":")[0] for artifact in (metrics, evaluation, report)
    } == {written["name"]}
    assert (evaluation.metadata["alpha"], evaluation.metadata["judge"]) == (written["alpha"], "expert")
    assert all(np.isfinite(value) for value in logged.values())
    assert evaluation.metadata["evaluation_id"] == written["evaluation_id"]
    client = mlflow.MlflowClient(store)
    [run] = client.search_runs([client.get_experiment_by_name("component").experiment_id])
    win_rate = written["metrics"]["win_rate"]
    for key, part in {
        "eval/win_rate": "value",
        "eval/low/win_rate": "low",
        "eval/high/win_rate": "high",
    }.items():
        assert run.data.metrics[key] == win_rate[part]
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == written["dataset_hash"][:36]
    mlflow.set_tracking_uri(store)
    try:
        table = client.load_table(run.info.experiment_id, "evaluation/samples.json", [run.info.run_id])
    finally:
        mlflow.set_tracking_uri(None)
    samples = read_samples(tmp_path / "evaluation", 1000)
    assert table["completion"].tolist() == [text.text for one in samples for text in one.policy]
    assert table["prompt"][0] == samples[0].prompt == written["example"]
    member = json.loads((tmp_path / "evaluation/extrapolated-0.5/evaluation.json").read_text())
    assert member["model_uri"] == "s3://models/spo-1/extrapolated-0.5"
    win_rate = run.data.metrics["eval/expo-0.5/win_rate"]
    assert win_rate == pytest.approx(member["metrics"]["win_rate"]["value"])
    files = client.list_artifacts(run.info.run_id, "evaluation/extrapolated-0.5")
    assert len(files) == 4


def test_models_that_were_broken_on_purpose_are_told_from_sharper_and_softer_ones(
    world, evaluating, tmp_path, recorded
):
    """From weights to choice: one sentence over and over, and random tokens; scaled logits are no fault."""
    import torch
    from softpref.evaluation import compare
    from softpref.lm.loading import load_model

    def save(name, change, metadata=None):
        folder = tmp_path / name
        shutil.copytree(world.policy, folder)
        model = load_model(str(world.reference))
        with torch.no_grad():
            model.lm_head.weight.mul_(2.5)  # fewer likely continuations than random weights have
            change(model)
        model.save_pretrained(folder)
        save_metadata(
            folder, {"name": name, "method": "spo", "max_completion_length": 24, **(metadata or {})}
        )
        return folder

    def sentence(model):
        """Each token is followed by one other, in a circle."""
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        circle = [6, 10, 13, 7, 16]
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[1:] = torch.eye(16)
        model.lm_head.weight.zero_()
        for token in range(1, 17):
            after = circle[(circle.index(token) + 1) % 5] if token in circle else circle[0]
            model.lm_head.weight[after, token - 1] = 10.0

    reference = save("reference", lambda model: None)
    members = {
        "sharper": (lambda model: model.lm_head.weight.mul_(1.4), 0.5),
        "softer": (lambda model: model.lm_head.weight.mul_(0.8), 2.0),
        "repeating": (sentence, 4.0),
        "random": (lambda model: model.lm_head.weight.zero_(), 8.0),
    }
    found = {}
    for name, (change, alpha) in members.items():
        policy = save(name, change, {"alpha": alpha, "beta": 0.1})
        found[name] = evaluating(
            world, tmp_path / f"{name}-evaluation", policy=policy, reference=reference, samples_per_prompt=40
        )
    metrics = {name: evaluation["metrics"] for name, evaluation in found.items()}
    assert (
        metrics["random"]["cross_entropy"]["value"]
        > 2 + metrics["random"]["reference_cross_entropy"]["value"]
    )
    assert metrics["repeating"]["repetition"]["value"] > 0.7
    assert metrics["sharper"]["kl_token"]["value"] == pytest.approx(
        metrics["sharper"]["kl_sequence"]["value"] / metrics["sharper"]["completion_length"]["value"]
    )
    result = compare.run([str(tmp_path / f"{name}-evaluation") for name in members], str(tmp_path / "out"))
    assert result.chosen in ("sharper", "softer")
    assert [name for name, evaluation in found.items() if ailments(Evaluation.of(evaluation))] == [
        "repeating",
        "random",
    ]
    assert "repeats itself: " in found["repeating"]["warnings"][-1]
    assert "writes what its reference would not: " in found["random"]["warnings"][-1]
    for name in ("repeating", "random"):
        assert f"{name} " in result.reason.partition("Never chosen: ")[2]


def test_a_language_model_judges_pairs_and_what_it_cannot_tell_is_absent(
    world, evaluating, tmp_path, recorded, monkeypatch
):
    """The endpoint judges by the planted rewards, so the figures are known from the samples."""
    pytest.importorskip("openai")
    from softpref.evaluation import compare

    from tests.evaluation.conftest import ANSWERS, REWARDS
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
