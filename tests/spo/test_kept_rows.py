"""Rows in tokens beside the reference: trainings take them where nothing differs, and end the same."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from softpref.errors import DataError
from softpref.lm import kept_rows as module
from softpref.lm import tokenizing
from softpref.lm.kept_rows import keep_rows, kept_rows
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.tokenization import stop_token_ids, tokenize_row
from softpref.spo import SPOConfig
from softpref.spo.rows import PreferenceRows, RowsWithTokens

QUICK = {
    "max_prompt_length": 6,
    "max_completion_length": 5,
    "samples_per_refresh": 8,
    "sampling_interval": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_dataset, reference_folder, make_rows):
    """A dataset, and a reference that the SFT stage made: `(dataset, reference)`."""
    from softpref.cli import main

    folder = tmp_path_factory.mktemp("made")
    rows = [
        row for row in make_rows(40, sizes=(2, 3)) if len({*row["completions"]}) == len(row["completions"])
    ]
    dataset = write_dataset(folder / "data", {"train": rows, "validation": rows[:6]})
    config = folder / "sft.json"
    options = {"base_model": reference_folder, "num_train_epochs": 0, "use_cpu": True, "bf16": False}
    config.write_text(json.dumps({**options, "disable_tqdm": True, "max_completion_length": 3}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softpref.tracking.tracker.mlflow_ready", lambda uri: False)
        patch.setattr("softpref.tracking.syncing.mlflow_ready", lambda uri: False)
        places = ["--dataset", dataset, "--output", str(folder / "reference")]
        assert main(["sft", *places, "--config", str(config)]) == 0
    return dataset, str(folder / "reference")


@pytest.fixture
def copies(made, tmp_path):
    """Copies of both folders, to be changed."""
    return tuple(Path(shutil.copytree(one, tmp_path / name)) for one, name in zip(made, "dr", strict=True))


def kept_beside(dataset, reference):
    tokenizer = load_tokenizer(str(reference))
    return kept_rows(dataset, reference, tokenizer, stop_token_ids(tokenizer, load_model(str(reference))))


@pytest.mark.parametrize(
    "options", [{}, {"method": "dpo", "beta": 0.5, "cut_rows": "keep"}], ids=["spo", "dpo"]
)
def test_a_training_takes_them_and_ends_at_the_same_weights(
    command, copies, tmp_path, monkeypatch, caplog, options
):
    caplog.set_level(logging.INFO)
    dataset, reference = map(str, copies)
    settings = {**QUICK, **options}
    calls = []
    monkeypatch.setattr(
        tokenizing, "tokenize_row", lambda *a, **k: calls.append(a[1]) or tokenize_row(*a, **k)
    )
    assert command("with", dataset, "--reference", reference, **settings) == 0
    assert f"taking the rows' tokens from {reference}/rows" in caplog.text
    longer = {prompt for prompt in calls if len(prompt) + 1 > QUICK["max_prompt_length"]}
    assert {*calls} == longer  # none but those that lose their beginning
    shutil.rmtree(Path(reference) / "rows")
    calls.clear()
    assert command("without", dataset, "--reference", reference, **settings) == 0
    assert f"tokenizing the rows here: {reference} holds none" in caplog.text
    assert len(calls) > 30
    calls.clear()
    assert command("of two", dataset, "--reference", reference, **settings, dataset_num_proc=2) == 0
    assert calls == []
    kept, own, of_two = (
        load_file(tmp_path / name / "model.safetensors") for name in ("with", "without", "of two")
    )
    begun = load_file(Path(reference) / "model.safetensors")
    assert all(torch.equal(kept[name], own[name]) for name in own)
    assert all(torch.equal(of_two[name], own[name]) for name in own)
    assert not all(torch.equal(kept[name], begun[name]) for name in own)
    said, said_too = (
        json.loads((tmp_path / name / "softpref.json").read_text()) for name in ("with", "without")
    )
    assert said["row_counts"] == said_too["row_counts"] != {}
    phases, phases_too = (
        json.loads((tmp_path / name / "timings.json").read_text()) for name in ("with", "without")
    )
    assert "reading" in phases
    assert "tokenizing" not in phases
    assert "tokenizing" in phases_too
    assert "reading" not in phases_too


@pytest.mark.parametrize("limits", [(512, 512), (512, 3), (4, 512), (3, 2)], ids=str)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_whatever_the_limits_rows_are_what_tokenizing_gives(
    write_dataset, reference_folder, make_rows, tmp_path, chat, limits
):
    rows = make_rows(30, sizes=(2, 3, 4), soft=True)
    if chat:
        limits = (limits[0] and limits[0] * 8, limits[1])
        for row in rows:
            turns = [("user", "a"), ("assistant", row["prompt"]), ("user", row["prompt"])]
            row["prompt"] = [{"role": role, "content": text} for role, text in turns]
            row["completions"] = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    dataset = write_dataset(tmp_path / "data", {"train": rows})
    tokenizer = load_tokenizer(reference_folder)
    stops = stop_token_ids(tokenizer)
    folder = shutil.copytree(reference_folder, tmp_path / "reference")
    args = SPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        cut_rows="keep",
        max_prompt_length=limits[0],
        max_completion_length=limits[1],
    )
    keep_rows(dataset, folder, None, args)
    kept = kept_rows(dataset, folder, tokenizer, stops)["train"]
    given = load_from_disk(dataset)["train"]
    own = PreferenceRows(given, tokenizer, args, stop_ids=stops)
    taken = PreferenceRows(RowsWithTokens(given, kept), tokenizer, args, stop_ids=stops)
    for name in ("rows", "numbers", "prompts", "counts"):
        assert getattr(taken, name) == getattr(own, name)
    assert kept.longer_prompts(limits[0]) == own.counts["cut_prompt"]


def other_rows(dataset, reference):
    rows = load_from_disk(str(dataset))
    rows["train"] = rows["train"].select([1, 0, *range(2, len(rows["train"]))])
    rows.save_to_disk(str(dataset.parent / "other"))
    shutil.copytree(dataset.parent / "other", dataset, dirs_exist_ok=True)


def other_template(dataset, reference):
    file = reference / "chat_template.jinja"
    file.write_text(file.read_text() + "\n")


def other_words(dataset, reference):
    file = reference / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"A"'))


def other_end(dataset, reference):
    file = reference / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [3, 7]}))


def flipped_byte(dataset, reference):
    file = reference / "rows" / "train" / "part-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_part(dataset, reference):
    file = reference / "rows" / "validation" / "part-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def lost_part(dataset, reference):
    (reference / "rows" / "train" / "part-00000.safetensors").unlink()


def further_part(dataset, reference):
    folder = reference / "rows" / "train"
    shutil.copy(folder / "part-00000.safetensors", folder / "part-00001.safetensors")


def cut_description(dataset, reference):
    file = reference / "rows" / "rows.json"
    file.write_text(file.read_text()[:-30])


def no_description(dataset, reference):
    (reference / "rows" / "rows.json").unlink()


def another_description(dataset, reference):
    (reference / "rows" / "rows.json").write_text('["splits"]')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_rows, "made from other train rows"),
        (other_template, "made from other tokenizer"),
        (other_words, "made from other tokenizer"),
        (other_end, "made from other tokenizer, end tokens"),
        (flipped_byte, "rows/train is damaged"),
        (cut_part, "rows/validation is damaged"),
        (lost_part, "rows/train is damaged"),
        (further_part, "rows/train is damaged"),
        (cut_description, r"rows\.json cannot be read"),
        (no_description, r"rows\.json cannot be read"),
        (another_description, r"rows\.json cannot be read"),
    ],
)
def test_what_differs_or_is_damaged_is_not_taken_and_the_log_says_why(copies, caplog, change, reason):
    assert set(kept_beside(*copies)) == {"train", "validation"}
    assert not caplog.records
    change(*copies)
    assert kept_beside(*copies) == {}
    assert re.search(f"tokenizing the rows here: .*{reason}", caplog.text)


def test_the_stage_that_keeps_them_writes_nothing_into_the_dataset(made):
    assert not list(Path(made[0]).rglob("cache-*"))


def test_files_that_say_nothing_of_tokens_may_change(copies):
    for name in (
        "timings.json",
        "softpref.json",
        "tracking.sent",
        "tracking.jsonl",
        "README.md",
        ".gitattributes",
    ):
        (copies[1] / name).write_text("other")
    assert set(kept_beside(*copies)) == {"train", "validation"}


def test_rows_of_other_code_are_not_taken(copies, monkeypatch, caplog):
    monkeypatch.setattr(module, "version", lambda package: "0")
    assert kept_beside(*copies) == {}
    assert "made from other code" in caplog.text


@pytest.mark.parametrize("function", ["_hashes", "_data_hash", "write_rows"])
def test_what_was_killed_while_writing_is_not_taken(copies, monkeypatch, caplog, function):
    dataset, reference = copies
    args = SPOConfig(output_dir=str(reference), use_cpu=True, bf16=False, disable_tqdm=True)
    options = (load_model(str(reference)), args)
    own = getattr(module, function)

    def killed(*given):
        if "validation" in str(given):
            raise KeyboardInterrupt
        return own(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, killed)
        with pytest.raises(KeyboardInterrupt):
            keep_rows(dataset, reference, *options)
    assert list((reference / "rows" / "train").iterdir())
    assert kept_beside(dataset, reference) == {}
    keep_rows(dataset, reference, *options)
    assert set(kept_beside(dataset, reference)) == {"train", "validation"}


def test_rows_that_cannot_be_tokenized_are_for_the_training_to_say(
    copies, command, write_dataset, tmp_path, caplog, capsys
):
    _, reference = copies
    good = {"prompt": "ab", "completions": ["a", "b"]}
    dataset = write_dataset(tmp_path / "bad", {"train": [good, {"prompt": "ab", "completions": ["a", ""]}]})
    args = SPOConfig(output_dir=str(reference), use_cpu=True, bf16=False, disable_tqdm=True)
    keep_rows(dataset, reference, None, args)
    assert "cannot be kept: train preference 1: the completion '' has no token" in caplog.text
    assert not (reference / "rows").exists()
    assert command("policy", dataset, "--reference", str(reference), **QUICK) == 2
    assert "training row 1: the completion '' has no token" in capsys.readouterr().err


def test_they_are_no_part_of_the_model_that_is_registered(copies):
    from softpref.registry.served import model_hash, whole_checkpoint

    _, reference = copies
    with whole_checkpoint(reference, False) as checkpoint:
        assert "rows" not in {path.name for path in checkpoint.iterdir()}
    before = model_hash(reference)
    shutil.rmtree(reference / "rows")
    assert model_hash(reference) == before


def test_the_description_names_hashes_and_no_place(made):
    dataset, reference = made
    text = (Path(reference) / "rows" / "rows.json").read_text()
    assert set(json.loads(text)) == {"tokenizer", "end tokens", "scored", "code", "splits"}
    assert str(Path(dataset).parent) not in text


def test_they_are_not_kept_where_nobody_wants_them(made, tmp_path, monkeypatch, reference_folder):
    from softpref.cli import main

    monkeypatch.setattr("softpref.tracking.tracker.mlflow_ready", lambda uri: False)
    monkeypatch.setattr("softpref.tracking.syncing.mlflow_ready", lambda uri: False)
    options = {"base_model": reference_folder, "num_train_epochs": 0, "use_cpu": True, "bf16": False}
    (tmp_path / "sft.json").write_text(json.dumps({**options, "keep_rows": False}))
    places = ["--dataset", made[0], "--output", str(tmp_path / "reference")]
    assert main(["sft", *places, "--config", str(tmp_path / "sft.json")]) == 0
    assert not (tmp_path / "reference" / "rows").exists()


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory, reference_folder):
    """The dataset, and a reference that kept its log-probabilities, too, up to a length."""
    from softpref.cli import main

    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softpref.tracking.tracker.mlflow_ready", lambda uri: False)
        patch.setattr("softpref.tracking.syncing.mlflow_ready", lambda uri: False)
        assert main(["sft", *keeping_logps(folder, made[0], reference_folder)]) == 0
    return made[0], str(folder / "reference")


def keeping_logps(folder, dataset, base, **options):
    config = {"base_model": base, "num_train_epochs": 0, "use_cpu": True, "bf16": False, "disable_tqdm": True}
    limits = {"max_prompt_length": 8, "max_completion_length": 4}
    config |= {"keep_reference_logps": True, "learning_rate": 0.1, **limits, **options}
    (folder / "sft.json").write_text(json.dumps(config))
    places = ["--dataset", dataset, "--output", str(folder / "reference")]
    return [*places, "--config", str(folder / "sft.json")]


def logps_kept(dataset, reference, precision="float32"):
    """Every row's, in order."""
    tokenizer, model = load_tokenizer(str(reference)), load_model(str(reference))
    rows = kept_rows(dataset, reference, tokenizer, stop_token_ids(tokenizer, model), precision=precision)
    return [list(row) for row in rows["train"]]


def test_the_references_log_probabilities_are_those_of_transformers_up_to_the_lengths(scored):
    model = load_model(scored[1]).eval()
    lengths = set()
    for row in logps_kept(*scored):
        for prompt, completion, *_, logp in row:
            fits = len(prompt) <= 8 and len(completion) <= 4
            lengths.add(fits)
            assert (logp is not None) == fits
            if fits:
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
                own = logits.log_softmax(-1)[range(len(completion)), completion].sum()
                assert logp == pytest.approx(own.item(), abs=1e-4)
    assert lengths == {True, False}


@pytest.mark.parametrize(
    "options",
    [{"anchor": 1.0}, {"method": "dpo", "beta": 0.5}, {"anchor": 1.0, "max_completion_length": 4}],
    ids=["anchor", "dpo", "cut"],
)
def test_a_training_takes_them_and_ends_where_it_would_without(
    command, scored, tmp_path, monkeypatch, caplog, options
):
    from softpref.spo.objective import Objective

    caplog.set_level(logging.INFO)
    asked = []
    own = Objective._reference_hidden
    monkeypatch.setattr(Objective, "_reference_hidden", lambda self, *a: asked.append(1) or own(self, *a))
    settings = {**QUICK, "max_prompt_length": 512, **options}
    dataset, reference = scored[0], shutil.copytree(scored[1], tmp_path / "reference")
    assert command("with", dataset, "--reference", str(reference), **settings) == 0
    assert "rows, and the reference's log-probabilities" in caplog.text
    assert not asked
    shutil.rmtree(reference / "rows")
    assert command("without", dataset, "--reference", str(reference), **settings) == 0
    assert asked
    taken, computed = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    begun = load_file(reference / "model.safetensors")
    moved = max((computed[name] - begun[name]).abs().max() for name in begun)
    assert max((taken[name] - computed[name]).abs().max() for name in begun) < 1e-3 * moved


def test_those_of_other_weights_or_precision_are_not_taken(scored, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert any(one.reference_logp is not None for row in logps_kept(*scored) for one in row)
    for precision, said in (("bfloat16", "in float32 and not bfloat16"), ("", "")):
        caplog.clear()
        rows = logps_kept(*scored, precision)
        assert all(one.reference_logp is None for row in rows for one in row)
        assert said in caplog.text
    reference = shutil.copytree(scored[1], tmp_path / "reference")
    model = load_model(str(reference))
    model.get_output_embeddings().weight.data[0, 0] += 1e-3
    model.save_pretrained(reference)
    rows = logps_kept(scored[0], reference)
    assert rows
    assert all(one.reference_logp is None for row in rows for one in row)
    assert "its log-probabilities are of other weights" in caplog.text


def test_what_cannot_be_scored_is_left_to_the_trainings(scored, copies):
    def score(sequences):
        return [math.nan if len(ids) > 2 else 0.0 for _, ids in sequences]

    dataset, reference = copies
    limits = {"max_prompt_length": 8, "max_completion_length": 4}
    args = SPOConfig(output_dir=str(reference), use_cpu=True, bf16=False, disable_tqdm=True, **limits)
    keep_rows(dataset, reference, load_model(str(reference)), args, score)
    known = [one for row in logps_kept(dataset, reference) for one in row if one.reference_logp is not None]
    assert known
    assert all(one.reference_logp == 0 and len(one.completion) <= 2 for one in known)


def test_a_row_that_the_model_has_no_positions_for_costs_the_others_nothing(copies, make_model):
    dataset, reference = copies
    tokenizer = load_tokenizer(str(reference))
    model = make_model(tokenizer)
    model.config.max_position_embeddings = 6
    asked = []

    def score(sequences):
        asked.extend(sequences)
        return [0.0] * len(sequences)

    args = SPOConfig(output_dir=str(reference), use_cpu=True, bf16=False, disable_tqdm=True)
    keep_rows(dataset, reference, model, args, score)
    lengths = [len(one.prompt) + len(one.completion) for row in logps_kept(dataset, reference) for one in row]
    assert max(lengths) > 6
    assert {len(prompt) + len(completion) <= 6 for prompt, completion in asked} == {True}
    assert all(
        (one.reference_logp == 0) == (len(one.prompt) + len(one.completion) <= 6)
        for row in logps_kept(dataset, reference)
        for one in row
    )


def test_a_reference_that_is_loaded_as_another_model_is_computed_anew(command, scored, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made = {"model_init_kwargs": {"rms_norm_eps": 0.5}, "anchor": 1.0}
    assert command("policy", scored[0], "--reference", scored[1], **QUICK, **made) == 0
    assert "taking the rows' tokens" in caplog.text
    assert "the reference's log-probabilities" not in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_cannot_be_used_is_named_whatever_the_processes(make_trainer, processes):
    rows = [{"prompt": "ab", "completions": ["a", "b"]}] * 3
    wrong = [{**rows[0], "probability": 2.0}, {"prompt": "ab", "completions": ["a", ""]}, {"prompt": "ab"}]
    for order, reason in (
        (wrong, "probability must be"),
        (wrong[1:], "has no token"),
        (wrong[2:], "needs compl"),
    ):
        with pytest.raises(DataError, match=f"training row 3: .*{reason}"):
            make_trainer([*rows, *order], dataset_num_proc=processes)
