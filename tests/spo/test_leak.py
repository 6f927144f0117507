"""On outputs that can be listed: probability leaks off them without the KL term, and online training finds
softmax(reward / α) on them."""

import itertools
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from softpref.lm.padding import pad_sequences
from softpref.lm.scoring import score_sequences, sequence_logps

PROMPT, END = [1, 5], 3
COMPLETIONS = [[*letters, END] for letters in itertools.product((5, 6, 7, 8), (9, 10, 11, 12), (5, 9))]


def mass(model):
    """Probability that the model's completion is one of the set."""
    return float(score_sequences(model, [(PROMPT, c) for c in COMPLETIONS]).exp().sum())


@pytest.fixture(scope="module")
def reference(make_model, tokenizer):
    """A model that has learned the set: 32 completions of three letters."""
    model = make_model(tokenizer, width=32, spread=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = pad_sequences([(PROMPT, completion) for completion in COMPLETIONS], 0)
    for _ in range(150):
        optimizer.zero_grad()
        (-sequence_logps(model, batch).mean()).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def rows(tokenizer):
    rng = random.Random(5)
    rewards = [rng.gauss(0, 1.5) for _ in COMPLETIONS]
    texts = [tokenizer.decode(completion[:-1]) for completion in COMPLETIONS]
    rows = []
    for _ in range(512):
        i, j = rng.sample(range(len(texts)), 2)
        probability = float(torch.tensor(rewards[i] - rewards[j]).sigmoid())
        rows.append(
            {
                "prompt": tokenizer.decode(PROMPT[1:]),
                "completions": [texts[i], texts[j]],
                "probability": probability,
            }
        )
    return rows


@pytest.fixture
def mass_after_training(make_trainer, reference, rows):
    def train(**options):
        trainer = make_trainer(
            rows,
            model=deepcopy(reference),
            output=f"beta-{options['beta']}",
            alpha=1.0,
            per_device_train_batch_size=16,
            num_train_epochs=5,
            learning_rate=1e-2,
            logging_steps=50,
            lr_scheduler_type="linear",
            samples_per_refresh=32,
            sampling_interval=1,
            **options,
        )
        trainer.train()
        return mass(trainer.model)

    return train


def test_mass_leaks_off_the_set_without_the_kl_term_and_stays_with_it(reference, mass_after_training):
    assert mass(reference) > 0.97
    leaked, held = mass_after_training(beta=0.0), mass_after_training(beta=0.1)
    assert leaked < 0.7
    assert held > 0.95


class Expert:
    """Judges by known rewards; what is no output of the set is worth less than all of them."""

    def __init__(self, rewards):
        self._rewards, self._lowest = rewards, min(rewards.values()) - 1

    def probabilities(self, prompts, first, second):
        better, worse = (
            np.array([self._rewards.get(t, self._lowest) for t in texts]) for texts in (first, second)
        )
        return 1 / (1 + np.exp(worse - better))


@pytest.mark.parametrize(("alpha", "rounds", "learning_rate"), [(1.0, 15, 5e-3), (0.5, 30, 3e-3)])
def test_online_training_finds_softmax_of_reward_over_alpha(
    make_trainer, reference, tokenizer, alpha, rounds, learning_rate
):
    rng = random.Random(5)
    rewards = torch.tensor([rng.gauss(0, 1) for _ in COMPLETIONS])
    texts = [tokenizer.decode(completion[:-1]) for completion in COMPLETIONS]
    target = (rewards / alpha).log_softmax(0)

    def measure(model):
        """Expected reward on the set, and KL(target ‖ model)."""
        logps = score_sequences(model, [(PROMPT, c) for c in COMPLETIONS]).log_softmax(0)
        return float(logps.exp() @ rewards), float(target.exp() @ (target - logps))

    trainer = make_trainer(
        [{"prompt": tokenizer.decode(PROMPT[1:])}] * 128,  # no completion is given, all are drawn
        model=deepcopy(reference),
        trainer_options={"judge": Expert(dict(zip(texts, rewards.tolist(), strict=True)))},
        alpha=alpha,
        beta=0.02,
        rounds=rounds,
        train_on="samples",
        per_device_train_batch_size=32,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        logging_steps=50,
        samples_per_refresh=32,
        sampling_interval=1,
    )
    reward_before, distance_before = measure(trainer.model)
    trainer.train()
    reward, distance = measure(trainer.model)
    best = float(target.exp() @ rewards)
    assert best - reward < 0.25 * (best - reward_before)
    assert distance < 0.2 * distance_before
    assert mass(trainer.model) > 0.95
