"""A model behind a URL is loaded like one here; what it is now can be told without loading it."""

from types import SimpleNamespace

import pytest
import torch
from softpref.errors import ConfigError
from softpref.lm.loading import load_model, load_tokenizer, save_model_folder
from softpref.lm.sources import check_model_source, local_source, pin_model, source_name

pytestmark = pytest.mark.fast


@pytest.fixture
def saved(tmp_path, make_tokenizer, make_model):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    save_model_folder(model, tokenizer, tmp_path / "model", {"stage": "sft", "name": "toy"})
    return model, tokenizer, tmp_path / "model"


def test_a_checkpoint_in_s3_is_loaded_like_one_here_and_its_pickles_stay_there(saved, bucket, cache):
    model, tokenizer, folder = saved
    for path in folder.iterdir():
        bucket.put_object(Bucket="team", Key=f"models/toy/{path.name}", Body=path.read_bytes())
    for name in ("pytorch_model.bin", "optimizer.pt", "checkpoint-10/model.safetensors"):
        bucket.put_object(Bucket="team", Key=f"models/toy/{name}", Body=b"pickle")
    url = "s3://team/models/toy"
    check_model_source(url)
    loaded, loaded_tokenizer = load_model(url), load_tokenizer(url)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert loaded_tokenizer("a fox.")["input_ids"] == tokenizer("a fox.")["input_ids"]
    fetched = {path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert fetched == {path.name for path in folder.iterdir()}
    before = pin_model(url, "v1")
    assert (before.source, before.revision) == (url, "v1")
    bucket.put_object(Bucket="team", Key="models/toy/config.json", Body=b"{}")
    assert pin_model(url).fingerprint not in (before.fingerprint, "")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "memory://model-0: the folder holds no .*unpickling",
        ),
        ({"model.safetensors": b"x"}, r"memory://model-1: the folder holds no config\.json"),
        ({"pytorch_model.bin": b"x"}, r"memory://model-2 holds no file of use, only pytorch_model\.bin"),
        ({}, r"memory://model-3 does not exist"),
    ],
)
def test_what_is_no_loadable_checkpoint_is_refused_by_its_url(memory, cache, request, files, message):
    url = f"memory://model-{message.partition('model-')[2][0]}"
    for name, content in files.items():
        memory.pipe(f"/{url.partition('://')[2]}/{name}", content)
    with pytest.raises(ConfigError, match=f"model {message}"):
        load_model(url)


def test_a_gguf_file_behind_a_url_is_one_file(memory, cache):
    memory.pipe("/quantized/toy.gguf", b"GGUF")
    assert local_source("memory://quantized/toy.gguf").endswith("/toy.gguf")
    memory.pipe("/quantized/toy.onnx", b"x")
    with pytest.raises(ConfigError, match=r"model memory://quantized/toy\.onnx is a file"):
        local_source("memory://quantized/toy.onnx")


@pytest.mark.parametrize(
    "source", ["s3://bucket/model", "hf://owner/name", "models:/m/3", "models:/m@champion"]
)
def test_sources_elsewhere_pass_the_first_check_which_asks_nobody(source):
    check_model_source(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s4://bucket/model", "s4:// cannot be read"),
        ("models:/m", "models:/NAME@ALIAS"),
        ("models:/m/champion", "models:/NAME@ALIAS"),
        ("models:/m/3/model", "models:/NAME@ALIAS"),
        ("models:/a/b@champion", "models:/NAME@ALIAS"),
    ],
)
def test_sources_that_cannot_be_one_do_not(source, message):
    with pytest.raises(ConfigError, match=message):
        check_model_source(source)


def test_a_source_is_recorded_without_the_secrets_of_its_url():
    assert source_name("https://me:secret@host/model?sig=x") == "https://host/model"
    assert source_name("owner/name") == local_source("owner/name") == "owner/name"


def test_the_pin_of_a_hub_model_is_its_commit_and_of_a_folder_its_content(monkeypatch, tmp_path):
    import huggingface_hub

    def info(self, repo_id, *, repo_type, revision, timeout):
        assert (repo_id, repo_type, timeout) == ("owner/name", "model", 10)
        return SimpleNamespace(sha=f"commit of {revision}")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    assert pin_model("owner/name", "v1") == ("owner/name", "commit of v1", "commit of v1")
    for source in ("", "/volume/of/another/pod", "toy.gguf"):
        assert pin_model(source) == (source, None, "")
    (tmp_path / "config.json").write_text("{}")
    first = pin_model(str(tmp_path))
    assert first[:2] == (str(tmp_path), None)
    assert pin_model(str(tmp_path)) == first
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    assert pin_model(str(tmp_path)).fingerprint not in ("", first.fingerprint)
    with pytest.raises(ConfigError, match="does not exist"):
        pin_model("some/deep/path")
