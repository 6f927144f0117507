"""Extrapolated models hold, tensor by tensor, aligned + w · (aligned − SFT), and load like any other."""

import pytest
import torch
from softpref.errors import ConfigError
from softpref.lm.extrapolation import (
    extrapolate,
    extrapolated_folders,
    parse_weights,
    write_extrapolations,
)
from softpref.lm.loading import load_model, load_tokenizer, save_model_folder
from softpref.records.model import load_metadata
from torch import nn

pytestmark = pytest.mark.fast


class Odd(nn.Module):
    """Floats of two widths, a tied weight, a scalar, an empty one, integer and boolean buffers."""

    def __init__(self, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(5, 3, generator=random))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table
        self.narrow = nn.Parameter(torch.randn(4, generator=random).bfloat16())
        self.wide = nn.Parameter(torch.randn(4, generator=random, dtype=torch.float64))
        self.scale = nn.Parameter(torch.randn((), generator=random))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("steps", torch.tensor([seed, 2]))
        self.register_buffer("mask", torch.tensor([True, seed % 2 == 0]))


@pytest.mark.parametrize("weight", [0.5, 2.0, -0.25, -0.5])
def test_every_tensor_is_moved_along_the_difference(weight):
    aligned, reference = Odd(0), Odd(1)
    before = {name: tensor.clone() for name, tensor in aligned.state_dict().items()}
    result = extrapolate(aligned, reference.state_dict(), weight)
    assert set(result) == set(before)
    for name, tensor in before.items():
        near, far = tensor.double(), reference.state_dict()[name].double()
        wanted = (near + weight * (near - far)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert result[name].dtype == tensor.dtype
        torch.testing.assert_close(result[name], wanted, msg=name)
        torch.testing.assert_close(aligned.state_dict()[name], tensor, rtol=0, atol=0)


def test_half_way_back_is_the_midpoint():
    aligned, reference = {"a": torch.tensor([1.0, 4.0])}, {"a": torch.tensor([3.0, -2.0])}
    assert extrapolate(aligned, reference, -0.5)["a"].tolist() == [2.0, 1.0]


def test_arithmetic_is_done_in_float32_and_rounded_once():
    # bfloat16 near 1 has steps of 2⁻⁷: the difference would be lost, were the reference rounded to it
    aligned = {"a": torch.tensor([1.0078125], dtype=torch.bfloat16)}
    reference = {"a": torch.tensor([0.998])}
    result = extrapolate(aligned, reference, 3.0)["a"]
    assert result.dtype == torch.bfloat16
    assert result.item() == torch.tensor(1.0078125 + 3 * (1.0078125 - 0.998)).bfloat16().item()
    assert result.item() != (aligned["a"] + 3 * (aligned["a"] - reference["a"].bfloat16())).item()


def test_what_alignment_did_not_move_stays_bit_by_bit():
    values = torch.randn(100).bfloat16()
    assert torch.equal(extrapolate({"a": values}, {"a": values.clone()}, 0.7)["a"], values)


def test_tied_tensors_are_one_in_the_result_and_may_have_one_name_in_the_reference():
    aligned, reference = Odd(0), Odd(1).state_dict()
    result = extrapolate(aligned, reference, 0.5)
    assert result["head.weight"] is result["table"]
    del reference["head.weight"]
    torch.testing.assert_close(extrapolate(aligned, reference, 0.5)["head.weight"], result["table"])
    reference["head.weight"] = reference["table"] + 1
    with pytest.raises(ConfigError, match=r"only the aligned model ties table = head\.weight"):
        extrapolate(aligned, reference, 0.5)


def test_models_that_do_not_match_are_refused_by_name():
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(4)}
    with pytest.raises(ConfigError, match=r"they differ in a \(\[2, 3\] against \[3, 2\]\)"):
        extrapolate(tensors, tensors | {"a": torch.zeros(3, 2)}, 0.5)
    with pytest.raises(ConfigError, match=r"differ in b \(torch\.float32 against torch\.int8\)"):
        extrapolate(tensors, tensors | {"b": torch.zeros(2, dtype=torch.int8)}, 0.5)
    other = {"a": tensors["a"], "x.lora_A": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"only the aligned model has b, c; only the reference has x\.lora"):
        extrapolate(tensors, other, 0.5)
    with pytest.raises(ConfigError, match="and 2 more"):
        extrapolate({str(i): torch.zeros(1) for i in range(5)}, {}, 0.5)


def test_a_result_that_its_type_cannot_hold_is_refused():
    aligned, reference = (
        {"a": torch.tensor([6e4], dtype=torch.float16)},
        {"a": torch.tensor([5e4], dtype=torch.float16)},
    )
    with pytest.raises(ConfigError, match=r"extrapolated by 5, a exceeds what torch\.float16 can hold"):
        extrapolate(aligned, reference, 5.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, -3.0, float("nan"), float("inf")])
def test_weights_that_give_no_new_model_are_refused(weight):
    with pytest.raises(ConfigError, match="above -1 and not 0"):
        extrapolate({"a": torch.zeros(1)}, {"a": torch.zeros(1)}, weight)


def test_weights_are_read_from_text():
    assert parse_weights("") == parse_weights(" ") == []
    assert parse_weights("0.3, -0.5,1") == [0.3, -0.5, 1.0]
    for text, message in (
        ("0.3;0.5", "separated by commas"),
        ("0.3,0", "not 0"),
        ("0.5,0.50", "0.5 comes twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_weights(text)


@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_written_folders_are_models_of_their_own(tmp_path, make_tokenizer, make_model, tied, dtype):
    tokenizer = make_tokenizer()
    reference = make_model(tokenizer, seed=1, tie_word_embeddings=tied)
    aligned = make_model(tokenizer, seed=0, tie_word_embeddings=tied).to(getattr(torch, dtype))
    save_model_folder(reference, tokenizer, tmp_path / "sft", {"name": "sft"})
    before = {name: tensor.clone() for name, tensor in aligned.state_dict().items()}
    metadata = {"name": "spo-1", "run_id": "run", "adapter": False, "extrapolation": 0.0}
    write_extrapolations(aligned, tmp_path / "sft", tokenizer, tmp_path / "policy", metadata, [0.3, -0.5])
    folders = extrapolated_folders(tmp_path / "policy")
    assert [folder.name for folder in folders] == ["extrapolated--0.5", "extrapolated-0.3"]
    for folder, weight in zip(folders, (-0.5, 0.3), strict=True):
        own = {"name": f"spo-1-expo-{weight:g}", "extrapolation": weight}
        assert load_metadata(folder) == metadata | own
        assert f"extrapolated (ExPO, arXiv 2404.16792): aligned + {weight:g} ×" in (
            folder / "README.md"
        ).read_text(encoding="utf-8")
        assert load_tokenizer(str(folder))("a fox.")["input_ids"] == tokenizer("a fox.")["input_ids"]
        loaded = load_model(str(folder), dtype="auto")
        assert loaded.dtype == getattr(torch, dtype)
        shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert shared == tied
        for name, near in before.items():
            wanted = (near.float() + weight * (near.float() - reference.state_dict()[name])).to(near.dtype)
            torch.testing.assert_close(loaded.state_dict()[name], wanted)
    for name, tensor in aligned.state_dict().items():
        assert torch.equal(tensor, before[name])
