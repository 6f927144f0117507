"""What an evaluation leaves: the figures of a model, and the samples that they were measured on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from softpref.errors import DataError
from softpref.records.dataset import Text
from softpref.records.figures import Figure, Figures, figures_of
from softpref.records.files import read_object, typed, write_object

EVALUATION_FILE, SAMPLES_FILE, REPORT_FILE = "evaluation.json", "samples.jsonl", "report.html"
SAMPLES_TABLE_FILE = "samples.json"


class Reliability(NamedTuple):
    """A bin of the reliability diagram: held-out pairs of like confidence.

    Attributes:
        confidence: mean probability that the model gives to the completion that it prefers.
        share: mean share of votes of that completion; equals the confidence in a calibrated model.
        low, high: interval of the share; None with fewer than `LEAST_PROMPTS` prompts.
        pairs: how many.
    """

    confidence: float
    share: float
    low: float | None
    high: float | None
    pairs: int


class JudgedBy(NamedTuple):
    """A judge, and how far it can be trusted: shares of the validation split's pairs, by the majority.

    The figures are None where they were not measured: of experts, and in older evaluations.

    Attributes:
        description: what its verdicts are and where they come from.
        accuracy: how often the judge agrees.
        longer_accuracy: how often the longer completion is the better one.
        length_accuracy: the same, or that of the shorter one, whichever is higher.
        over_length: `accuracy` less `length_accuracy`, pair by pair.
        reference_accuracy: how often the reference gives the better one the higher log-probability.
        usage: what it took, by name.
    """

    name: str
    description: str = ""
    accuracy: Figure | None = None
    longer_accuracy: Figure | None = None
    length_accuracy: Figure | None = None
    over_length: Figure | None = None
    reference_accuracy: Figure | None = None
    usage: Mapping[str, int] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JudgedBy:
        known: dict[str, Any] = {
            name: Figure.of(one) if isinstance(one, Mapping) and name != "usage" else one
            for name, one in values.items()
        }
        return cls(**known)


class DrawnText(NamedTuple):
    """A sample of a model.

    Attributes:
        score: the judge's, nats; None of a judge that gives no scores.
        truncated: whether it met the length limit.
        tokens: its length, end included.
        repetition: share of its 4-grams of tokens that repeat an earlier one.
        surprisal: −log π_ref, nats.
        kl: Σ KL_t to the reference, nats; only of policy samples.
        win: P(it beats the reference's sample of the same place); only where the judge was asked of both.
        reason: what the judge said of them.
        heads: scores by each of the judge's heads, nats; empty where it has none, or one.
    """

    text: str
    score: float | None
    truncated: bool
    tokens: int = 0
    repetition: float = 0.0
    surprisal: float = 0.0
    kl: float | None = None
    win: float | None = None
    reason: str = ""
    heads: Sequence[float] = ()


class PromptRecord(NamedTuple):
    """Everything drawn for one prompt, messages flattened; a line of `samples.jsonl`."""

    prompt: str
    reference: list[DrawnText]
    policy: list[DrawnText]


class EvaluatedOn(TypedDict):
    """What an `evaluation_id` is made of: hashes of rows, judge (after its name) and reference; settings."""

    data: str
    judge: str
    reference: str
    settings: dict[str, object]


@dataclass(kw_only=True)
class Evaluation:
    """What stage 4 measured of a model: `evaluation.json`, and a member of `comparison.json`.

    Attributes:
        method, alpha, anchor, beta, kl_beta, kl_on, rounds, train_on, extrapolation: as the training stage
            names them.
        evaluation_id, evaluated_on: equal for evaluations whose figures can be compared; what it is made of.
        metrics: every figure of samples and held-out rows.
        exact, softmax_frontier: figures of enumerated sets, and the most entropy at each expected reward;
            None where sets are not known.
        reliability: bins of the reliability diagram, the least confident first; None where the method implies
            no preferences.
        theory, reward_frontier: the optimum estimated from samples of the reference, and the most expected
            reward at each KL; None where rewards are not known.
        by_prompt: values of each prompt, by figure, for paired comparisons; None for a prompt of which the
            judge judged nothing.
        dimensions, dimension_weights: those of preference that it learned, one after another in this order,
            and λ of each earlier one in the last round; empty where there is one training on all rows.
        settings: those that change a figure's meaning.
        data_source, base_model: where the rows came from, and what the reference was trained from.
        example: the first prompt that was drawn from, as a user would send it.
    """

    name: str
    method: str | None
    alpha: float | None
    anchor: float = 0.0
    beta: float | None
    kl_beta: float = 0.0
    kl_on: str = "samples"
    rounds: int
    train_on: str
    extrapolation: float
    model_uri: str
    reference_uri: str = ""
    run_id: str | None
    dataset_hash: str | None = None
    evaluation_id: str
    evaluated_on: EvaluatedOn | None = None
    judge: JudgedBy
    metrics: Figures
    reliability: list[Reliability] | None = None
    exact: Figures | None
    softmax_frontier: list[list[float]] | None
    theory: Figures | None = None
    reward_frontier: list[list[float]] | None = None
    by_prompt: Mapping[str, Sequence[float | None]]
    dimensions: list[str] = field(default_factory=list)
    dimension_weights: list[float] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    data_source: str = ""
    base_model: str = ""
    example: Text | None = None
    warnings: list[str]

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str | Path = "an evaluation") -> Evaluation:
        """From JSON; for keys that older evaluations lack, the default is what was then the only choice.

        Raises:
            DataError: other keys are missing.
        """
        needed = [one.name for one in fields(cls) if one.default is one.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise DataError(
                f"{where} lacks {', '.join(missing)}; was it written by this version's evaluation?"
            )
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        known["judge"] = JudgedBy.of(known["judge"])
        for group in ("metrics", "exact", "theory"):
            known[group] = figures_of(known.get(group))
        if bins := known.get("reliability"):
            known["reliability"] = [Reliability(**one) for one in bins]
        return cls(**known)

    @classmethod
    def read(cls, folder: str | Path) -> Evaluation:
        """That of an evaluation folder.

        Raises:
            ConfigError: the folder holds none.
            DataError: it is damaged.
        """
        path = Path(folder) / EVALUATION_FILE
        return typed(path, read_object(path, "an evaluation folder"), lambda values: cls.of(values, path))

    def write(self, folder: Path) -> None:
        write_object(folder / EVALUATION_FILE, self.as_dict())

    def as_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {one.name: plain(getattr(self, one.name)) for one in fields(self)}

    def values(self, prefix: str = "", part: str = "value") -> dict[str, float]:
        """`{NAME: value, exact/NAME: value, theory/…, judge/…}` of the figures that have a value.

        Args:
            part: what to take of a figure, `value`, or `low` or `high` of its interval.
        """
        judge = {name: one for name, one in self.judge._asdict().items() if isinstance(one, Figure)}
        groups = {"": self.metrics, "exact/": self.exact or {}, "theory/": self.theory or {}, "judge/": judge}
        return {
            f"{prefix}{group}{name}": value
            for group, figures in groups.items()
            for name, figure in figures.items()
            if (value := getattr(figure, part)) is not None
        }


def write_samples(folder: Path, records: Iterable[PromptRecord]) -> None:
    """Write `samples.jsonl`."""
    with open(folder / SAMPLES_FILE, "w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(plain(record), ensure_ascii=False) + "\n")


def write_samples_table(folder: Path, records: Iterable[PromptRecord]) -> None:
    """Write `samples.json`, the policy's samples in the format of MLflow's tables."""
    columns = ["prompt", "completion", "score", "truncated", "tokens", "kl"]
    rows = [
        [record.prompt, text.text, text.score, text.truncated, text.tokens, text.kl]
        for record in records
        for text in record.policy
    ]
    table = json.dumps({"columns": columns, "data": rows}, ensure_ascii=False)
    (folder / SAMPLES_TABLE_FILE).write_text(table, encoding="utf-8")


def read_samples(folder: str | Path, most: int) -> list[PromptRecord]:
    """The first `most` prompts of `samples.jsonl`; empty where it is absent.

    Raises:
        DataError: it is damaged.
    """
    path = Path(folder) / SAMPLES_FILE
    if not path.exists():
        return []

    def read(path: Path) -> list[PromptRecord]:
        with open(path, encoding="utf-8") as lines:
            found = [json.loads(line) for line in itertools.islice(lines, most)]
        return [
            PromptRecord(
                one["prompt"],
                *([DrawnText(**text) for text in one[side]] for side in ("reference", "policy")),
            )
            for one in found
        ]

    return typed(path, path, read)


def plain(value: object) -> object:
    """As JSON has it: named tuples as dictionaries; what a sample or a judge has none of is left out."""
    if isinstance(value, DrawnText):
        absent = DrawnText._field_defaults
        left_out = [name for name in ("kl", "win", "reason", "heads") if getattr(value, name) == absent[name]]
        return {name: part for name, part in value._asdict().items() if name not in left_out}
    if isinstance(value, JudgedBy) and value.usage is None:
        return {name: plain(part) for name, part in value._asdict().items() if name != "usage"}
    if isinstance(value, (Figure, JudgedBy, PromptRecord, Reliability)):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value
