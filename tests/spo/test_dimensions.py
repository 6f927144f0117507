"""Rounds on one dimension of preference after another: what earlier ones have learned, what begins one."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from softpref.errors import ConfigError
from softpref.lm.scoring import score_sequences
from softpref.records.model import load_metadata
from softpref.spo.lineage import EarlierRound, earlier_rewards

QUICK = {
    "max_prompt_length": 16,
    "max_completion_length": 6,
    "cut_rows": "keep",
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "kl_on": "none",
}
BETAS, WEIGHTS = (0.4, 0.9, 0.7), ((), (0.6,), (1.5, 0.3))


@pytest.fixture
def models(make_model, tokenizer):
    """π_0, π_1, π_2."""
    return [make_model(tokenizer, layers=2, seed=seed) for seed in (11, 12, 13)]


def rounds_of(models, method, count):
    """The first rounds, which began with the models."""
    return [
        EarlierRound(model, method, alpha=beta, anchor=0.3, beta=beta, weights=weights)
        for model, beta, weights in zip(models[:count], BETAS, WEIGHTS, strict=False)
    ]


def implied(method, sums, count):
    """R̂ of each round by the recursion, of one completion; `sums` are its log-probabilities, by model."""
    rewards = []
    for place in range(count):
        base = (0.3 if method == "spo" else 1.0) * sums[place]
        earlier = sum(weight * one for weight, one in zip(WEIGHTS[place], rewards, strict=True))
        rewards.append(BETAS[place] * (sums[place + 1] - base) - earlier)
    return rewards


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["dpo", "spo"])
def test_a_step_is_that_of_the_formula(make_trainer, make_rows, models, direct, watch, caplog, method, count):
    rows = make_rows(5, soft=True, seed=4)
    weights = WEIGHTS[count]
    trainer = make_trainer(
        rows,
        model=models[count],
        method=method,
        alpha=BETAS[count],
        beta=BETAS[count] if method == "dpo" else 0.0,
        anchor=0.3 if method == "spo" else 0.0,
        dimensions="short",
        dimension_weights=",".join(map(str, weights)),
        per_device_train_batch_size=len(rows),
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        trainer_options={"callbacks": [watch], "earlier_rounds": rounds_of(models, method, count)},
    )
    frozen = [model.double() for model in models[:count]]
    trainer.train()
    policy = watch.models[0]
    ends = [*frozen, policy]  # the policy begins as the model of the last round
    losses = []
    for row in trainer.train_dataset.rows:
        margins, offsets = [], []
        for completion in row["completions"]:
            sums = [direct.token_logps(model, row["prompt"], completion).sum() for model in ends]
            kept = [one.detach() for one in sums]
            learned = implied(method, kept, count)
            offsets.append(sum(weight * one for weight, one in zip(weights, learned, strict=True)))
            margins.append(BETAS[count] * (sums[-1] - (0.3 if method == "spo" else 1.0) * kept[-1]))
        assert row["offsets"] == pytest.approx([float(one) for one in offsets], abs=1e-4)
        z = margins[0] - margins[1] - (offsets[0] - offsets[1])
        p = row["probability"]
        loss = -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z))
        losses.append(loss / BETAS[count] if method == "spo" else loss)
    expected = torch.stack(losses).mean()
    [log] = [log for log in trainer.state.log_history if "loss" in log]
    assert log["loss/preference"] == pytest.approx(expected.item(), rel=1e-4)
    direct.agree(watch.gradients[0], direct.gradient(policy, expected))
    if method == "dpo":  # not ln 2, the loss of no margin
        z = [row["offsets"][1] - row["offsets"][0] for row in trainer.train_dataset.rows]
        p = [row["probability"] for row in trainer.train_dataset.rows]
        z, p = torch.tensor(z), torch.tensor(p)
        begins = -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z)).mean()
        assert expected.item() == pytest.approx(float(begins), abs=1e-4)
        assert abs(float(begins) - 0.6931) > 0.01
        mean = -float(z.mean())
        assert f"speak for the better completion of a row by {mean:.3f} nats on average" in caplog.text
        assert f"in {100 * float((z > 0).float().mean()):.0f} % of the rows: the loss does not" in caplog.text


def test_rewards_of_metrics_are_what_this_round_learns(make_trainer, make_rows, models):
    trainer = make_trainer(
        make_rows(4, seed=4),
        model=models[1],
        method="dpo",
        beta=0.5,
        dimensions="short",
        learning_rate=0.0,
        trainer_options={"earlier_rounds": rounds_of(models, "dpo", 1), "eval_dataset": make_rows(3, seed=5)},
    )
    rows = trainer.eval_dataset.rows
    metrics = trainer.evaluate()
    margins = [row["offsets"][1] - row["offsets"][0] for row in rows]  # the policy has not moved yet
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def test_weights_of_zero_are_training_without_earlier_rounds(
    make_trainer, make_rows, models, weights, caplog
):
    ended = []
    for options in ({"earlier_rounds": rounds_of(models, "dpo", 1)}, {}):
        trainer = make_trainer(
            make_rows(6, seed=4),
            model=deepcopy(models[1]),
            method="dpo",
            beta=0.5,
            dimensions="short",
            dimension_weights=0,
            trainer_options=options,
        )
        trainer.train()
        ended.append(weights(trainer.model))
    assert torch.equal(*ended)
    assert "does not begin" not in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_offsets_of_bf16_models_are_fp32_numbers_near_those_of_fp32(
    make_trainer, make_rows, models, tmp_path, cached
):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (deepcopy(model).to(dtype) for model in models[:2])
        trainer = make_trainer(
            make_rows(6, seed=4),
            model=second,
            method="dpo",
            beta=0.5,
            dimensions="short",
            bf16=dtype == torch.bfloat16,
            reference_cache=str(tmp_path / "kept") if cached else "",
            trainer_options={"earlier_rounds": rounds_of([first], "dpo", 1)},
        )
        found.append(torch.tensor([one for row in trainer.train_dataset.rows for one in row["offsets"]]))
    assert not torch.equal(found[1], found[1].bfloat16().float())  # rounded after no sum
    assert float((found[1] - found[0]).abs().max()) < 0.2  # what forward passes in bf16 alone cost
    assert float((found[1] - found[0]).abs().max()) > 1e-4


def test_kept_log_probabilities_give_the_same_offsets(make_trainer, make_rows, models, tmp_path, monkeypatch):
    found = []
    for _ in range(2):
        for cache in ("", str(tmp_path / "kept")):
            trainer = make_trainer(
                make_rows(6, seed=4),
                model=models[2],
                method="dpo",
                beta=0.5,
                dimensions="short",
                reference_cache=cache,
                trainer_options={"earlier_rounds": rounds_of(models, "dpo", 2)},
            )
            found.append([row["offsets"] for row in trainer.train_dataset.rows])
    files = list((tmp_path / "kept").glob("*.safetensors"))
    assert len(files) == 3  # of each model one
    for other in found[1:]:
        assert torch.allclose(torch.tensor(found[0]), torch.tensor(other), atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr("softpref.spo.trainer.score_sequences", lambda *a, **o: pytest.fail("scored"))
        make_trainer(
            make_rows(6, seed=4),
            model=models[2],
            method="dpo",
            beta=0.5,
            dimensions="short",
            reference_cache=str(tmp_path / "kept"),
            trainer_options={"earlier_rounds": rounds_of(models, "dpo", 2)},
        )


def test_earlier_rewards_follow_the_recursion():
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    rounds = [
        EarlierRound(None, "dpo", beta=0.5),
        EarlierRound(None, "spo", alpha=2.0, anchor=0.25, weights=[0.7]),
    ]
    found = earlier_rewards(rounds, list(logps))
    first = 0.5 * (logps[1] - logps[0])
    second = 2.0 * (logps[2] - 0.25 * logps[1]) - 0.7 * first
    assert torch.allclose(found, torch.stack([first, second]))


def test_rows_of_other_sets_are_refused_once_there_are_earlier_rounds(make_trainer, make_rows, models):
    trainer = make_trainer(
        make_rows(4),
        model=models[1],
        dimensions="short",
        trainer_options={"earlier_rounds": rounds_of(models, "dpo", 1)},
    )
    with pytest.raises(ConfigError, match="as a set of its eval_dataset"):
        trainer.evaluate(make_rows(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": "short", "method": "ipo"}, "one of spo, dpo, rdpo with dimensions"),
        ({"dimensions": "short", "alpha": 0.0}, "above 0 with dimensions"),
        ({"dimensions": "short", "rounds": 2}, "empty where rows are drawn from the policy"),
        ({"dimensions": "short", "dimension_weights": "1,-1"}, "a number of at least 0"),
        ({"dimensions": "short", "dimension_weights": "much"}, "a number of at least 0"),
        ({"dimensions": "short", "dimension_weights": "1,2,3"}, "3 weights, and there are 1 earlier rounds"),
        ({}, "name in SPOConfig.dimensions"),
    ],
)
def test_what_does_not_go_with_dimensions_is_refused(make_trainer, make_rows, models, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(
            make_rows(2),
            model=models[1],
            trainer_options={"earlier_rounds": rounds_of(models, "dpo", 1)},
            **options,
        )


# The stage


@pytest.fixture
def dataset(tmp_path, write_dataset):
    rows = [
        {
            "prompt": prompt,
            "completions": completions if name == "long" else completions[::-1],
            "kind": "pairwise",
            "probability": None,
            "dimension": name,
        }
        for prompt in ("ab", "cd", "ef")
        for completions in (["abca", "b"], ["cad", "db"])
        for name in ("long", "short")
    ]
    return write_dataset(tmp_path / "data", {"train": rows, "validation": rows[:4]})


@pytest.fixture
def first(command, dataset, tmp_path):
    """The folder of a first round on `long`."""
    assert command("first", dataset, **QUICK, method="dpo", beta=0.3, dimensions="long") == 0
    return tmp_path / "first"


def test_a_round_takes_the_rows_of_its_dimension_and_the_rewards_of_the_rounds_before(
    command, dataset, first, tmp_path, monkeypatch, reference_folder
):
    from softpref.spo import stage

    made = []
    make = stage.SPOTrainer

    def recorded(*arguments, **options):
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(stage, "SPOTrainer", recorded)
    options = {**QUICK, "method": "spo", "alpha": 0.5, "beta": 0.0, "dimension_weights": "0.5"}
    second = ["--reference", str(first)]
    assert command("second", dataset, *second, **options, dimensions="short") == 0
    assert len(made[0].train_dataset.rows) == 6
    assert len(made[0].eval_dataset.rows) == 2
    assert all("offsets" in row for row in (*made[0].train_dataset.rows, *made[0].eval_dataset.rows))
    lineage = load_metadata(tmp_path / "second")["lineage"]
    shown = ("dimension", "method", "beta", "alpha", "dimension_weights", "reference")
    assert [tuple(one[name] for name in shown) for one in lineage] == [
        ("long", "dpo", 0.3, 1.0, [], reference_folder),
        ("short", "spo", 0.0, 0.5, [0.5], str(first)),
    ]
    third = ["--reference", str(tmp_path / "second")]
    assert (
        command("third", dataset, *third, **{**options, "dimension_weights": "1,2"}, dimensions="long") == 0
    )
    assert [one["dimension_weights"] for one in load_metadata(tmp_path / "third")["lineage"]][2] == [1, 2]


def test_a_round_that_does_not_know_the_rounds_before_is_refused(
    command, dataset, first, tmp_path, reference_folder, capsys
):
    def refused(*more, **options):
        capsys.readouterr()
        given = {**QUICK, "method": "dpo", "beta": 0.3, "dimensions": "short", **options}
        assert command("refused", dataset, "--reference", str(tmp_path / "begin"), *more, **given) == 2
        return capsys.readouterr().err

    shutil.copytree(first, tmp_path / "begin")
    said = json.loads((first / "softpref.json").read_text())

    def say(**changed):
        (tmp_path / "begin" / "softpref.json").write_text(json.dumps({**said, **changed}))

    say(lineage=None)
    assert "does not say which dimension it was trained on" in refused()
    say(extrapolation=0.5)
    assert "is extrapolated" in refused()
    say(lineage=[{**said["lineage"][0], "reference": "/nowhere/at/all"}])
    assert "the model that round 1 (long) began with" in (told := refused())
    assert "earlier_models can say where it is now" in told
    assert "has other weights than" in refused(earlier_models=str(first))
    assert "names 2 models" in refused(earlier_models="a,b")
    assert "its dimensions: long, short" in refused(dimensions="wide")
    say(lineage=[{**said["lineage"][0], "reference": "/nowhere/at/all"}])
    given = {**QUICK, "method": "dpo", "beta": 0.3, "dimensions": "short", "earlier_models": reference_folder}
    assert command("found", dataset, "--reference", str(tmp_path / "begin"), **given) == 0


def test_several_dimensions_are_rounds_one_after_another(command, dataset, first, tmp_path, weights):
    from softpref.lm.loading import load_model

    shared = {**QUICK, "method": "dpo", "beta": 0.3}
    assert (
        command("second", dataset, "--reference", str(first), **{**shared, "beta": 0.8}, dimensions="short")
        == 0
    )
    options = {**shared, "dimensions": ["long", "short"], "dimension_options": {"short": {"beta": 0.8}}}
    assert command("both", dataset, **options) == 0
    both = tmp_path / "both"
    for inner, alone in (("round-1", "first"), ("", "second")):
        assert torch.equal(*(weights(load_model(str(folder))) for folder in (both / inner, tmp_path / alone)))
        found, expected = (load_metadata(folder)["lineage"] for folder in (both / inner, tmp_path / alone))
        assert [one["dimension"] for one in found] == [one["dimension"] for one in expected]
        assert [one["beta"] for one in found] == [one["beta"] for one in expected]
    assert load_metadata(both)["lineage"][1]["reference"] == str(both / "round-1")
    assert load_metadata(both / "round-1")["name"] == "dpo-beta-0.3-long"
    assert command("both", dataset, **options) == 0  # finished: nothing is trained again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": ["long", "long"]}, "names of dimensions, each once"),
        ({"dimension_options": {"wide": {}}}, "about the dimensions long, short, not wide"),
        ({"dimension_options": {"short": {"bta": 1}}}, "did you mean 'beta'"),
        ({"dimension_options": {"short": {"beta": -1}}}, "SPOConfig.beta must be"),
        ({"dimension_options": {"short": 0.5}}, "must be an object of options"),
    ],
)
def test_wrong_rounds_are_refused_before_the_first_is_trained(
    command, dataset, tmp_path, capsys, options, message
):
    given = {**QUICK, "method": "dpo", "beta": 0.3, "dimensions": ["long", "short"], **options}
    assert command("wrong", dataset, **given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


# Theory: a small world whose every answer is known

ANSWERS = ["a", "b", "ab", "ba", "cd", "d"]
REWARDS = {
    "long": torch.tensor([0.3, -0.9, 1.2, 0.1, 0.6, -0.8], dtype=torch.float64),
    "short": torch.tensor([0.9, 0.2, -1.0, 0.4, -0.2, 0.7], dtype=torch.float64),
}


def every_pair(rewards):
    """All pairs of answers, with the exact probability of Bradley-Terry."""
    pairs = [(i, j) for i in range(len(ANSWERS)) for j in range(i)]
    return [
        {
            "prompt": "gh",
            "completions": [ANSWERS[i], ANSWERS[j]],
            "kind": "pairwise",
            "probability": float(torch.sigmoid(rewards[i] - rewards[j])),
        }
        for i, j in pairs
    ]


@pytest.fixture
def trained(make_trainer):
    """`trained(model, dimension, **options)`: a copy of the model, trained until it has settled."""

    def train(model, dimension, earlier=(), **options):
        rows = every_pair(REWARDS[dimension])
        trainer = make_trainer(
            rows,
            model=deepcopy(model),
            dimensions=dimension,
            kl_on="none",
            num_train_epochs=70,
            per_device_train_batch_size=len(rows),
            learning_rate=3e-2,
            lr_scheduler_type="cosine",
            logging_steps=1000,
            trainer_options={"earlier_rounds": list(earlier)},
            **options,
        )
        trainer.train()
        return trainer.model.eval()

    return train


def on_answers(model, tokenizer):
    """log-probabilities of the answers given their set: `[answers]`."""
    from softpref.lm.tokenization import stop_token_ids, tokenize_row

    rows = tokenize_row(tokenizer, "gh", ANSWERS, stop_ids=stop_token_ids(tokenizer, model))
    logps = score_sequences(model, [(row.prompt, row.completion) for row in rows])
    return logps.double().log_softmax(0)


@pytest.mark.parametrize("order", [("long", "short"), ("short", "long")], ids="-".join)
@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_rounds_end_at_the_optimum_of_either_order_and_every_weight(
    make_model, tokenizer, trained, method, order
):
    start = make_model(tokenizer, layers=2, seed=21)
    options = {"method": method, "alpha": 0.8, "beta": 0.8}
    first = trained(start, order[0], **options)
    began, earlier = on_answers(start, tokenizer), EarlierRound(start, method, alpha=0.8, beta=0.8)
    gained = []
    for weight in (0.0, 2.0):
        own = {"method": method, "alpha": 1.3, "beta": 1.3, "dimension_weights": weight}
        second = on_answers(trained(first, order[1], [earlier], **own), tokenizer)
        if method == "spo":
            logits = (REWARDS[order[1]] + weight * REWARDS[order[0]]) / 1.3
        else:
            logits = began + (1 / 0.8 + weight / 1.3) * REWARDS[order[0]] + REWARDS[order[1]] / 1.3
        optimum = logits.log_softmax(0)
        assert float((optimum.exp() * (optimum - second)).sum()) < 5e-3
        gained.append(float(second.exp() @ REWARDS[order[0]]))
    assert gained[1] > gained[0]
