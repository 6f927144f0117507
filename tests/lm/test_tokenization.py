"""Prompts and completions become tokens so that what is scored is what the policy would have written."""

import pytest
from softpref.errors import ConfigError, DataError
from softpref.lm.tokenization import decode, stop_token_ids, tokenize_prompt, tokenize_sequence

USER = [{"role": "user", "content": "who?"}]
ANSWER = [{"role": "assistant", "content": "a fox"}]


@pytest.fixture(params=[False, True], ids=["own pad", "pad is end"])
def tokenizer(request, make_tokenizer):
    return make_tokenizer(pad_is_eos=request.param)


@pytest.mark.parametrize("completion", [" a fox", " a fox<|im_end|>", " a fox<|im_end|><|im_end|>"])
@pytest.mark.parametrize("closes", [False, True])
def test_a_text_completion_ends_with_exactly_one_end_token(make_tokenizer, completion, closes):
    for pad_is_eos in (False, True):
        tokenizer = make_tokenizer(closes=closes, pad_is_eos=pad_is_eos)
        sequence = tokenize_sequence(tokenizer, "there was", completion)
        assert sequence.completion[-1] == tokenizer.eos_token_id
        assert sequence.completion.count(tokenizer.eos_token_id) == 1
        assert decode(tokenizer, sequence.completion) == " a fox"
        assert not sequence.truncated


def test_a_prompt_starts_once_and_is_not_closed(make_tokenizer):
    for closes in (False, True):
        tokenizer = make_tokenizer(closes=closes)
        prompt = tokenize_prompt(tokenizer, "abc")
        assert prompt == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["a", "b", "c"])]
        assert tokenize_prompt(tokenizer, "") == [tokenizer.bos_token_id]


def test_a_start_token_that_is_also_the_end_token_stays_in_front_and_goes_behind(make_tokenizer):
    tokenizer = make_tokenizer(closes=True, eos="<s>")
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert tokenize_prompt(tokenizer, "ab") == [tokenizer.bos_token_id, *letters]
    assert tokenize_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    assert tokenize_sequence(tokenizer, "", "ab").completion == [*letters, tokenizer.eos_token_id]


def test_a_prompt_without_any_token_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="no token"):
        tokenize_prompt(make_tokenizer(start=False), "")


def test_a_cut_completion_carries_no_end_token_and_says_so(tokenizer):
    sequence = tokenize_sequence(tokenizer, "there was", " a fox", max_completion_length=6)
    assert sequence.truncated
    assert decode(tokenizer, sequence.completion) == " a fox"
    assert tokenizer.eos_token_id not in sequence.completion
    whole = tokenize_sequence(tokenizer, "there was", " a fox", max_completion_length=7)
    assert not whole.truncated
    assert len(whole.completion) == 7


def test_a_long_prompt_keeps_its_end(tokenizer):
    sequence = tokenize_sequence(tokenizer, "there was", " a fox", max_prompt_length=3)
    assert tokenizer.decode(sequence.prompt) == "was"
    assert tokenize_prompt(tokenizer, "there was", max_length=3) == sequence.prompt


def test_a_chat_is_split_in_token_space_and_ends_with_one_end_token(tokenizer):
    sequence = tokenize_sequence(tokenizer, USER, ANSWER)
    assert tokenizer.decode(sequence.prompt) == "<|im_start|>user: who?<|im_end|>\n<|im_start|>assistant: "
    # the template writes a line break behind the end token, which the policy is never asked to write
    assert tokenizer.decode(sequence.completion) == "a fox<|im_end|>"
    assert tokenize_prompt(tokenizer, USER) == sequence.prompt
    assert tokenizer.bos_token_id not in sequence.prompt


def test_a_template_that_writes_the_start_token_gets_no_second_one(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert tokenize_prompt(tokenizer, USER).count(tokenizer.bos_token_id) == 1


def test_a_template_without_an_end_token_gets_one(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}. {% endfor %}")
    completion = tokenize_sequence(tokenizer, USER, ANSWER).completion
    assert tokenizer.decode(completion) == "a fox. <|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(make_tokenizer):
    rewriting = (
        "{% if messages | length > 1 %}long: {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="does not keep the prompt's tokens"):
        tokenize_sequence(make_tokenizer(chat_template=rewriting), USER, ANSWER)


def test_messages_without_a_chat_template_are_refused(make_tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        tokenize_prompt(make_tokenizer(chat_template=None), USER)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("there was", "", "has no token"),
        ("there was", "<|im_end|>", "has no token"),
        (USER, [{"role": "assistant", "content": ""}], "has no token"),
        ("there was", ANSWER, "both be text or both be messages"),
        (USER, "a fox", "both be text or both be messages"),
        ("there was", True, "both be text or both be messages"),
        (None, "a fox", "text or a list of messages"),
        ("there was", "a<|im_end|>fox", "before its end"),
    ],
)
def test_what_cannot_be_a_completion_is_refused(tokenizer, prompt, completion, message):
    with pytest.raises(DataError, match=message):
        tokenize_sequence(tokenizer, prompt, completion)


def test_a_tokenizer_without_an_end_token_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        tokenize_sequence(tokenizer, "there was", " a fox")


def test_the_stop_tokens_are_the_tokenizers_and_the_generation_configs(make_tokenizer, make_model):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    assert stop_token_ids(tokenizer, model) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [0, 2]
    assert stop_token_ids(tokenizer, model) == sorted([0, 2, tokenizer.eos_token_id])
