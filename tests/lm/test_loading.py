"""Models are refused in milliseconds where they cannot be loaded, and come back as they were saved."""

import json

import pytest
import torch
from softpref.errors import ConfigError
from softpref.lm.loading import load_model, load_tokenizer, require_new_folder, save_model_folder
from softpref.lm.scoring import score_sequences
from softpref.lm.sources import check_model_source
from softpref.records.model import load_metadata

SEQUENCES = [([1, 7], [8, 3])]


@pytest.fixture
def saved(tmp_path, make_tokenizer, make_model):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.generation_config.update(temperature=0.1, top_p=0.5, do_sample=True)
    save_model_folder(model, tokenizer, tmp_path / "model", {"stage": "sft", "name": "toy"})
    return model, tokenizer, tmp_path / "model"


def test_a_saved_folder_gives_back_model_tokenizer_and_metadata(saved):
    model, tokenizer, folder = saved
    loaded, loaded_tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert loaded_tokenizer("a fox.")["input_ids"] == tokenizer("a fox.")["input_ids"]
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert load_metadata(folder) == {"stage": "sft", "name": "toy"}
    assert not list(folder.glob("*.bin"))


def test_a_saved_folder_is_served_at_its_own_distribution(saved):
    generation = json.loads((saved[2] / "generation_config.json").read_text())
    assert generation["do_sample"] is True
    assert (generation.get("temperature", 1.0), generation.get("top_p", 1.0)) == (1.0, 1.0)
    assert generation["top_k"] == 0
    assert generation["eos_token_id"] == saved[1].eos_token_id


def test_an_adapter_folder_is_loaded_upon_its_base(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, tokenizer, folder = saved
    base = load_model(str(folder))
    plain = score_sequences(base, SEQUENCES)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted = score_sequences(model, SEQUENCES)
    assert abs(float(adapted - plain)) > 1e-3
    save_model_folder(model, tokenizer, tmp_path / "adapter", {"adapter": True})
    loaded = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(score_sequences(loaded, SEQUENCES), adapted)
    assert not hasattr(loaded, "peft_config")  # merged: it can be trained, and be a reference
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_tokenizer_without_padding_pads_with_its_end_token(make_tokenizer, make_model, tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(make_tokenizer, make_model, tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("source", ["", "/nowhere/model", "./model", "../model", "some/deep/path", "m.gguf"])
def test_a_source_that_is_neither_there_nor_a_hub_id_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="model"):
        check_model_source(source)


def test_a_hub_id_is_left_to_the_hub():
    check_model_source("owner/name")
    check_model_source("name")


def test_a_model_that_the_hub_does_not_give_is_refused_at_once(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(self, repo_id, **options):
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ConfigError, match=r"owner/no-such-model is no folder here.*no route.*download it"
        ):
            load("owner/no-such-model")


def test_a_folder_without_configuration_or_with_pickled_weights_only_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="unpickling can run code"):
        load_model(str(tmp_path))


def test_weights_that_cannot_be_read_name_the_model(saved):
    (saved[2] / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(str(saved[2]))


def test_a_finished_model_is_not_written_over(saved, tmp_path):
    require_new_folder(tmp_path / "new")
    with pytest.raises(ConfigError, match="finished model already"):
        require_new_folder(saved[2])


def test_a_foreign_folder_is_not_written_into_but_an_unfinished_run_is_continued(saved, tmp_path):
    (saved[2] / "softpref.json").unlink()  # any checkpoint of someone else's
    with pytest.raises(ConfigError, match=r"something else already \(README.md, .*nothing is overwritten"):
        require_new_folder(saved[2])
    with pytest.raises(ConfigError, match="is a file"):
        require_new_folder(saved[2] / "config.json")
    (saved[2] / "checkpoints").mkdir()
    require_new_folder(saved[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_said_to_be_the_models(saved, tmp_path, dtype, number):
    model, tokenizer, _ = saved
    model.to(getattr(torch, dtype))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5:8] = number
        model.model.norm.weight[0] = number
    save_model_folder(model, tokenizer, tmp_path / "broken", {})
    said = (
        rf"model {tmp_path}/broken holds weights that are not finite \(NaN or infinite\): "
        r"model\.layers\.0\.mlp\.up_proj\.weight \(3 of 512\), model\.norm\.weight \(1 of 16\); "
        "the checkpoint itself is damaged"
    )
    with pytest.raises(ConfigError, match=said):
        load_model(tmp_path / "broken", dtype="auto")
    from softpref.spo.config import SPOConfig
    from softpref.spo.given import loaded

    with pytest.raises(ConfigError, match=r"model holds weights that are not finite .* \(3 of 512\)"):
        loaded(model, SPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True))


def test_the_largest_weights_that_are_numbers_are_taken(saved, tmp_path):
    model, tokenizer, _ = saved
    with torch.no_grad():
        model.model.norm.weight[:] = torch.finfo(torch.float32).max
    save_model_folder(model, tokenizer, tmp_path / "large", {})
    load_model(tmp_path / "large")


def write_gguf(model, path):
    """The Llama as an unquantized GGUF file, without a tokenizer."""
    gguf = pytest.importorskip("gguf", reason="the extra softpref[gguf] is not installed")
    config, tensors = model.config, {name: t.numpy() for name, t in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        weight = tensors[f"{ours}.weight"]
        if theirs.endswith(
            ("attn_q", "attn_k")
        ):  # GGUF keeps the two halves of a rotation next to each other
            heads, width = config.num_attention_heads, weight.shape[1]
            weight = weight.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", weight.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_as_an_ordinary_model_that_can_be_saved(make_tokenizer, make_model, tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    write_gguf(model, tmp_path / "toy.gguf")
    loaded = load_model(str(tmp_path / "toy.gguf"))
    expected = score_sequences(model, SEQUENCES)
    torch.testing.assert_close(score_sequences(loaded, SEQUENCES), expected)
    save_model_folder(loaded, tokenizer, tmp_path / "saved", {})
    again = load_model(str(tmp_path / "saved"))
    torch.testing.assert_close(score_sequences(again, SEQUENCES), expected)


def test_weights_that_are_missing_or_of_another_shape_are_named(saved):
    from safetensors.torch import load_file, save_file

    file, folder = saved[2] / "model.safetensors", str(saved[2])
    weights = load_file(file)
    layer = "model.layers.0.mlp.up_proj.weight"
    save_file({name: one for name, one in weights.items() if name != layer}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(folder)
    save_file({**weights, layer: weights[layer][:-1].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"shapes differ: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_config_of_more_layers_than_there_are_weights_is_refused(saved):
    config = json.loads((saved[2] / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (saved[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1"):
        load_model(str(saved[2]))


def test_a_generation_config_that_cannot_be_saved_is_settled_when_the_model_is_loaded(saved, tmp_path):
    file = saved[2] / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 3}))
    model = load_model(str(saved[2]))
    assert model.generation_config.eos_token_id == 3
    model.save_pretrained(tmp_path / "again")
