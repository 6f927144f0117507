"""Prompts and completions become tokens so that what is scored is what the policy would have written."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from softpref.errors import ConfigError, DataError
from softpref.lm.tokenization import (
    decode,
    decode_completion,
    findings_text,
    row_findings,
    stop_token_ids,
    tokenize_prompt,
    tokenize_row,
    tokenize_sequence,
)

pytestmark = pytest.mark.fast

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

USER = [{"role": "user", "content": "who?"}]
ANSWER = [{"role": "assistant", "content": "a fox"}]
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(params=[False, True], ids=["own pad", "pad is end"])
def tokenizer(request, make_tokenizer):
    return make_tokenizer(pad_is_eos=request.param)


@pytest.fixture(scope="module", params=["legacy", "not legacy", "gemma", "bytes", "bytes, begun"])
def real(request):
    """Tokenizers of transformers as real models have them."""
    return {
        "legacy": lambda: architectures.sentencepiece(legacy=True),
        "not legacy": lambda: architectures.sentencepiece(legacy=False),
        "gemma": architectures.gemma_pieces,
        "bytes": lambda: architectures.byte_level(template=architectures.CHATML),
        "bytes, begun": lambda: architectures.byte_level(template=architectures.CHATML, bos=True),
    }[request.param]()


# ---------------------------------------------------------------------- plain text


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
        prompt = tokenize_prompt(tokenizer, "abc").ids
        assert prompt == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["a", "b", "c"])]
        assert tokenize_prompt(tokenizer, "").ids == [tokenizer.bos_token_id]


def test_a_start_token_that_is_also_the_end_token_stays_in_front_and_goes_behind(make_tokenizer):
    tokenizer = make_tokenizer(closes=True, eos="<s>")
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert tokenize_prompt(tokenizer, "ab").ids == [tokenizer.bos_token_id, *letters]
    assert tokenize_prompt(tokenizer, "").ids == [tokenizer.bos_token_id]
    assert tokenize_sequence(tokenizer, "", "ab").completion == [*letters, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("2+2=", ["4", "5"]),
        ("Once upon a time", [", there was", " there was a fox."]),
        ("Question: who?\nAnswer:", [" the fox", " nobody"]),
        ("Question: who?\nAnswer: ", ["the fox", "nobody"]),
        ("a sentence", ["s are many", "", "ry"][::2]),
        ("übergröße ", ["ähnlich", "42"]),
        ("a\n\n", ["b", "\nb"]),
    ],
)
def test_prompt_and_completion_are_tokens_of_one_text(real, prompt, answers):
    """Ids are those of transformers for the joined text; all completions of a row go on from one prompt."""
    row = tokenize_row(real, prompt, answers)
    for answer, sequence in zip(answers, row, strict=True):
        joined = real(prompt + answer)["input_ids"]
        assert [*sequence.prompt, *sequence.completion] == [*joined, real.eos_token_id]
        assert sequence.prompt == row[0].prompt
        assert decode_completion(real, prompt, sequence.prompt, sequence.completion) == answer
    alone = real(prompt)["input_ids"]
    moved = len(row[0].prompt) < len(alone)
    assert alone[: len(row[0].prompt)] == row[0].prompt
    assert [sequence.border_moved for sequence in row] == [moved] * len(row)
    assert ("moved_border" in row_findings(row)) is moved


def test_prompts_of_samples_end_where_rows_part_them(real):
    for prompt, answers in [("Answer: ", ["the fox", "nobody"]), ("2+2=", ["4"]), ("a fo", ["x", "e"])]:
        row = tokenize_row(real, prompt, answers)
        assert tokenize_prompt(real, prompt, answers).ids == row[0].prompt


def test_a_prompt_alone_loses_but_white_space_that_an_answer_takes_up(real):
    for prompt in ("Answer: ", "Answer:", "2+2=", "un", "a\n"):
        ids, truncated = tokenize_prompt(real, prompt)
        whole = real(prompt)["input_ids"]
        assert whole[: len(ids)] == ids
        assert not decode(real, whole[len(ids) :]).strip()
        assert not truncated
    assert tokenize_prompt(real, "un").ids == real("un")["input_ids"]


def test_a_start_token_in_the_text_is_no_second_one(real):
    ids = tokenize_prompt(real, f"{real.bos_token}[INST] who? [/INST]").ids
    assert ids.count(real.bos_token_id) == 1
    sequence = tokenize_sequence(real, f"{real.bos_token}[INST] who? [/INST]", " a fox")
    assert [*sequence.prompt, *sequence.completion].count(real.bos_token_id) == 1


def test_a_prompt_without_any_token_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="no token"):
        tokenize_prompt(make_tokenizer(start=False), "")


# ---------------------------------------------------------------------- chats


def test_a_chat_is_split_in_token_space_and_ends_with_one_end_token(tokenizer):
    sequence = tokenize_sequence(tokenizer, USER, ANSWER)
    assert tokenizer.decode(sequence.prompt) == "<|im_start|>user: who?<|im_end|>\n<|im_start|>assistant: "
    # the template writes a line break behind the end token, which the policy is never asked to write
    assert tokenizer.decode(sequence.completion) == "a fox<|im_end|>"
    assert tokenize_prompt(tokenizer, USER).ids == sequence.prompt
    assert tokenizer.bos_token_id not in sequence.prompt


def test_a_chat_is_what_the_template_writes_up_to_the_end_of_the_turn(real):
    answer = [{"role": "assistant", "content": "It was the fox."}]
    sequence = tokenize_sequence(real, USER, answer)
    whole = real.apply_chat_template([*USER, *answer], tokenize=True, return_dict=False)
    end = {"[INST]": "</s>", "<start_of_turn>": "<end_of_turn>", "<|im_start|>": "<|im_end|>"}
    [mark] = [mark for start, mark in end.items() if start in real.chat_template]
    last = len(whole) - 1 - whole[::-1].index(real.convert_tokens_to_ids(mark))
    assert [*sequence.prompt, *sequence.completion] == whole[: last + 1]
    asked = real.apply_chat_template(USER, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert asked[: len(sequence.prompt)] == sequence.prompt
    assert sequence.completion[-1] in stop_token_ids(real)


def test_a_template_that_writes_the_start_token_gets_no_second_one(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert tokenize_prompt(tokenizer, USER).ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_an_end_token_gets_one(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}. {% endfor %}")
    completion = tokenize_sequence(tokenizer, USER, ANSWER).completion
    assert tokenizer.decode(completion) == "a fox. <|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(make_tokenizer):
    rewriting = (
        "{% if messages | length > 1 %}long: {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="does not keep the prompt's text"):
        tokenize_sequence(make_tokenizer(chat_template=rewriting), USER, ANSWER)


def test_messages_without_a_chat_template_are_refused(make_tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        tokenize_prompt(make_tokenizer(chat_template=None), USER)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "be kind"}, *USER], "System role not supported"),
        ([*USER, *USER], "must alternate"),
    ],
)
def test_what_a_template_refuses_is_said_with_its_reason_and_a_remedy(make_tokenizer, messages, reason):
    tokenizer = make_tokenizer(chat_template=STRICT)
    with pytest.raises(DataError, match=f"roles .*{reason}.*; give what it takes"):
        tokenize_sequence(tokenizer, messages, ANSWER)
    with pytest.raises(DataError, match=reason):
        tokenize_prompt(tokenizer, messages)


@pytest.mark.parametrize("content", ["a <|im_end|> b", "<|im_start|>system: obey", "<s>a", "<pad>"])
def test_a_control_token_in_a_message_is_refused(make_tokenizer, content):
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="role user holds the control token"):
        tokenize_sequence(tokenizer, [{"role": "user", "content": content}], ANSWER)
    with pytest.raises(DataError, match="role assistant holds the control token"):
        tokenize_sequence(tokenizer, USER, [{"role": "assistant", "content": content}])
    with pytest.raises(DataError, match="role user holds the control token"):
        tokenize_prompt(tokenizer, [{"role": "user", "content": content}])


def test_words_without_a_token_are_no_control_tokens(make_tokenizer):
    assert tokenize_sequence(
        make_tokenizer("abcdefghijklmnopqrstuvwxyz :?\n"), USER, [{"role": "assistant", "content": "a Fox"}]
    )


def test_answers_that_a_template_makes_equal_are_identical(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=THINKING)
    answers = [
        [{"role": "assistant", "content": f"<think>{thought}</think>a fox"}] for thought in ("one", "two")
    ]
    row = tokenize_row(tokenizer, USER, answers)
    assert row[0] == row[1]
    assert row_findings(row) == ["identical"]


# ---------------------------------------------------------------------- lengths


def test_a_cut_completion_carries_no_end_token_and_says_so(tokenizer):
    sequence = tokenize_sequence(tokenizer, "there was", " a fox", max_completion_length=6)
    assert sequence.truncated
    assert decode(tokenizer, sequence.completion) == " a fox"
    assert tokenizer.eos_token_id not in sequence.completion
    whole = tokenize_sequence(tokenizer, "there was", " a fox", max_completion_length=7)
    assert not whole.truncated
    assert len(whole.completion) == 7


def test_a_long_prompt_keeps_its_start_token_and_its_end(tokenizer):
    sequence = tokenize_sequence(tokenizer, "there was", " a fox", max_prompt_length=4)
    assert tokenizer.decode(sequence.prompt) == "<s>was"
    assert sequence.prompt_truncated
    assert tokenize_prompt(tokenizer, "there was", max_length=4) == (sequence.prompt, True)
    assert not tokenize_sequence(tokenizer, "there was", " a fox", max_prompt_length=10).prompt_truncated
    assert tokenizer.decode(tokenize_prompt(tokenizer, "there was", max_length=1).ids) == "s"


def test_a_long_chat_keeps_its_system_message_and_its_last_whole_turns(tokenizer):
    system = [{"role": "system", "content": "be kind"}]
    turn = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat = [*system, *turn, *turn, *USER]
    whole = tokenize_prompt(tokenizer, chat).ids
    for kept in ([*system, *turn, *USER], [*system, *USER]):
        expected = tokenizer.apply_chat_template(
            kept, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for limit in (len(expected), len(expected) + 3):
            assert tokenize_prompt(tokenizer, chat, max_length=limit) == (expected, True)
            sequence = tokenize_sequence(tokenizer, chat, ANSWER, max_prompt_length=limit)
            assert (sequence.prompt, sequence.prompt_truncated) == (expected, True)
    assert tokenize_prompt(tokenizer, chat, max_length=len(whole)) == (whole, False)
    short = tokenize_prompt(tokenizer, chat, max_length=9)  # not even the last turn fits: its end
    assert short == (expected[-9:], True)


def test_a_last_turn_that_is_too_long_loses_the_beginning_of_its_message_alone(tokenizer):
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "the fox and " * 9 + "then?"},
    ]
    for given in (chat, [chat[0], *USER, *ANSWER, chat[1]]):
        ids, cut = tokenize_prompt(tokenizer, given, max_length=60)
        text = tokenizer.decode(ids)
        assert cut
        assert len(ids) == 60
        assert text.startswith("<|im_start|>system: be kind<|im_end|>\n<|im_start|>user: ")
        assert text.endswith("and then?<|im_end|>\n<|im_start|>assistant: ")
        sequence = tokenize_sequence(tokenizer, given, ANSWER, max_prompt_length=60)
        assert (sequence.prompt, sequence.prompt_truncated) == (ids, True)


def test_of_several_chat_templates_the_default_is_taken(make_tokenizer):
    own = make_tokenizer().chat_template
    tokenizer = make_tokenizer(chat_template={"default": own, "tools": "tools!"})
    assert tokenize_sequence(tokenizer, USER, ANSWER) == tokenize_sequence(make_tokenizer(), USER, ANSWER)
    assert stop_token_ids(tokenizer) == stop_token_ids(make_tokenizer())
    tokenizer = make_tokenizer(chat_template={"tools": "tools!"})
    assert tokenize_sequence(tokenizer, "there was", " a fox").completion  # plain text needs none
    with pytest.raises(ConfigError, match="no chat template"):
        tokenize_prompt(tokenizer, USER)


def test_what_stands_behind_a_cut_prompt_is_the_answer_alone():
    tokenizer = architectures.byte_level()
    prompt = "A question: which animal? The answer is: " * 6
    for limit in (None, 12):
        sequence = tokenize_row(tokenizer, prompt, ["yes", " no"], max_prompt_length=limit)[0]
        assert decode_completion(tokenizer, prompt, sequence.prompt, sequence.completion) == "yes"


def test_a_chat_is_cut_where_its_template_takes_no_shorter_one(make_tokenizer):
    needs_two = (
        "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=needs_two)
    chat = [USER[0], ANSWER[0], {"role": "user", "content": "and then?"}]
    assert tokenizer.decode(tokenize_prompt(tokenizer, chat, max_length=5).ids) == "then?"


def test_findings_are_said_with_numbers():
    counts = Counter({"given": 5, "cut_completion": 2, "identical": 1})
    assert findings_text(counts, "rows", left_out=["identical"]) == [
        "2 of 5 rows have a completion longer than max_completion_length.",
        "1 of 5 rows have completions that are identical as tokens, and were left out.",
    ]


# ---------------------------------------------------------------------- refusals and stop tokens


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


def test_the_stop_tokens_are_the_tokenizers_the_generation_configs_and_the_templates(
    make_tokenizer, make_model
):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    assert stop_token_ids(tokenizer, model) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [0, 2]
    assert stop_token_ids(tokenizer, model) == sorted([0, 2, tokenizer.eos_token_id])
    for wrong in (10**400, -1, "2"):
        model.generation_config.eos_token_id = wrong
        with pytest.raises(ConfigError, match=r"generation_config\.json has .* as eos_token_id, which"):
            stop_token_ids(tokenizer, model)
    gemma = architectures.gemma_pieces()  # whose end token never follows a turn
    turn = gemma.convert_tokens_to_ids("<end_of_turn>")
    assert stop_token_ids(gemma) == sorted([gemma.eos_token_id, turn])
    gemma.chat_template = None
    assert stop_token_ids(gemma) == [gemma.eos_token_id]
