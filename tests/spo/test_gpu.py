"""On an NVIDIA GPU: the numbers of the CPU, and bf16 nearer to float64 than full logits are.

    pytest tests/spo/test_gpu.py

`SOFTPREF_TEST_DEVICE=cpu` runs what can be run without one.
"""

import os

import pytest
import torch
from softpref.lm.head import completion_hidden
from softpref.lm.packing import ATTENTION, pack_sequences
from softpref.lm.padding import pad_sequences
from softpref.lm.sampling import sample_completions, sampling_noise
from softpref.lm.scoring import score_sequences
from softpref.objectives import token_kl
from torch import nn

DEVICE = os.environ.get("SOFTPREF_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"
)

TOKENS, WIDTH, VOCABULARY = 700, 64, 1000
PROMPTS = [[1, 5 + i % 8, *(5 + (i * j) % 8 for j in range(i % 5))] for i in range(24)]
MODELS = {"llama": {}, "shared keys": {"num_key_value_heads": 1}, "tied head": {"tie_word_embeddings": True}}


class Case:
    """Hidden states and head of a policy and of a reference, rounded to `dtype`, and targets."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

        spread = 3 / WIDTH**0.5  # logits of standard deviation 3
        self.states = [normal(TOKENS, WIDTH), normal(VOCABULARY, WIDTH, scale=spread)]
        self.reference = [normal(TOKENS, WIDTH), normal(VOCABULARY, WIDTH, scale=spread)]
        self.targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator).to(DEVICE)
        self.upstream = normal(2, TOKENS).float()

    def chunked(self, **options):
        """KL, log-probabilities, and the gradients of their weighted sum to hidden states and head."""
        states = [each.clone().requires_grad_() for each in self.states]
        found = token_kl(*states, *self.reference, self.targets, **options)
        return self._with_gradients(states, found.kl, found.logps)

    def full(self, dtype, softcap=None):
        """The same from full logits, products in `dtype` and all else in no less than fp32."""

        def log_softmax(hidden, head):
            logits = (hidden @ head.T).to(torch.promote_types(dtype, torch.float32))
            return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).log_softmax(-1)

        states = [each.to(dtype).requires_grad_() for each in self.states]
        own, others = log_softmax(*states), log_softmax(*(each.to(dtype) for each in self.reference))
        kl = nn.functional.kl_div(others, own, reduction="none", log_target=True).sum(-1)
        return self._with_gradients(states, kl, own.gather(1, self.targets[:, None]).squeeze(1))

    def _with_gradients(self, states, *values):
        total = sum((u * v).sum() for u, v in zip(self.upstream, values, strict=True))
        return {
            **dict(zip(("kl", "logps"), (value.detach() for value in values), strict=True)),
            **dict(zip(("hidden", "head"), torch.autograd.grad(total, states), strict=True)),
        }


def error(found, expected):
    """Relative, of the whole tensor."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunks_give_the_numbers_of_full_logits(softcap, chunk_size):
    case = Case(torch.float32)
    expected = case.full(torch.float64, softcap)
    found = case.chunked(softcap=softcap, ref_softcap=softcap, chunk_size=chunk_size)
    for name, value in found.items():
        assert value.device.type == DEVICE
        assert error(value, expected[name]) < 1e-5, name


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU rounds products to bf16 however they are asked for")
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_in_bf16_chunks_are_nearer_to_float64_than_full_logits(chunk_size):
    case = Case(torch.bfloat16)
    exact, full, found = (
        case.full(torch.float64),
        case.full(torch.bfloat16),
        case.chunked(chunk_size=chunk_size),
    )
    for name in ("kl", "logps"):
        assert found[name].dtype == torch.float32
        assert error(found[name], exact[name]) < 0.1 * error(full[name], exact[name]), name
    for name in ("hidden", "head"):  # both are rounded to bf16 at the end
        assert found[name].dtype == torch.bfloat16
        assert error(found[name], exact[name]) < error(full[name], exact[name]), name


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_give_the_numbers_of_padded_ones(make_model, tokenizer, name, share_prompts):
    model = make_model(tokenizer, layers=2, width=32, **MODELS[name]).to(DEVICE)
    rows = [(prompt, [5 + (i + j) % 8 for j in range(1 + i % 7)]) for prompt in PROMPTS for i in range(3)]
    found = []
    for batch, plain in (
        (pad_sequences(rows, 0), True),
        (pack_sequences(rows, share_prompts=share_prompts), False),
    ):
        logps = completion_hidden(model, batch.to(DEVICE), plain=plain).logps()
        total = (torch.linspace(-1, 2, len(logps), device=DEVICE) * logps).sum()
        found.append([logps.detach(), *torch.autograd.grad(total, list(model.parameters()))])
    assert model.config._attn_implementation == ATTENTION
    for packed, padded in zip(found[1], found[0], strict=True):
        assert error(packed, padded) < 3e-5


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_cpu_and_scored_alike(make_model, tokenizer, name):
    options = {
        "noise": sampling_noise(len(PROMPTS), 24, seed=1),
        "stop_ids": [3],
        "batch_size": 16,
    }
    model = make_model(tokenizer, layers=2, width=32, **MODELS[name])
    expected = sample_completions(model, PROMPTS, **options)
    model.to(DEVICE)
    samples = sample_completions(model, PROMPTS, **options)
    assert [sample.completion for sample in samples] == [sample.completion for sample in expected]
    assert len({len(sample.completion) for sample in samples}) > 3  # rows left the batch meanwhile
    scores = score_sequences(model, [(sample.prompt, sample.completion) for sample in samples])
    assert scores.tolist() == pytest.approx([sample.logp for sample in samples], rel=1e-5, abs=1e-5)


@pytest.fixture
def trajectory(make_trainer, make_rows):
    """`trajectory(output, **options)`: logs of each step, weights in the end on the CPU, the trainer."""

    def train(output, resume=None, **options):
        rows = make_rows(32, sizes=(2, 3), soft=True)
        # at higher rates this toy model amplifies rounding from step to step
        shared = {"beta": 0.3, "optim": "sgd", "learning_rate": 0.02, "per_device_train_batch_size": 4}
        trainer = make_trainer(rows, output=output, **{**shared, **options})
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.args.device.type == ("cpu" if options["use_cpu"] else "cuda")
        logs = [log for log in trainer.state.log_history if "loss" in log]
        weights = {name: weight.detach().cpu() for name, weight in trainer.model.named_parameters()}
        return logs, weights, trainer

    return train


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plain_forward": True},
        {"kl_gradient": "full", "weight_exponent": 0.5, "weight_scores": "token"},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"kl_on": "data", "anchor": 0.5},
    ],
    ids=["packed and chunked", "full logits", "weighted", "checkpointed and accumulated", "on data"],
)
def test_training_takes_the_steps_that_it_takes_on_the_cpu(trajectory, options):
    expected, weights, _ = trajectory("cpu", use_cpu=True, **options)
    logs, found, _ = trajectory("gpu", use_cpu=DEVICE == "cpu", **options)
    assert len(logs) == len(expected) == 8
    kl = "kl/data" if "kl_on" in options else "kl/sequence"
    for log, wanted in zip(logs, expected, strict=True):
        for key in ("loss", "loss/preference", kl, "rewards/margins", "grad_norm"):
            assert log[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-3), (key, log["step"])
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=5e-5, msg=name)


def test_training_in_bf16_follows_that_in_fp32(trajectory):
    options = {"use_cpu": DEVICE == "cpu", "learning_rate": 1e-3}
    expected, _, _ = trajectory("fp32", **options)
    logs, weights, trainer = trajectory("bf16", bf16=True, **options)
    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == ATTENTION  # packed in this precision too
    for log, wanted in zip(logs, expected, strict=True):
        assert log["loss/preference"] == pytest.approx(wanted["loss/preference"], rel=0.1), log["step"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_a_run_continues_from_its_checkpoint(trajectory, tmp_path):
    options = {"use_cpu": DEVICE == "cpu", "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}
    logs, weights, _ = trajectory("run", **options)
    later, found, _ = trajectory("run", resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert [log["step"] for log in later] == [log["step"] for log in logs]
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
