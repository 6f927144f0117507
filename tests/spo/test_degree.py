"""The degree loss in training: its formula, what it must not depend on, and what becomes of its head."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from softpref.errors import ConfigError, DataError
from softpref.key_content import texts_by_level
from softpref.spo import SPOConfig
from softpref.spo.rows import collate
from transformers import TrainerCallback

GAMMA = 0.7
WORDS = ("bed", "fig", "jug", "oak", "pie", "rum", "sun", "tea", "wax", "zoo")


@pytest.fixture(scope="module")
def words(make_tokenizer):
    """A tokenizer of letters, spaces and punctuation."""
    return make_tokenizer()


@pytest.fixture
def rows():
    """Pairs and a ranking, some completions with fewer than three key phrases."""
    rng = random.Random(0)

    def text():
        count = rng.choice((1, 2, 3, 4, 5, 6))
        return " ".join(rng.sample(WORDS, 1)[0] + rng.choice((",", " of", ". ", "")) for _ in range(count))

    def row(number):
        size = 3 if number % 4 == 3 else 2
        return {"prompt": f"say {rng.choice(WORDS)}: ", "completions": [f"{text()}{i}" for i in "abc"[:size]]}

    return [row(number) for number in range(12)]


class Head(TrainerCallback):
    """Keeps what the head was at each optimizer step, and its gradient."""

    def __init__(self):
        self.trainer, self.weights, self.gradients = None, [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.degree_head is None:
            return
        parameters = list(self.trainer.degree_head.parameters())
        self.weights.append([one.detach().clone().double() for one in parameters])
        self.gradients.append([one.grad.clone() for one in parameters])


@pytest.fixture
def adapted(make_model, words):
    """`adapted()`: a model with an adapter that has moved away from its base."""
    from peft import LoraConfig, get_peft_model

    def make():
        torch.manual_seed(7)
        config = LoraConfig(r=4, target_modules="all-linear")
        model = get_peft_model(make_model(words, layers=2, spread=0.2), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def head():
    return Head()


@pytest.fixture
def trainer_of(make_trainer, make_model, words, head):
    """`trainer_of(rows, **options)`: a trainer whose head, unless `fresh`, begins with random numbers."""

    def make(rows, *, fresh=False, model=None, trainer_options=None, **options):
        defaults = {
            "kl_on": "none",
            "degree_weight": GAMMA,
            "max_completion_length": 60,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": 0.02,
            "train_sampling_strategy": "sequential",
            "per_device_train_batch_size": len(rows),
        }
        given = {"processing_class": words, "callbacks": [], **(trainer_options or {})}
        trainer = make_trainer(
            rows,
            model=make_model(words, layers=2, spread=0.2) if model is None else model,
            trainer_options={**given, "callbacks": [head, *given["callbacks"]]},
            **{**defaults, **options},
        )
        head.trainer = trainer
        if not fresh and trainer.degree_head is not None:
            torch.manual_seed(11)
            for parameter in trainer.degree_head.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return trainer

    return make


def level_of(seed, epoch, row, side, levels):
    return int(np.random.default_rng((seed, epoch, row, side, 2)).integers(levels))


def test_levels_are_drawn_alike_on_every_platform():
    """By row, side and epoch of the seed 3; NumPy promises this generator's numbers."""
    drawn = [level_of(3, epoch, row, side, 4) for epoch in (0, 1) for row in (0, 1, 2) for side in (0, 1)]
    assert drawn == [3, 3, 1, 2, 3, 0, 3, 0, 0, 1, 1, 2]


def degree_by_hand(model, tokenizer, rows, weights, *, epoch=0, levels=4, sides=(0, 1), heads=2):
    """L_deg as its formula is written, one text at a time, with transformers' own hidden states."""
    weight, bias = weights
    means = []
    for side in sides:
        losses = []
        for number, row in enumerate(rows):
            completion = row["completions"][0 if side == 0 else -1]
            removed = texts_by_level(completion, levels)
            if not removed:
                continue
            level = level_of(3, epoch, number, side, levels)
            text = [completion, *removed][level]
            # all letters have a token of their own, so that prompt and completion meet where they should
            ids = [*tokenizer(row["prompt"] + text)["input_ids"], tokenizer.eos_token_id]
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            scores = weight[min(side, heads - 1)] @ found[-1][0, -1].double() + bias[min(side, heads - 1)]
            losses.append(scores.logsumexp(0) - scores[level])
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dpo", "beta": 0.5},
        {"plain_forward": True},
        {"degree_heads": 1, "degree_levels": 3, "method": "sppo", "beta": 1.0},
        {"degree_on": "preferred", "anchor": 1.0},
        {"degree_on": "dispreferred", "degree_levels": 2},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        {"lora": True},
        {"pad_is_eos": True},
        {"pad_is_eos": True, "plain_forward": True},
    ],
    ids=[
        "dpo",
        "plain",
        "one head",
        "preferred",
        "dispreferred",
        "accumulated",
        "adapter",
        "pad",
        "pad, plain",
    ],
)
def test_the_step_is_that_of_the_formula(
    trainer_of, adapted, make_tokenizer, words, rows, watch, head, direct, logs_of, options
):
    options, given = dict(options), {}
    if options.pop("pad_is_eos", False):  # the last token, which the head reads, is that of the padding
        words = make_tokenizer(pad_is_eos=True)
        given["processing_class"] = words
    lora = options.pop("lora", False)
    levels, heads = options.get("degree_levels", 4), options.get("degree_heads", 2)
    sides = {"preferred": (0,), "dispreferred": (1,)}.get(options.get("degree_on"), (0, 1))
    logs = []
    for gamma in (GAMMA, 0.0):
        trainer = trainer_of(
            rows,
            model=adapted() if lora else None,
            trainer_options={"callbacks": [watch], **given},
            degree_weight=gamma,
            **options,
        )
        trainer.train()
        logs.append(logs_of(trainer)[0])
        if gamma:
            after = [one.detach().double() for one in trainer.degree_head.parameters()]
    before = [one.requires_grad_() for one in head.weights[0]]
    policy = watch.models[0]
    loss = degree_by_hand(policy, words, rows, before, levels=levels, sides=sides, heads=heads)
    expected = direct.gradient(policy, GAMMA * loss)
    own = torch.autograd.grad(GAMMA * loss, before)
    assert float(expected.norm()) > 1e-2
    direct.agree(watch.gradients[0] - watch.gradients[1], expected, 2e-3)
    ours, theirs = logs
    assert ours["loss"] - theirs["loss"] == pytest.approx(GAMMA * loss.item(), rel=1e-3)
    assert ours["loss/preference"] == pytest.approx(theirs["loss/preference"], rel=1e-5)
    places = [0 if side == 0 else -1 for side in sides]
    skipped = [not texts_by_level(row["completions"][place], levels) for row in rows for place in places]
    assert ours["degree/skipped"] == pytest.approx(sum(skipped) / len(skipped))
    assert sum(skipped) or levels == 2
    # the optimizer takes ten times the policy's step
    for found, begun, gradient in zip(after, before, own, strict=True):
        direct.agree((found - begun).detach().flatten(), -0.2 * gradient.flatten(), 1e-4)


@pytest.mark.parametrize("options", [{}, {"method": "tdpo", "beta": 0.5}, {"kl_on": "samples", "beta": 0.3}])
def test_on_the_first_step_a_new_head_moves_the_policy_by_nothing_and_draws_nothing(
    trainer_of, rows, watch, head, logs_of, direct, options
):
    logs, states = [], []
    for gamma in (GAMMA, 0.0):
        trainer = trainer_of(
            rows, fresh=True, degree_weight=gamma, trainer_options={"callbacks": [watch]}, **options
        )
        trainer.train()
        logs.append(logs_of(trainer)[0])
        states.append(torch.get_rng_state())
        states.append([] if trainer.buffer is None else trainer.buffer._samples)
    direct.agree(*watch.gradients, 1e-5)  # but for rounding: what a model reads at once differs
    assert torch.equal(states[0], states[2])
    assert states[1] == states[3]
    assert logs[0]["degree/loss"] == pytest.approx(math.log(4), rel=1e-6)
    assert logs[0]["loss"] - logs[1]["loss"] == pytest.approx(GAMMA * math.log(4), rel=1e-3)
    assert all(float(gradient.norm()) > 1e-3 for gradient in head.gradients[0])


@pytest.mark.parametrize("plain_forward", [False, True])
def test_a_head_of_zeros_has_a_gradient_and_leaves_the_policy_none(trainer_of, rows, plain_forward):
    trainer = trainer_of(rows, fresh=True, plain_forward=plain_forward)
    batch = collate([trainer.train_dataset[number] for number in range(len(rows))])
    found = trainer.objective.row_losses(trainer.model.train(), batch, trainer.degree_head)
    assert found.degree.tolist() == pytest.approx([math.log(4)] * len(found.degree), rel=1e-6)
    found.degree.sum().backward()
    gradients = [one.grad for one in trainer.model.parameters() if one.grad is not None]
    assert gradients
    assert not any(one.any() for one in gradients)
    assert all(one.grad.any() for one in trainer.degree_head.parameters())


def test_without_a_degree_weight_there_is_nothing_of_it(trainer_of, rows, logs_of):
    trainer = trainer_of(rows, degree_weight=0.0, degree_levels=2, degree_heads=1)
    trainer.train()
    assert trainer.degree_head is None
    assert len(trainer.optimizer.param_groups) == 2
    assert not any("removed" in row for row in trainer.train_dataset.rows)
    assert "degree_skipped" not in trainer.row_counts["train"]
    assert not [name for log in logs_of(trainer) for name in log if name.startswith("degree")]


@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_without_weight_it_is_the_base_method_bit_for_bit_and_with_hardly_any_almost(
    trainer_of, rows, weights, logs_of, method
):
    """A weight of 1e-20 has the head, its texts and its draws, but no effect."""
    kl_on = "samples" if method == "spo" else "none"
    base = {"method": method, "beta": 0.3, "num_train_epochs": 3, "kl_on": kl_on}
    found = []
    for options in ({}, {"degree_levels": 2, "degree_on": "preferred"}, {"degree_weight": 1e-20}):
        trainer = trainer_of(rows, fresh=True, **{"degree_weight": 0.0, **base, **options})
        trainer.train()
        logs = [
            {name: one for name, one in log.items() if not name.startswith(("degree", "sampling/t"))}
            for log in logs_of(trainer)
        ]
        found.append((weights(trainer.model), torch.get_rng_state(), logs))
    (base_weights, base_state, base_logs), *others = found
    for own, state, logs in others:
        exact = own is others[0][0]
        torch.testing.assert_close(own, base_weights, rtol=0, atol=0 if exact else 1e-6)
        assert torch.equal(state, base_state)
        assert logs == base_logs if exact else len(logs) == len(base_logs)


def test_the_trajectory_is_the_same_however_steps_are_cut_and_padded(trainer_of, rows, weights, logs_of):
    found = []
    for options in (
        {"per_device_train_batch_size": 12},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"plain_forward": True},
    ):
        trainer = trainer_of(rows, num_train_epochs=4, **options)
        trainer.train()
        own = torch.cat([one.detach().flatten() for one in trainer.degree_head.parameters()])
        names = [name for name in logs_of(trainer)[0] if name.startswith(("degree", "loss", "grad_norm"))]
        assert len(names) == 8
        found.append(
            (weights(trainer.model), own, [[log[name] for name in names] for log in logs_of(trainer)])
        )
    model, own, logs = found[0]
    assert len(logs) == 4
    for other in found[1:]:
        torch.testing.assert_close(other[0], model, rtol=0, atol=2e-5)
        torch.testing.assert_close(other[1], own, rtol=0, atol=2e-5)
        for one, expected in zip(other[2], logs, strict=True):
            assert one == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_each_epoch_draws_levels_uniformly_and_anew(trainer_of, rows):
    data = trainer_of(rows).train_dataset
    drawn = {}
    for epoch in range(200):
        data.epoch = epoch
        for number in range(len(data)):
            for text in data[number]["degree_texts"]:
                drawn[epoch, number, text.side] = text.level
                assert text.level == level_of(3, epoch, number, text.side, 4)
    counts = np.bincount(list(drawn.values()), minlength=4)
    assert len(drawn) > 3000
    assert (abs(counts / len(drawn) - 1 / 4) < 0.03).all()  # four standard errors


def test_a_batch_without_a_text_that_takes_part_has_no_degree_loss(trainer_of, rows, watch, head, logs_of):
    """Each row of its own step: those of too few phrases take the very step that they took without."""
    short = [
        {"prompt": "say: ", "completions": ["sun", "tea of zoo"]},
        {"prompt": "say: ", "completions": ["oak, oak", "pie"]},
    ]
    whole = next(row for row in rows if all(texts_by_level(one, 4) for one in row["completions"]))
    for gamma in (GAMMA, 0.0):
        trainer = trainer_of(
            [*short, whole],
            degree_weight=gamma,
            per_device_train_batch_size=2,
            trainer_options={"callbacks": [watch]},
        )
        trainer.train()
        if gamma:
            first, second = logs_of(trainer)
            assert not any(one.any() for one in head.gradients[0])
            assert all(one.any() for one in head.gradients[1])
    assert torch.equal(watch.gradients[0], watch.gradients[2])
    assert first["degree/skipped"] == 1
    assert "degree/loss" not in first
    assert second["degree/skipped"] == 0
    assert math.isfinite(second["degree/loss"])
    with pytest.raises(DataError, match="no completion of the 2 training rows has degree_levels − 1 = 3 key"):
        trainer_of(short)


def test_the_head_is_in_checkpoints_and_never_in_the_model(trainer_of, rows, tmp_path, weights, logs_of):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    options["per_device_train_batch_size"] = (
        4  # the checkpoint at 4 stands within the second epoch of 3 steps
    )
    whole = trainer_of(rows, fresh=True, output="whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert "degree_head.safetensors" in json.loads((checkpoint / "manifest.json").read_text())["files"]
    resumed = trainer_of(rows, fresh=True, output="resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for one, other in zip(resumed.degree_head.parameters(), whole.degree_head.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.any()
    curves = [
        [{k: v for k, v in log.items() if "loss" in k or "deg" in k} for log in logs_of(one)[4:]]
        for one in (whole, resumed)
    ]
    assert len(curves[0]) == 2
    assert curves[0] == curves[1]
    whole.model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    kept = load_file(checkpoint / "model.safetensors")
    base = {name for name, _ in whole.model.named_parameters()}
    assert saved.keys() == kept.keys() == base
    loaded = type(whole.model).from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[1, 7, 9, 8]])
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)
    (tmp_path / "run").mkdir()
    without = trainer_of(rows, degree_weight=0.0, **options)
    without.train()
    begun = trainer_of(rows, output="other", **options)
    with pytest.raises(ConfigError, match="holds no head of the degree loss"):
        begun.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


class Longer:
    def probabilities(self, prompts, first, second):
        return np.array([len(a) > len(b) for a, b in zip(first, second, strict=True)], dtype=float)


@pytest.mark.parametrize("train_on", ["samples", "preferences"])
def test_in_rounds_what_the_policy_has_drawn_is_what_loses_its_key_content(
    trainer_of, rows, words, train_on, weights, tmp_path
):
    options = {
        "method": "dpo",
        "train_on": train_on,
        "rounds": 2,
        "cut_rows": "keep",
        "degree_levels": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "num_train_epochs": 2,
        "trainer_options": {"judge": Longer()},
    }
    trainer = trainer_of(rows, output="whole", **options)
    trainer.train()
    assert trainer.rounds.epoch == 3
    asked = 0
    for row in trainer.rounds.rows:
        removed = row["removed"]
        for completion, ids in zip(
            (row["completions"][0], row["completions"][-1]), removed["texts"], strict=True
        ):
            text = words.decode(completion, skip_special_tokens=True)
            left = texts_by_level(text, 2) if completion[-1] == words.eos_token_id else []
            found = [words.decode(one, skip_special_tokens=True) for one in ids]
            assert [one.strip() for one in found] == [one.strip() for one in left]
            asked += len(ids)
    assert asked > 3
    resumed = trainer_of(rows, output="resumed", fresh=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(trainer.model))


def test_an_evaluation_has_the_metrics_and_the_loss_of_the_method(trainer_of, rows, words):
    figures = []
    for gamma in (GAMMA, 0.0):
        trainer = trainer_of(
            rows[:6],
            degree_weight=gamma,
            trainer_options={"eval_dataset": rows[6:]},
            per_device_eval_batch_size=4,
        )
        figures.append(trainer.evaluate())
        if gamma:
            weights = [one.double() for one in trainer.degree_head.parameters()]
            model = trainer.model.double()
            sides = []
            for side in (0, 1):
                loss = degree_by_hand(model, words, rows[6:], weights, sides=(side,))
                place = 0 if side == 0 else -1
                sides.append(
                    (loss.item(), sum(bool(texts_by_level(row["completions"][place], 4)) for row in rows[6:]))
                )
            expected = sum(loss * count for loss, count in sides) / sum(count for _, count in sides)
            model.float()
    assert figures[0]["eval_loss"] == figures[1]["eval_loss"]
    assert figures[0]["eval_degree/loss"] == pytest.approx(expected, rel=1e-4)
    assert 0 < figures[0]["eval_degree/length_baseline"] <= 1


def test_conversations_lose_key_content_of_the_answer_alone(trainer_of, words):
    rows = [
        {
            "prompt": [{"role": "user", "content": "tea, sun, oak"}],
            "completions": [
                [{"role": "assistant", "content": "wax, rum of oak, fig"}],
                [{"role": "assistant", "content": "jug"}],
            ],
        }
    ]
    [row] = trainer_of(rows, max_prompt_length=60).train_dataset.rows
    left = [words.decode(one) for one in row["removed"]["texts"][0]]
    assert left == [", of oak, fig<|im_end|>", ", of , fig<|im_end|>", ", of , <|im_end|>"]
    assert words.decode(row["removed"]["prompt"]).endswith(
        "user: tea, sun, oak<|im_end|>\n<|im_start|>assistant: "
    )
    assert row["removed"]["texts"][1] == []


def test_where_nothing_is_left_the_end_token_is(trainer_of, words):
    [row] = trainer_of(
        [{"prompt": "say: ", "completions": ["tea", "zoo."]}], degree_levels=2
    ).train_dataset.rows
    assert row["removed"]["texts"][0] == [[words.eos_token_id]]
    assert words.decode(row["removed"]["texts"][1][0]) == ".<|im_end|>"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"degree_weight": -0.1}, "degree_weight must be at least 0, got -0.1"),
        ({"degree_levels": 1}, "degree_levels must be at least 2, got 1"),
        ({"degree_heads": 3}, "degree_heads must be from 1 to 2, got 3"),
        ({"degree_levels": 2.5}, "degree_levels must be a whole number, got 2.5"),
        ({"degree_on": "chosen"}, "degree_on must be both or preferred or dispreferred, got 'chosen'"),
        ({"degree_language": "fr"}, "degree_language must be en, got 'fr'"),
        (
            {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
            "dataloader_persistent_workers must",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        SPOConfig(output_dir=str(tmp_path), **{"degree_weight": 0.1, **options})


def test_options_without_a_degree_weight_are_named(tmp_path, caplog):
    SPOConfig(output_dir=str(tmp_path), degree_levels=3, degree_on="preferred")
    assert "degree_levels=3 has no effect: there is no degree loss without a degree_weight" in caplog.text
    assert "degree_on='preferred' has no effect" in caplog.text


def test_an_optimizer_that_is_handed_over_is_refused(trainer_of, make_model, words, rows):
    model = make_model(words, layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="leave optimizers out"):
        trainer_of(rows, model=model, trainer_options={"optimizers": (optimizer, None)})


def test_a_head_and_its_policy_learn_levels(trainer_of, logs_of):
    rng = random.Random(1)
    rows = []
    for _ in range(32):
        one, two = (rng.sample(WORDS, 3) for _ in range(2))
        rows.append({"prompt": "say: ", "completions": [", ".join(one), ", ".join(two) + "."]})
    trainer = trainer_of(
        rows, fresh=True, optim="adamw_torch", learning_rate=3e-3, num_train_epochs=40, degree_weight=1.0
    )
    trainer.train()
    first, last = logs_of(trainer)[0], logs_of(trainer)[-1]
    assert first["degree/loss"] == pytest.approx(math.log(4), rel=1e-6)
    assert last["degree/loss"] < 0.5


def test_of_a_model_whose_states_are_all_alike_no_head_learns_anything(
    trainer_of, make_model, words, rows, logs_of
):
    model = make_model(words, layers=2, spread=0.2)
    model.model.norm.weight.requires_grad_(False).zero_()
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "num_train_epochs": 10, "method": "dpo"}
    trainer = trainer_of(rows, fresh=True, model=model, **options)
    trainer.train()
    losses = [log["degree/loss"] for log in logs_of(trainer)]
    # but for the bias, which learns how often each level was drawn so far
    assert losses == pytest.approx([math.log(4)] * len(losses), abs=0.03)


def test_the_stage_writes_a_model_without_the_head_and_records_the_loss(
    command, tmp_path, write_dataset, make_rows, reference_folder
):
    dataset = write_dataset(tmp_path / "data", {"train": make_rows(12), "validation": make_rows(6, seed=1)})
    options = {"degree_weight": 0.3, "degree_levels": 2, "kl_on": "none", "use_peft": True, "lora_r": 2}
    lengths = {"max_prompt_length": 16, "max_completion_length": 8}
    assert command("policy", dataset, **options, **lengths) == 0
    folder = tmp_path / "policy"
    saved = load_file(folder / "model.safetensors")
    base = load_file(f"{reference_folder}/model.safetensors")
    assert {name: one.shape for name, one in saved.items()} == {name: one.shape for name, one in base.items()}
    assert not list(folder.rglob("*degree_head*"))
    assert json.loads((folder / "softpref.json").read_text())["degree_weight"] == 0.3
    lines = map(json.loads, (folder / "tracking.jsonl").read_text().splitlines())
    logged = {name for line in lines if line["kind"] == "metrics" for name in line["values"]}
    for name in ("loss", "accuracy", "mean_absolute_error", "length_baseline", "skipped"):
        assert {f"degree/{name}", f"eval_degree/{name}"} & logged == {f"degree/{name}", f"eval_degree/{name}"}
