"""The file formats of public benchmarks: questions as they publish them, answers as their leaderboards read
them. Runs no model.

AlpacaEval (`tatsu-lab/alpaca_eval`), MT-Bench (`lm-sys/FastChat`), Arena-Hard in both its versions
(`lmarena/arena-hard-auto`), RewardBench (`allenai/reward-bench`).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from softpref.disk import what_is_at
from softpref.errors import DataError

_FORMATS = {  # by the fields of a line; the first that fits counts
    "rewardbench": {"prompt", "chosen", "rejected"},
    "alpaca-eval": {"instruction"},
    "arena-hard": {"uid", "prompt"},
    "mt-bench": {"question_id", "turns"},
}
_SECTIONS = {  # RewardBench's, and its subsets
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
_HEAVY = {"math-prm": 984}  # counts as much as all code together, whatever its number of rows


class Question(NamedTuple):
    """A question of a benchmark.

    Attributes:
        row: as the benchmark publishes it.
        turns: what the user says, one after another; each is asked after the answer to the one before.
    """

    row: Mapping[str, Any]
    turns: list[str]


class Benchmark(NamedTuple):
    """A benchmark's rows.

    Attributes:
        format: `alpaca-eval`, `mt-bench`, `arena-hard` or `rewardbench`.
        rows: as they are published.
    """

    format: str
    rows: list[Mapping[str, Any]]

    @property
    def questions(self) -> list[Question]:
        """What is asked, of a benchmark of answers."""
        if self.format == "alpaca-eval":
            return [Question(row, [row["instruction"]]) for row in self.rows]
        if self.format == "arena-hard":
            return [Question(row, [row["prompt"]]) for row in self.rows]
        return [Question(row, [_content(turn) for turn in row["turns"]]) for row in self.rows]


def read_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark's file, a JSON list or a JSON object per line, and recognise its format.

    Raises:
        DataError: the file is absent, holds no rows, or has the fields of no benchmark.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise DataError(f"{file} {what_is_at(file)}; give the benchmark's file")
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: it cannot be read as JSON, or as a JSON object per line ({error})"
        ) from error
    if not rows:
        raise DataError(f"{file} holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number}: expected an object, got {type(row).__name__}")
    format = next((name for name, fields in _FORMATS.items() if fields <= rows[0].keys()), None)
    if format is None:
        known = "; ".join(f"{name}: {', '.join(sorted(fields))}" for name, fields in _FORMATS.items())
        raise DataError(f"{file} has {', '.join(rows[0])}, which are the fields of no benchmark ({known})")
    for number, row in enumerate(rows, 1):
        if missing := sorted(_FORMATS[format] - row.keys()):
            raise DataError(f"{file}, row {number}, lacks {', '.join(missing)}, which {format} has")
    return Benchmark(format, rows)


def answers_text(
    format: str,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Sequence[str]]],
    model: str,
    now: float,
) -> str:
    """The answers' file, as the leaderboard's own scripts read it.

    Args:
        answers: of each question its choices, of each choice an answer for each turn; AlpacaEval and
            Arena-Hard's second version know one choice alone, and take the first.
        now: seconds since 1970, for the formats that say when.
    """
    pairs = list(zip(questions, answers, strict=True))
    if format == "alpaca-eval":
        rows = [
            {**_known(question.row, "dataset"), "instruction": question.turns[0], "output": choices[0][0]}
            | {"generator": model}
            for question, choices in pairs
        ]
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    lines: list[dict[str, Any]]
    if format == "arena-hard":
        lines = [
            {
                "uid": question.row["uid"],
                "ans_id": uuid.uuid4().hex,
                "model": model,
                "messages": [
                    {"role": "user", "content": question.turns[0]},
                    {"role": "assistant", "content": {"answer": choices[0][0]}},
                ],
                "tstamp": now,
                "metadata": {},
            }
            for question, choices in pairs
        ]
    else:
        lines = [
            {
                "question_id": question.row["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": model,
                "choices": [
                    {"index": index, "turns": [_as_turn(question, text) for text in turns]}
                    for index, turns in enumerate(choices)
                ],
                "tstamp": now,
            }
            for question, choices in pairs
        ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def reward_bench_results(
    rows: Sequence[Mapping[str, Any]], margins: Sequence[float], model: str, reference: str
) -> dict[str, Any]:
    """RewardBench's results: accuracy by subset, as its scripts write it, and by section, as it is published.

    A margin of 0 counts as wrong, as there. A section is the mean of its subsets by their rows, with the
    published count of `math-prm`; one without any subset is left out.

    Args:
        margins: implicit reward of `chosen` less that of `rejected`, of each row.
        reference: empty where the reward is log π alone.
    """
    right: dict[str, list[bool]] = {}
    for row, margin in zip(rows, margins, strict=True):
        right.setdefault(str(row.get("subset", "all")), []).append(margin > 0)
    subsets = {name: sum(values) / len(values) for name, values in sorted(right.items())}
    sections = {}
    for section, names in _SECTIONS.items():
        weights = {name: _HEAVY.get(name, len(right[name])) for name in names if name in right}
        if weights:
            total = sum(subsets[name] * weight for name, weight in weights.items())
            sections[section] = total / sum(weights.values())
    known = {
        "model": model,
        "ref_model": reference or None,
        "model_type": "DPO" if reference else "DPO Ref. Free",
    }
    return {**known, **subsets, "sections": sections}


def _content(turn: Any) -> str:
    """A turn's text: Arena-Hard's first version has it within an object."""
    return str(turn["content"]) if isinstance(turn, dict) else str(turn)


def _as_turn(question: Question, text: str) -> Any:
    """An answer in the form of the question's turns."""
    return {"content": text} if isinstance(question.row["turns"][0], dict) else text


def _known(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}
