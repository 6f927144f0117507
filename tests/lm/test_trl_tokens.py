"""Token ids are those of TRL's own preparation for its DPO trainer; where they are not, it is known why."""

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from softpref.lm.tokenization import stop_token_ids, tokenize_row

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

TOKENIZERS = {
    "Llama 2's kind": lambda: architectures.sentencepiece(legacy=True),
    "Mistral's kind": lambda: architectures.sentencepiece(legacy=False),
    "Gemma's kind": architectures.gemma_pieces,
    "Qwen's kind": lambda: architectures.byte_level(template=architectures.CHATML),
    "Llama 3's kind": lambda: architectures.byte_level(template=architectures.CHATML, bos=True),
}
WORDS = [
    "the fox",
    "a hen",
    "2+2",
    "übergröße",
    "it's",
    "日本",
    "Answer:",
    "end.",
    "--",
    "\t",
    "  ",
    "\n",
    "🙂",
    "x",
]


def texts(count):
    """Prompts with two answers: words and marks at random, with and without spaces where they meet."""
    rng = random.Random(0)

    def text(least, most):
        return rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(least, most)))

    for _ in range(count):
        prompt = text(1, 8) + rng.choice(["", "", " ", "\n", "\n\n", ":", " ["])
        answers = [rng.choice(["", " ", "\n"]) + text(1, 6) + rng.choice(["", ".", " ", "\n"]) for _ in "ab"]
        if prompt.strip() and all(answer.strip() for answer in answers):
            yield prompt, answers


def messages(role, text):
    return [{"role": role, "content": text}]


def of_trl(tokenizer, rows):
    """Prompt ids, chosen ids and rejected ids, as TRL gives them to its trainer."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        Dataset.from_list(rows),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )
    return [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in prepared]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_has_the_ids_of_trl(kind):
    tokenizer = TOKENIZERS[kind]()
    rows = list(texts(120))
    theirs = of_trl(
        tokenizer, [{"prompt": prompt, "chosen": best, "rejected": worst} for prompt, (best, worst) in rows]
    )
    assert len(rows) > 100
    for (prompt, answers), (prompt_ids, completions) in zip(rows, theirs, strict=True):
        ours = tokenize_row(tokenizer, prompt, answers)
        assert [sequence.completion for sequence in ours] == completions
        assert ours[0].prompt == prompt_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chats_have_the_ids_of_trl_up_to_the_end_of_the_turn(kind):
    """What a template writes behind the end of the turn is never generated: TRL scores it, we do not."""
    tokenizer = TOKENIZERS[kind]()
    rows = [
        (messages("user", prompt), [messages("assistant", answer) for answer in answers])
        for prompt, answers in texts(120)
    ]
    theirs = of_trl(
        tokenizer, [{"prompt": prompt, "chosen": best, "rejected": worst} for prompt, (best, worst) in rows]
    )
    assert len(rows) > 100
    stops = stop_token_ids(tokenizer)
    for (prompt, answers), (prompt_ids, completions) in zip(rows, theirs, strict=True):
        ours = tokenize_row(tokenizer, prompt, answers)
        for sequence, ids in zip(ours, completions, strict=True):
            assert sequence.prompt == prompt_ids
            assert sequence.completion[-1] in stops
            assert sequence.completion == ids[: len(sequence.completion)]
            behind = tokenizer.decode(ids[len(sequence.completion) :])
            assert behind == ("\n" if "[INST]" not in tokenizer.chat_template else "")
