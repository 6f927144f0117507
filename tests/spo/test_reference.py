"""Log-probabilities of the reference on disk: worth the same as a live reference, and never another's."""

import pytest
import torch
from softpref.errors import ConfigError, DataError
from softpref.lm.checkpoints import last_checkpoint
from softpref.lm.fingerprint import model_fingerprint
from softpref.lm.scoring import score_sequences
from softpref.spo import reference
from softpref.spo.reference import kept_logps

CACHED = ("dpo", "rdpo", "ipo", "slic", "ropo", "apo_zero", "apo_down", "sppo")


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def files(kept):
    """`files() -> the cache's files`."""
    return lambda: sorted(kept.iterdir())


@pytest.fixture
def train(make_trainer, make_rows, kept):
    """`train(cache=True, trainer=None, **options)` of a method on soft pairs, validated on others."""

    def run(*, cache=True, method="dpo", rows=None, trains=True, **options):
        trainer = make_trainer(
            make_rows(12, soft=True, seed=1) if rows is None else rows,
            method=method,
            beta=0.3,
            reference_cache=str(kept) if cache else "",
            trainer_options={"eval_dataset": make_rows(5, seed=2), **options.pop("trainer_options", {})},
            per_device_train_batch_size=4,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.05,
            **options,
        )
        if trains:
            trainer.train()
        return trainer

    return run


@pytest.fixture
def no_scoring(monkeypatch):
    """From here on, whoever asks a model for log-probabilities of rows fails."""

    def fail(*arguments, **options):
        raise AssertionError("scored")

    def switch():
        monkeypatch.setattr("softpref.spo.trainer.score_sequences", fail)

    return switch


@pytest.mark.parametrize("method", CACHED)
def test_training_goes_as_with_a_live_reference(train, weights, logs_of, method):
    live, cached = (train(cache=cache, method=method, output=str(cache)) for cache in (False, True))
    assert live.ref_model is not None
    assert cached.ref_model is None
    torch.testing.assert_close(weights(cached.model), weights(live.model), rtol=0, atol=1e-5)
    for ours, theirs in zip(logs_of(cached), logs_of(live), strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert logs_of(live)[-1]["rewards/margins"] != pytest.approx(0, abs=1e-2)
    held_out = live.evaluate()
    for name, value in cached.evaluate().items():
        if name.startswith(("eval_rewards", "eval_loss")):
            assert value == pytest.approx(held_out[name], rel=1e-3, abs=1e-4), name


def test_a_second_run_scores_nothing_and_sees_the_very_same_values(train, files, no_scoring, weights):
    first = train(output="first")
    assert len(files()) == 2  # training and evaluation rows
    assert all(path.name.startswith("reference_logps-") for path in files())
    changed = {path: path.stat().st_mtime_ns for path in files()}
    no_scoring()
    second = train(output="second")
    torch.testing.assert_close(weights(second.model), weights(first.model), rtol=0, atol=0)
    # another method shares the values, and so do the same rows in another order
    other = train(method="ipo", rows=None, output="other")
    assert [row["ref_logps"] for row in other.train_dataset.rows] == [
        row["ref_logps"] for row in first.train_dataset.rows
    ]
    assert {path: path.stat().st_mtime_ns for path in files()} == changed


def test_kept_values_are_the_references_own_and_follow_their_rows(train, make_rows, files, no_scoring, model):
    rows = make_rows(9, sizes=(2, 3))
    rows.append({**rows[0], "completions": rows[0]["completions"][::-1]})  # known completions, turned round
    trainer = train(rows=rows, trains=False)
    no_scoring()
    shuffled = train(rows=rows[::-1], trains=False)
    assert len(files()) == 2
    for tried in (trainer, shuffled):
        for row in tried.train_dataset.rows:
            expected = score_sequences(model, [(row["prompt"], one) for one in row["completions"]])
            assert row["ref_logps"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert shuffled.train_dataset.rows == trainer.train_dataset.rows[::-1]


def test_other_rows_another_model_and_another_precision_have_files_of_their_own(
    train, make_rows, make_model, tokenizer, files
):
    train(trains=False)
    train(rows=make_rows(12, seed=8), trains=False)
    assert len(files()) == 3  # the evaluation rows stayed
    other = make_model(tokenizer, layers=2, seed=9)
    train(trains=False, trainer_options={"ref_model": other})
    assert len(files()) == 5
    train(trains=False, bf16=True)
    assert len(files()) == 7


def test_a_handed_in_reference_is_the_one_that_is_kept(train, make_model, tokenizer, logs_of):
    live, cached = (
        train(
            cache=cache,
            output=str(cache),
            trainer_options={"ref_model": make_model(tokenizer, layers=2, seed=9)},
        )
        for cache in (False, True)
    )
    assert abs(logs_of(live)[0]["rewards/margins"]) > 0.05
    for ours, theirs in zip(logs_of(cached), logs_of(live), strict=True):
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("which", ["model", "data"])
def test_a_file_of_another_model_or_other_data_is_refused(
    train, make_rows, make_model, tokenizer, files, which
):
    train(trains=False, trainer_options={"eval_dataset": None})
    (own,) = files()
    if which == "model":
        train(
            trains=False,
            trainer_options={"eval_dataset": None, "ref_model": make_model(tokenizer, layers=2, seed=9)},
        )
    else:
        train(trains=False, rows=make_rows(12, seed=8), trainer_options={"eval_dataset": None})
    (foreign,) = set(files()) - {own}
    foreign.replace(own)
    with pytest.raises(ConfigError, match=f"was made for another {which} .*name another reference_cache"):
        train(trains=False, trainer_options={"eval_dataset": None})


def test_a_file_that_was_cut_off_or_lacks_an_entry_is_refused(train, files, no_scoring):
    from safetensors import safe_open
    from safetensors.torch import save_file

    train(trains=False, trainer_options={"eval_dataset": None})
    (own,) = files()
    whole = own.read_bytes()
    no_scoring()
    for end in (len(whole) - 5, 4, 0):
        own.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match=r"cannot be read .*remove it, and it is made anew"):
            train(trains=False, trainer_options={"eval_dataset": None})
    own.write_bytes(whole)
    with safe_open(own, framework="pt") as content:
        metadata, tensors = content.metadata(), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    assert len(tensors["logps"]) == 24
    save_file({name: tensor[1:].clone() for name, tensor in tensors.items()}, own, metadata=metadata)
    with pytest.raises(DataError, match=r"lacks a completion of row \d+; .*remove it"):
        train(trains=False, trainer_options={"eval_dataset": None})
    save_file({"logps": tensors["logps"]}, own, metadata=metadata)
    with pytest.raises(ConfigError, match="cannot be read"):
        train(trains=False, trainer_options={"eval_dataset": None})


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_scored(train, kept, no_scoring):
    kept.write_text("a file")
    no_scoring()
    with pytest.raises(FileExistsError):
        train(trains=False)


def test_a_write_that_fails_leaves_nothing_that_looks_whole(train, files, kept, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(reference.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        train(trains=False)
    assert not [path for path in files() if path.suffix == ".safetensors" and path.name[0] != "."]


def test_all_processes_score_where_one_of_them_sees_no_file(tmp_path):
    rows = [{"prompt": [1], "completions": [[2], [3, 4]]}]
    calls = []

    def score(sequences):
        calls.append(sequences)
        return [-float(len(completion)) for _, completion in sequences]

    kept_logps(rows, tmp_path, "model", score)
    kept_logps(rows, tmp_path, "model", score)
    assert len(calls) == 1
    found = kept_logps(rows, tmp_path, "model", score, writes=False, everywhere=lambda here: False)
    assert len(calls) == 2
    assert found == [[-1.0, -2.0]]


def test_rows_that_have_no_kept_values_are_refused_with_a_reason(train, make_trainer, make_rows):
    cached = train(trains=False)
    other = make_trainer(make_rows(3, seed=4), method="dpo", output="other").train_dataset
    with pytest.raises(ConfigError, match="no kept log-probabilities of the reference"):
        cached.evaluate(other)


def test_a_fingerprint_is_that_of_the_weights_under_an_adapter(make_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    def adapt(base, **options):
        lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options)
        return get_peft_model(base, lora)

    plain = model_fingerprint(make_model(tokenizer, attention_bias=True))
    assert plain == model_fingerprint(make_model(tokenizer, attention_bias=True))
    assert len(plain) == 64
    for options in ({}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}):
        adapted = adapt(make_model(tokenizer, attention_bias=True), **options)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5)
        assert model_fingerprint(adapted) == plain, options
    with torch.no_grad():
        adapted.get_base_model().model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-3
    assert model_fingerprint(adapted) != plain
    changed = make_model(tokenizer, attention_bias=True)
    with torch.no_grad():
        changed.model.norm.weight[-1] += 1e-6
    assert model_fingerprint(changed) != plain
    assert model_fingerprint(make_model(tokenizer, attention_bias=True).double()) != plain


def test_an_adapter_shares_the_file_of_its_base_model(train, make_model, tokenizer, no_scoring, files):
    from peft import LoraConfig

    plain = train(trains=False)
    no_scoring()
    adapted = train(
        output="adapted",
        trainer_options={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
    )
    assert len(files()) == 2
    assert adapted.ref_model is None
    assert adapted.train_dataset.rows == plain.train_dataset.rows


def test_a_resumed_run_takes_the_kept_values_of_the_first_model(train, tmp_path, no_scoring, weights):
    whole = train(output="run", save_strategy="steps", save_steps=2)
    assert whole.state.global_step == 6
    no_scoring()
    again = train(output="run", save_strategy="steps", save_steps=2, trains=False)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-6")
    torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=0)
