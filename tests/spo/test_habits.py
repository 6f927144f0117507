"""What somebody who knows the trainers of transformers and TRL tries first, and what answers them."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from softpref.errors import ConfigError, DataError, SoftprefError
from softpref.spo import SPOConfig, SPOTrainer
from torch.optim import SGD
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

ROWS = [
    {"prompt": "ab", "completions": ["c", "de"]},
    {"prompt": "cab", "completions": ["fed", "g", "ha"], "kind": "ranking"},
    {"prompt": "h", "completions": ["b", "a"], "probability": 0.7},
]
PAIRS = [row for row in ROWS if len(row["completions"]) == 2]


class Begin(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def question(text, answer=None):
    turns = [{"role": "user", "content": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


@pytest.fixture
def logps(tokenizer, direct):
    """`logps(model, row) -> its completions' log-probabilities`, each from its own logits."""

    def each(model, row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ends = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for text in row["completions"]
        ]
        return [direct.token_logps(model, prompt, end).sum().item() for end in ends]

    return each


# ---------------------------------------------------------------- models, tokenizers and their names


def test_a_model_is_loaded_from_its_name_in_fp32_with_its_tokenizer_and_reference(
    make_trainer, reference_folder, weights
):
    options = {"model_init_kwargs": {"attn_implementation": "eager"}}
    trainer = make_trainer(
        PAIRS, model=reference_folder, trainer_options={"processing_class": None}, **options
    )
    saved = AutoModelForCausalLM.from_pretrained(reference_folder)
    torch.testing.assert_close(weights(trainer.model), weights(saved), rtol=0, atol=0)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.float32
    assert trainer.processing_class("ab")["input_ids"] == [1, 5, 6]
    trainer.train()
    torch.testing.assert_close(weights(trainer.ref_model), weights(saved), rtol=0, atol=0)
    path = Path(reference_folder)
    again = make_trainer(PAIRS, model=path, trainer_options={"ref_model": path, "processing_class": None})
    torch.testing.assert_close(weights(again.ref_model), weights(saved), rtol=0, atol=0)
    assert again.processing_class("ab")["input_ids"] == [1, 5, 6]


def test_a_loaded_model_brings_its_tokenizer_and_without_arguments_the_output_is_named_after_it(
    reference_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(reference_folder, max_position_embeddings=2048)
    trainer = SPOTrainer(model, train_dataset=PAIRS)
    assert trainer.processing_class("ab")["input_ids"] == [1, 5, 6]
    assert trainer.args.output_dir == f"{Path(reference_folder).name}-SPO"


def test_options_of_loading_may_come_from_the_command_line(layers_of, reference_folder):
    assert SPOConfig(**layers_of, model_init_kwargs='{"dtype": "bfloat16"}').model_init_kwargs == {
        "dtype": "bfloat16"
    }
    assert SPOConfig(**layers_of).model_init_kwargs is None
    with pytest.raises(
        ConfigError, match=r"SPOConfig.model_init_kwargs is not JSON .* write it like \{\"dtype"
    ):
        SPOConfig(**layers_of, model_init_kwargs="dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*no_such_option"):
        SPOTrainer(reference_folder, SPOConfig(**layers_of, model_init_kwargs={"no_such_option": 1}))


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (None, {}, "SPOTrainer needs a model: one of transformers, its Hub id or folder, or a model_init"),
        ("no/such/folder", {}, "'no/such/folder' does not exist; give a checkpoint folder"),
        (
            "made",
            {"processing_class": None},
            "needs processing_class, the tokenizer of the model: .* no name",
        ),
        ("made", {"processing_class": "folder"}, "processing_class must be a tokenizer, got str; left out"),
        ("made", {"ref_model": "itself"}, "would move with it"),
        ("made", {"ref_model": "other"}, "vocabulary of 15 tokens, the model one of 13"),
        ("made", {"judge": "expert"}, "judge must have a method probabilities.* got 'expert'"),
        ("made", {"model_init": lambda: None}, "a model or a model_init that makes it, not both"),
        (
            "made",
            {"args": TrainingArguments(use_cpu=True)},
            "args must be an SPOConfig, got TrainingArguments",
        ),
    ],
)
def test_what_is_no_model_tokenizer_or_reference_is_refused_with_what_would_be_one(
    layers_of, make_model, make_tokenizer, tokenizer, model, options, says
):
    model = make_model(tokenizer) if model == "made" else model
    others = {"itself": model, "other": make_model(make_tokenizer("abcdefghij"))}
    options = {
        name: others.get(value, value) if isinstance(value, str) else value for name, value in options.items()
    }
    handed = {
        "args": SPOConfig(**layers_of),
        "train_dataset": PAIRS,
        "processing_class": tokenizer,
        **options,
    }
    with pytest.raises(ConfigError, match=says):
        SPOTrainer(model, **handed)


def test_a_generation_config_that_cannot_be_saved_does_not_end_a_training(
    make_trainer, make_model, tokenizer, caplog
):
    model = make_model(tokenizer)
    model.generation_config.temperature = 0.6  # without sampling, which saving refuses
    trainer = make_trainer(PAIRS, model=model, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-1" / "model.safetensors").is_file()
    assert "generation config cannot be saved" in caplog.text


# ---------------------------------------------------------------- arguments as other trainers have them


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokenizer", "SPOTrainer takes no tokenizer: the tokenizer is handed over as processing_class"),
        ("beta", r"SPOTrainer takes no beta: it is an option of SPOConfig, args=SPOConfig\(beta=…\)"),
        ("data_collator", "batches are packed by SPOTrainer itself"),
        ("loss_type", "SPOTrainer takes no loss_type; did you mean 'method'"),
        ("eval_datasets", "SPOTrainer takes no eval_datasets; did you mean 'eval_dataset'"),
    ],
)
def test_an_argument_of_another_trainer_is_answered(make_trainer, name, says):
    with pytest.raises(ConfigError, match=says):
        make_trainer(PAIRS, trainer_options={name: None})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("loss_type", "SPOConfig has no parameter 'loss_type'; did you mean 'method'"),
        ("max_length", "did you mean 'max_completion_length' or 'max_prompt_length'"),
        ("precompute_ref_log_probs", "did you mean 'reference_cache'"),
        ("learning_rte", "did you mean 'learning_rate'"),
    ],
)
def test_an_option_of_another_configuration_is_answered(layers_of, name, says):
    with pytest.raises(ConfigError, match=says):
        SPOConfig(**layers_of, **{name: 1})


def test_the_arguments_stand_in_their_documented_order_and_are_all_described():
    names = [*inspect.signature(SPOTrainer).parameters]
    documented = ["model", "args", "train_dataset", "eval_dataset", "processing_class", "ref_model"]
    assert names[:9] == [*documented, "prompt_dataset", "peft_config", "callbacks"]
    for name in names[:-1]:
        assert f"\n        {name}: " in SPOTrainer.__doc__


# ---------------------------------------------------------------- rows


def test_rows_of_an_iterable_are_those_of_a_list(make_trainer, tmp_path):
    datasets = pytest.importorskip("datasets")
    given = [{"kind": None, "probability": None, **row} for row in ROWS]  # the same columns in each
    expected = make_trainer(given).train_dataset.rows
    stream = datasets.IterableDataset.from_generator(lambda: iter(given))
    generated = datasets.Dataset.from_generator(lambda: iter(given), cache_dir=str(tmp_path))
    for rows in (stream, generated, (row for row in given)):
        assert make_trainer(rows).train_dataset.rows == expected
    answers = make_trainer(stream, train_on="self_play", beta=0.0)
    assert [row["completions"][0] for row in answers.rounds._given] == [
        row["completions"][0] for row in expected
    ]


def test_the_prompt_may_be_what_chosen_and_rejected_begin_with(make_trainer):
    options = {"max_prompt_length": 64, "max_completion_length": 32}
    explicit = [
        {"prompt": question("ab"), "chosen": question("", "c")[1:], "rejected": question("", "d")[1:]}
    ]
    expected = make_trainer(explicit, **options).train_dataset.rows
    implicit = {"chosen": question("ab", "c"), "rejected": question("ab", "d")}
    for row in (implicit, {"prompt": "ab", **implicit}):  # a text beside messages repeats their question
        assert make_trainer([row], **options).train_dataset.rows == expected
    drawn = make_trainer([implicit], train_on="self_play", beta=0.0, **options)
    assert drawn.rounds._prompts == [question("ab")]


def test_the_prompt_of_texts_ends_with_the_last_word_that_both_share(
    make_trainer, make_tokenizer, make_model
):
    tokenizer = make_tokenizer()
    made = {"model": make_model(tokenizer), "trainer_options": {"processing_class": tokenizer}}
    options = {"max_prompt_length": 64, "max_completion_length": 32, **made}
    for chosen, rejected, prompt in (
        ("why so? because", "why so? better", "why so?"),
        (
            "\n\nHuman: hi\n\nAssistant: no way",
            "\n\nHuman: hi\n\nAssistant: no sir",
            "\n\nHuman: hi\n\nAssistant:",
        ),
    ):
        [row] = make_trainer([{"chosen": chosen, "rejected": rejected}], **options).train_dataset.rows
        explicit = {"prompt": prompt, "completions": [text[len(prompt) :] for text in (chosen, rejected)]}
        assert make_trainer([explicit], **options).train_dataset.rows == [row]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            {"train": PAIRS, "test": PAIRS},
            r"train_dataset must be rows, got a dict of train, test; .*data\['train'\]",
        ),
        (
            {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
            "Dataset.from_dict makes rows of a dict of columns",
        ),
        ("rows.jsonl", "train_dataset must be rows, got the text 'rows.jsonl'; datasets.load_dataset"),
        (SPOConfig, "train_dataset must be rows, got type"),
        (
            ["prompt", "chosen"],
            "training row 0: a row must be a mapping .* got 'prompt'; of a table, .*from_pandas",
        ),
        (
            [{"chosen": "ab", "rejected": "cd"}],
            "training row 0: needs prompt, or chosen and rejected that both",
        ),
        (
            [{"chosen": question("a", "b"), "rejected": question("b", "c")}],
            "needs prompt, or chosen and rejected",
        ),
        ([{"completion": "a", "label": True, "prompt": "b"}], "needs completions, or chosen and rejected"),
    ],
)
def test_what_are_no_rows_is_answered_with_what_would_be(make_trainer, rows, says):
    with pytest.raises(SoftprefError, match=says):
        make_trainer(rows)


def test_a_dict_of_splits_from_the_library_of_data_sets_is_answered(make_trainer):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)})
    with pytest.raises(ConfigError, match=r"got a DatasetDict of train; hand over .* data\['train'\]"):
        make_trainer(splits)


# ---------------------------------------------------------------- evaluation and prediction


def test_rows_are_evaluated_as_they_are_handed_over(make_trainer):
    trainer = make_trainer(PAIRS, trainer_options={"eval_dataset": ROWS})
    expected = trainer.evaluate()
    found = trainer.evaluate(ROWS)
    assert found.keys() == expected.keys()
    for name in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert trainer.evaluate(PAIRS)["eval_logps/chosen"] != pytest.approx(
        expected["eval_logps/chosen"], rel=1e-3
    )


def test_several_sets_are_evaluated_under_their_names_also_in_training(make_trainer, logps):
    sets = {"old": PAIRS, "new": ROWS[1:2]}
    trainer = make_trainer(
        PAIRS, eval_strategy="steps", eval_steps=1, max_steps=1, trainer_options={"eval_dataset": sets}
    )
    assert set(trainer.row_counts) == {"train", "old", "new"}
    found = trainer.evaluate()
    for name, rows in sets.items():
        expected = np.mean([logps(trainer.model, row)[0] for row in rows])
        assert found[f"eval_{name}_logps/chosen"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate({"other": PAIRS})["eval_other_loss"] == pytest.approx(found["eval_old_loss"])
    trainer.train()
    assert any("eval_new_loss" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_predictions_are_log_probabilities_and_rewards_of_each_row(make_trainer, model, logps, method):
    cut = {"prompt": "ab", "completions": ["abcdefgh", "a"]}  # takes no part
    rows = [ROWS[0], cut, *ROWS[1:]]
    options = {"method": method, "alpha": 0.5, "beta": 0.3, "per_device_eval_batch_size": 2}
    trainer = make_trainer(PAIRS, model=model, **options)
    trainer.train()
    found = trainer.predict(rows)
    assert found.predictions["logps"].shape == found.predictions["rewards"].shape == (4, 3)
    for row, values, rewards in zip(rows, *found.predictions.values(), strict=True):
        if row is cut:
            assert np.isnan([*values, *rewards]).all()
            continue
        expected, reference = np.array(logps(trainer.model, row)), np.array(logps(trainer.ref_model, row))
        implied = 0.5 * expected if method == "spo" else 0.3 * (expected - reference)
        np.testing.assert_allclose(values[: len(expected)], expected, rtol=1e-4)
        np.testing.assert_allclose(rewards[: len(expected)], implied, rtol=1e-3, atol=1e-4)
        assert np.isnan(values[len(expected) :]).all()
    np.testing.assert_allclose(found.label_ids, [1, math.nan, 1, 0.7], rtol=1e-6)
    chosen = np.nanmean(found.predictions["logps"][:, 0])
    assert found.metrics["test_logps/chosen"] == pytest.approx(chosen, rel=1e-5)


def test_compute_metrics_is_given_what_predict_returns(make_trainer):
    seen = []

    def compute(prediction):
        seen.append(prediction)
        margins = prediction.predictions["logps"][:, 0] - prediction.predictions["logps"][:, 1]
        return {"margin": margins.mean(), "labels": prediction.label_ids.sum()}

    trainer = make_trainer(PAIRS, trainer_options={"eval_dataset": PAIRS, "compute_metrics": compute})
    found = trainer.evaluate()
    assert found["eval_margin"] == pytest.approx(
        found["eval_logps/chosen"] - found["eval_logps/rejected"], rel=1e-4
    )
    assert found["eval_labels"] == pytest.approx(1.7)
    np.testing.assert_array_equal(trainer.predict(PAIRS).predictions["logps"], seen[0].predictions["logps"])


def test_evaluation_in_training_without_rows_to_evaluate_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="eval_strategy is steps, and there are no validation rows"):
        make_trainer(PAIRS, eval_strategy="steps", eval_steps=1)


def test_rows_to_evaluate_are_checked_as_training_rows_are(make_trainer):
    trainer = make_trainer(PAIRS)
    with pytest.raises(DataError, match="evaluation row 0: needs completions"):
        trainer.evaluate([{"prompt": "a"}])
    with pytest.raises(ConfigError, match="the evaluation rows must be rows, got the text"):
        trainer.predict("rows.jsonl")


# ---------------------------------------------------------------- training


def test_a_model_made_by_model_init_is_made_anew_for_each_training(make_model, tokenizer, weights, layers_of):
    from peft import LoraConfig

    made = []

    def model_init():
        made.append(make_model(tokenizer, layers=2, attention_dropout=0.5))
        return made[-1]

    lora = LoraConfig(r=2, target_modules="all-linear")
    for peft_config in (None, lora):
        trainer = SPOTrainer(
            args=SPOConfig(**layers_of, learning_rate=1e-2, max_steps=2, save_strategy="no"),
            train_dataset=PAIRS,
            processing_class=tokenizer,
            peft_config=peft_config,
            model_init=model_init,
        )
        ends = []
        for _ in range(2):
            trainer.train()
            ends.append(weights(trainer.model))
            if peft_config is None:
                torch.testing.assert_close(
                    weights(trainer.ref_model), weights(make_model(tokenizer, layers=2))
                )
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
        assert trainer.state.log_history[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)
    assert len(made) == 6


def test_an_optimizer_handed_over_is_the_one_that_steps(make_trainer, model, watch, weights):
    optimizer = SGD(model.parameters(), lr=0.5)
    before = weights(model)
    options = {"optimizers": (optimizer, None), "callbacks": [watch]}
    trainer = make_trainer(PAIRS, model=model, max_steps=1, max_grad_norm=0.0, trainer_options=options)
    trainer.train()
    torch.testing.assert_close(weights(trainer.model), before - 0.5 * watch.gradients[0])


def test_an_optimizer_of_weights_that_do_not_move_is_refused(make_trainer, make_model, tokenizer):
    from peft import LoraConfig

    model = make_model(tokenizer)
    for options in ({"peft_config": LoraConfig(r=2, target_modules="all-linear")}, {}):
        other = model if options else make_model(tokenizer)
        with pytest.raises(ConfigError, match="optimizers holds none of the parameters that are trained"):
            make_trainer(
                PAIRS,
                model=make_model(tokenizer) if not options else model,
                trainer_options={"optimizers": (SGD(other.parameters(), lr=1.0), None), **options},
            )


def test_training_resumes_from_the_newest_whole_checkpoint_or_the_one_that_is_named(make_trainer, weights):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = make_trainer(PAIRS, **options)
    whole.train()
    folder = Path(whole.args.output_dir)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()  # as a kill leaves it
    for checkpoint, step in ((True, 3), (str(folder / "checkpoint-2"), 2), (folder / "checkpoint-1", 1)):
        begun = Begin()
        trainer = make_trainer(PAIRS, trainer_options={"callbacks": [begun]}, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert begun.step == step
        torch.testing.assert_close(weights(trainer.model), weights(whole.model), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="checkpoint-9 is no checkpoint to resume from: it has no manifest"):
        make_trainer(PAIRS, **options).train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    with pytest.raises(ConfigError, match="empty holds no whole checkpoint to resume from"):
        make_trainer(PAIRS, output="empty").train(resume_from_checkpoint=True)


def test_the_adapter_of_the_configuration_is_that_of_peft_config_and_comes_from_the_seed(
    make_trainer, weights
):
    from peft import LoraConfig

    lora = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    handed = make_trainer(PAIRS, trainer_options={"peft_config": lora})
    torch.manual_seed(99)
    configured = make_trainer(PAIRS, use_peft=True, lora_r=3, lora_alpha=6)
    torch.testing.assert_close(weights(configured.model), weights(handed.model), rtol=0, atol=0)
    assert configured.ref_model is None
    with pytest.raises(ConfigError, match="the model has an adapter already"):
        make_trainer(PAIRS, model=handed.model, use_peft=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_no_weight(make_trainer, weights, adapter, reentrant):
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            PAIRS,
            use_peft=adapter,
            max_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        trainer.train()
        ends.append(weights(trainer.model))
    torch.testing.assert_close(ends[1], ends[0])


# ---------------------------------------------------------------- saving and sharing


def test_a_saved_model_is_loaded_again_by_its_folder(make_trainer, tmp_path, logps):
    trainer = make_trainer(PAIRS, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = make_trainer(PAIRS, model=str(tmp_path / "saved"), trainer_options={"processing_class": None})
    for row in ROWS:
        assert logps(again.model, row) == pytest.approx(logps(trainer.model, row), rel=1e-5)
    trainer.create_model_card(model_name="mine")
    assert "# mine" in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_a_model_is_pushed_to_the_hub_and_a_hub_that_does_not_answer_is_said_before_training(
    make_trainer, monkeypatch
):
    pushed = []

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, **options):
            pushed.append(options)

    class Away:
        def create_repo(self, name, **options):
            raise OSError("no network\nmore")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make_trainer(PAIRS, push_to_hub=True, hub_model_id="me/mine", max_steps=1)
    trainer.push_to_hub()
    assert pushed[0]["repo_id"] == "me/mine"
    assert (Path(pushed[0]["folder_path"]) / "model.safetensors").is_file()
    monkeypatch.setattr("transformers.trainer.hf_api", Away)
    with pytest.raises(ConfigError, match=r"makes no repository \(OSError: no network\); log in"):
        make_trainer(PAIRS, push_to_hub=True)


@pytest.fixture
def layers_of(tmp_path):
    """The least that an `SPOConfig` for the toy world needs."""
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_prompt_length": 16,
        "max_completion_length": 8,
        "samples_per_refresh": 8,
        "sampling_interval": 2,
        "logging_steps": 1,
    }
