"""Packed sequences against the same ones apart: values, gradients, and what may not be packed."""

import logging
import random

import pytest
import torch
from softpref.lm import packing
from softpref.lm.head import completion_hidden
from softpref.lm.packing import ATTENTION, pack_sequences
from softpref.lm.padding import pad_sequences
from softpref.lm.sampling import sample_completions, sampling_noise
from softpref.lm.scoring import score_sequences, scoring_batches, sequence_logps
from torch import nn
from torch.nn import functional

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQUENCES = [
    ([5, 6, 7], [8, 9, 11, 2]),
    ([5, 6, 7], [12, 2]),
    ([5, 6, 7], [13]),
    ([4], [21, 22, 23]),
    ([9, 8, 7, 6, 5], [14, 15, 2]),
    ([9, 8, 7, 6, 5], [16, 17, 2]),
    ([9, 8, 7, 6, 5], [18, 19]),
    ([5, 6, 7], [8, 2]),
]


def make(architecture="Llama", **options):
    """A tiny random model, far from uniform, with attention that matters."""
    import transformers

    known = {"n_embd": 16, "n_layer": 2, "n_head": 2} if architecture == "GPT2" else SIZES
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{"vocab_size": 40, **known, **options})
    name = f"{architecture}LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.4, generator=generator))
    return model


def many(prompts, sizes, seed=0, longest=20):
    """Rows of completions that share a prompt."""
    rng = random.Random(seed)
    rows = []
    for _ in range(prompts):
        prompt = [rng.randrange(1, 40) for _ in range(rng.randint(1, longest))]
        for _ in range(rng.choice(sizes)):
            rows.append((prompt, [rng.randrange(1, 40) for _ in range(rng.randint(1, longest))]))
    return rows


def agree(model, sequences, share_prompts=True):
    """Values and gradients of packed sequences are those of full logits of padded ones."""
    apart = completion_hidden(model, pad_sequences(sequences, 0), plain=True)
    packed = completion_hidden(model, pack_sequences(sequences, share_prompts=share_prompts))
    assert torch.equal(packed.targets, apart.targets)
    upstream = torch.linspace(-1, 2, len(apart.targets))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values, gradients = [], []
    for states in (apart, packed):
        logps = states.logps()
        values.append(logps.detach())
        gradients.append(torch.autograd.grad((upstream * logps).sum(), trained, allow_unused=True))
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=5e-6)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-6
    return packed


def is_packed(model):
    return model.config._attn_implementation == ATTENTION


ARCHITECTURES = {
    "Llama": ("Llama", {}),
    "one key head each": ("Llama", {"num_key_value_heads": 2}),
    "GPT-2, learned positions": ("GPT2", {}),
    "Phi, partial rotations": ("Phi", {}),
    "Qwen 3, normed queries": ("Qwen3", {}),
    "Gemma 3, sliding layers": ("Gemma3Text", {"sliding_window": 64, "query_pre_attn_scalar": 8}),
    "Mixtral, experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def made(name):
    architecture, options = ARCHITECTURES[name]
    if architecture == "Gemma3Text":
        import transformers

        config = transformers.Gemma3TextConfig(**{**SIZES, **options})
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM(config).eval()
    return make(architecture, **options)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_shared_and_separate_sequences_give_the_numbers_of_padded_ones(name, share_prompts):
    model = made(name)
    agree(model, SEQUENCES, share_prompts)
    assert is_packed(model)
    for seed, sizes in enumerate([(1,), (2,), (2, 3), (8,)]):
        agree(model, many(3, sizes, seed), share_prompts)
    # eight completions of one length: attention takes them at once
    agree(model, [([3, 4, 5, 6], [7 + i, *range(1, 12), 2]) for i in range(8)], share_prompts)


def test_a_batch_holds_each_prompt_once_and_no_padding():
    batch = pack_sequences(SEQUENCES)
    assert batch.blocks == ((3, (3, 1, 0)), (1, (2,)), (5, (2, 2, 1)), (3, (1,)))
    assert len(batch.input_ids) == 3 + 4 + 1 + 2 + 5 + 5 + 3 + 1 == len(batch.position_ids)
    assert batch.targets.tolist() == [token for _, completion in SEQUENCES for token in completion]
    assert batch.lengths.tolist() == [len(completion) for _, completion in SEQUENCES]
    assert batch.sequences() == SEQUENCES
    apart = pack_sequences(SEQUENCES, share_prompts=False)
    assert len(apart.blocks) == len(SEQUENCES)
    assert apart.sequences() == SEQUENCES


@pytest.mark.parametrize("sequences", [[], [([1], [])], [([], [1])], [([1], [5]), ([1, 2], [])]])
def test_a_sequence_without_prompt_or_completion_is_refused(sequences):
    with pytest.raises(ValueError, match="at least one completion token"):
        pack_sequences(sequences)


def test_no_token_sees_its_neighbours():
    """By gradient: the scores of a sequence move with its own tokens' embeddings, and with no others."""
    model = make()
    sequences = many(4, (2, 3), seed=7) + [([3, 4], [5 + i, 6, 7, 8]) for i in range(6)]
    batch = pack_sequences(sequences)
    kept = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: kept.append(output.detach().requires_grad_()) or kept[-1]
    )
    logps = completion_hidden(model, batch).logps().split(batch.lengths.tolist())
    handle.remove()
    entered = kept[-1]
    place, start = 0, 0
    for prompt, completions in batch.blocks:
        own = start + prompt
        for length in completions:
            (gradient,) = torch.autograd.grad(logps[place].sum(), entered, retain_graph=True)
            reached = gradient[0].abs().sum(-1) > 0
            expected = torch.zeros(len(batch.input_ids), dtype=torch.bool)
            expected[start : start + prompt] = True
            expected[own : own + length] = True
            assert torch.equal(reached, expected)
            own, place = own + length, place + 1
        start = own


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keys_that_heads_share_are_copied_only_where_a_mask_meets_an_accelerator(device, monkeypatch):
    calls = []
    attention = functional.scaled_dot_product_attention

    def watched(query, key, value, mask, **options):
        calls.append((mask is not None, key.shape[1] == value.shape[1] == 4, options["enable_gqa"]))
        return attention(query, key, value, mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    batch = pack_sequences(SEQUENCES)
    blocks = packing._Blocks(batch.blocks, device)
    query = torch.zeros(1, 4, len(batch.input_ids), 8, device=device)
    key, value = torch.zeros(2, 1, 2, len(batch.input_ids), 8, device=device)
    output, _ = packing._attention(None, query, key, value, None, softpref_blocks=blocks)
    assert output.shape == (1, len(batch.input_ids), 4, 8)
    assert {mask for mask, _, _ in calls} == {True, False}
    for mask, copied, grouped in calls:
        assert copied == (not grouped) == (mask and device == "meta")


def test_linear_layers_see_each_token_once():
    model = make()
    completion_hidden(model, pack_sequences(SEQUENCES))  # tries it out
    seen = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[:-1].numel())
    )
    completion_hidden(model, pack_sequences(SEQUENCES))
    completion_hidden(model, pack_sequences(SEQUENCES, share_prompts=False))
    completion_hidden(model, pad_sequences(SEQUENCES, 0))
    handle.remove()
    assert seen == [24, 40, 64]


# ------------------------------------------------------------------ what is padded instead


class _Forgetful:
    """Takes positions, and reads others."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


def _forgets_positions(model):
    plain = type(model)
    model.__class__ = type("Forgetful", (_Forgetful, plain), {})
    return model


def _mixes_tokens(model):
    """A layer that averages over all tokens so far, beside attention."""

    class Mixing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) + hidden.cumsum(1) / 10

    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)
    return model


def _own_attention(model):
    layer = model.model.layers[1].self_attn

    def forward(hidden_states, **ignored):
        return layer.v_proj(hidden_states).repeat(1, 1, 2), None

    layer.forward = forward
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make(attn_implementation="eager"), "its attention is eager"),
        (lambda: _forgets_positions(make()), "different numbers"),
        (lambda: _mixes_tokens(make()), "different numbers"),
        (lambda: _own_attention(make()), "1 of its 2 layers"),
        (lambda: make("RecurrentGemma", lru_width=16, num_hidden_layers=3), "layers"),
        (lambda: make("Bloom", n_head=2, n_layer=2), "attention is eager|position_ids|layers"),
        (
            lambda: make("GptOss", num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager"),
            "its attention is eager",
        ),
    ],
    ids=["eager", "positions", "mixing", "own", "recurrent", "alibi", "sinks"],
)
def test_what_cannot_be_packed_is_padded_and_says_so_once(model, reason, caplog):
    import re

    model = model()
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            agree(model, SEQUENCES)
    assert model.config._attn_implementation == before
    lines = [line for line in caplog.messages if "sequences are padded" in line]
    assert len(lines) == 1
    assert re.search(reason, lines[0])


def test_sequences_longer_than_a_sliding_window_are_padded():
    short, long = many(2, (2,), seed=1, longest=4), [(list(range(1, 9)), [3] * 9), ([1], [4, 2])]
    model = make("Mistral", sliding_window=8)
    agree(model, short)
    assert is_packed(model)
    seen = []
    handle = model.model.embed_tokens.register_forward_pre_hook(
        lambda m, inputs: seen.append(inputs[0].shape)
    )
    agree(model, long)
    handle.remove()
    assert seen[1] == (2, 17)  # as many rows as sequences


def test_attention_that_is_changed_afterwards_is_found_out(caplog):
    model = make()
    agree(model, SEQUENCES)
    model.set_attn_implementation("eager")
    agree(model, SEQUENCES)
    assert "its attention is eager" in caplog.text
    model.set_attn_implementation("sdpa")
    agree(model, SEQUENCES)  # padded ever after


def test_compiled_models_are_padded(caplog):
    model = make()
    compiled = torch.compile(model, backend="eager")
    agree(compiled, SEQUENCES)
    assert not is_packed(model)
    assert "compiled anew" in caplog.text
    known = make()
    agree(known, SEQUENCES)
    assert is_packed(known)
    before = len(caplog.records)
    compiled = torch.compile(known, backend="eager")
    for _ in range(2):
        assert not packing.packs(compiled, known, pack_sequences(SEQUENCES))
    assert len(caplog.records) == before + 1


# ------------------------------------------------------------------ what else happens to such a model


def test_a_model_that_was_packed_samples_scores_and_saves_as_before(tmp_path):
    model, other = make(), make()
    agree(model, SEQUENCES)
    assert is_packed(model)
    options = {"noise": sampling_noise(8, 12, seed=1), "stop_ids": (2,)}
    prompts = [prompt for prompt, _ in SEQUENCES]
    assert sample_completions(model, prompts, **options) == sample_completions(other, prompts, **options)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(*(each(ids, attention_mask=mask).logits for each in (model, other)))
    assert torch.equal(
        *(
            each.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            for each in (model, other)
        )
    )
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_adapters_checkpointing_and_bf16_are_packed():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    agree(model, SEQUENCES)
    assert is_packed(model)
    with model.disable_adapter(), torch.no_grad():
        off = sequence_logps(model, pack_sequences(SEQUENCES))
    torch.testing.assert_close(off, sequence_logps(make(), pad_sequences(SEQUENCES, 0)).detach())

    model = make().train()
    model.gradient_checkpointing_enable()
    agree(model, SEQUENCES)
    assert is_packed(model)

    model = make().bfloat16()
    with torch.no_grad():
        packed = sequence_logps(model, pack_sequences(SEQUENCES))
        apart = sequence_logps(model, pad_sequences(SEQUENCES, 0))
        exact = sequence_logps(make().double(), pad_sequences(SEQUENCES, 0)).float()
    assert is_packed(model)
    assert (packed - exact).norm() <= 2 * (apart - exact).norm()


def test_scoring_keeps_the_order_given_and_prompts_together():
    model = make()
    sequences = many(5, (3,), seed=3)
    random.Random(0).shuffle(sequences)
    expected = torch.cat([sequence_logps(model, pad_sequences([each], 0)) for each in sequences]).detach()
    for options in ({}, {"batch_size": 4}, {"plain": True}):
        found = score_sequences(model, sequences, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    [(_, batch)] = scoring_batches(model, sequences, batch_size=64)
    assert len(batch.blocks) == 5
