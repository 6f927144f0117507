"""Whatever becomes of a checkpoint's files, a training goes on from a whole one, or says that none is."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from softpref.errors import ConfigError, SoftprefError
from softpref.lm.checkpoints import (
    MANIFEST_FILE,
    checkpoints_in,
    claim_checkpoints,
    fault_of,
    last_checkpoint,
    remove_checkpoints,
    thin_checkpoints,
)
from softpref.spo import SPOConfig, SPOTrainer


class Judge:
    def probabilities(self, prompts, first, second):
        import numpy as np

        return 1 / (1 + np.exp([len(b) - len(a) for a, b in zip(first, second, strict=True)]))


KINDS = {
    "samples": {"samples_per_refresh": 12, "sampling_interval": 3},
    "rounds": {"kl_on": "none", "rounds": 2, "train_on": "samples", "method": "sppo", "num_train_epochs": 1},
    "adapter": {"kl_on": "none", "use_peft": True, "lora_r": 2},
}
OF_ALL = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
OF_ALL |= {"training_loss.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
WHOLE_MODEL = {"config.json", "generation_config.json", "model.safetensors"}
FILES = {
    "samples": OF_ALL | WHOLE_MODEL | {"sample_buffer_0_of_1.json"},
    "rounds": OF_ALL | WHOLE_MODEL | {"round_rows.json"},
    "adapter": OF_ALL | {"adapter_config.json", "adapter_model.safetensors", "README.md"},
}


def trainer_in(folder, make_model, tokenizer, make_rows, **options):
    defaults = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 2, "save_steps": 2}
    defaults |= {"learning_rate": 1e-2, "max_prompt_length": 16, "max_completion_length": 8, "seed": 3}
    defaults |= {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "steps"}
    defaults |= {"save_total_limit": None}
    config = SPOConfig(output_dir=str(folder), **{**defaults, **options})
    return SPOTrainer(
        make_model(tokenizer),
        config,
        train_dataset=make_rows(6),
        processing_class=tokenizer,
        judge=Judge() if options.get("rounds") else None,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_model, tokenizer, make_rows):
    """Trainings of each kind, with their checkpoints: the trainer, and what `train` gave."""
    found = {}
    for kind, options in KINDS.items():
        trainer = trainer_in(tmp_path_factory.mktemp(kind), make_model, tokenizer, make_rows, **options)
        found[kind] = trainer, trainer.train()
    return found


def copy_of(trainer, folder, steps):
    for step in steps:
        shutil.copytree(Path(trainer.args.output_dir) / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


MANGLINGS = {
    "cut": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "flipped": flipped,
    "empty": lambda content: b"",
    "foreign": lambda content: b'{"files": {}}',
    "zeros": lambda content: bytes(len(content)),
    "absent": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_checkpoint_is_in_its_manifest_and_none_may_differ(trained, tmp_path, caplog, kind):
    folder = copy_of(trained[kind][0], tmp_path, (4, 6))
    newest = folder / "checkpoint-6"
    assert {path.name for path in newest.iterdir()} == FILES[kind] | {MANIFEST_FILE}
    assert last_checkpoint(folder) == str(newest)
    assert not caplog.text
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for what, mangle in MANGLINGS.items():
            if mangle is None:
                file.unlink()
            else:
                file.write_bytes(mangle(content))
            caplog.clear()
            assert last_checkpoint(folder) == str(folder / "checkpoint-4"), (file.name, what)
            [said] = caplog.messages
            assert str(newest) in said
            assert file.name in said, what
            file.write_bytes(content)
    assert fault_of(newest) == ""


def test_what_a_kill_left_of_a_file_goes_with_the_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    claim_checkpoints(folder, {"seed": 1}, Args)
    (folder / ".run.json.7.part").write_text('{"se')
    remove_checkpoints(folder)
    assert not folder.exists()


@pytest.mark.parametrize("size", [[712], "many", None])
def test_a_manifest_of_other_values_is_said_to_be_damaged(tmp_path, size):
    file = {"size": size, "xxh3_128": "0"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"files": {"config.json": file}}))
    assert fault_of(tmp_path).startswith(
        f"its {MANIFEST_FILE} cannot be read" if size != 10**400 else "its config"
    )


def test_where_the_newest_is_damaged_training_goes_on_from_the_one_before_to_the_same_end(
    trained, tmp_path, make_model, tokenizer, make_rows, caplog
):
    whole, result = trained["samples"]
    copy_of(whole, tmp_path, (2, 4))
    (tmp_path / "checkpoint-4/optimizer.pt").unlink()
    resumed = trainer_in(tmp_path, make_model, tokenizer, make_rows, **KINDS["samples"])
    again = resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is passed over: its optimizer.pt is absent" in caplog.text
    for (name, expected), found in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert bool((expected == found).all()), name
    assert again.training_loss == again.metrics["train_loss"] == pytest.approx(result.training_loss)
    assert resumed.state.log_history[-1]["train_loss"] == again.training_loss
    timed = ("sampling/t", "train_")
    for one, other in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(timed)} == pytest.approx(
            {k: v for k, v in other.items() if not k.startswith(timed)}
        )
    assert not fault_of(tmp_path / "checkpoint-4")  # written anew


def test_what_is_trained_to_its_end_already_keeps_its_loss(
    trained, tmp_path, make_model, tokenizer, make_rows
):
    whole, result = trained["samples"]
    folder = copy_of(whole, tmp_path, (6,))
    again = trainer_in(folder, make_model, tokenizer, make_rows, **KINDS["samples"]).train(True)
    assert again.global_step == 6
    assert again.training_loss == pytest.approx(result.training_loss)


def test_the_loss_of_a_training_is_the_mean_of_its_steps(trained):
    trainer, result = trained["samples"]
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]  # of two steps each
    assert len(logged) == 3
    assert result.training_loss == pytest.approx(sum(logged) / 3)


def test_a_checkpoint_that_is_named_must_be_whole(trained, tmp_path, make_model, tokenizer, make_rows):
    folder = copy_of(trained["samples"][0], tmp_path, (2,))
    (folder / "checkpoint-2" / MANIFEST_FILE).unlink()
    trainer = trainer_in(folder, make_model, tokenizer, make_rows, **KINDS["samples"])
    with pytest.raises(
        ConfigError, match=r"checkpoint-2 is no checkpoint to resume from: it has no manifest"
    ):
        trainer.train(str(folder / "checkpoint-2"))
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


class Args:
    should_save, process_index = True, 0


def test_without_a_whole_checkpoint_a_training_starts_anew_and_says_so(trained, tmp_path, caplog):
    assert claim_checkpoints(tmp_path, {"seed": 1}, Args) == (None, True)
    assert not caplog.text
    copy_of(trained["samples"][0], tmp_path, (2, 4))
    assert claim_checkpoints(tmp_path, {"seed": 1}, Args) == (str(tmp_path / "checkpoint-4"), True)
    for step in (2, 4):
        os.truncate(tmp_path / f"checkpoint-{step}/scheduler.pt", 7)
    assert claim_checkpoints(tmp_path, {"seed": 1}, Args) == (None, True)
    assert f"no checkpoint in {tmp_path} is whole: training starts anew" in caplog.text
    assert claim_checkpoints(tmp_path, {"seed": 2}, Args) == (None, False)


@pytest.mark.parametrize("content", ["", "{", "7", "[]", '["seed"]', "\0\0\0\0"])
def test_whose_checkpoints_cannot_be_told_are_refused(trained, tmp_path, content):
    claim_checkpoints(tmp_path, {"seed": 1}, Args)
    copy_of(trained["samples"][0], tmp_path, (2,))
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json, which says whose the checkpoints are|of another run"):
        claim_checkpoints(tmp_path, {"seed": 1}, Args)
    (tmp_path / "run.json").unlink()
    assert claim_checkpoints(tmp_path, {"seed": 1}, Args).checkpoint == str(tmp_path / "checkpoint-2")


def test_the_older_checkpoint_goes_when_the_newer_one_is_whole_and_not_before(
    tmp_path, make_model, tokenizer, make_rows, monkeypatch
):
    seen = []

    def seal(folder):
        seen.append({step: not fault_of(path) for step, path in checkpoints_in(tmp_path).items()})
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        real(folder)

    from softpref.lm.checkpoints import seal_checkpoint as real

    monkeypatch.setattr("softpref.lm.training.seal_checkpoint", seal)
    options = {**KINDS["adapter"], "save_total_limit": 1}
    trainer = trainer_in(tmp_path, make_model, tokenizer, make_rows, **options)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert seen == [{2: False}, {2: True, 4: False}, {4: True, 6: False}]
    assert list(checkpoints_in(tmp_path)) == [4]  # what could not be written takes no space
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert trainer.args.save_total_limit == 1


def test_thinning_keeps_the_newest_the_best_and_what_lies_ahead(tmp_path):
    def left(whole, cut, **options):
        shutil.rmtree(tmp_path, ignore_errors=True)
        for step in (*whole, *cut):
            (tmp_path / f"checkpoint-{step}").mkdir(parents=True)
            if step in whole:
                (tmp_path / f"checkpoint-{step}" / MANIFEST_FILE).touch()
        best = options.get("best") and str(tmp_path / f"checkpoint-{options['best']}")
        thin_checkpoints(tmp_path, options["newest"], options["limit"], best)
        return list(checkpoints_in(tmp_path))

    assert left([2, 4, 6], [], newest=6, limit=2) == [4, 6]
    assert left([2, 4, 6], [], newest=6, limit=1) == [6]
    assert left([2, 4, 6], [], newest=6, limit=1, best=2) == [2, 6]
    assert left([2, 4, 6], [], newest=6, limit=2, best=2) == [2, 6]
    assert left([2, 4, 6], [], newest=6, limit=3, best=6) == [2, 4, 6]
    assert left([2, 10], [4, 8], newest=10, limit=2) == [2, 10]  # a cut one counts for nothing
    assert left([2, 4], [8], newest=4, limit=1) == [4, 8]
    assert left([2, 4, 6], [5], newest=6, limit=None) == [2, 4, 5, 6]


def test_checkpoints_of_the_model_alone_are_not_trained_on(
    tmp_path, make_model, tokenizer, make_rows, caplog
):
    options = {**KINDS["adapter"], "save_only_model": True, "num_train_epochs": 1}
    trainer_in(tmp_path, make_model, tokenizer, make_rows, **options).train()
    assert last_checkpoint(tmp_path) is None
    assert "it holds the model alone (save_only_model)" in caplog.text


def test_the_best_checkpoint_is_not_loaded_when_it_is_damaged(
    trained, tmp_path, make_model, tokenizer, make_rows
):
    folder = copy_of(trained["samples"][0], tmp_path, (2,))
    trainer = trainer_in(folder, make_model, tokenizer, make_rows, **KINDS["samples"])
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-2")
    trainer._load_best_model()
    file = folder / "checkpoint-2/model.safetensors"
    weights = load_file(file)
    assert all(bool((weights[name] == one).all()) for name, one in trainer.model.state_dict().items())
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(SoftprefError, match=r"checkpoint-2, cannot be loaded: its model\.safetensors is not"):
        trainer._load_best_model()


def test_a_manifest_is_the_last_file(trained):
    folder = Path(trained["samples"][0].args.output_dir) / "checkpoint-6"
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(written, key=written.__getitem__) == MANIFEST_FILE
    assert json.loads((folder / MANIFEST_FILE).read_text())["files"].keys() == written.keys() - {
        MANIFEST_FILE
    }
