"""Answers a public benchmark's questions, or measures a model by its pairs, for its leaderboard."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softpref.config import write_parameters
from softpref.disk import says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.evaluation.config import BenchmarkConfig
from softpref.evaluation.leaderboards import (
    Question,
    answers_text,
    read_benchmark,
    reward_bench_results,
)
from softpref.lm.sources import check_model_source, check_remote_code, local_source
from softpref.progress import progress, settle_output
from softpref.records.dataset import Text
from softpref.records.model import load_metadata


@says_disk_trouble
def run(
    config: BenchmarkConfig, *, policy_dir: str, output_dir: str, reference_dir: str = ""
) -> dict[str, object]:
    """Write what the leaderboard of `config.questions` reads into `output_dir`; returns what was written.

    `NAME.json` for AlpacaEval, `NAME.jsonl` for MT-Bench and Arena-Hard. For RewardBench `NAME.json` with the
    accuracy of the implicit reward log π − log π_ref by subset and section, or of log π alone without a
    reference.

    Args:
        policy_dir, reference_dir: model folders, their URLs, models of the MLflow registry, or Hub ids.

    Raises:
        ConfigError: a model is absent, several turns are asked of a model without chat template, the longest
            answer is unknown, or the output is there already.
        DataError: the questions cannot be read.
    """
    settle_output()
    benchmark = read_benchmark(config.questions)
    policy_dir = local_source(policy_dir)
    reference_dir = local_source(reference_dir) if reference_dir else ""
    for source in filter(None, (policy_dir, reference_dir)):
        check_model_source(source)
        check_remote_code(source, config.trust_remote_code)
    metadata = load_metadata(policy_dir)
    name = config.name or metadata.get("name") or Path(policy_dir).name
    output = Path(output_dir)
    listed = benchmark.format in ("alpaca-eval", "rewardbench")
    file = output / f"{name.replace('/', '_')}.{'json' if listed else 'jsonl'}"
    if file.exists():
        raise ConfigError(f"{file} exists already; give another folder, or remove it first")
    if benchmark.format == "rewardbench":
        results = reward_bench_results(
            benchmark.rows, _margins(config, benchmark.rows, policy_dir, reference_dir), name, reference_dir
        )
        text, found = (
            json.dumps(results, indent=2, ensure_ascii=False) + "\n",
            {"sections": results["sections"]},
        )
    else:
        longest = config.max_new_tokens or metadata.get("max_completion_length") or 0
        if not longest:
            raise ConfigError(f"how long answers of {policy_dir} may be is not known; set max_new_tokens")
        answers, cut = _answers(config, benchmark.questions, policy_dir, longest)
        text, found = (
            answers_text(benchmark.format, benchmark.questions, answers, name, time.time()),
            {"cut": cut},
        )
    output.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.partial")  # what is there under its name is whole
    part.write_text(text, encoding="utf-8")
    part.replace(file)
    write_parameters(config, output)
    return {"benchmark": benchmark.format, "rows": len(benchmark.rows), "written": str(file), **found}


def _answers(
    config: BenchmarkConfig, questions: Sequence[Question], policy_dir: str, longest: int
) -> tuple[list[list[list[str]]], int]:
    """Answers by question, choice and turn, and how many were cut at the length limit."""
    from softpref.lm.loading import load_model, load_tokenizer
    from softpref.lm.sampling import sample_completions, sampling_noise
    from softpref.lm.scoring import check_positions
    from softpref.lm.tokenization import decode_completion, stop_token_ids, tokenize_prompt

    tokenizer = load_tokenizer(policy_dir, trust_remote_code=config.trust_remote_code)
    chat = bool(tokenizer.chat_template)
    most = max(len(question.turns) for question in questions)
    if most > 1 and not chat:
        raise ConfigError(
            f"{config.questions} asks {most} turns of a conversation, and the tokenizer of {policy_dir} has "
            "no chat template"
        )
    model = _model(config, policy_dir, load_model)
    places = [(question, choice) for question in range(len(questions)) for choice in range(config.choices)]
    answers: list[list[list[str]]] = [[[] for _ in range(config.choices)] for _ in questions]
    cut = 0
    with progress(
        "answers", total=sum(len(questions[question].turns) for question, _ in places), unit="answer"
    ) as loop:
        for turn in range(most):
            here = [place for place in places if turn < len(questions[place[0]].turns)]
            prompts = [_prompt(config, chat, questions[q].turns, answers[q][choice]) for q, choice in here]
            limit = config.max_prompt_length or None
            ids = [tokenize_prompt(tokenizer, prompt, max_length=limit).ids for prompt in prompts]
            check_positions(
                model, max(map(len, ids)), longest, "lower max_new_tokens, or set max_prompt_length"
            )
            drawn = sample_completions(
                model,
                ids,
                noise=sampling_noise(len(ids), longest, config.seed * most + turn),
                stop_ids=stop_token_ids(tokenizer, model),
                batch_size=config.batch_size,
                progress=loop.update,
            )
            for (question, choice), prompt, own, sample in zip(here, prompts, ids, drawn, strict=True):
                text = decode_completion(tokenizer, prompt, own, sample.completion)
                answers[question][choice].append(text.strip())
                cut += sample.truncated
    return answers, cut


def _prompt(config: BenchmarkConfig, chat: bool, turns: Sequence[str], answers: Sequence[str]) -> Text:
    """The conversation so far, up to the question that comes after these answers."""
    if not chat:
        return config.prompt_template.replace("{question}", turns[0])
    messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    for asked, answered in zip(turns, answers, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def _margins(
    config: BenchmarkConfig, rows: Sequence[Any], policy_dir: str, reference_dir: str
) -> list[float]:
    """Implicit reward of `chosen` less that of `rejected`, of each row, nats."""
    from softpref.lm.loading import load_model, load_tokenizer
    from softpref.lm.scoring import score_sequences
    from softpref.lm.tokenization import stop_token_ids, tokenize_row

    tokenizer = load_tokenizer(policy_dir, trust_remote_code=config.trust_remote_code)
    chat = bool(tokenizer.chat_template)
    policy = _model(config, policy_dir, load_model)
    stop_ids = stop_token_ids(tokenizer, policy)
    pairs = []
    for number, row in enumerate(rows, 1):
        texts: list[Text] = [row["chosen"], row["rejected"]]
        if chat:
            texts = [[{"role": "assistant", "content": str(text)}] for text in texts]
        try:
            sequences = tokenize_row(
                tokenizer,
                _prompt(config, chat, [row["prompt"]], []),
                texts,
                stop_ids=stop_ids,
                max_prompt_length=config.max_prompt_length or None,
                max_completion_length=config.max_new_tokens or None,
            )
        except DataError as error:
            raise DataError(f"{config.questions}, row {number}: {error}") from error
        pairs += [(one.prompt, one.completion) for one in sequences]
    total = len(pairs) * (2 if reference_dir else 1)
    with progress("pairs", total=total, unit="sequence") as loop:
        rewards = score_sequences(policy, pairs, batch_size=config.batch_size, progress=loop.update)
        if reference_dir:
            del policy
            reference = _model(config, reference_dir, load_model)
            rewards -= score_sequences(reference, pairs, batch_size=config.batch_size, progress=loop.update)
    chosen, rejected = rewards.reshape(-1, 2).T
    margins: list[float] = (chosen - rejected).tolist()
    return margins


def _model(config: BenchmarkConfig, folder: str, load: Any) -> Any:
    import torch

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(folder, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code).eval()
