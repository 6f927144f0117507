"""The stage end to end on two tiny random models: its figures, samples and page."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from datasets import load_from_disk
from softpref.evaluation.meanings import title
from softpref.evaluation.stage import headline
from softpref.records.evaluation import Evaluation

from tests.evaluation.conftest import METRICS, copy_policy

EXACT = {
    "kl_optimum_to_policy", "entropy", "optimum_entropy", "expected_reward", "optimum_expected_reward",
    "mass_on_set", "least_mass_on_set", "reference_mass_on_set",
}  # fmt: skip


def test_every_figure_has_value_and_counts(evaluation):
    assert set(evaluation["metrics"]) == METRICS
    assert set(evaluation["exact"]) >= EXACT
    for figures in (evaluation["metrics"], evaluation["exact"]):
        for name, figure in figures.items():
            if name.endswith("best_of_8"):  # of six samples
                assert figure["value"] is None
                continue
            # of three prompts no interval is claimed, nor what takes one
            assert (figure["value"] is None) == (name == "calibration_floor"), name
            assert (figure["low"], figure["high"]) == (None, None), name
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
def test_messages_are_evaluated_through_the_chat_template(world, evaluating, tmp_path):
    from datasets import DatasetDict
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
