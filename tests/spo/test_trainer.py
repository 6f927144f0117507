"""What `SPOTrainer` does with rows, references, adapters and failures, seen through training itself."""

import math

import pytest
import torch
from softpref.errors import ConfigError, DataError, SoftprefError
from softpref.lm.checkpoints import last_checkpoint
from softpref.lm.scoring import score_sequences
from softpref.lm.tokenization import tokenize_sequence
from softpref.objectives import preference_loss

SPO_METRICS = {
    "loss/preference",
    "logps/accuracies",
    "logps/chosen",
    "logps/end",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/saturated",
    "rewards/margins",
    "rewards/accuracies",
}
KL_METRICS = {
    "kl/sequence",
    "kl/token",
    "entropy",
    "completions/mean_length",
    "completions/truncated_fraction",
    "sampling/age",
    "sampling/ess",
    "sampling/time_fraction",
}

DRAWING = {"sampling/tokens_per_second", "sampling/logps_difference"}  # of steps that draw samples


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def sequences(tokenizer, rows):
    return [
        tokenize_sequence(tokenizer, row["prompt"], completion)[:2]
        for row in rows
        for completion in row["completions"]
    ]


def test_the_metrics_are_the_documented_ones(make_trainer, make_rows):
    trainer = make_trainer(make_rows(16), num_train_epochs=2)
    trainer.train()
    first, second = logs_of(trainer)[:2]
    assert first.keys() - {"loss", "grad_norm", "learning_rate", "epoch", "step"} == (
        SPO_METRICS | KL_METRICS | DRAWING
    )
    assert second.keys() == first.keys() - DRAWING  # nothing was sampled then
    documented = type(trainer).__doc__
    for name in SPO_METRICS | KL_METRICS | DRAWING:
        assert f"`{name}`" in documented
    assert all(math.isfinite(value) for log in logs_of(trainer) for value in log.values())


def test_before_the_first_step_nothing_has_moved(make_trainer, make_rows, tokenizer):
    rows = make_rows(8, soft=True)
    trainer = make_trainer(rows, alpha=0.5)
    scores = score_sequences(trainer.model, sequences(tokenizer, rows))
    trainer.train()
    log = logs_of(trainer)[0]
    assert log["kl/sequence"] == pytest.approx(0, abs=1e-5)
    assert (log["sampling/age"], log["sampling/ess"]) == (0, pytest.approx(1, abs=1e-4))
    expected = preference_loss(
        scores,
        torch.full((8,), 2),
        alpha=0.5,
        probabilities=torch.tensor([row["probability"] for row in rows]),
    )
    assert log["loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert log["logps/chosen"] == pytest.approx(float(scores[::2].mean()), rel=1e-4)
    assert log["rewards/margins"] == pytest.approx(float(0.5 * (scores[::2] - scores[1::2]).mean()), abs=1e-3)


def test_training_prefers_what_was_preferred_and_regularises_towards_the_reference(make_trainer, make_rows):
    rows = make_rows(16)
    free, tied = (
        make_trainer(rows, beta=beta, num_train_epochs=10, output=str(beta)) for beta in (0.01, 5.0)
    )
    for trainer in (free, tied):
        trainer.train()
    assert logs_of(free)[-1]["rewards/margins"] > logs_of(free)[0]["rewards/margins"] + 1
    assert logs_of(tied)[-1]["kl/sequence"] < 0.5 * logs_of(free)[-1]["kl/sequence"]


def test_dpo_starts_at_log_two_and_leaves_its_reference_alone(make_trainer, make_rows, tokenizer):
    rows = make_rows(16)
    trainer = make_trainer(rows, method="dpo", beta=0.5, num_train_epochs=3)
    before = score_sequences(trainer.ref_model, sequences(tokenizer, rows))
    trainer.train()
    assert logs_of(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert logs_of(trainer)[-1]["rewards/margins"] > 0.5
    assert trainer.buffer is None
    after = score_sequences(trainer.ref_model, sequences(tokenizer, rows))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    # the rewards of the evaluation are those of policy against reference
    policy = score_sequences(trainer.model, sequences(tokenizer, rows))
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_rewards/chosen"] == pytest.approx(
        float(0.5 * (policy - before)[::2].mean()), rel=1e-3, abs=1e-4
    )


def test_an_adapter_trains_against_itself_switched_off(make_trainer, make_rows, model, weights, tokenizer):
    from peft import LoraConfig

    rows = make_rows(16)
    base = weights(model)
    before = score_sequences(model, sequences(tokenizer, rows))
    lora = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = make_trainer(
        rows, model=model, beta=0.05, num_train_epochs=3, trainer_options={"peft_config": lora}
    )
    assert trainer.ref_model is None
    trainer.train()
    logs = logs_of(trainer)
    assert logs[0]["kl/sequence"] == pytest.approx(0, abs=1e-5)
    assert logs[-1]["kl/sequence"] > 0.05
    after = score_sequences(trainer.model, sequences(tokenizer, rows))
    assert float((after - before).abs().max()) > 0.1
    with trainer.model.disable_adapter():
        off = score_sequences(trainer.model, sequences(tokenizer, rows))
    torch.testing.assert_close(off, before)
    kept = [parameter for name, parameter in trainer.model.named_parameters() if "lora" not in name]
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in kept]), base, rtol=0, atol=0)


def test_an_adapter_for_layers_that_the_model_lacks_is_refused(make_trainer, make_rows):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["no_such_layer"])
    with pytest.raises(ConfigError, match=r"peft_config does not fit the model: .*no_such_layer"):
        make_trainer(make_rows(8), trainer_options={"peft_config": lora})


def test_dpo_with_an_adapter_starts_at_log_two(make_trainer, make_rows):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = make_trainer(make_rows(8), method="dpo", trainer_options={"peft_config": lora})
    trainer.train()
    assert logs_of(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)


def test_dropout_is_off(make_trainer, make_rows, make_model, tokenizer, weights):
    rows, ends = make_rows(16), []
    for rate in (0.0, 0.7):
        trainer = make_trainer(
            rows, model=make_model(tokenizer, attention_dropout=rate), output=f"dropout-{rate}"
        )
        trainer.train()
        ends.append(weights(trainer.model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("adapter", [False, True], ids=["copy", "adapter switched off"])
@pytest.mark.parametrize("plain", [False, True], ids=["chunked", "full logits"])
@pytest.mark.parametrize("method", ["spo", "dpo", "tdpo"])
def test_in_bf16_a_model_is_at_distance_zero_from_itself(make_trainer, make_rows, method, plain, adapter):
    options = {"method": method, "plain_forward": plain, "beta": 0.3, "bf16": True, "learning_rate": 0.0}
    if adapter:
        from peft import LoraConfig

        options["trainer_options"] = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}
    trainer = make_trainer(make_rows(8), **options)
    seen = set()
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    for model in models:
        projection = next(module for name, module in model.named_modules() if name.endswith("0.mlp.up_proj"))
        projection.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    log = logs_of(trainer)[0]
    if method == "spo":  # the reference's hidden states were computed in other batches
        assert abs(log["kl/sequence"]) < 5e-4
    else:
        assert log["rewards/margins"] == log["rewards/chosen"] == log["rewards/accuracies"] - 0.5 == 0.0


@pytest.mark.parametrize("method", ["spo", "tdpo"])
def test_in_bf16_gradients_are_those_of_fp32_up_to_rounding(make_trainer, make_rows, watch, method):
    for options in ({}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}):
        callbacks = {"callbacks": [watch]}
        make_trainer(make_rows(8), method=method, trainer_options=callbacks, **options).train()
    exact, rounded, checkpointed = watch.gradients
    assert ((rounded != 0) == (exact != 0)).float().mean() > 0.99
    assert 1e-4 * exact.norm() < (rounded - exact).norm() < 0.12 * exact.norm()
    assert (checkpointed - rounded).norm() < 1e-5 * exact.norm()


def test_how_the_models_are_computed_is_found_out_before_anything_lowers_their_precision(
    make_trainer, make_rows, monkeypatch
):
    from softpref.lm import packing

    tried = []
    find_out = packing._found_by_trying

    def watched(inner):
        tried.append(inner(input_ids=torch.tensor([[1, 2]])).logits.dtype)
        assert inner.model.layers[0].mlp.up_proj(torch.ones(1, 16)).dtype == torch.float32
        return find_out(inner)

    monkeypatch.setattr(packing, "_found_by_trying", watched)
    trainer = make_trainer(make_rows(8), bf16=True, beta=0.3)
    assert tried == [torch.float32] * 2
    trainer.train()
    assert len(tried) == 2


def test_a_non_finite_loss_stops_and_leaves_the_last_good_weights_and_the_batch(
    make_trainer, make_rows, tmp_path, weights
):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, TrainerCallback

    class Poison(TrainerCallback):
        """At the start of step 3 the model begins to answer NaN, its weights being as they are."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.before = weights(model)
                model.lm_head.register_forward_hook(lambda module, inputs, output: output * math.nan)

    poison = Poison()
    trainer = make_trainer(make_rows(24), trainer_options={"callbacks": [poison]}, sampling_interval=8)
    with pytest.raises(SoftprefError, match="loss became nan at optimizer step 3"):
        trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert last_checkpoint(tmp_path / "run") == str(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(weights(saved), poison.before, rtol=0, atol=0)
    batch = load_file(tmp_path / "run" / "nonfinite_batch.safetensors")
    assert len(batch["lengths"]) == 16
    assert len(batch["targets"]) == batch["lengths"].sum()
    assert batch["group_sizes"].tolist() == [2] * 8


def test_a_non_finite_gradient_stops_before_the_weights_move(make_trainer, make_rows, weights):
    trainer = make_trainer(make_rows(8))
    before = weights(trainer.model)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(SoftprefError, match="gradient norm became"):
        trainer.train()
    torch.testing.assert_close(weights(trainer.model), before, rtol=0, atol=0)


def test_rankings_of_mixed_sizes_train(make_trainer, make_rows):
    rows = make_rows(18, sizes=(2, 3, 4), soft=True)
    trainer = make_trainer(rows, num_train_epochs=12, beta=0.01, learning_rate=5e-3)
    assert {row["kind"] for row in trainer.train_dataset.rows} == {"pairwise", "ranking"}
    trainer.train()
    assert logs_of(trainer)[-1]["loss/preference"] < 0.7 * logs_of(trainer)[0]["loss/preference"]


@pytest.mark.parametrize("kind", ["ranking", "best_of_n"])
def test_the_kind_of_the_rows_or_of_the_settings_decides_how_an_order_is_read(
    make_trainer, make_rows, tokenizer, kind
):
    rows = [{**row, "kind": kind} for row in make_rows(8, sizes=(3,))]
    for options in ({}, {"preference_kind": kind}):
        if options:
            rows = [{key: value for key, value in row.items() if key != "kind"} for row in rows]
        trainer = make_trainer(rows, **options)
        scores = score_sequences(trainer.model, sequences(tokenizer, rows))
        expected = preference_loss(scores, torch.full((8,), 3), alpha=1.0, kind=kind)
        trainer.train()
        assert logs_of(trainer)[0]["loss/preference"] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_chosen_and_rejected_columns_and_messages_are_rows_too(make_trainer, make_rows):
    rows = make_rows(8)
    columns = [
        {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]}
        for row in rows
    ]
    first = make_trainer(rows, output="a").train_dataset.rows
    assert make_trainer(columns, output="b").train_dataset.rows == first
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
        }
        for row in rows
    ]
    trainer = make_trainer(chat, max_prompt_length=64)
    trainer.train()
    assert logs_of(trainer)[0]["logps/chosen"] < 0


def test_the_kl_term_draws_from_the_prompt_dataset_too_where_there_is_one(make_trainer, make_rows, tokenizer):
    prompts = [{"prompt": "hhhh"}, {"prompt": "gg"}]
    trainer = make_trainer(make_rows(8), trainer_options={"prompt_dataset": prompts})
    trainer.train()
    drawn = [tokenizer.decode(sample.prompt[1:]) for sample in trainer.buffer.slice_for(0)]
    assert {*drawn[1::2]} == {"hhhh", "gg"}
    assert {*drawn[::2]} <= {tokenizer.decode(row["prompt"][1:]) for row in trainer.train_dataset.rows}


def test_by_default_the_kl_term_draws_from_the_training_prompts(make_trainer, make_rows):
    trainer = make_trainer(make_rows(30))
    trainer.train()
    known = {tuple(row["prompt"]) for row in trainer.train_dataset.rows}
    drawn = {tuple(sample.prompt) for sample in trainer.buffer.slice_for(0)}
    assert drawn <= known
    assert len(drawn) > 4


def test_evaluation_gives_its_metrics_whatever_the_batch(make_trainer, make_rows, tokenizer):
    rows = make_rows(10, sizes=(2, 3))
    results = []
    for batch in (10, 3):
        trainer = make_trainer(
            make_rows(8),
            per_device_eval_batch_size=batch,
            trainer_options={"eval_dataset": rows},
        )
        results.append(trainer.evaluate())
        assert trainer.evaluate(metric_key_prefix="held_out")["held_out_logps/chosen"] == pytest.approx(
            results[-1]["eval_logps/chosen"]
        )
    scores = score_sequences(trainer.model, sequences(tokenizer, rows))
    sizes = torch.tensor([len(row["completions"]) for row in rows])
    expected = preference_loss(scores, sizes, alpha=1.0, kind="ranking")
    chosen = scores[sizes.cumsum(0) - sizes]
    for metrics in results:
        assert {f"eval_{name}" for name in SPO_METRICS} <= metrics.keys()
        assert metrics["eval_loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
        assert metrics["eval_loss/preference"] == pytest.approx(float(expected.mean()), rel=1e-4)
        assert metrics["eval_logps/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-4)


def test_evaluation_during_training_does_not_mix_into_the_training_metrics(make_trainer, make_rows):
    rows = make_rows(16)
    plain = make_trainer(rows, output="plain")
    plain.train()
    watched = make_trainer(
        rows,
        output="watched",
        eval_strategy="steps",
        eval_steps=1,
        trainer_options={"eval_dataset": make_rows(6, seed=9)},
    )
    watched.train()
    for ours, theirs in zip(logs_of(watched), logs_of(plain), strict=True):
        for name in SPO_METRICS | {"loss", "kl/sequence"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    assert any("eval_rewards/accuracies" in log for log in watched.state.log_history)


def test_training_twice_with_one_trainer_draws_samples_anew(make_trainer, make_rows):
    trainer = make_trainer(make_rows(40))
    trainer.train()
    trainer.train()
    assert trainer.buffer.policy_step == 3
    assert len(logs_of(trainer)) > 0
    assert all("kl/sequence" in log for log in logs_of(trainer))


PAIR = {"prompt": "ab", "completions": ["c", "d"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "ab"}, "training row 1: needs completions"),
        ({"completions": ["c", "d"]}, "training row 1: needs prompt"),
        ({**PAIR, "completions": ["c"]}, "training row 1: needs at least two"),
        ({**PAIR, "completions": "cd"}, "training row 1: completions must be a list"),
        ({**PAIR, "completions": ["c", ""]}, "training row 1: .* no token"),
        ({**PAIR, "completions": ["c", True]}, "training row 1: .* got str and True"),
        ({**PAIR, "completions": ["c", None]}, "training row 1: .* got str and None"),
        ({**PAIR, "probability": 1.2}, r"training row 1: probability must be .* got 1\.2"),
        ({**PAIR, "probability": float("nan")}, "training row 1: probability must be"),
        ({**PAIR, "probability": "0.7"}, "training row 1: probability must be a number"),
        ({**PAIR, "completions": ["c", "d", "e"], "probability": 0.7}, "training row 1: .* pair"),
        ({**PAIR, "completions": ["c", "d", "e"], "kind": "best"}, "training row 1: kind must be"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(make_trainer, row, message):
    with pytest.raises(DataError, match=message):
        make_trainer([PAIR, row])


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, DataError, "there is no training row"),
        (
            [PAIR, {**PAIR, "completions": ["c", "d", "e"], "kind": "best_of_n"}],
            {"method": "sppo"},
            DataError,
            "training row 1: method sppo needs to know how often each completion wins",
        ),
        (
            [{**PAIR, "completions": ["c", "d", "e"]}],
            {"preference_kind": "pairwise"},
            DataError,
            "3 completions are no pair",
        ),
        ([PAIR], {"kl_prompts": "both"}, ConfigError, "there is no separate prompt set"),
        ([PAIR], {"rounds": 2}, ConfigError, "give SPOTrainer a judge"),
        ([PAIR], {"trainer_options": {"prompt_dataset": []}}, DataError, "holds no prompt"),
        ([PAIR], {"trainer_options": {"prompt_dataset": [{"text": "a"}]}}, DataError, "prompt row 0"),
    ],
)
def test_rows_and_settings_that_do_not_fit_together_are_refused(make_trainer, rows, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(rows, **options)


def test_a_checkpoint_of_a_run_without_samples_is_refused_with_a_reason(make_trainer, make_rows, tmp_path):
    rows = make_rows(16)
    make_trainer(rows, beta=0.0, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ConfigError, match="holds no samples for process 0 of 1"):
        make_trainer(rows, num_train_epochs=2).train(resume_from_checkpoint=last_checkpoint(tmp_path / "run"))


def test_saturated_margins_are_said_aloud_with_the_remedy(make_trainer, make_rows, caplog):
    rows = [
        {"prompt": "ab", "completions": ["abcdefg", "a"]},
        {"prompt": "ba", "completions": ["gfedcba", "b"]},
    ]
    make_trainer(rows, alpha=2.0, beta=0.0).train()
    assert "100% of the pairs have a margin beyond 5 nats" in caplog.text
    assert "set anchor to 1" in caplog.text
    caplog.clear()
    trainer = make_trainer(rows, alpha=2.0, beta=0.0, anchor=1.0)
    trainer.train()
    assert "beyond 5 nats" not in caplog.text  # margins begin at 0


def test_the_end_token_is_watched(make_trainer, tokenizer, logs_of, direct, model, caplog):
    """`logps/end` is of the end token behind the chosen; where it has lost half a nat, the log says so."""
    rows = [{"prompt": "ab", "completions": ["ab", "ba"]}, {"prompt": "cd", "completions": ["abcde", "e"]}]
    trainer = make_trainer(rows, beta=0.0, max_steps=1)
    trainer.train()  # too short a run for a verdict
    expected = [
        direct.token_logps(model.double(), row["prompt"], row["completions"][0])[-1].item()
        for row in trainer.train_dataset.rows
    ]
    assert logs_of(trainer)[0]["logps/end"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert "forgets to stop" not in caplog.text
    # rows whose first completion loses to a longer one: its end becomes less likely
    losing = [{"prompt": prompt, "completions": ["h", "ha"], "probability": 0.0} for prompt in ("ab", "cd")]
    make_trainer(losing, beta=0.0, num_train_epochs=40).train()
    assert "log P of the end token behind chosen completions has fallen by" in caplog.text
    assert "lower learning_rate, or raise beta" in caplog.text


def test_a_fall_is_what_exceeds_chance():
    from softpref.spo.health import fall

    still = [-3.0, -5.0, -4.0, -3.5, -4.5, -3.2, -4.4, -3.9, -4.1, -5.0]
    assert fall(still) == 0
    assert fall([*still, *(value - 3 for value in still)]) == pytest.approx(3, abs=0.5)
    assert fall([-3.0, -9.0]) == 0
    assert fall([-3.0] * 10) == 0
