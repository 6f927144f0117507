"""Public benchmarks are answered and scored in their own formats, with the model's own distribution."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from softpref.cli import main
from softpref.errors import DataError
from softpref.evaluation.leaderboards import read_benchmark, reward_bench_results

from tests.evaluation.conftest import llama, save_model, tokenizer

TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': 'tell me ', 'system': 'of ', 'assistant': ''}[message['role']] + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain"), seed=1, name="spo-alpha-1")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("chat"), seed=2, name="chat")
    own = tokenizer()
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    return folder


def write(path: Path, rows, lines=True):
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def benchmark(policy, questions, output, *options):
    asked = ["benchmark", "--policy", str(policy), "--questions", questions, "--output", str(output)]
    return main([*asked, *options])


def test_alpaca_eval_reads_a_list_of_outputs_drawn_from_the_models_own_distribution(plain, tmp_path):
    asked = [{"instruction": "tell me of fox", "dataset": "helpful_base"}] * 2000
    questions = write(tmp_path / "alpaca_eval.json", asked, lines=False)
    options = ["--prompt_template", "{question} ", "--max_new_tokens", "1"]
    assert benchmark(plain, questions, tmp_path / "out", *options) == 0
    outputs = json.loads((tmp_path / "out" / "spo-alpha-1.json").read_text())
    assert outputs[0].keys() == {"dataset", "instruction", "output", "generator"}
    assert {one["generator"] for one in outputs} == {"spo-alpha-1"}

    ids = tokenizer()("tell me of fox", return_tensors="pt").input_ids
    with torch.no_grad():
        chances = llama(1)(ids).logits[0, -1].softmax(-1)
    found = Counter(one["output"] for one in outputs)
    word = tokenizer().convert_ids_to_tokens(int(chances[3:].argmax()) + 3)  # the first three are special
    chance = float(chances[3:].max())
    assert found[word] / 2000 == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 2000))


def test_mt_bench_asks_each_turn_after_the_answer_before_it(chat, tmp_path, monkeypatch):
    import softpref.lm.tokenization as tokenization

    seen, real = [], tokenization.tokenize_prompt

    def noted(tokenizer, prompt, *args, **options):
        seen.append(prompt)
        return real(tokenizer, prompt, *args, **options)

    monkeypatch.setattr(tokenization, "tokenize_prompt", noted)
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["of fox", "of owl"]},
        {"question_id": 82, "category": "math", "turns": ["of cat"]},
    ]
    file = write(tmp_path / "question.jsonl", questions)
    assert benchmark(chat, file, tmp_path / "out", "--choices", "2", "--system_prompt", "hen") == 0
    one, other = map(json.loads, (tmp_path / "out" / "chat.jsonl").read_text().splitlines())
    assert (one["question_id"], one["model_id"], other["question_id"]) == (81, "chat", 82)
    assert [choice["index"] for choice in one["choices"]] == [0, 1]
    assert [len(choice["turns"]) for choice in (*one["choices"], *other["choices"])] == [2, 2, 1, 1]
    assert one["answer_id"] != other["answer_id"]
    system = {"role": "system", "content": "hen"}
    assert seen[0] == [system, {"role": "user", "content": "of fox"}]
    later = [prompt for prompt in seen if len(prompt) > 2]
    assert [prompt[2]["content"] for prompt in later] == [choice["turns"][0] for choice in one["choices"]]
    assert later[0][3] == {"role": "user", "content": "of owl"}


def test_both_versions_of_arena_hard_are_answered_in_their_own_form(plain, tmp_path):
    newer = write(tmp_path / "new.jsonl", [{"uid": "u1", "category": "hard", "prompt": "tell me of fox"}])
    assert benchmark(plain, newer, tmp_path / "new") == 0
    (line,) = map(json.loads, (tmp_path / "new" / "spo-alpha-1.jsonl").read_text().splitlines())
    assert (line["uid"], line["model"]) == ("u1", "spo-alpha-1")
    assert line["messages"][0] == {"role": "user", "content": "tell me of fox"}
    assert line["messages"][1]["role"] == "assistant"
    assert isinstance(line["messages"][1]["content"]["answer"], str)

    turns = [{"content": "tell me of fox"}]
    older = write(tmp_path / "old.jsonl", [{"question_id": "q1", "cluster": "c", "turns": turns}])
    assert benchmark(plain, older, tmp_path / "old", "--name", "mine") == 0
    (line,) = map(json.loads, (tmp_path / "old" / "mine.jsonl").read_text().splitlines())
    assert line["choices"][0]["turns"][0].keys() == {"content"}


def logp(model, text, answer):
    """log π of an answer's words and its end, by transformers, one sequence at a time."""
    prompt, words = (tokenizer()(part, add_special_tokens=False).input_ids for part in (text, answer))
    ids = torch.tensor([[*prompt, *words, 1]])
    with torch.no_grad():
        logps = model(ids).logits[0].log_softmax(-1)
    places = range(len(prompt), ids.shape[1])
    return sum(float(logps[place - 1, ids[0, place]]) for place in places)


def test_reward_bench_counts_pairs_that_the_implicit_reward_ranks_right(plain, tmp_path):
    reference = save_model(tmp_path / "reference", seed=5, name="reference")
    answers = ["runs home", "sleeps away", "eats .", "runs away", "sleeps .", "eats home"]
    rows = [
        {"id": i, "prompt": f"tell me of {hero}", "chosen": chosen, "rejected": rejected, "subset": subset}
        for i, (hero, chosen, rejected, subset) in enumerate(
            (hero, chosen, rejected, subset)
            for hero, subset in (("fox", "alpacaeval-easy"), ("owl", "math-prm"), ("cat", "hep-go"))
            for chosen, rejected in itertools.combinations(answers, 2)
        )
    ]
    policy, base = llama(1), llama(5)
    rewards = {
        (hero, answer): logp(policy, f"tell me of {hero}", answer) - logp(base, f"tell me of {hero}", answer)
        for hero in ("fox", "owl", "cat")
        for answer in answers
    }
    right = {}
    for row in rows:
        hero = row["prompt"].split()[-1]
        right.setdefault(row["subset"], []).append(
            rewards[hero, row["chosen"]] > rewards[hero, row["rejected"]]
        )
    file = write(tmp_path / "rewardbench.jsonl", rows)
    options = ["--reference", str(reference), "--prompt_template", "{question} "]
    assert benchmark(plain, file, tmp_path / "out", *options) == 0
    results = json.loads((tmp_path / "out" / "spo-alpha-1.json").read_text())
    assert results["model_type"] == "DPO"
    assert len({sum(values) for values in right.values()} - {0, 15}) > 1
    for subset, values in right.items():
        assert results[subset] == pytest.approx(sum(values) / len(values))
    math, code = results["math-prm"], results["hep-go"]
    assert results["sections"]["Reasoning"] == pytest.approx((984 * math + 15 * code) / 999)
    assert results["sections"].keys() == {"Chat", "Reasoning"}


def test_without_a_reference_the_reward_is_the_log_probability_and_a_tie_is_wrong():
    results = reward_bench_results([{"subset": "a"}, {"subset": "a"}], [0.0, 1.0], "m", "")
    assert (results["a"], results["model_type"], results["ref_model"]) == (0.5, "DPO Ref. Free", None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no rows"),
        ("{not json", "cannot be read as JSON"),
        ('{"text": "a"}', "has text, which are the fields of no benchmark"),
        ("[1]", "row 1: expected an object, got int"),
        ('{"instruction": "a"}\n{"text": "b"}', "row 2, lacks instruction, which alpaca-eval has"),
    ],
)
def test_what_is_no_benchmark_is_said(tmp_path, content, said):
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match=said):
        read_benchmark(tmp_path / "file")


def test_a_file_that_is_absent_is_said(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.json does not exist; give the benchmark's file"):
        read_benchmark(tmp_path / "nowhere.json")


def test_what_cannot_be_answered_is_refused_in_a_sentence(plain, tmp_path, capsys):
    asked = write(tmp_path / "mt.jsonl", [{"question_id": 1, "turns": ["a", "b"]}])
    assert benchmark(plain, asked, tmp_path / "out") == 2
    assert "asks 2 turns of a conversation" in capsys.readouterr().err
    one = write(tmp_path / "one.jsonl", [{"instruction": "tell me of fox"}])
    assert benchmark(save_model(tmp_path / "bare", seed=1), one, tmp_path / "out") == 2
    assert "set max_new_tokens" in capsys.readouterr().err
    assert benchmark(plain, one, tmp_path / "out") == 0
    assert benchmark(plain, one, tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["benchmark", "--policy", str(plain), "--output", str(tmp_path)]) == 2
    assert "questions needs a benchmark's file" in capsys.readouterr().err
