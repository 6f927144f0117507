"""An evaluation that is called again."""

import json
import shutil

import pytest
from softpref.errors import ConfigError

from tests.evaluation.conftest import copy_policy


@pytest.mark.parametrize("tracked", [False, True])
def test_a_finished_evaluation_called_again_gives_its_figures_and_tracks_what_a_kill_left_out(
    world, evaluating, evaluated, recorded, tmp_path, monkeypatch, caplog, tracked
):
    monkeypatch.setattr("softpref.lm.loading.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    monkeypatch.setattr("softpref.tracking.is_finished", lambda folder: tracked)
    shutil.copytree(evaluated, tmp_path / "out")
    found = evaluating(world, tmp_path / "out")
    assert found == json.loads((evaluated / "evaluation.json").read_text())
    assert "holds this very evaluation, finished" in caplog.text
    figures = {name: value for call in recorded if call[0] == "metrics" for name, value in call[1].items()}
    assert figures.get("eval/win_rate") == (None if tracked else found["metrics"]["win_rate"]["value"])


@pytest.mark.usefixtures("recorded")
def test_an_evaluation_of_a_model_that_has_changed_is_not_taken_for_this_ones(
    world, evaluating, evaluated, tmp_path
):
    shutil.copytree(evaluated, tmp_path / "out")
    policy = copy_policy(world, tmp_path / "policy")
    evaluating(world, tmp_path / "out", policy=policy)  # wherever it lies
    file = policy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"of something else \(policy: '\w+' there, '\w+' here\)"):
        evaluating(world, tmp_path / "out", policy=policy)
