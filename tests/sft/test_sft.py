"""The reference stage: what carries the loss, what is learned, what is kept, what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from softpref.config import build_config
from softpref.errors import ConfigError, DataError
from softpref.lm.loading import load_model, load_tokenizer, save_model_folder
from softpref.lm.sampling import sample_completions, sampling_noise
from softpref.lm.scoring import score_sequences
from softpref.lm.tokenization import decode, tokenize_prompt, tokenize_sequence
from softpref.records.model import load_metadata
from softpref.sft.config import SFTConfig
from softpref.sft.scratch import build_model, build_tokenizer
from softpref.sft.stage import headline, run
from softpref.sft.trainer import Demonstrations, SFTTrainer, collate

SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_dataset, rows, tracking_uri):
    """A reference from nothing: `(folder, metrics)`."""
    folder = tmp_path_factory.mktemp("sft")
    dataset = write_dataset(folder / "data", rows, validation=rows[:4])
    config = build_config(
        SFTConfig,
        {"use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 1, "model_config": SMALL},
        {"learning_rate": 2e-2, "num_train_epochs": 40, "per_device_train_batch_size": 6, "vocab_size": 300},
        {"save_steps": 50, "lr_scheduler_type": "linear"},
    )
    metrics = run(
        config, dataset_dir=dataset, output_dir=str(folder / "reference"), tracking_uri=tracking_uri
    )
    return folder / "reference", metrics


def test_the_headline_is_losses_and_perplexity(trained):
    _, metrics = trained
    found = headline(metrics)
    assert set(found) == {"train_loss", "eval_loss", "eval_perplexity"}
    assert math.log(found["eval_perplexity"]) == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert headline({"train_loss": 1.0}) == {"train_loss": 1.0}
    assert headline({"train_loss": math.nan, "eval_loss": 1e4}) == {"eval_loss": 1e4}


def loss_by_hand(model, tokenizer, rows):
    """Mean over completion tokens of −log π, each sequence alone."""
    sequences = [tokenize_sequence(tokenizer, row["prompt"], row["completion"])[:2] for row in rows]
    scores = score_sequences(model, sequences, batch_size=1)
    return -float(scores.sum()) / sum(len(completion) for _, completion in sequences)


@pytest.mark.parametrize("plain", [False, True])
def test_the_loss_is_on_completion_tokens_alone(tmp_path, make_tokenizer, make_model, rows, plain):
    tokenizer = make_tokenizer(pad_is_eos=True)
    model = make_model(tokenizer)
    sequences = [tokenize_sequence(tokenizer, row["prompt"], row["completion"]) for row in rows[:5]]
    batch = collate(sequences)
    assert batch["targets"].tolist() == [token for sequence in sequences for token in sequence.completion]
    config = SFTConfig(
        output_dir=str(tmp_path), model_config=SMALL, use_cpu=True, bf16=False, plain_forward=plain
    )
    trainer = SFTTrainer(model=model, args=config, data_collator=collate)
    with torch.no_grad():
        loss = float(trainer.compute_loss(model.eval(), batch))
    assert loss == pytest.approx(loss_by_hand(model, tokenizer, rows[:5]), rel=1e-5)


def test_a_step_weighs_all_its_tokens_alike_however_it_is_cut(
    tmp_path, make_tokenizer, make_model, rows, monkeypatch
):
    tokenizer = make_tokenizer()
    sequences = [tokenize_sequence(tokenizer, row["prompt"], row["completion"]) for row in rows[:12]]
    sequences += [sequences[0]._replace(completion=sequences[0].completion * 3)]
    weights = []
    for batch, pieces in ((13, 1), (4, 4), (1, 13)):
        model = make_model(tokenizer)
        config = SFTConfig(
            output_dir=str(tmp_path / f"of-{batch}"),
            model_config=SMALL,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0,
            num_train_epochs=1,
            save_strategy="no",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=pieces,
        )
        SFTTrainer(model=model, args=config, data_collator=collate, train_dataset=sequences).train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    begun = torch.cat([parameter.detach().flatten() for parameter in make_model(tokenizer).parameters()])
    assert float((weights[0] - begun).abs().max()) > 1e-2
    for found in weights[1:]:
        torch.testing.assert_close(found, weights[0], rtol=0, atol=1e-5)


def test_a_training_that_was_cut_off_after_its_last_step_takes_no_further_one(
    tmp_path, make_tokenizer, make_model, rows
):
    tokenizer = make_tokenizer()
    sequences = [tokenize_sequence(tokenizer, row["prompt"], row["completion"]) for row in rows]

    def trainer():
        config = SFTConfig(
            output_dir=str(tmp_path),
            model_config=SMALL,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_steps=4,  # in the middle of the second pass
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=6,
        )
        model = make_model(tokenizer)
        return SFTTrainer(model=model, args=config, data_collator=collate, train_dataset=sequences)

    whole = trainer()
    loss = whole.train().training_loss
    again = trainer()
    found = again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert found.training_loss == pytest.approx(loss, rel=1e-6)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, rtol=0, atol=0)


def test_a_reference_from_nothing_learns_the_completions_and_to_end_them(trained, rows):
    folder, metrics = trained
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    prompts = [tokenize_prompt(tokenizer, row["prompt"]).ids for row in rows]
    samples = sample_completions(
        model,
        prompts,
        noise=sampling_noise(len(prompts), 24, 0),
        stop_ids=[tokenizer.eos_token_id],
    )
    assert sum(not sample.truncated for sample in samples) >= 0.9 * len(samples)
    known = {row["completion"] for row in rows}
    assert sum(decode(tokenizer, sample.completion) in known for sample in samples) >= 0.8 * len(samples)
    # each prompt has two demonstrations: log 2 nats a completion is all there is left to be unsure of
    tokens = len(tokenize_sequence(tokenizer, rows[0]["prompt"], rows[0]["completion"]).completion)
    assert loss_by_hand(model, tokenizer, rows) < 2 * math.log(2) / tokens
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(model, tokenizer, rows[:4]), rel=1e-3)


def test_the_folder_says_what_it_is_and_keeps_no_checkpoints(trained):
    folder, metrics = trained
    metadata = load_metadata(folder)
    assert metadata["stage"] == "sft"
    assert metadata["dataset_hash"] == "abc"
    assert metadata["run_id"]
    assert not (folder / "checkpoints").exists()
    assert metrics["train_loss"] > metrics["eval_loss"]
    assert load_model(str(folder)).config.vocab_size == len(load_tokenizer(str(folder)))


def test_training_goes_on_from_a_checkpoint_folder_with_its_tokenizer(
    trained, tmp_path, write_dataset, settings, tracking_uri
):
    base = str(trained[0])
    rows = [{"prompt": "fox and bell:", "completion": " the moon!"}] * 12
    config = SFTConfig(**settings, base_model=base, num_train_epochs=3)
    dataset = write_dataset(tmp_path / "data", rows)
    run(config, dataset_dir=dataset, output_dir=str(tmp_path / "out"), tracking_uri=tracking_uri)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.get_vocab() == load_tokenizer(base).get_vocab()
    before, after = (loss_by_hand(load_model(m), tokenizer, rows) for m in (base, str(tmp_path / "out")))
    assert after < 0.5 * before
    assert load_metadata(tmp_path / "out")["base_model"] == base


def test_a_base_model_may_be_a_path_or_none(trained):
    assert SFTConfig(base_model=Path(trained[0])).base_model == str(trained[0])
    assert SFTConfig(base_model=None, model_config={"model_type": "llama"}).base_model == ""


def test_no_epochs_keep_the_base_model_as_it_is(
    trained, tmp_path, write_dataset, rows, settings, tracking_uri
):
    base = str(trained[0])
    dataset = write_dataset(tmp_path / "data", rows, validation=rows[:6])
    config = SFTConfig(**settings, base_model=base, num_train_epochs=0)
    metrics = run(config, dataset_dir=dataset, output_dir=str(tmp_path / "out"), tracking_uri=tracking_uri)
    kept = load_model(str(tmp_path / "out")).state_dict()
    for name, tensor in load_model(base).state_dict().items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0)
    expected = loss_by_hand(load_model(base), load_tokenizer(base), rows[:6])
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_demonstrations_of_their_own_come_before_best_completions(
    trained, tmp_path, write_dataset, rows, settings, tracking_uri
):
    demonstrations = [{"prompt": "fox and bell:", "completion": " the moon!"}] * 12
    dataset = write_dataset(tmp_path / "data", rows, demonstrations=demonstrations)
    config = SFTConfig(**settings, base_model=str(trained[0]), num_train_epochs=20)
    run(config, dataset_dir=dataset, output_dir=str(tmp_path / "out"), tracking_uri=tracking_uri)
    tokenizer, model = load_tokenizer(str(tmp_path / "out")), load_model(str(tmp_path / "out"))
    assert loss_by_hand(model, tokenizer, demonstrations) < 0.5
    assert loss_by_hand(model, tokenizer, rows) > 1


def test_a_chat_model_learns_messages(tmp_path, make_tokenizer, make_model, settings, tracking_uri):
    from datasets import Dataset, DatasetDict

    tokenizer = make_tokenizer()
    save_model_folder(make_model(tokenizer, spread=0.1), tokenizer, tmp_path / "base", {})
    (tmp_path / "base" / "softpref.json").unlink()
    chat = {
        "prompt": [{"role": "user", "content": "who?"}],
        "completions": [
            [{"role": "assistant", "content": "a fox"}],
            [{"role": "assistant", "content": "an owl"}],
        ],
    }
    DatasetDict({"train": Dataset.from_list([chat] * 12)}).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "data" / "stats.json").write_text("{}")
    config = SFTConfig(**settings, base_model=str(tmp_path / "base"), num_train_epochs=20)
    run(
        config,
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        tracking_uri=tracking_uri,
    )
    model = load_model(str(tmp_path / "out"))
    row = {"prompt": chat["prompt"], "completion": chat["completions"][0]}
    assert loss_by_hand(model, tokenizer, [row]) < 0.2


TEXTS = [
    "the fox found a bell.",
    "  two  spaces\tand\r\nline breaks\n",
    "Füchse, 狐狸, лиса, 🦊 and e\u0301",
    "\x00\x1f control, and bytes that are no word: \ufffd\U0010ffff",
    "<s> </s> [INST] are only text here",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocab_size", [258, 300])
def test_any_text_can_be_written_and_read_back(rows, text, vocab_size, tmp_path):
    tokenizer = build_tokenizer([row["completion"] for row in rows] * 2, vocab_size=vocab_size)
    assert len(tokenizer) <= vocab_size
    tokenizer.save_pretrained(tmp_path)
    build_model(SMALL, tokenizer).save_pretrained(tmp_path)
    for one in (tokenizer, load_tokenizer(str(tmp_path))):
        ids = one(text)["input_ids"]
        assert decode(one, ids) == text
        assert one.eos_token_id not in ids


def test_a_finished_folder_is_not_written_over(trained, write_dataset, rows, tmp_path, settings):
    dataset = write_dataset(tmp_path / "data", rows)
    config = SFTConfig(**settings, base_model=str(trained[0]))
    with pytest.raises(ConfigError, match="finished model already"):
        run(config, dataset_dir=dataset, output_dir=str(trained[0]))


def test_a_folder_that_is_no_dataset_is_refused(trained, tmp_path, settings):
    config = SFTConfig(**settings, base_model=str(trained[0]))
    with pytest.raises(DataError, match=r"holds no stats\.json"):
        run(config, dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))


def test_a_demonstration_that_cannot_be_learned_is_named(trained, tmp_path, write_dataset, rows, settings):
    dataset = write_dataset(tmp_path / "data", [*rows[:2], {"prompt": "fox", "completion": ""}])
    config = SFTConfig(**settings, base_model=str(trained[0]))
    with pytest.raises(DataError, match=r"demonstration 2: .* has no token"):
        run(config, dataset_dir=dataset, output_dir=str(tmp_path / "out"))


def test_a_demonstration_longer_than_the_model_is_refused(tmp_path, write_dataset, settings):
    rows = [{"prompt": "a", "completion": " b"}] * 11 + [{"prompt": "fox " * 60, "completion": " bell" * 60}]
    limits = {"max_prompt_length": 500, "max_completion_length": 500}
    config = SFTConfig(**{**settings, **limits}, model_config={**SMALL, "max_position_embeddings": 32})
    with pytest.raises(ConfigError, match="do not fit the model's 32 positions; lower max_prompt_length"):
        run(config, dataset_dir=write_dataset(tmp_path / "data", rows), output_dir=str(tmp_path / "out"))


def test_messages_cannot_train_a_model_from_nothing(tmp_path, settings):
    from datasets import Dataset, DatasetDict

    message = [{"role": "user", "content": "who?"}]
    row = {"prompt": message, "completions": [message, message]}
    DatasetDict({"train": Dataset.from_list([row])}).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "data" / "stats.json").write_text(json.dumps({}))
    config = SFTConfig(**settings, model_config=SMALL)
    with pytest.raises(ConfigError, match="need a chat model"):
        run(config, dataset_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs base_model"),
        ({"model_config": {"hidden_size": 8}}, '"model_type"'),
        ({"base_model": "/nowhere/model"}, "model '/nowhere/model' does not exist"),
        ({"base_model": "missing.gguf"}, "missing.gguf does not exist"),
        ({"model_config": SMALL, "vocab_size": 257}, "vocab_size must be at least 258"),
        ({"model_config": SMALL, "max_prompt_length": 0}, "max_prompt_length must be at least 1"),
        ({"model_config": SMALL, "learning_rte": 1.0}, "did you mean 'learning_rate'"),
    ],
)
def test_a_wrong_parameter_is_refused_and_the_message_says_what_is_right(settings, options, message):
    with pytest.raises(ConfigError, match=message):
        build_config(SFTConfig, settings, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, "lama"),
        ({**SMALL, "hiden_size": 8}, "did you mean 'hidden_size'"),
        ({**SMALL, "hidden_size": "wide"}, "does not describe a model"),
        ({**SMALL, "hidden_size": 33}, "does not describe a model"),
    ],
)
def test_an_option_that_the_model_type_does_not_have_is_refused(make_tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(options, make_tokenizer())


def test_whole_numbers_are_floats_where_the_model_type_has_floats(make_tokenizer):
    """transformers refuses them, and a form gives 1 for 1.0."""
    config = build_model({**SMALL, "initializer_range": 1, "num_key_value_heads": 1}, make_tokenizer()).config
    assert type(config.initializer_range) is float
    assert type(config.num_key_value_heads) is int


def test_demonstrations_that_are_cut_are_counted(trained, tmp_path, write_dataset, settings, tracking_uri):
    rows = [
        {"prompt": "fox and bell:", "completion": " the moon!"},
        {"prompt": "fox and bell:", "completion": " the moon!" * 9},
    ]
    dataset = write_dataset(tmp_path / "data", rows)
    config = SFTConfig(
        **settings,
        base_model=str(trained[0]),
        num_train_epochs=0,
        max_completion_length=16,
        max_prompt_length=2,
    )
    metrics = run(config, dataset_dir=dataset, output_dir=str(tmp_path / "out"), tracking_uri=tracking_uri)
    assert {name: value for name, value in metrics.items() if name.startswith("rows/")} == {
        "rows/given": 2,
        "rows/cut_prompt": 2,
        "rows/cut_completion": 1,
    }
    assert load_metadata(tmp_path / "out")["row_counts"]["train"]["cut_completion"] == 1


def test_demonstrations_are_the_same_whatever_the_processes(make_tokenizer, settings, tmp_path, rows):
    tokenizer = make_tokenizer()
    limits = {"max_prompt_length": 6, "max_completion_length": 8}
    made = []
    for processes in (1, 2):
        config = SFTConfig(
            **{**settings, **limits},
            output_dir=str(tmp_path),
            model_config=SMALL,
            dataset_num_proc=processes,
        )
        made.append(
            Demonstrations(rows * 20, tokenizer, config, [tokenizer.eos_token_id], "train demonstration")
        )
    expected = [tokenize_sequence(tokenizer, row["prompt"], row["completion"], **limits) for row in rows * 20]
    assert made[0].rows == made[1].rows == expected
    assert made[0].counts == made[1].counts
    wrong = [*rows, {"prompt": "fox", "completion": ""}]
    with pytest.raises(DataError, match=f"train demonstration {len(rows)}: .* has no token"):
        Demonstrations(wrong, tokenizer, config, [tokenizer.eos_token_id], "train demonstration")


def test_less_than_one_process_is_refused(settings):
    with pytest.raises(ConfigError, match=r"SFTConfig\.dataset_num_proc must be at least 1"):
        SFTConfig(**settings, model_config=SMALL, dataset_num_proc=0)
