"""Samples follow the model's own distribution exactly, and depend on nothing but model, prompt and noise."""

import collections

import pytest
import torch
from scipy.stats import chisquare
from softpref.lm.sampling import sample_completions, sampling_noise
from softpref.lm.scoring import score_sequences

from tests.enumeration import outcome_probabilities

pytestmark = pytest.mark.fast

PROMPTS = [[1, 5, 6, 7], [1], [1, 7], [1, 6, 6, 5, 5, 7, 7], [1, 5]]
STOP = 3


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer("abc")


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    return make_model(tokenizer, spread=0.6)


def sample(model, prompts, *, seed=0, length=6, stop_ids=(STOP,), **options):
    noise = sampling_noise(len(prompts), length, seed)
    return sample_completions(model, prompts, noise=noise, stop_ids=stop_ids, **options)


def test_the_samples_distribution_is_the_models_whatever_its_generation_config_says(model, tokenizer):
    prompt, count = PROMPTS[0], 6000
    chances = outcome_probabilities(model, prompt, length=3, stop=STOP)
    assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_p=0.5, top_k=1, repetition_penalty=2.0
    )
    # prompts of several lengths share the batches, so that rows are padded and leave at different times
    prompts = [prompt, PROMPTS[3]] * count
    samples = sample(model, prompts, length=3, seed=4, batch_size=2000)
    counts = collections.Counter(tuple(s.completion) for s in samples if s.prompt == prompt)
    assert set(counts) <= set(chances)
    common = [outcome for outcome, chance in chances.items() if chance * count >= 5]
    seen = [counts[outcome] for outcome in common]
    seen.append(count - sum(seen))
    expected = [chances[outcome] * count for outcome in common]
    expected.append(count - sum(expected))
    assert len(common) > 30
    assert chisquare(seen, expected).pvalue > 0.001


def test_a_sample_does_not_depend_on_batch_size_or_on_the_prompts_beside_it(model):
    prompts = PROMPTS * 8
    noise = sampling_noise(len(prompts), 12, seed=1)
    options = {"stop_ids": (STOP,)}
    whole = sample_completions(model, prompts, noise=noise, batch_size=64, **options)
    assert len({len(s.completion) for s in whole}) > 3
    for batch_size in (1, 7):
        again = sample_completions(model, prompts, noise=noise, batch_size=batch_size, **options)
        assert [s.completion for s in again] == [s.completion for s in whole]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample_completions(model, [prompts[i] for i in order], noise=noise[order], **options)
    assert [s.completion for s in shuffled] == [whole[i].completion for i in order]
    assert [s.prompt for s in whole] == prompts


def test_the_reported_log_probability_is_that_of_scoring(model):
    samples = sample(model, PROMPTS * 6, length=10, batch_size=16)
    scored = score_sequences(model, [(s.prompt, s.completion) for s in samples])
    assert [s.logp for s in samples] == pytest.approx(scored.tolist(), abs=2e-5)


def test_padding_does_not_shift_absolute_positions(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    samples = sample(model, PROMPTS * 6, length=8)
    scored = score_sequences(model, [(s.prompt, s.completion) for s in samples], batch_size=1)
    assert [s.logp for s in samples] == pytest.approx(scored.tolist(), abs=2e-5)


def test_a_stop_token_ends_a_completion_and_the_limit_truncates_it(model):
    samples = sample(model, PROMPTS * 20, length=4)
    assert {s.truncated for s in samples} == {False, True}
    for s in samples:
        assert STOP not in s.completion[:-1]
        assert s.truncated == (s.completion[-1] != STOP)
        assert len(s.completion) == 4 if s.truncated else len(s.completion) <= 4


def test_any_of_several_stop_tokens_ends(model):
    stops = (STOP, 6)
    samples = sample(model, PROMPTS * 20, length=8, stop_ids=stops)
    assert {s.completion[-1] for s in samples if not s.truncated} == set(stops)
    assert all(not set(stops) & set(s.completion[:-1]) for s in samples)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(model):
    one, same, other = (sample(model, PROMPTS * 4, seed=seed) for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_sampling_runs_without_dropout_and_restores_the_mode(make_model, tokenizer):
    model = make_model(tokenizer, attention_dropout=0.9)
    still = sample(model, PROMPTS)
    model.train()
    assert sample(model, PROMPTS) == still
    assert model.training


def test_noise_without_a_row_for_each_prompt_is_refused(model):
    with pytest.raises(ValueError, match="one row per prompt"):
        sample_completions(model, PROMPTS, noise=sampling_noise(3, 4, 0), stop_ids=(STOP,))
