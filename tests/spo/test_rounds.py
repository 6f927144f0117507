"""Training rows drawn anew in rounds: by which policy, judged how, against which reference, resumed where."""

import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from softpref.errors import ConfigError, DataError
from softpref.lm.checkpoints import seal_checkpoint
from softpref.lm.packing import PackedBatch
from softpref.lm.scoring import score_sequences
from softpref.lm.tokenization import decode, tokenize_prompt, tokenize_sequence
from softpref.spo.rounds import win_tables
from transformers import TrainerCallback

ROWS, BATCH, EPOCHS, ROUNDS = 6, 3, 2, 3
STEPS = ROUNDS * EPOCHS * ROWS // BATCH
BETA = 0.5


class Judge:
    """Counts letters: an `a` is worth half a nat, each letter costs a bit; knows prompts by their text."""

    name = description = fingerprint = "letters"

    def __init__(self):
        self.asked = []

    def score(self, prompt, text):
        return 0.5 * text.count("a") - 0.2 * len(text) + 0.1 * len(prompt) * text.count("b")

    def probabilities(self, prompts, first, second):
        self.asked += list(zip(prompts, first, second, strict=True))
        margins = [self.score(p, a) - self.score(p, b) for p, a, b in self.asked[-len(prompts) :]]
        return 1 / (1 + np.exp(-np.array(margins)))


class Rounds(TrainerCallback):
    """What each round began with, and which completions each step was trained on."""

    def __init__(self, trainer):
        self.trainer, self.models, self.rows, self.begun = trainer, [], [], []
        self.drawn, self.trained = [], []
        rounds, draw, loss = trainer.rounds, trainer._draw, trainer.compute_loss

        def recorded_draw(prompts, noise, progress):
            samples = draw(prompts, noise, progress)
            self.drawn.append((rounds.number, noise, samples))
            return samples

        def recorded_loss(model, inputs, *arguments, **options):
            batch = PackedBatch(*(inputs[name] for name in PackedBatch._fields))
            ids = [[*prompt, *completion] for prompt, completion in batch.sequences()]
            self.trained.append((trainer.state.global_step, ids))
            return loss(model, inputs, *arguments, **options)

        rounds._draw, trainer.compute_loss = recorded_draw, recorded_loss
        trainer.add_callback(self)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if self.trainer.rounds.number == len(self.rows):
            self.begun.append(state.global_step)
            self.models.append(deepcopy(model))
            self.rows.append(deepcopy(self.trainer.rounds.rows))


@pytest.fixture
def judge():
    return Judge()


@pytest.fixture
def rounds(make_trainer, make_rows, judge):
    """`rounds(trains=True, **options) -> (trainer, Rounds)` of a run of three rounds of two epochs."""

    def run(*, rows=None, trains=True, trainer_options=None, **options):
        trainer = make_trainer(
            make_rows(ROWS, soft=True) if rows is None else rows,
            trainer_options={"judge": judge, **(trainer_options or {})},
            **{
                "rounds": ROUNDS,
                "num_train_epochs": EPOCHS,
                "per_device_train_batch_size": BATCH,
                "beta": BETA,
                "lr_scheduler_type": "linear",
                "cut_rows": "keep",  # the toy model hardly ever ends within its few tokens
                **options,
            },
        )
        watched = Rounds(trainer)
        if trains:
            trainer.train()
        return trainer, watched

    return run


def plain(row):
    return {name: row[name] for name in ("prompt", "completions", "probability", "kind")}


@pytest.mark.parametrize("train_on", ["preferences", "samples", "self_play"])
@pytest.mark.parametrize("method", ["spo", "dpo", "sppo"])
def test_rounds_from_beginning_to_end(
    rounds, make_rows, judge, direct, tokenizer, model, logs_of, method, train_on
):
    judged = train_on != "self_play"
    count = {"sppo": 4, "dpo": 3, "spo": 2}[method] if judged else 1
    options = {"completions_per_prompt": count} if judged else {}
    if method == "dpo":
        options["round_reference"] = "previous"
    trainer, watched = rounds(method=method, train_on=train_on, **options)
    given = make_rows(ROWS, soft=True)
    prompts = [tokenize_prompt(tokenizer, row["prompt"]).ids for row in given]
    answers = [tokenize_sequence(tokenizer, row["prompt"], row["completions"][0])[1] for row in given]

    # as many steps as rounds, passes and batches make, one schedule over all of them, the round in the log
    logs = logs_of(trainer)
    assert trainer.state.global_step == trainer.state.max_steps == len(logs) == STEPS
    assert [log["round"] for log in logs] == [1 + step // (STEPS // ROUNDS) for step in range(STEPS)]
    rates = [log["learning_rate"] for log in logs]
    assert rates == pytest.approx([1e-2 * (1 - step / STEPS) for step in range(STEPS)])
    assert all(0 <= log["sampling/time_fraction"] <= 1 for log in logs)
    assert [round(log["epoch"], 6) for log in logs] == [(step + 1) / 2 for step in range(STEPS)]

    # every step is of its own round's rows, from the first batch on, and each pass takes all of them
    assert watched.begun == [0, 4, 8]
    for epoch in range(ROUNDS * EPOCHS):
        found = [ids for step, batch in watched.trained if step // 2 == epoch for ids in batch]
        rows = watched.rows[epoch // EPOCHS]
        expected = [row["prompt"] + completion for row in rows for completion in row["completions"]]
        assert sorted(found) == sorted(expected)

    drawn = [(noise, samples) for number, noise, samples in watched.drawn]
    if train_on == "preferences":
        first = trainer.rounds._given
        assert [plain(row) for row in watched.rows[0]] == [plain(row) for row in first]
        assert [row["probability"] for row in first] == [row["probability"] for row in given]
        drawn.insert(0, None)
    assert len(drawn) == ROUNDS
    noises = [one[0] for one in drawn if one is not None]
    assert not any(torch.equal(noises[0], other) for other in noises[1:])
    for number, (policy, rows) in enumerate(zip(watched.models, watched.rows, strict=True)):
        assert [row["prompt"] for row in rows] == prompts
        if drawn[number] is not None:
            noise, samples = drawn[number]
            drawn_by(direct, policy, noise, samples)
            for i, row in enumerate(rows):
                group = [sample.completion for sample in samples[i * count : (i + 1) * count]]
                if judged:
                    texts = [decode(tokenizer, completion) for completion in group]
                    as_the_judge_says(judge, row, given[i]["prompt"], group, texts, method)
                else:
                    assert row["completions"] == [answers[i], group[0]]
                    assert (row["probability"], row["kind"]) == (1.0, "pairwise")
        # the reference of the round is the policy that it began with
        if method == "spo":
            assert all("ref_logps" not in row for row in rows)
            continue
        flat = [(row["prompt"], completion) for row in rows for completion in row["completions"]]
        expected = score_sequences(policy, flat).tolist()
        found = [logp for row in rows for logp in row["ref_logps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        assert logs[watched.begun[number]]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert (trainer.ref_model is None) == (method != "spo")
    assert bool(judge.asked) == judged
    assert {prompt for prompt, _, _ in judge.asked} <= {row["prompt"] for row in given}
    every = list(zip(prompts, answers, strict=True))
    moved = score_sequences(trainer.model, every) - score_sequences(model, every)
    assert float(moved.abs().max()) > 0.1


def drawn_by(direct, policy, noise, samples):
    """Whether samples are what `policy` makes of these uniform numbers: the first token whose Σπ exceeds."""
    policy = deepcopy(policy).double()
    assert len({tuple(sample.completion) for sample in samples}) > 3
    for row, sample in zip(noise.tolist(), samples, strict=True):
        with torch.no_grad():
            chances = direct.distributions(policy, sample.prompt, sample.completion).exp()
        for t, token in enumerate(sample.completion):
            below, upto = chances[t, :token].sum().item(), chances[t, : token + 1].sum().item()
            assert below - 1e-5 <= row[t] <= upto + 1e-5


def as_the_judge_says(judge, row, prompt, group, texts, method):
    """Whether a row is what the judge's comparisons make of the completions that were drawn."""
    scores = np.array([judge.score(prompt, text) for text in texts])
    chances = 1 / (1 + np.exp(scores[None] - scores[:, None]))  # of i against j
    wins = [(chances[i].sum() - 0.5) / (len(group) - 1) for i in range(len(group))]
    known = dict(zip(map(tuple, group), wins, strict=True))
    scored = dict(zip(map(tuple, group), scores, strict=True))
    inside = [tuple(completion) for completion in row["completions"]]
    if method == "sppo":
        assert sorted(inside) == sorted(map(tuple, group))
        assert row["win_probabilities"] == pytest.approx([known[one] for one in inside])
        assert row["win_probabilities"] == sorted(row["win_probabilities"], reverse=True)
    else:
        best, worst = inside
        assert (known[best], known[worst]) == (max(wins), min(wins))
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(scored[worst] - scored[best])))
        assert row["kind"] == "pairwise"


def test_a_round_too_large_for_one_draw_is_drawn_in_parts(rounds, direct, monkeypatch):
    monkeypatch.setattr("softpref.spo.rounds._DRAWN_AT_ONCE", 6)
    trainer, watched = rounds(rounds=1, train_on="samples", completions_per_prompt=3)
    assert [len(samples) for _, _, samples in watched.drawn] == [6, 6, 6]  # of two prompts each
    assert not torch.equal(watched.drawn[0][1], watched.drawn[1][1])
    every = [sample for _, _, samples in watched.drawn for sample in samples]
    for i, row in enumerate(trainer.rounds.rows):
        group = every[3 * i : 3 * i + 3]
        assert {tuple(sample.prompt) for sample in group} == {tuple(row["prompt"])}
        drawn = [sample.completion for sample in group]
        assert all(completion in drawn for completion in row["completions"])
    drawn_by(direct, watched.models[0], watched.drawn[2][1], watched.drawn[2][2])


def test_drawing_shows_its_progress_unless_it_is_switched_off(rounds, capsys, monkeypatch):
    monkeypatch.setattr("softpref.progress._SECONDS", 0.0)
    rounds(rounds=1, train_on="samples")
    assert "drawing completions" not in capsys.readouterr().err
    rounds(rounds=1, train_on="samples", disable_tqdm=False, output="shown")
    shown = capsys.readouterr().err
    assert "round 1, drawing completions: completion " in shown


def test_a_round_of_sppo_begins_at_the_target_squared(rounds, logs_of):
    # where policy and reference are one, all that is left is ((P − ½) / β)² of each completion
    trainer, watched = rounds(
        method="sppo",
        train_on="samples",
        completions_per_prompt=3,
        per_device_train_batch_size=ROWS,
        num_train_epochs=1,
    )
    for log, rows in zip(logs_of(trainer), watched.rows, strict=True):
        targets = [sum(((win - 0.5) / BETA) ** 2 for win in row["win_probabilities"]) for row in rows]
        assert log["loss"] == pytest.approx(sum(targets) / len(targets), rel=1e-3)


@pytest.mark.parametrize("history", [2, ROUNDS])
def test_self_play_meets_the_opponents_of_the_latest_rounds(rounds, history):
    options = {"method": "dpo", "train_on": "self_play", "round_reference": "previous", "num_train_epochs": 1}
    _, watched = rounds(**options, opponent_history=history)
    opponents = [[sample.completion for sample in samples] for _, _, samples in watched.drawn]
    met = set()
    for number, (policy, rows) in enumerate(zip(watched.models, watched.rows, strict=True)):
        for i, row in enumerate(rows):
            opponent = row["completions"][1]
            ages = [age for age in range(number + 1) if opponents[number - age][i] == opponent]
            assert min(ages) < history
            met |= {(number, age) for age in ages if len(ages) == 1}
        # whoever wrote an opponent, the reference is the policy that the round began with
        flat = [(row["prompt"], completion) for row in rows for completion in row["completions"]]
        found = [logp for row in rows for logp in row["ref_logps"]]
        assert found == pytest.approx(score_sequences(policy, flat).tolist(), abs=1e-4)
    assert {(ROUNDS - 1, age) for age in range(history)} <= met


def test_every_round_of_the_history_gives_its_share_of_opponents(rounds):
    trainer, _ = rounds(
        method="dpo", train_on="self_play", opponent_history=3, rounds=5, num_train_epochs=1, trains=False
    )
    drawing = trainer.rounds
    drawing._given = [{"prompt": [i], "completions": [[0]]} for i in range(9_000)]
    for number in range(5):
        drawn = [{"prompt": [i], "completions": [[0], [number]]} for i in range(9_000)]
        rows = drawing._against_history(drawn, number)
    counts = np.bincount([row["completions"][1][0] for row in rows])
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:].tolist() == pytest.approx([3_000] * 3, abs=5 * np.sqrt(2_000))


def test_the_authors_sppo_learns_from_the_best_and_the_worst_with_wins_over_all(rounds, judge):
    """Their P counts a completion's comparison with itself as ½."""
    _, watched = rounds(
        method="sppo",
        sppo_completions="extremes",
        train_on="samples",
        completions_per_prompt=4,
        num_train_epochs=1,
    )
    assert len(watched.rows) == ROUNDS
    asked = iter(judge.asked)
    decided = 0
    for (_, _, samples), rows in zip(watched.drawn, watched.rows, strict=True):
        for place, row in enumerate(rows):
            four = [sample.completion for sample in samples[4 * place : 4 * place + 4]]
            table = np.full((4, 4), 0.5)
            for i in range(4):
                for j in range(i + 1, 4):
                    prompt, first, second = next(asked)
                    table[i, j] = 1 / (1 + np.exp(judge.score(prompt, second) - judge.score(prompt, first)))
                    table[j, i] = 1 - table[i, j]
            wins = table.mean(1)
            assert row["win_probabilities"] == pytest.approx([wins.max(), wins.min()])
            found = [wins[four.index(one)] for one in row["completions"]]
            assert found == pytest.approx([wins.max(), wins.min()])
            assert len(row["ref_logps"]) == 2
            decided += wins.max() > wins.min()
    assert decided > ROUNDS


def test_sppo_with_a_kl_term_is_regularised_towards_the_initial_model(rounds, direct, model, watch, logs_of):
    """RSPO: squares relative to the policy that the round began with, and λ KL to the initial one."""
    strength = 0.4
    trainer, watched = rounds(
        method="sppo",
        beta=1.0,
        kl_beta=strength,
        kl_on="data",
        rounds=2,
        train_on="samples",
        num_train_epochs=1,
        per_device_train_batch_size=ROWS,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        trainer_options={"callbacks": [watch]},
    )
    initial, previous = model.double(), watched.models[1].double()
    for rows, policy, gradient in zip(watched.rows, watch.models, watch.gradients, strict=True):
        start = initial if policy is watch.models[0] else previous
        loss = 0.0
        for row in rows:
            for one, win in zip(row["completions"], row["win_probabilities"], strict=True):
                now = direct.distributions(policy, row["prompt"], one)
                with torch.no_grad():
                    before = direct.token_logps(start, row["prompt"], one).sum()
                    old = direct.distributions(initial, row["prompt"], one)
                ratio = now[range(len(one)), one].sum() - before
                divergence = (now.exp() * (now - old)).sum() / len(row["completions"])
                loss = loss + (ratio - (win - 0.5)) ** 2 + strength * divergence
        direct.agree(gradient, direct.gradient(policy, loss / ROWS), tolerance=1e-3)
    assert logs_of(trainer)[1]["kl/data"] > 1e-4


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("history", [1, 2])
def test_a_mixed_reference_is_geometric_between_the_previous_policy_and_the_initial_model(
    rounds, direct, watch, model, logs_of, share, lora, history
):
    """α-SPIN: DPO of demonstrations against the policy's own completions, relative to that mixture."""
    trainer, watched = rounds(
        method="dpo",
        train_on="self_play",
        round_reference="previous",
        initial_share=share,
        opponent_history=history,
        rounds=2,
        num_train_epochs=1,
        per_device_train_batch_size=ROWS,
        learning_rate=0.05,
        max_grad_norm=0.0,
        use_peft=lora,
        trainer_options={"judge": None, "callbacks": [watch]},
    )
    initial = model.double()
    for rows, policy, log, before, gradient in zip(
        watched.rows, watched.models, logs_of(trainer), watch.models, watch.gradients, strict=True
    ):
        losses, policy = [], policy.double()
        with torch.no_grad():
            for row in rows:
                scores = []
                for one, kept in zip(row["completions"], row["ref_logps"], strict=True):
                    now, old = (
                        float(direct.token_logps(each, row["prompt"], one).sum())
                        for each in (policy, initial)
                    )
                    assert kept == pytest.approx(share * old + (1 - share) * now, abs=1e-4)
                    scores.append(BETA * (now - share * old - (1 - share) * now))
                losses.append(math.log1p(math.exp(scores[1] - scores[0])))
        assert log["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        exact = 0.0  # the same as a formula of the policy, for its gradient
        for row in rows:
            margins = [
                direct.token_logps(before, row["prompt"], one).sum() - kept
                for one, kept in zip(row["completions"], row["ref_logps"], strict=True)
            ]
            exact = exact - torch.nn.functional.logsigmoid(BETA * (margins[0] - margins[1])) / ROWS
        direct.agree(gradient, direct.gradient(before, exact), 1e-3)
    assert logs_of(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(logs_of(trainer)[1]["loss"] - math.log(2)) > 1e-3


def test_the_initial_reference_stays_where_the_method_wants_it(rounds, model, weights, logs_of):
    trainer, watched = rounds(method="dpo", train_on="samples", learning_rate=3e-2)
    torch.testing.assert_close(weights(trainer.ref_model), weights(model), rtol=0, atol=0)
    assert all("ref_logps" not in row for rows in watched.rows for row in rows)
    assert abs(logs_of(trainer)[watched.begun[-1]]["rewards/chosen"]) > 0.05


def test_evaluation_rows_are_scored_against_the_initial_model(rounds, make_rows, model, tokenizer):
    held_out = make_rows(5, seed=6)
    trainer, _ = rounds(method="sppo", train_on="samples", trainer_options={"eval_dataset": held_out})
    flat = [
        tokenize_sequence(tokenizer, row["prompt"], completion)[:2]
        for row in held_out
        for completion in row["completions"]
    ]
    change = score_sequences(trainer.model, flat) - score_sequences(model, flat)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/chosen"] == pytest.approx(BETA * change[::2].mean().item(), abs=1e-3)
    assert abs(metrics["eval_rewards/chosen"]) > 0.05


def test_an_adapters_previous_policy_has_its_adapter_on(rounds, logs_of):
    from peft import LoraConfig

    trainer, watched = rounds(
        method="sppo",
        train_on="samples",
        learning_rate=3e-2,
        trainer_options={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
    )
    flat = [(row["prompt"], one) for row in watched.rows[-1] for one in row["completions"]]
    found = torch.tensor([logp for row in watched.rows[-1] for logp in row["ref_logps"]])
    on = score_sequences(watched.models[-1], flat)
    with watched.models[-1].disable_adapter():
        off = score_sequences(watched.models[-1], flat)
    torch.testing.assert_close(found, on, rtol=0, atol=1e-4)
    assert float((on - off).abs().max()) > 0.1
    assert trainer.ref_model is None


@pytest.mark.parametrize(
    "options",
    [
        {"train_on": "samples", "kl_gradient": "full"},
        {"method": "sppo", "completions_per_prompt": 3, "gradient_accumulation_steps": 2},
        {"method": "sppo", "completions_per_prompt": 3, "sppo_completions": "extremes"},
        {"method": "dpo", "train_on": "self_play", "round_reference": "previous"},
        {"method": "dpo", "train_on": "self_play", "round_reference": "previous", "initial_share": 0.4},
        {"method": "dpo", "train_on": "self_play", "opponent_history": 2},
    ],
    ids=["spo", "sppo", "extremes", "self-play", "mixture", "history"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(rounds, weights, logs_of, tmp_path, options):
    options = {
        **options,
        "per_device_train_batch_size": BATCH // options.get("gradient_accumulation_steps", 1),
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
    }
    whole, watched = rounds(**options)
    every, steps_of_round = logs_of(whole), whole.state.max_steps // ROUNDS
    # in the middle of a round's second pass, and between two rounds
    for step in (steps_of_round + 3, steps_of_round):
        again, seen = rounds(**options, trains=False)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        torch.testing.assert_close(weights(again.model), weights(whole.model), rtol=0, atol=0)
        assert again.rounds.rows == whole.rounds.rows
        drawn = [samples for _, _, samples in seen.drawn]
        first = -(-step // steps_of_round)  # the first round that is still to be drawn
        assert drawn == [samples for _, _, samples in watched.drawn][first - ROUNDS :]
        timed = ("sampling/t", "step")
        for ours, theirs in zip(logs_of(again), every, strict=True):
            for name in theirs.keys() - {name for name in theirs if name.startswith(timed)}:
                assert ours[name] == theirs[name], name


def test_a_checkpoint_holds_what_the_data_do_not(rounds, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    for method, first, later in (
        ("dpo", set(), {"completions", "probability"}),
        ("sppo", {"ref_logps"}, {"completions", "probability", "win_probabilities", "ref_logps"}),
    ):
        trainer, _ = rounds(method=method, output=method, **options)
        for step, round_, names in ((4, 0, first), (8, 1, later)):
            file = tmp_path / method / f"checkpoint-{step}" / "round_rows.json"
            state = json.loads(file.read_text())
            assert state["round"] == round_
            assert {name for row in state["rows"] for name in row} == names
        trainer.rounds.load(tmp_path / method / "checkpoint-12")
        assert trainer.rounds.rows == trainer.train_dataset.rows


def test_a_drawn_row_takes_no_log_probabilities_of_the_given_one_from_a_checkpoint(rounds, tmp_path):
    trainer, _ = rounds(method="dpo", round_reference="initial", trains=False)
    for row in trainer.rounds._given:  # as rows of a reference that kept them bring them
        row["ref_logps"] = [-1.0] * len(row["completions"])
    trainer.rounds.begin(1)
    assert not any("ref_logps" in row for row in trainer.rounds.rows)
    drawn = trainer.rounds.rows
    trainer.rounds.save(tmp_path)
    trainer.rounds.forget()
    trainer.rounds.load(tmp_path)
    assert trainer.rounds.rows == drawn


def test_a_checkpoint_of_another_kind_of_run_is_refused(rounds, make_rows, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "beta": 0.0}
    rounds(rounds=1, train_on="samples", num_train_epochs=4, **options)
    folder = str(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ConfigError, match="holds a round of 6 rows, the training data have 5"):
        rounds(rows=make_rows(5), trains=False, **options)[0].train(resume_from_checkpoint=folder)
    (tmp_path / "run" / "checkpoint-4" / "round_rows.json").unlink()
    seal_checkpoint(folder)  # as one that never had it
    with pytest.raises(ConfigError, match="holds no rows of a round"):
        rounds(trains=False, **options)[0].train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("passes", [0.5, 1.5, 2.5])
def test_one_round_is_one_however_long_it_is(rounds, passes, logs_of):
    trainer, watched = rounds(rounds=1, train_on="samples", num_train_epochs=passes)
    assert trainer.state.global_step == math.ceil(passes * ROWS / BATCH)
    assert len(watched.drawn) == 1
    assert {log["round"] for log in logs_of(trainer)} == {1}


def test_a_number_of_steps_ends_rounds_early_and_says_so_or_prolongs_the_last(rounds, logs_of, caplog):
    trainer, _ = rounds(train_on="samples", max_steps=6)
    assert [log["round"] for log in logs_of(trainer)] == [1] * 4 + [2] * 2
    assert "max_steps=6 ends training in round 2 of 3; a round has 4 steps" in caplog.text
    caplog.clear()
    trainer, watched = rounds(train_on="samples", max_steps=14, output="long")
    assert [log["round"] for log in logs_of(trainer)] == [1] * 4 + [2] * 4 + [3] * 6
    assert len(watched.drawn) == 3
    assert logs_of(trainer)[-1]["learning_rate"] == pytest.approx(1e-2 / 14)
    assert "max_steps" not in caplog.text


def test_training_twice_draws_every_round_anew(rounds, weights):
    trainer, watched = rounds(rounds=1, train_on="samples", sampling_interval=8, samples_per_refresh=8)
    first = [sample for _, _, samples in watched.drawn for sample in samples]
    buffered = list(trainer.buffer._samples)
    trainer.train()
    assert len(watched.drawn) == 2
    assert watched.drawn[1][2] != first
    assert trainer.buffer._samples != buffered  # drawn at step 0 both times, but not by the same policy


def test_rows_of_prompts_alone_suffice_for_samples(rounds, make_rows):
    prompts = [{"prompt": row["prompt"]} for row in make_rows(ROWS)]
    trainer, _ = rounds(rows=prompts, train_on="samples")
    again, _ = rounds(rows=make_rows(ROWS), train_on="samples", output="again")
    assert trainer.rounds.rows == again.rounds.rows


def test_demonstrations_suffice_for_self_play_and_need_no_judge(make_trainer, make_rows):
    rows = make_rows(ROWS)
    demonstrations = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in rows]
    options = {"train_on": "self_play", "beta": 0.0, "rounds": 2}
    trainer = make_trainer(demonstrations, **options)
    trainer.train()
    again = make_trainer(rows, output="again", **options)
    again.train()
    assert trainer.rounds.rows == again.rounds.rows
    assert {row["probability"] for row in trainer.rounds.rows} == {1.0}


def test_messages_are_asked_of_the_judge_with_their_roles(rounds, judge, make_rows):
    chat = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in make_rows(ROWS)]
    trainer, _ = rounds(rows=chat, train_on="samples", max_prompt_length=64, rounds=1)
    asked, first, _ = judge.asked[0]
    assert asked == f"user: {chat[0]['prompt'][0]['content']}"
    assert "<" not in first  # no special token
    start = trainer.processing_class.convert_tokens_to_ids("<|im_start|>")
    assert all(start in row["prompt"] for row in trainer.rounds.rows)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "ab"}, {"train_on": "samples"}, "training row 1: needs prompt; has text"),
        ({"prompt": "ab"}, {"train_on": "self_play"}, "training row 1: needs completions, or chosen"),
        ({"prompt": "ab", "completion": ""}, {"train_on": "self_play"}, "training row 1: .* no token"),
        ({"prompt": 5}, {"train_on": "samples"}, "training row 1: a prompt must be text"),
    ],
)
def test_a_row_that_no_round_can_use_is_named(rounds, row, options, message):
    rows = [{"prompt": "ab", "completion": "c"}, row]
    with pytest.raises(DataError, match=message):
        rounds(rows=rows, trains=False, **options)


@pytest.mark.parametrize("answer", [[0.5], [[0.5] * ROWS], [1.5] * ROWS])
def test_a_judge_that_gives_no_probabilities_is_refused(rounds, judge, answer):
    judge.probabilities = lambda prompts, first, second: np.array(answer)
    with pytest.raises(ConfigError, match=f"compare {ROWS} pairs; its probabilities must be as many numbers"):
        rounds(train_on="samples")


def test_a_round_needs_every_pair_judged():
    class Ended:
        ended = "its budget is used up"

        def verdicts(self, prompts, first, second): ...

        def probabilities(self, prompts, first, second):
            return np.array([0.5] + [np.nan] * (len(prompts) - 1))

    with pytest.raises(ConfigError, match="left 2 of 3 pairs unjudged: its budget is used up; a round needs"):
        win_tables(Ended(), ["p"], [["a", "b", "c"]])


def test_loader_processes_see_the_rows_of_each_round(rounds):
    alone, seen = rounds(train_on="samples", num_train_epochs=1, rounds=2)
    apart, watched = rounds(
        train_on="samples", num_train_epochs=1, rounds=2, dataloader_num_workers=1, output="apart"
    )
    assert watched.trained == seen.trained
    assert apart.rounds.rows == alone.rounds.rows
