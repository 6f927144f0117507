"""Which rows take part in training, how much each counts, and what is said of the others."""

import logging
from copy import deepcopy

import numpy as np
import pytest
import torch
from softpref.errors import ConfigError, DataError
from softpref.lm.tokenization import tokenize_prompt

pytestmark = pytest.mark.fast

SHORT = {"prompt": "abc", "completions": ["ab", "ba"]}
OTHER = {"prompt": "cab", "completions": ["fed", "g"]}
CUT = {"prompt": "bad", "completions": ["abcdefgh", "a"]}  # nine tokens with the end token, where eight fit
EQUAL = {"prompt": "dad", "completions": ["he", "he"]}


class Judge:
    """Likes long texts, so that a cut one would win."""

    name = description = fingerprint = "length"

    def probabilities(self, prompts, first, second):
        return 1 / (1 + np.exp([len(b) - len(a) for a, b in zip(first, second, strict=True)]))


@pytest.fixture
def one_step(make_trainer, watch):
    """`one_step(rows, **options) -> (trainer, gradient)` of a step on all rows, without a KL term."""

    def run(rows, **options):
        defaults = {"beta": 0.0, "max_steps": 1, "per_device_train_batch_size": len(rows)}
        trainer = make_trainer(rows, **{**defaults, **options})
        trainer.add_callback(watch)
        trainer.train()
        return trainer, watch.gradients.pop()

    return run


def test_rows_that_are_cut_or_identical_take_no_part_and_are_counted(one_step, caplog):
    trainer, gradient = one_step([SHORT, CUT, OTHER, EQUAL])
    assert trainer.row_counts["train"] == {"given": 4, "left_out": 2, "cut_completion": 1, "identical": 1}
    assert "1 of 4 training rows have a completion longer than max_completion_length" in caplog.text
    assert "1 of 4 training rows have completions that are identical as tokens, and were left" in caplog.text
    torch.testing.assert_close(gradient, one_step([SHORT, OTHER])[1])


def test_cut_rows_are_kept_where_asked(one_step, tokenizer, caplog):
    trainer, gradient = one_step([SHORT, CUT], cut_rows="keep")
    assert trainer.row_counts["train"] == {"given": 2, "cut_completion": 1}
    assert trainer.train_dataset[1]["completions"][0] == tokenizer.convert_tokens_to_ids(list("abcdefgh"))
    assert "and were left out" not in caplog.text
    assert not torch.allclose(gradient, one_step([SHORT])[1])


def test_prompts_of_rows_left_out_still_serve_the_kl_term(make_trainer, tokenizer):
    trainer = make_trainer([SHORT, CUT, EQUAL])
    expected = [tokenize_prompt(tokenizer, row["prompt"]).ids for row in (SHORT, CUT, EQUAL)]
    assert trainer.buffer._prompts == [expected]


def test_prompts_may_come_one_by_one(make_trainer, tokenizer):
    texts = ["abc", "cab", "bad"]
    prompts = ({"prompt": text} for text in texts)
    trainer = make_trainer([SHORT], kl_prompts="separate", trainer_options={"prompt_dataset": prompts})
    assert trainer.buffer._prompts == [[tokenize_prompt(tokenizer, text).ids for text in texts]]


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize(("row", "reason"), [(CUT, "1 one of more than"), (EQUAL, "1 have completions that")])
def test_data_of_which_nothing_is_left_are_refused(make_trainer, split, row, reason):
    data = (
        {"rows": [row]}
        if split == "training"
        else {"rows": [SHORT], "trainer_options": {"eval_dataset": [row]}}
    )
    with pytest.raises(DataError, match=f"none of the 1 {split} rows can take part.*{reason}"):
        make_trainer(**data)


def test_prompts_that_lose_their_beginning_are_counted(make_trainer, caplog):
    long = {"prompt": "abcdefgh" * 3, "completions": ["a", "b"]}
    trainer = make_trainer(
        [SHORT, long], trainer_options={"eval_dataset": [long], "prompt_dataset": [{"prompt": "h" * 20}]}
    )
    assert trainer.row_counts == {
        "train": {"given": 2, "cut_prompt": 1},
        "validation": {"given": 1, "cut_prompt": 1},
    }
    for rows in ("1 of 2 training rows", "1 of 1 validation rows", "1 of 1 prompt rows"):
        assert f"{rows} have a prompt longer than max_prompt_length" in caplog.text


def test_only_the_first_process_says_it(make_trainer, caplog, monkeypatch):
    from softpref.spo import SPOConfig

    monkeypatch.setattr(SPOConfig, "process_index", 1)
    make_trainer([SHORT, CUT], beta=0.0)
    assert "training rows" not in caplog.text


@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_a_row_of_weight_two_counts_as_two_rows(one_step, method):
    beta = {"beta": 0.3} if method == "dpo" else {}
    _, weighted = one_step(
        [{**SHORT, "weight": 3.0}, {**OTHER, "weight": 1.5}], method=method, alpha=0.5, **beta
    )
    _, twice = one_step([SHORT, SHORT, OTHER], method=method, alpha=0.5, **beta)
    torch.testing.assert_close(weighted, twice, rtol=1e-4, atol=1e-7)


def test_equal_weights_change_nothing(one_step):
    rows = [{**row, "weight": 7} for row in (SHORT, OTHER)]
    torch.testing.assert_close(one_step(rows)[1], one_step([SHORT, OTHER])[1], rtol=0, atol=0)


def test_a_weight_of_zero_leaves_a_row_out_of_the_metrics_too(one_step, logs_of):
    trainer, gradient = one_step([{**SHORT, "weight": 1}, {**OTHER, "weight": 0}])
    alone, expected = one_step([SHORT])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    for name in ("loss/preference", "logps/chosen", "rewards/margins"):
        assert logs_of(trainer)[0][name] == pytest.approx(logs_of(alone)[0][name], rel=1e-5)


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan"), "1", True])
def test_a_weight_that_is_none_is_refused(make_trainer, weight):
    with pytest.raises(DataError, match=r"training row 1: weight must be a number of at least 0"):
        make_trainer([SHORT, {**OTHER, "weight": weight}])


def test_weights_that_are_all_zero_are_refused(make_trainer):
    with pytest.raises(DataError, match="every training row has weight 0"):
        make_trainer([{**SHORT, "weight": 0.0}])


def test_ids_without_an_embedding_are_refused_where_a_text_uses_them(make_trainer, make_model, tokenizer):
    small = make_model(tokenizer)
    known = tokenizer.convert_tokens_to_ids("f")  # and the letters before it
    small.resize_token_embeddings(known + 1)
    with pytest.raises(
        ConfigError, match=rf"gives id {known + 1}, but the model's embedding has {known + 1}"
    ):
        make_trainer([{"prompt": "abc", "completions": ["ab", "gab"]}], model=small)
    with pytest.raises(ConfigError, match="gives id"):
        make_trainer([SHORT], model=small, trainer_options={"prompt_dataset": [{"prompt": "bag"}]})


def test_a_pad_token_without_an_embedding_is_harmless(make_trainer, make_model, tokenizer, logs_of):
    padded = deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<outside>"})
    model = make_model(tokenizer)
    assert padded.pad_token_id >= model.get_input_embeddings().num_embeddings
    losses = []
    for own in (tokenizer, padded):
        trainer = make_trainer(
            [SHORT, OTHER], model=deepcopy(model), trainer_options={"processing_class": own}
        )
        trainer.train()
        losses.append([log["loss"] for log in logs_of(trainer)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["spo", "sppo"])
def test_rows_of_a_round_with_cut_samples_take_no_part(
    make_trainer, make_model, tokenizer, logs_of, caplog, method
):
    """A row is of samples that ended, where two did; one without has weight 0, and the mean weight is 1."""
    options = {"method": method, "beta": 0.5} if method == "sppo" else {"beta": 0.0}
    trainer = make_trainer(
        [{"prompt": text} for text in ("a", "b", "cab", "dad", "head", "he", "fad", "bed")],
        model=make_model(tokenizer, spread=0.1),  # every token is about as likely, the end token too
        trainer_options={"judge": Judge()},
        train_on="samples",
        completions_per_prompt=2,
        per_device_train_batch_size=8,
        max_steps=1,
        **options,
    )
    trainer.train()
    stop = trainer.processing_class.eos_token_id
    rows = trainer.rounds.rows
    ended = [all(completion[-1] == stop for completion in row["completions"]) for row in rows]
    assert 1 < sum(ended) < len(rows)
    assert [row["weight"] for row in rows] == pytest.approx([8 / sum(ended) * one for one in ended])
    assert f"round 1: {len(rows) - sum(ended)} of 8 rows have a completion that reached" in caplog.text
    assert logs_of(trainer)[0]["rows/left_out_fraction"] == 1 - sum(ended) / 8


def test_a_first_round_without_an_ended_sample_is_refused(make_trainer):
    trainer = make_trainer(
        [{"prompt": "a"}, {"prompt": "b"}],
        trainer_options={"judge": Judge()},
        train_on="samples",
        max_completion_length=1,
        beta=0.0,
    )
    trainer.stop_ids, trainer.rounds._stop_ids = [], frozenset()
    with pytest.raises(ConfigError, match="first round a completion reached max_completion_length=1"):
        trainer.train()


def test_self_play_leaves_out_answers_that_are_cut(make_trainer, caplog):
    caplog.set_level(logging.WARNING)
    rows = [{"prompt": "abc", "completion": "ab"}, {"prompt": "bad", "completion": "abcdefgh"}]
    trainer = make_trainer(rows, train_on="self_play", beta=0.0)
    assert trainer.row_counts["train"] == {"given": 2, "left_out": 1, "cut_completion": 1}
    assert len(trainer.rounds) == 1


def test_large_weights_stay_finite(one_step):
    rows = [{**SHORT, "weight": 1e308}, {**OTHER, "weight": 1e308}, {**SHORT, "weight": 5e307}]
    trainer, _ = one_step(rows)
    assert [row["weight"] for row in trainer.train_dataset.rows] == pytest.approx([1.2, 1.2, 0.6])
    assert trainer.row_counts["train"]["weighted"] == 3


def test_the_share_left_out_of_a_round_is_part_of_a_checkpoint(make_trainer, make_model, tokenizer, tmp_path):
    options = {
        "model": make_model(tokenizer, spread=0.1),
        "trainer_options": {"judge": Judge()},
        "train_on": "samples",
        "beta": 0.0,
    }
    rows = [{"prompt": text} for text in ("a", "b", "cab", "dad", "head", "he", "fad", "bed")]
    first = make_trainer(rows, **options)
    first.rounds.begin(0)
    assert 0 < first.rounds.left_out < 1
    first.rounds.save(tmp_path)
    again = make_trainer(rows, **options)
    again.rounds.load(tmp_path)
    assert again.rounds.left_out == first.rounds.left_out
    assert again.rounds.rows == first.rounds.rows
