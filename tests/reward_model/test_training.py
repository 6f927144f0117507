"""Training a judge: its loss beside TRL's and a formula, its heads, its folder, and what it learns."""

import json
import math

import numpy as np
import pytest
import torch
from softpref.cli import main
from softpref.errors import ConfigError, DataError
from softpref.judges.reliability import agreement
from softpref.judges.reward_model import load_reward_judge
from softpref.judges.texts import text_rows
from softpref.lm.loading import with_reward_heads
from softpref.lm.rating import RewardHeads, rate, read
from softpref.objectives import bradley_terry_loss
from softpref.reward_model import stage, trainer
from softpref.reward_model.config import RewardModelConfig
from softpref.reward_model.stage import headline, run
from softpref.reward_model.trainer import (
    RatedRows,
    RewardTrainer,
    bootstrap_weights,
    collate,
    row_losses,
)
from transformers import AutoModelForSequenceClassification

GOOD, BAD = ["calm", "kind", "warm"], ["rude", "cold", "grim"]
NOUNS = ["sea", "owl", "fox", "bell", "road", "hill"]


def lexicon_rows(prompts, per_prompt, seed):
    """Pairs of which people prefer the one with a good word; which is the longer one is chance."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt in prompts:
        for _ in range(per_prompt):
            fill = [" ".join(random.choice(NOUNS, random.integers(1, 5))) for _ in range(2)]
            words = [f"{random.choice(GOOD)} {fill[0]}", f"{random.choice(BAD)} {fill[1]}"]
            rows.append(pair(prompt, *words))
    return rows


def pair(prompt, better, worse, probability=None, **more):
    return {
        "prompt": prompt,
        "completions": [better, worse],
        "kind": "pairwise",
        "probability": probability,
        **more,
    }


def write_dataset(folder, **splits):
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(folder))
    (folder / "stats.json").write_text(json.dumps({"stage": "data", "dataset_hash": "abc"}))
    return str(folder)


@pytest.fixture(scope="module")
def plain(make_tokenizer):
    return make_tokenizer(chat_template=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory, plain, make_model):
    folder = tmp_path_factory.mktemp("base")
    make_model(plain, width=32, layers=2, spread=0.1).save_pretrained(folder)
    plain.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(base):
    return {
        "base_model": base,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "max_length": 64,
        "heads": 4,
    }


def batch_of(rows, tokenizer, weights=None, heads=1, length=64):
    config = RewardModelConfig(base_model="gpt2", use_cpu=True, max_length=length, disable_tqdm=True)
    given = np.ones((len(rows), heads)) if weights is None else weights
    rated = RatedRows(rows, given, tokenizer, config, "row")
    return collate(rated.rows, tokenizer.pad_token_id)


def test_the_loss_is_the_likelihood_of_votes_by_bradley_terry():
    margin = torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64, requires_grad=True)
    share = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    loss = bradley_terry_loss(margin, share)
    by_hand = [
        -p * math.log(1 / (1 + math.exp(-m))) + (1 - p) * (m + math.log1p(math.exp(-m)))
        for m, p in zip(margin.tolist(), share.tolist(), strict=True)
    ]
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-12)
    loss.sum().backward()
    slope = [1 / (1 + math.exp(-m)) - p for m, p in zip(margin.tolist(), share.tolist(), strict=True)]
    assert margin.grad.tolist() == pytest.approx(slope, rel=1e-12)


def test_loss_and_gradient_on_hard_labels_are_those_of_trl(plain, make_model, tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = lexicon_rows(["why", "who then"], 2, 0)
    model = with_reward_heads(make_model(plain, width=16, layers=1), 1, plain.pad_token_id)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    batch = batch_of(rows, plain)
    theirs = RewardTrainer.__new__(RewardTrainer)  # its loss needs none of what its constructor makes
    theirs.model = model
    theirs.args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    from collections import defaultdict

    from accelerate import Accelerator

    theirs.accelerator = Accelerator(cpu=True)
    theirs._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    theirs._total_train_tokens, theirs._tp_size = 0, 1
    order = [*range(0, 2 * len(rows), 2), *range(1, 2 * len(rows), 2)]  # all chosen, then all rejected
    fed = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    losses = []
    for loss in (lambda: theirs.compute_loss(model, dict(fed)), lambda: row_losses(model, batch).mean()):
        model.zero_grad()
        value = loss()
        value.backward()
        losses.append((value.item(), [weights.grad.clone() for weights in model.parameters()]))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    for mine, other in zip(losses[1][1], losses[0][1], strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-7)


def test_a_rows_pairs_share_its_weight_and_each_head_counts_as_it_drew(plain, make_model):
    rows = [
        {"prompt": "p", "completions": ["a", "bb", "ccc"], "kind": "ranking", "probability": None},
        {"prompt": "q", "completions": ["dd", "e", "f"], "kind": "best_of_n", "probability": None},
        pair("r", "g", "hh", 0.75),
    ]
    weights = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    model = with_reward_heads(make_model(plain, width=16, layers=1), 2, plain.pad_token_id)
    torch.nn.init.normal_(model.score.weight)
    found = row_losses(model, batch_of(rows, plain, weights, 2)).tolist()

    def nats(better, worse, share=1.0):
        gap = better - worse
        return share * np.log1p(np.exp(-gap)) + (1 - share) * np.log1p(np.exp(gap))

    texts = [["pa", "pbb", "pccc"], ["qdd", "qe", "qf"], ["rg", "rhh"]]
    expected = []
    places = [[(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)], [(0, 1, 1.0), (0, 2, 1.0)], [(0, 1, 0.75)]]
    for group, pairs, own in zip(texts, places, weights, strict=True):
        ids = [{"input_ids": [*plain(text)["input_ids"], plain.eos_token_id]} for text in group]
        s = rate(model, ids).numpy().astype(float)
        losses = [nats(s[i], s[j], share) for i, j, share in pairs]
        expected.append((np.mean(losses, 0) * own).mean())
    assert found == pytest.approx(expected, rel=1e-4)


def test_heads_draw_prompts_and_not_rows_and_rows_keep_their_weight():
    rows = [pair(prompt, "a", "b", weight=weight) for prompt in "pqrst" for weight in (1.0, 2.0)]
    drawn = bootstrap_weights(rows, 3, seed=0)
    assert drawn.shape == (10, 3)
    first, second = drawn[::2], drawn[1::2]
    assert (second == 2 * first).all()
    assert first.sum(0).tolist() == [5, 5, 5]
    assert (first != 1).any()
    assert (drawn == bootstrap_weights(rows, 3, seed=0)).all()
    assert (drawn != bootstrap_weights(rows, 3, seed=1)).any()
    assert bootstrap_weights(rows, 1, seed=0)[:, 0].tolist() == [1.0, 2.0] * 5


def test_a_trained_judge_knows_a_lexicon_and_length_does_not(tmp_path, settings, store):
    """The whole way, on the console: train, save, load, and beat a coin and length on unseen prompts."""
    known = [f"{who} and {what}: " for who in NOUNS for what in NOUNS]
    dataset = write_dataset(
        tmp_path / "data",
        judge=lexicon_rows(known[:24], 10, 0),
        train=lexicon_rows(known[24:25], 1, 1),
        validation=lexicon_rows(known[25:], 6, 2),
    )
    options = {**settings, "learning_rate": 3e-3, "num_train_epochs": 3, "seed": 0, "tracking_uri": store}
    given = [f"--{name}={json.dumps(value).strip(chr(34))}" for name, value in options.items()]
    result = tmp_path / "result.json"
    assert (
        main(
            ["judge", f"--dataset={dataset}", f"--output={tmp_path / 'judge'}", f"--result={result}", *given]
        )
        == 0
    )
    metrics = json.loads(result.read_text())["result"]
    assert metrics["accuracy/low"] > 0.8
    assert metrics["over_length/low"] > 0
    assert metrics["eval_loss"] < 0.5 < math.log(2)
    assert headline(metrics)["accuracy"] == pytest.approx(metrics["accuracy"], rel=1e-5)

    assert '"judge/accuracy/low"' in (tmp_path / "judge" / "tracking.jsonl").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert model.config.num_labels == 4
    said = json.loads((tmp_path / "judge" / "softpref.json").read_text())
    assert (said["stage"], said["split"], said["heads"], said["max_length"]) == ("judge", "judge", 4, 64)
    assert (said["dataset_hash"], said["base_model"]) == ("abc", settings["base_model"])

    judge = load_reward_judge(str(tmp_path / "judge"), device="cpu")
    held_out = list(text_rows(lexicon_rows(known[25:], 6, 2)))
    found, _ = agreement(judge, held_out)
    assert found["accuracy"].value == pytest.approx(metrics["accuracy"])
    assert found["length_accuracy"].value < 0.75
    heads = judge.heads(["sea and owl: "] * 2, ["kind fox", "rude fox"])
    assert np.ptp(heads[0] - heads[1]) > 0  # they learned from other prompts


def test_the_same_seed_gives_the_same_judge_however_a_batch_is_cut(tmp_path, settings, store):
    dataset = write_dataset(
        tmp_path / "data", judge=lexicon_rows(NOUNS, 4, 0), validation=lexicon_rows(["x", "y"], 2, 1)
    )
    folders = []
    for name, cut in (("whole", (8, 1)), ("again", (8, 1)), ("cut", (2, 4))):
        sizes = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
        config = RewardModelConfig(**{**settings, **sizes, "learning_rate": 1e-3, "seed": 3})
        run(config, dataset_dir=dataset, output_dir=tmp_path / name, tracking_uri=store)
        folders.append(load_reward_judge(str(tmp_path / name), device="cpu"))
    whole, again, cut = folders
    assert whole.fingerprint == again.fingerprint
    scores = [judge.scores(["x"] * 2, ["kind sea", "rude sea"]) for judge in (whole, cut)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0][0] != scores[0][1]


@pytest.mark.parametrize("options", [{"frozen_layers": 1}, {"frozen_layers": 2}, {"use_peft": True}])
def test_what_is_frozen_stays_and_the_rest_learns(tmp_path, settings, store, base, options):
    dataset = write_dataset(tmp_path / "data", judge=lexicon_rows(NOUNS, 4, 0))
    config = RewardModelConfig(**{**settings, **options, "learning_rate": 1e-2})
    metrics = run(config, dataset_dir=dataset, output_dir=tmp_path / "judge", tracking_uri=store)
    assert "accuracy" not in metrics  # there is no validation split
    before = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "score.weight" in changed
    frozen = options.get("frozen_layers", 0)
    assert "model.embed_tokens.weight" not in changed
    for layer in range(2):
        learned = f"model.layers.{layer}.mlp.down_proj.weight" in changed
        assert learned == (layer >= frozen)
    assert ("model.norm.weight" in changed) == (frozen == 1)


@pytest.mark.parametrize("other", ["every batch", "resumed"])
def test_heads_alone_learn_the_same_from_texts_that_are_read_once(
    tmp_path, settings, store, monkeypatch, other
):
    known = [f"{who} and {what}: " for who in NOUNS for what in NOUNS]
    rows = {"judge": lexicon_rows(known[:9], 4, 0), "validation": lexicon_rows(known[9:12], 2, 1)}
    dataset = write_dataset(tmp_path / "data", **rows)
    alone = {"layers": 1, "frozen_layers": 1, "learning_rate": 1e-2, "num_train_epochs": 3, "seed": 5}
    saved = {"save_strategy": "steps", "save_steps": 4}
    read_texts: list[int] = []
    monkeypatch.setattr(
        trainer,
        "read",
        lambda model, texts, **more: read_texts.append(len(texts)) or read(model, texts, **more),
    )

    def trained(name):
        config = RewardModelConfig(**{**settings, **alone, **saved})
        metrics = run(config, dataset_dir=dataset, output_dir=tmp_path / name, tracking_uri=store)
        return metrics, AutoModelForSequenceClassification.from_pretrained(tmp_path / name)

    (metrics, model) = trained("once")
    distinct = [
        {(row["prompt"], one) for row in part for one in row["completions"]} for part in rows.values()
    ]
    assert read_texts == [len(part) for part in distinct]
    if other == "every batch":
        monkeypatch.setattr(stage, "_only_heads_learn", lambda model, config: False)
    else:
        step = RewardTrainer.training_step

        def cut(self, *given):
            if self.state.global_step == 6:
                raise RuntimeError("cut off")
            return step(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(RewardTrainer, "training_step", cut)
            with pytest.raises(RuntimeError, match="cut off"):
                trained(other)
        assert (tmp_path / other / "checkpoints" / "checkpoint-4").is_dir()
    (again, same) = trained(other)
    for figure in ("train_loss", "eval_loss", "accuracy"):
        assert again[figure] == pytest.approx(metrics[figure], rel=1e-5)
    assert metrics["train_loss"] < math.log(2)
    mine, theirs = model.state_dict(), same.state_dict()
    assert mine.keys() == theirs.keys()
    assert model.config.num_hidden_layers == 1
    assert mine["score.weight"].abs().min() > 0
    for name, weights in mine.items():
        assert torch.allclose(weights, theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}])
def test_heads_alone_learn_with_options_that_concern_the_body(tmp_path, settings, store, options):
    dataset = write_dataset(tmp_path / "data", judge=lexicon_rows(NOUNS, 4, 0))
    heads = []
    for given in ({}, options):
        config = RewardModelConfig(**{**settings, "frozen_layers": 2, "learning_rate": 1e-2, **given})
        folder = tmp_path / f"judge-{len(heads)}"
        run(config, dataset_dir=dataset, output_dir=folder, tracking_uri=store)
        heads.append(AutoModelForSequenceClassification.from_pretrained(folder).score.weight)
    plain, other = heads
    assert other.abs().min() > 0
    assert torch.equal(plain, other) == ("gradient_checkpointing" in options)  # noise changes what they learn


def test_the_lowest_layers_are_those_of_the_whole_model(tmp_path, plain):
    """Of an architecture that says of each layer what it is."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
    config = Qwen2Config(vocab_size=len(plain), num_hidden_layers=4, **sizes, **window)
    whole = Qwen2ForCausalLM(config).eval()
    cut = with_reward_heads(whole, 2, plain.pad_token_id, layers=3)
    assert cut.config.layer_types == config.layer_types[:3]
    torch.nn.init.normal_(cut.score.weight)
    texts = [
        {"input_ids": plain("the owl and the sea")["input_ids"]},
        {"input_ids": plain("sea")["input_ids"]},
    ]
    for text, features in zip(texts, read(cut, texts), strict=True):
        hidden = whole(torch.tensor([text["input_ids"]]), output_hidden_states=True).hidden_states[3][0, -1]
        assert torch.allclose(features, whole.model.norm(hidden), atol=1e-6)
    assert torch.allclose(RewardHeads(cut)(read(cut, texts)).logits, rate(cut, texts), atol=1e-6)
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(rate(loaded, texts), rate(cut, texts))


def test_what_no_judge_can_be_trained_with_is_refused(tmp_path, settings):
    dataset = write_dataset(tmp_path / "data", train=lexicon_rows(NOUNS, 1, 0))
    with pytest.raises(DataError, match=r"no preferences in a split 'judge'.*judge_fraction"):
        run(RewardModelConfig(**settings), dataset_dir=dataset, output_dir=tmp_path / "judge")
    with pytest.raises(ConfigError, match="needs base_model"):
        RewardModelConfig(use_cpu=True)
    with pytest.raises(ConfigError, match=r"use_peft.*frozen_layers is 1"):
        RewardModelConfig(**settings, use_peft=True, frozen_layers=1)
    with pytest.raises(ConfigError, match=r"heads must be at least 1"):
        RewardModelConfig(**{**settings, "heads": 0})
    both = write_dataset(tmp_path / "both", judge=lexicon_rows(NOUNS, 1, 0))
    config = RewardModelConfig(**settings, frozen_layers=3)
    with pytest.raises(ConfigError, match="frozen_layers is 3, and the model has 2 layers"):
        run(config, dataset_dir=both, output_dir=tmp_path / "judge")
    config = RewardModelConfig(**settings, layers=3)
    with pytest.raises(ConfigError, match=r"^layers is 3, and the model has 2 layers"):
        run(config, dataset_dir=both, output_dir=tmp_path / "judge")
