"""What the stages leave on disk for one another: file names, typed records, and how to tell what is complete.

The file that identifies a folder is written last, so a folder that has it is complete:

| folder | identified by | beside it |
| :-- | :-- | :-- |
| dataset | `stats.json` | splits, `sft/`, `prompts/`, `rejected.jsonl`, `page.html`, what experts know |
| model | `softpref.json` | safetensors, tokenizer, model card, `extrapolated-W/`, `round-N/` |
| evaluation | `evaluation.json` | `samples.jsonl`, `report.html`, `extrapolated-W/`, `round-N/` |
| comparison | `comparison.json` | `report.html`, `frontier.png`, `chosen/evaluation.json` |
| registration | `registration.json` | |

Each also has `parameters.yaml`, which `--config` accepts, and `timings.json` where the stage takes long;
models and evaluations have `result.json`, for a stage that has finished and is called again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

from softpref.disk import DAMAGED, content_hash, flush_below, in_brief, remove_parts, write_whole
from softpref.errors import ConfigError, DataError

STATS_FILE, REJECTED_FILE, PAGE_FILE = "stats.json", "rejected.jsonl", "page.html"
OUTCOMES_FILE, REWARD_FILE = "outcomes.jsonl", "reward.json"
METADATA_FILE = "softpref.json"
JUDGE_SPLIT = "judge"  # preferences that a judge learns from, and the policy never sees
REWARD_STAGE = "judge"  # the stage of a model folder that is a reward model
EVALUATION_FILE, SAMPLES_FILE, REPORT_FILE = "evaluation.json", "samples.jsonl", "report.html"
SAMPLES_TABLE_FILE = "samples.json"
COMPARISON_FILE, FRONTIER_FILE, CHOSEN_FOLDER = "comparison.json", "frontier.png", "chosen"
REGISTRATION_FILE = "registration.json"
ROUND_FOLDER = "round-"  # and its number: a model of an earlier round on another dimension of preference
PARAMETERS_FILE, TIMINGS_FILE, RESULT_FILE = "parameters.yaml", "timings.json", "result.json"


T = TypeVar("T")

Message = dict[str, str]
"""A message of a conversation: `role` and `content`."""
Text = str | Sequence[Message]
"""A prompt or a completion: plain text, or messages such as `[{"role": "user", "content": "…"}]`."""


class PreferenceRow(TypedDict):
    """A row of the dataset: completions best first, the probability of a pair with a soft label.

    `degree` is true of rankings that nobody has judged (`degree_ranking_weight` of the data stage). The
    dimension is what they were judged by, where rows are judged by several; empty for a row of none.
    """

    prompt: Text
    completions: list[Text]
    kind: str
    probability: float | None
    source_row: NotRequired[int]
    weight: NotRequired[float | None]
    dimension: NotRequired[str]
    source: NotRequired[str]
    degree: NotRequired[bool]


def judged_rows(rows: Any) -> Any:
    """Of a split of a dataset the rows that were judged: those without `degree`."""
    if "degree" not in rows.column_names:
        return rows
    return rows.filter(lambda made: not made, input_columns="degree", keep_in_memory=True)


class ColumnMapping(TypedDict):
    """How the columns of a source are read."""

    form: str
    columns: dict[str, str | list[str]]
    dimensions: NotRequired[dict[str, dict[str, str | list[str]]]]
    guessed: bool
    unused: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    prompt_template: str | None


class MixtureCounts(TypedDict):
    """Rows that a source had for a mixture, gave, and kept; `binding` where it had none left to give."""

    usable: int
    rows: int
    not_sampled: int
    binding: bool


class MixedSource(MixtureCounts):
    """What became of the rows of one source of a mixture."""

    name: str
    source: str
    share: float
    rows_read: int
    rejected: dict[str, int]
    left_out: dict[str, int]
    mapping: ColumnMapping


class DatasetStats(TypedDict, total=False):
    """What a dataset holds and what became of its source's rows: `stats.json`.

    Counts are by split (`rows`, `prompts`, `sft`, `extra_prompts`), by reason (`rejected`, `left_out`), by
    kind of row or label, by number of completions, or by dimension (absent where rows have none).
    `longer_chosen` is the share of pairs whose better completion has more characters; pairs of equal length
    count half. `degree_rankings` are rows of the training split that were made of others; what is said of
    labels, lengths and prompts leaves them out. `files` has hashes of the files.
    """

    stage: str
    code_version: str
    source: str
    config: dict[str, object]
    mapping: ColumnMapping
    conversational: bool
    rows_read: int
    duplicates: int
    contradictions: dict[str, int]
    rejected: dict[str, int]
    left_out: dict[str, int]
    not_sampled: int
    degree_rankings: int
    rows: dict[str, int]
    prompts: dict[str, int]
    kinds: dict[str, int]
    dimensions: dict[str, int]
    completions_per_row: dict[str, int]
    labels: dict[str, int]
    confidence: dict[str, list[float]]
    characters: dict[str, dict[str, object]]
    longer_chosen: float
    dataset_hash: str
    test_hash: str
    files: dict[str, str]
    mixture: list[MixedSource]
    sft: dict[str, object]
    extra_prompts: dict[str, object]
    taken_over: str


class DimensionRound(TypedDict):
    """A round of training on one dimension of preference; options are named as in training.

    Attributes:
        dimension_weights: λ of each round before it.
        reference: the model that it began with, which is its reference, too.
        reference_hash: of that model's weights; empty where they were not in a folder.
    """

    dimension: str
    dimension_weights: list[float]
    reference: str
    reference_hash: str
    dataset_hash: str
    method: str
    alpha: float
    anchor: float
    beta: float
    kl_beta: float
    kl_on: str
    preference_kind: str
    soft_labels: str
    weight_exponent: float
    label_smoothing: float


class ModelMetadata(TypedDict, total=False):
    """What later stages read of a model folder: `softpref.json`. Options are named as in training.

    Attributes:
        lineage: the rounds behind a model that was trained on one dimension after another, its own last.
        row_counts: what was counted of the rows of each split.
        saturated: share of saturated margins at the end of training.
        split, heads, max_length: of a reward model: what it learned from, its heads, tokens that it reads.
    """

    name: str
    stage: str
    base_model: str
    run_id: str | None
    dataset_hash: str
    code_version: str
    method: str
    alpha: float
    anchor: float
    beta: float
    kl_beta: float
    kl_on: str
    rounds: int
    train_on: str
    preference_kind: str
    extrapolation: float
    lineage: list[DimensionRound]
    adapter: bool
    cut_rows: str
    row_counts: dict[str, dict[str, int]]
    saturated: float | None
    max_prompt_length: int | None
    max_completion_length: int
    split: str
    heads: int
    max_length: int


class Figure(NamedTuple):
    """One measured value.

    Attributes:
        value: the estimate, None where it is unknown.
        low, high: ends of its interval, None for fewer than two prompts.
        n: observations behind it: preference pairs, sampled completions or prompts.
        prompts: distinct prompts among them, the independent units.
        unit: `nats`, `probability`, `tokens` …
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    prompts: int | None = None
    unit: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Figure:
        return cls(**{name: values[name] for name in cls._fields if name in values})


Figures = Mapping[str, Figure]


class Reliability(NamedTuple):
    """A bin of the reliability diagram: held-out pairs of like confidence.

    Attributes:
        confidence: mean probability that the model gives to the completion that it prefers.
        share: mean share of votes of that completion; equals the confidence in a calibrated model.
        low, high: interval of the share; None with fewer than two prompts.
        pairs: how many.
    """

    confidence: float
    share: float
    low: float | None
    high: float | None
    pairs: int


def figures_of(values: Mapping[str, Mapping[str, Any]] | None) -> Figures | None:
    """Figures by name, from JSON; None stays."""
    return None if values is None else {name: Figure.of(one) for name, one in values.items()}


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
        return _typed(path, _read(path, "an evaluation folder"), lambda values: cls.of(values, path))

    def write(self, folder: Path) -> None:
        _write(folder / EVALUATION_FILE, self.as_dict())

    def as_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

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


class BestFor(NamedTuple):
    """The member that serves a use best.

    Attributes:
        use: what a model is wanted for, in words.
        figure: the name of the figure that tells.
        best: the member's name.
        alike: members that cannot be told from it: the interval of their difference includes 0.
        differences: of every other healthy member to the best, prompt by prompt.
    """

    use: str
    figure: str
    best: str
    alike: list[str]
    differences: Figures


class EqualRewardRow(TypedDict):
    """An SPO member: its expected reward, and each curve's entropy there in nats, None outside its range."""

    name: str
    curve: str
    expected_reward: float
    entropy: dict[str, float | None]


class EqualReward(TypedDict):
    """Entropy of every curve at the expected rewards of the SPO members, by `exact` figures or `samples`."""

    basis: str
    curves: list[str]
    rows: list[EqualRewardRow]


_OF_ONE_MODEL = (
    "reference_uri",
    "dataset_hash",
    "evaluated_on",
    "settings",
    "data_source",
    "base_model",
    "example",
)  # no part of a comparison


@dataclass
class Comparison:
    """Which member of a sweep was chosen and why: `comparison.json`.

    Attributes:
        rule: in words.
        chosen: a member's name; None where none may be chosen.
        passed_over: members that the rule ranks higher, with what keeps each from passing the gate.
        equal_reward: None without SPO members, or with nothing beside them.
        best_for: by use.
    """

    rule: str
    chosen: str | None
    reason: str
    passed_over: dict[str, list[str]]
    equal_reward: EqualReward | None
    members: list[Evaluation]
    best_for: list[BestFor] = field(default_factory=list)

    @property
    def chosen_member(self) -> Evaluation | None:
        return next((member for member in self.members if member.name == self.chosen), None)

    @classmethod
    def read(cls, folder: str | Path) -> Comparison:
        """That of a comparison folder.

        Raises:
            ConfigError: the folder holds none.
            DataError: it is damaged.
        """
        path = Path(folder) / COMPARISON_FILE
        return _typed(path, _read(path, "a comparison folder"), lambda values: cls._of(values, path))

    @classmethod
    def _of(cls, known: Mapping[str, Any], path: Path) -> Comparison:
        members = [Evaluation.of(member, path) for member in known.get("members", ())]
        uses = [
            BestFor(**{**one, "differences": figures_of(one["differences"])})
            for one in known.get("best_for", ())
        ]
        others: dict[str, Any] = {one.name: known.get(one.name) for one in fields(cls)}
        return cls(**{**others, "members": members, "best_for": uses})

    def write(self, folder: Path) -> None:
        members = [
            {name: value for name, value in member.as_dict().items() if name not in _OF_ONE_MODEL}
            for member in self.members
        ]
        uses = [_plain(one) for one in self.best_for]
        _write(folder / COMPARISON_FILE, {**vars(self), "members": members, "best_for": uses})


@dataclass(kw_only=True)
class Registration:
    """What was decided about a model: `registration.json`.

    Attributes:
        reason: in words.
        champion: whether this version is the champion now.
        reused: whether an earlier attempt had registered it.
    """

    registered: bool = False
    reason: str = ""
    model_name: str
    version: str | None = None
    aliases: list[str] = field(default_factory=list)
    champion: bool = False
    reused: bool = False
    model_uri: str | None = None
    run_id: str | None = None
    tracking_uri: str
    model_hash: str | None = None
    gate_failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> Registration:
        path = Path(folder) / REGISTRATION_FILE
        return _typed(path, _read(path, "a registration folder"), lambda values: cls(**values))

    def write(self, folder: Path) -> None:
        _write(folder / REGISTRATION_FILE, asdict(self))


def write_samples(folder: Path, records: Iterable[PromptRecord]) -> None:
    """Write `samples.jsonl`."""
    with open(folder / SAMPLES_FILE, "w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")


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

    return _typed(path, path, read)


def read_stats(folder: str | Path) -> DatasetStats:
    """What `stats.json` says of a dataset; empty where it is absent.

    Raises:
        DataError: it is damaged.
    """
    stats: DatasetStats = _read_if_there(Path(folder) / STATS_FILE)
    return stats


def hashes_in(folder: Path) -> dict[str, str]:
    """The hash of each file of rows in a dataset folder, and of what experts know, by its path there."""
    files = [*folder.rglob("data-*.arrow"), folder / OUTCOMES_FILE, folder / REWARD_FILE]  # others are caches
    return {
        file.relative_to(folder).as_posix(): content_hash(file) for file in sorted(files) if file.exists()
    }


def read_dataset(folder: str | Path) -> Any:
    """A dataset, or its splits by name, as the data stage saved them in a folder.

    Raises:
        DataError: a file is absent or damaged, or not the one that `stats.json` describes.
    """
    from datasets import load_from_disk

    whole = next((one for one in (Path(folder), Path(folder).parent) if (one / STATS_FILE).is_file()), None)
    stats = read_stats(whole) if whole else {}
    try:
        for name, digest in stats.get("files", {}).items():
            if whole and (file := whole / name).is_relative_to(folder) and content_hash(file) != digest:
                raise ValueError(f"its {file.relative_to(folder)} is not what was written")
        found: Any = load_from_disk(str(folder))
        splits = found if isinstance(found, dict) else {"": found}
        for rows in splits.values():
            rows.data.validate(full=True)  # else what is damaged within a column is met anywhere, or crashes
    except Exception as error:  # those of datasets, Arrow and JSON are of all kinds
        raise DataError(
            f"the dataset {folder} cannot be read: {in_brief(error)}; make it anew with softpref data"
        ) from error
    return found


def save_metadata(folder: str | Path, values: Mapping[str, object]) -> None:
    """Write what later stages need to know of a model folder (`softpref.json`), its last file."""
    remove_parts(folder)
    flush_below(folder)
    write_whole(Path(folder) / METADATA_FILE, json.dumps(values, indent=2) + "\n")


def load_metadata(folder: str | Path) -> ModelMetadata:
    """Read `softpref.json` of a model folder; empty for a model that softpref did not write.

    Raises:
        DataError: it is damaged.
    """
    metadata: ModelMetadata = _read_if_there(Path(folder) / METADATA_FILE)
    return metadata


def earlier_folders(folder: str | Path) -> list[Path]:
    """The folders `round-N` in a model folder, or of their evaluations in an evaluation's, in order."""
    found = [path for path in Path(folder).glob(f"{ROUND_FOLDER}*") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _plain(value: object) -> object:
    """Named tuples as dictionaries; what a sample or a judge has none of is left out."""
    if isinstance(value, DrawnText):
        absent = DrawnText._field_defaults
        left_out = [name for name in ("kl", "win", "reason", "heads") if getattr(value, name) == absent[name]]
        return {name: part for name, part in value._asdict().items() if name not in left_out}
    if isinstance(value, JudgedBy) and value.usage is None:
        return {name: _plain(part) for name, part in value._asdict().items() if name != "usage"}
    if isinstance(value, (BestFor, Figure, JudgedBy, PromptRecord, Reliability)):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _read(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give {what}")
    values: dict[str, Any] = _read_if_there(path)
    return values


def _read_if_there(path: Path) -> Any:
    return _typed(path, path, _object_in) if path.exists() else {}


def _object_in(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    json.dumps(values, ensure_ascii=False).encode()  # an escape can stand for what is no text
    return values


def _typed(path: Path, values: Any, read: Callable[[Any], T]) -> T:
    """What `read` makes of a file's values; that they are not what softpref writes is a `DataError`."""
    try:
        return read(values)
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(
            f"{path} cannot be read: {in_brief(error)}; it is damaged, or not a file of softpref's: have the "
            "stage that writes it do so again"
        ) from error


def _write(path: Path, values: Mapping[str, object]) -> None:
    remove_parts(path.parent)
    flush_below(path.parent)
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
