"""Batched log-probabilities equal those of one sequence at a time, whatever stands in the padding."""

import pytest
import torch
from softpref.lm.padding import completion_logits, pad_sequences
from softpref.lm.scoring import entropies, gather_logps, score_sequences, sequence_logps, sum_by_sequence

SEQUENCES = [([1, 7, 8], [9, 10, 3]), ([1], [5]), ([1, 6, 6, 6, 7], [3]), ([1, 9], [8, 7, 6, 5, 3])]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer("abcdefgh")


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    return make_model(tokenizer, layers=2)


def token_logps_by_hand(model, prompt, completion):
    """One sequence without padding, in float64."""
    double = model.double()
    with torch.no_grad():
        logits = double(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    model.float()
    return [float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]


@pytest.mark.parametrize("pad_id", [0, 3], ids=["own pad", "pad is end"])
def test_each_completion_token_has_the_log_probability_of_its_own_sequence(model, pad_id):
    batch = pad_sequences(SEQUENCES, pad_id)
    with torch.no_grad():
        logits, targets = completion_logits(model, batch)
    expected = [
        value for prompt, completion in SEQUENCES for value in token_logps_by_hand(model, prompt, completion)
    ]
    assert targets.tolist() == [token for _, completion in SEQUENCES for token in completion]
    assert gather_logps(logits, targets).tolist() == pytest.approx(expected, abs=2e-5)


def test_padding_is_told_by_length_and_not_by_token():
    batch = pad_sequences(SEQUENCES, pad_id=3)  # 3 also ends the completions
    assert batch.completion_mask.sum(1).tolist() == [3, 1, 1, 5] == batch.lengths.tolist()
    assert batch.attention_mask.sum(1).tolist() == [6, 2, 6, 7]
    assert batch.input_ids[0, 5] == 3
    assert batch.completion_mask[0].tolist() == [False, False, False, True, True, True, False]


def test_what_stands_in_the_padding_changes_nothing(model):
    one, other = pad_sequences(SEQUENCES, pad_id=0), pad_sequences(SEQUENCES, pad_id=11)
    with torch.no_grad():
        torch.testing.assert_close(sequence_logps(model, one), sequence_logps(model, other))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_come_in_the_order_given_and_do_not_depend_on_the_batch(model, batch_size):
    scores = score_sequences(model, SEQUENCES, batch_size=batch_size)
    expected = [sum(token_logps_by_hand(model, *sequence)) for sequence in SEQUENCES]
    assert scores.tolist() == pytest.approx(expected, abs=2e-5)


def test_scoring_runs_without_dropout_and_restores_the_mode(make_model, tokenizer):
    model = make_model(tokenizer, attention_dropout=0.9)
    still = score_sequences(model, SEQUENCES)
    model.train()
    torch.testing.assert_close(score_sequences(model, SEQUENCES), still)
    assert model.training


def test_token_values_are_summed_within_their_sequence():
    sums = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1, 3]))
    assert sums.tolist() == [1, 14]


def test_entropy_of_closed_cases():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert entropies(logits).tolist() == pytest.approx([torch.tensor(4.0).log().item(), 0.0])


@pytest.mark.parametrize("sequences", [[], [([1], [])], [([1], [5]), ([1, 2], [])]])
def test_a_sequence_without_completion_is_refused(sequences):
    with pytest.raises(ValueError, match="at least one completion token"):
        pad_sequences(sequences, 0)
