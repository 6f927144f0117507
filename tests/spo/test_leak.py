"""The preference loss alone lets probability leak to outputs that no pair mentions; the KL term holds it."""

import itertools
import random

import pytest
import torch
from softpref.lm.scoring import pad_sequences, score_sequences, sequence_logps

PROMPT, END = [1, 5], 3
COMPLETIONS = [[*letters, END] for letters in itertools.product((5, 6, 7, 8), (9, 10, 11, 12), (5, 9))]


def mass(model):
    """Probability that the model's completion is one of the set."""
    return float(score_sequences(model, [(PROMPT, c) for c in COMPLETIONS], pad_id=0).exp().sum())


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
        from copy import deepcopy

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
