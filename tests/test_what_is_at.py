"""A path that is refused is said to be what it is, such as a pipe, a device, or a link to nothing."""

import os
import socket

import pytest
from softpref.config import read_mapping
from softpref.data.sources import open_source, pin
from softpref.disk import what_is_at
from softpref.errors import ConfigError, SoftprefError
from softpref.evaluation.leaderboards import read_benchmark
from softpref.lm.course import dataset_stats
from softpref.lm.loading import require_new_folder
from softpref.lm.sources import check_model_source
from softpref.pipelines.recipes import find_file
from softpref.preflight.stage import _check_local_source
from softpref.tracking import sync

pytestmark = pytest.mark.fast


@pytest.fixture
def places(tmp_path, monkeypatch):
    """One path of each kind."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        yield tmp_path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("folder", "is a folder"),
        ("file", "is a file"),
        ("pipe", "is a pipe"),
        ("socket", "is a socket"),
        ("/dev/null", "is a device"),
        ("link", "is a link to nowhere, which does not exist"),
        ("circle", "cannot be read (Too many levels of symbolic links)"),
        ("absent", "does not exist"),
        ("file/below", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("~/pairs.jsonl", "does not exist (~ is not replaced here: write the folder's name)"),
    ],
    ids=lambda text: text[:20],
)
def test_what_a_path_is(places, path, said):
    assert what_is_at(path) == said


READERS = {
    "a source": (open_source, "source {path!r} {said}; give"),
    "a source that is pinned": (pin, "source {path!r} {said}; give"),
    "a source of a pipeline": (_check_local_source, "source {path} {said}; give a file, a folder"),
    "a model": (check_model_source, "model {path} {said}; give a checkpoint folder"),
    "a configuration": (read_mapping, "configuration file {path} {said}; give a YAML or JSON file"),
    "a benchmark": (read_benchmark, "{path} {said}; give the benchmark's file"),
    "a dataset": (dataset_stats, "dataset {path} {said}; give a folder of the data stage"),
    "a new folder": (require_new_folder, "{path} {said}; name a new folder"),
    "records of tracking": (sync, "{path} {said}; give the output folder of a stage"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "said"), [("/dev/null", "is a device"), ("pipe", "is a pipe")])
def test_what_is_neither_file_nor_folder_is_refused_as_what_it_is(places, reader, name, said):
    read, sentence = READERS[reader]
    path = str(places / name)
    with pytest.raises(SoftprefError) as refused:
        read(path)
    assert str(refused.value).startswith(sentence.format(path=path, said=said))


def test_a_recipe_that_is_no_file_is_refused_as_what_it_is(places):
    (places / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"recipe 'folder\.yaml' is a folder; give a YAML file"):
        find_file("folder.yaml", places, "recipe")
    with pytest.raises(ConfigError, match=r"there is no recipe 'absent\.yaml'"):
        find_file("absent.yaml", places, "recipe")


def test_a_gguf_file_that_is_a_folder_is_said_to_be_one(places):
    (places / "model.gguf").mkdir()
    with pytest.raises(ConfigError, match=r"model model\.gguf is a folder; give a GGUF file"):
        check_model_source("model.gguf")
    with pytest.raises(ConfigError, match=r"model absent\.gguf does not exist; give a GGUF file"):
        check_model_source("absent.gguf")
