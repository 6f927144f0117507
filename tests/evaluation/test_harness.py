"""Tasks of the LM Evaluation Harness are figures of an evaluation."""

import json
import math

import pytest
import torch
from softpref.errors import ConfigError
from softpref.evaluation.harness import find_tasks, measured

from tests.evaluation.conftest import llama, tokenizer

pytest.importorskip("lm_eval")
ANSWERS, CHOICES = {"fox": 0, "owl": 1, "cat": 2, "hen": 1}, ("runs home", "sleeps .", "eats away")


@pytest.fixture
def task(tmp_path):
    """A task of multiple choice, on a file here."""
    rows = [
        {"question": f"tell me of {hero}", "choices": CHOICES, "answer": ANSWERS[hero]} for hero in ANSWERS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "animals.yaml"
    file.write_text(
        "task: animals\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    return str(file)


def test_a_task_is_measured_on_the_loaded_model(task):
    model, words = llama(3), tokenizer()
    model.config.pad_token_id = words.pad_token_id = 1
    (figure,) = measured(find_tasks([task]), model, words, batch_size=4, confidence=0.95).values()
    right = []
    for hero, answer_place in ANSWERS.items():
        scores = []
        for choice in CHOICES:
            prompt, answer = (words(text).input_ids for text in (f"tell me of {hero}", choice))
            with torch.no_grad():
                logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(logps[len(prompt) - 1 + i, id]) for i, id in enumerate(answer)))
        right.append(scores[answer_place] == max(scores))
    share = sum(right) / len(right)
    assert 0 < share < 1  # else the interval below says nothing
    assert figure.value == pytest.approx(share)
    error = math.sqrt(share * (1 - share) / (len(right) - 1))
    assert figure.high - figure.value == pytest.approx(1.96 * error, rel=1e-3)
    assert figure.n == len(ANSWERS)


def test_an_unknown_task_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"lm_eval_tasks: .*nowhere"):
        find_tasks([str(tmp_path / "nowhere.yaml")])


def test_none_is_asked_for():
    assert find_tasks([]) is None
