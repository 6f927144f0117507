"""A reward model as a judge: what it is fed, what it scores, and which checkpoints are refused."""

import json

import numpy as np
import pytest
import torch
from softpref.errors import ConfigError
from softpref.judges.loading import check_judge, load_judge
from softpref.judges.reward_model import RewardModelJudge, load_reward_judge
from softpref.judges.texts import as_given, as_text
from softpref.lm.rating import padded, rate, rated_text
from transformers import LlamaConfig, LlamaForSequenceClassification

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how are you?"}]
ANSWER = [{"role": "assistant", "content": "fine, thanks."}]
PROMPTS = ["a long question, longer than the others", "b", "b", "cc cc"]
COMPLETIONS = ["yes", "no, not at all.", "yes", "maybe"]


def reward_model(tokenizer, *, labels=1, seed=0, pad=True, positions=128):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id if pad else None,
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


def test_a_conversation_is_fed_as_the_cards_of_public_reward_models_say(make_tokenizer):
    """Skywork's: the template's text, its start token taken off, tokenized with special tokens."""
    template = make_tokenizer().chat_template
    for tokenizer in (make_tokenizer(), make_tokenizer(chat_template="{{ bos_token }}" + template)):
        text = tokenizer.apply_chat_template([*CHAT, *ANSWER], tokenize=False)
        by_hand = tokenizer(text.removeprefix(tokenizer.bos_token))["input_ids"]
        ids = rated_text(tokenizer, as_given(as_text(CHAT, roles=True)), "fine, thanks.", None)["input_ids"]
        theirs = tokenizer.apply_chat_template([*CHAT, *ANSWER], tokenize=True, return_dict=True)["input_ids"]
        assert ids == theirs
        assert ids == (by_hand if text.startswith(tokenizer.bos_token) else by_hand[1:])
        assert rated_text(tokenizer, CHAT, ANSWER, None)["input_ids"] == ids


def test_plain_texts_take_the_turns_of_a_chat_template_where_there_is_one(tokenizer, make_tokenizer):
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": " because."}]
    theirs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert rated_text(tokenizer, "why?", " because.", None)["input_ids"] == theirs
    plain = make_tokenizer(chat_template=None)
    whole = [*plain("why? because.")["input_ids"], plain.eos_token_id]
    assert rated_text(plain, "why?", " because.", None)["input_ids"] == whole
    assert rated_text(plain, turns[:1], turns[1:], None)["input_ids"] == [
        *plain("why?\n because.")["input_ids"],
        plain.eos_token_id,
    ]


def test_an_encoder_is_fed_question_and_answer_as_a_pair():
    """As OpenAssistant's card says: tokenizer(question, answer)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "why", "so", "user"])}
    text = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    text.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    encoder = PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    asked = [{"role": "user", "content": "why"}]
    assert rated_text(encoder, asked, "so", None)["input_ids"] == [2, 4, 3, 5, 3]
    assert rated_text(encoder, asked, "so", None).get("token_type_ids", [0, 0, 0, 1, 1]) == [0, 0, 0, 1, 1]
    assert rated_text(encoder, "why", "so so so so", 6)["input_ids"] == [2, 4, 3, 5, 5, 3]


def test_scores_of_a_batch_are_those_of_each_text_alone(tokenizer, monkeypatch):
    model = reward_model(tokenizer, labels=3)
    texts = [rated_text(tokenizer, *pair, None) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([one["input_ids"]])).logits for one in texts])
    assert torch.allclose(rate(model, texts), alone, atol=1e-5)
    monkeypatch.setattr("softpref.lm.rating._TOKENS_AT_ONCE", 64)  # batches of one or two
    assert torch.allclose(rate(model, texts), alone, atol=1e-5)
    unpadded = reward_model(tokenizer, labels=3, pad=False)  # which transformers takes one by one alone
    assert torch.allclose(rate(unpadded, texts), alone, atol=1e-5)


def test_a_batch_is_padded_on_the_right_behind_a_mask():
    batch = padded([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_score_is_the_mean_of_the_heads_and_the_lower_one_their_tenth_percentile(tokenizer):
    judge = RewardModelJudge(reward_model(tokenizer, labels=5), tokenizer)
    heads = judge.heads(PROMPTS, COMPLETIONS)
    assert heads.shape == (4, 5)
    assert judge.scores(PROMPTS, COMPLETIONS) == pytest.approx(heads.mean(1))
    chances = judge.probabilities(["b"], ["yes"], ["no, not at all."])
    assert chances == pytest.approx(1 / (1 + np.exp(heads[1].mean() - heads[2].mean())))
    lower = judge.lower(PROMPTS, COMPLETIONS)
    assert lower[[0, 3]] == pytest.approx(heads.mean(1)[[0, 3]])  # the only completion of its prompt
    middle = heads[1:3].mean(0)  # of each head, over the completions of "b"
    for row in (1, 2):
        expected = np.percentile(heads[row] - middle, 10) + middle.mean()
        assert lower[row] == pytest.approx(expected)
        assert lower[row] < heads[row].mean()


def test_a_text_beyond_the_limit_loses_its_beginning_but_not_its_start(make_tokenizer):
    plain = make_tokenizer(chat_template=None)
    whole = rated_text(plain, "abcdef", "gh", None)["input_ids"]
    assert rated_text(plain, "abcdef", "gh", 5)["input_ids"] == [whole[0], *whole[-4:]]


def test_a_checkpoint_is_loaded_as_transformers_loads_it(tmp_path, tokenizer):
    model = reward_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = load_judge("reward-model", tmp_path, model=str(tmp_path), device="cpu")
    asked = tokenizer.apply_chat_template([*CHAT, *ANSWER], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = LlamaForSequenceClassification.from_pretrained(tmp_path)(**asked).logits.item()
    prompt = as_text(CHAT, roles=True)
    assert judge.scores([prompt], ["fine, thanks."]) == pytest.approx([expected], abs=1e-5)
    assert judge.scores([], []).shape == (0,)
    again = load_reward_judge(str(tmp_path), device="cpu")
    assert again.fingerprint == judge.fingerprint
    model.score.weight.data[0, 0] += 0.01
    model.save_pretrained(tmp_path)
    assert load_reward_judge(str(tmp_path), device="cpu").fingerprint != judge.fingerprint
    long = ["x" * 500] * 2
    assert np.isfinite(judge.scores(["p"] * 2, long)).all()  # the model has 128 positions


def test_several_labels_are_refused_unless_they_are_our_heads(tmp_path, tokenizer):
    reward_model(tokenizer, labels=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has 2 labels.*one label, or one of `softpref judge`"):
        load_reward_judge(str(tmp_path), device="cpu")
    (tmp_path / "softpref.json").write_text(json.dumps({"stage": "judge", "split": "judge"}))
    judge = load_reward_judge(str(tmp_path), device="cpu")
    assert "mean of 2 heads" in judge.description
    assert "the split judge" in judge.description


def test_a_language_model_is_refused_as_a_judge(tmp_path, tokenizer, make_model):
    make_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"without reward heads; train a judge.*softpref judge"):
        load_reward_judge(str(tmp_path), device="cpu")


def test_a_judge_and_its_model_go_together(tmp_path):
    with pytest.raises(ConfigError, match="needs judge_model"):
        check_judge("reward-model", tmp_path)
    with pytest.raises(ConfigError, match="'bradley-terry' takes no judge_model"):
        check_judge("bradley-terry", tmp_path, model="owner/name")
    with pytest.raises(ConfigError, match="does not exist"):
        check_judge("reward-model", tmp_path, model="/nowhere/model")
