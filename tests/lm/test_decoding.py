"""Cache and attention of decoding give what those of transformers give, and leave a model as it was."""

from types import SimpleNamespace

import pytest
import torch
from softpref.lm import decoding
from softpref.lm.packing import ATTENTION as PACKED
from softpref.lm.packing import pack_sequences, packs
from softpref.lm.sampling import sample_completions, sampling_noise
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def grouped_model(attention="sdpa", heads=4, groups=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def states(generator, rows, tokens):
    return torch.randn(rows, 2, tokens, 4, generator=generator)


def test_the_cache_holds_what_transformers_holds_through_growth_and_rows_that_leave():
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(num_hidden_layers=1)
    [ours], [theirs] = decoding.decoding_cache(config).layers, DynamicCache(config=config).layers
    assert type(theirs) is DynamicLayer
    assert type(ours) is not DynamicLayer
    rows = 5
    for step, tokens in enumerate([9, *[1] * 150, 70, 1]):
        assert ours.get_mask_sizes(tokens) == theirs.get_mask_sizes(tokens)
        keys, values = states(generator, rows, tokens), states(generator, rows, tokens)
        for mine, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(mine, other)
        if step in (20, 120):
            rows -= 2
            keep = torch.randperm(rows + 2, generator=generator)[:rows]
            ours.batch_select_indices(keep)
            theirs.batch_select_indices(keep)
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length() == 9 + 150 + 71


def test_a_token_is_written_where_there_is_room_and_nothing_is_copied():
    layer = decoding.decoding_cache(LlamaConfig(num_hidden_layers=1)).layers[0]
    generator = torch.Generator().manual_seed(0)
    keys, _ = layer.update(states(generator, 3, 10), states(generator, 3, 10))
    places = {keys.data_ptr()}
    for _ in range(500):
        keys, _ = layer.update(states(generator, 3, 1), states(generator, 3, 1))
        places.add(keys.data_ptr())
    assert keys.shape[2] == 510
    assert len(places) <= 7


def test_layers_that_forget_stay_those_of_transformers():
    layers = decoding.decoding_cache(MistralConfig(num_hidden_layers=2, sliding_window=8)).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer] * 2


@pytest.mark.parametrize("mask", [None, "seen", "added"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("length", [1, 5])
def test_grouped_attention_is_sdpa_of_transformers(mask, heads, groups, length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, length, heads, 8, generator=generator).transpose(1, 2)
    room = torch.randn(2, 3, groups, 20, 8, generator=generator)
    key, value = room[:, :, :, :13]
    seen = torch.rand(3, 1, length, 13, generator=generator) > 0.3
    seen[..., 0] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    attention_mask = {None: None, "seen": seen, "added": added}[mask]
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    arguments = (module, query, key, value, attention_mask)
    ours, weights = decoding.grouped_attention(*arguments, scaling=0.3, dropout=0.0)
    theirs, _ = sdpa_attention_forward(*arguments, scaling=0.3, dropout=0.0)
    assert weights is None
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_mask_of_each_head_is_left_to_transformers():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 13, 8, generator=generator)
    mask = torch.rand(3, 4, 1, 13, generator=generator) > 0.3
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    ours, _ = decoding.grouped_attention(module, query, key, value, mask)
    assert torch.equal(ours, sdpa_attention_forward(module, query, key, value, mask)[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_are_those_of_transformers_own_cache_and_attention(attention, monkeypatch):
    model = grouped_model(attention)
    prompts = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16], [17, 18]] * 4
    noise = sampling_noise(len(prompts), 90, 0)

    def draw():
        return sample_completions(model, prompts, noise=noise, stop_ids=(3,))

    ours = draw()
    assert model.config._attn_implementation == attention
    monkeypatch.setattr(decoding, "decoding_cache", lambda config: DynamicCache(config=config))
    monkeypatch.setattr(decoding, "grouped_attention", sdpa_attention_forward)
    theirs = draw()
    assert [each.completion for each in ours] == [each.completion for each in theirs]
    assert len({len(each.completion) for each in ours}) > 3
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_logps == pytest.approx(other.token_logps, abs=1e-5)


def test_no_keys_are_copied_for_each_head_while_tokens_are_drawn(monkeypatch):
    model = grouped_model(heads=4, groups=2)
    assert decoding.decodes(model)  # found out beforehand
    widths = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *rest, **options):
        widths.append((query.shape[2], key.shape[1]))
        return plain(query, key, *rest, **options)

    monkeypatch.setattr(decoding.functional, "scaled_dot_product_attention", watched)
    sample_completions(model, [[5, 6], [7]], noise=sampling_noise(2, 6, 0), stop_ids=())
    assert widths[:2] == [(2, 4)] * 2  # the prompts, once in each layer
    assert widths[2:] == [(2, 2)] * 10


def test_a_model_keeps_its_packed_attention_and_an_error_does_not_change_that():
    model = grouped_model()
    assert packs(model, model, pack_sequences([([1, 2], [3, 4])]))
    assert model.config._attn_implementation == PACKED
    with decoding.decoding_attention(model):
        assert model.config._attn_implementation == decoding.ATTENTION
    assert model.config._attn_implementation == PACKED
    with pytest.raises(ValueError, match="stop here"), decoding.decoding_attention(model):
        raise ValueError("stop here")
    assert model.config._attn_implementation == PACKED
    assert packs(model, model, pack_sequences([([1, 2], [3, 4])]))
