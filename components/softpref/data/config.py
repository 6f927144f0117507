"""The parameters of stage 1: where preferences come from and how they become a dataset. Reads no data."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import re
import string
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, NamedTuple

from softpref.config import build_config, closest, shown
from softpref.data import story_world, storyteller
from softpref.data.columns import check_roles, is_dimension
from softpref.data.story_world import STORIES
from softpref.errors import ConfigError
from softpref.key_content import check_language
from softpref.remote import public_url

STORY_ROWS = 4000
STORY_SFT_ROWS = 4000
# sources that need no file, and their dimensions
EMBEDDED = {"story": story_world.DIMENSIONS, "storyteller": tuple(storyteller.DIMENSIONS)}
# what may lie beside the preferences, from a source of its own (`sft_source` …), and the roles it needs
FURTHER = {
    "sft": ("prompt", "completion"),
    "prompts": ("prompt",),
    "unpaired": ("prompt", "completion", "label"),
}
WITH_ESCAPES = ("prompt_template", "implicit_prompt_end")  # in which \n is a line break
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
# What says where rows lie. It belongs to one source, so the others do not take it over from `source`.
_OF_A_PLACE = ("format", "subset", "split", "revision")
# What says how a row is read. The others take it over unless they have their own. Duplicates, contradictions,
# lengths, samples and splits concern the whole dataset.
_OF_A_ROW = (
    *("columns", "dimensions", "preference_values", "score_scale", "prompt_template", "implicit_prompt"),
    *("implicit_prompt_end", "transcripts", "as_messages", "system_prompt", "list_kind", "group_size"),
    *("labels", "ties", "min_votes", "max_source_rows"),
)
_STORY = (
    "mixture: story and storyteller cannot be mixed, since their known rewards hold only for their own rows; "
    "write the source with `softpref data` first, and give that folder with one of its splits"
)
_NEEDS_SHARE = "needs its share of the dataset, a number between 0 and 1"
_OPTIONS = {"share", "source", *_OF_A_PLACE, *_OF_A_ROW}


@dataclasses.dataclass
class DataConfig:
    """Parameters of the data stage.

    Args:
        source: `"story"` (the embedded story world, which can be enumerated), `"storyteller"` (embedded too:
            natural language, with a known reward), a local file, a folder of files, a saved `datasets`
            folder, the URL of one of them (`s3://`, `gs://`, `abfs://`, `https://`, `hf://`, any that fsspec
            knows; credentials from the environment), or a Hugging Face Hub dataset id such as `"owner/name"`.
            The splits of a dataset folder of this stage are taken over as they are, unless `split` asks for
            one of them.
        mixture: further sources and their shares of the dataset, above 0 and in sum below 1; `source` has the
            rest: `{"b.parquet": 0.3}`, or `{"b.parquet": {"share": 0.3, "columns": {"chosen": "better",
            "rejected": "worse"}}}`. The dataset is the largest seeded sample with these shares, each exact to
            one row, or has `rows` rows with them; where no source has a share, it has all rows of all. Each
            further source has its own `format`, `subset`, `split`
            and `revision`; how its rows are read (`columns` to `system_prompt`, `list_kind` to `min_votes`,
            `max_source_rows`) is as given here, unless it has its own. If the options include `source`, the
            key is just a name, so that two splits of one source can be mixed. Splits go by prompt across all
            sources, and so do contradictions and duplicates, of which the first source keeps its own. Where
            some rows have weights, rows of a source without any weigh 1. Not for embedded sources.
        subset: configuration name of a Hub dataset, or of a folder whose dataset card (`README.md`) names
            several.
        split: which split to read of a Hub dataset, a saved `DatasetDict`, or a folder that its dataset card
            or its files' names divide as on the Hub (`train-….parquet`, `test/….jsonl`); by default `"train"`
            or the only one.
        revision: branch, tag or commit of a Hub dataset.
        format: `"jsonl"`, `"json"` (one array), `"csv"`, `"tsv"` or `"parquet"`; `"auto"` goes by the file's
            suffix (also under `.gz`), or without a known one by the first bytes (not CSV).
        columns: from role to column of the source, such as `{"chosen": "better"}`. Roles: `prompt`; `chosen`,
            `rejected` (one, or a list of which none is the best), alone or with `probability` (that chosen
            beats rejected), `score_chosen` and `score_rejected`, or `margin` (how much better);
            `completion_a`, `completion_b` with `votes_a`, `votes_b` and perhaps `votes_equal`, or `votes` (a
            list of columns, one vote each), or `probability` (that A beats B), or `preference` (a label), or
            `strength` (-3 where A is much better, to 3 where B is), or `score_a` and `score_b`, or `margin`
            (of A over B); `completions` with `scores` (higher is better), `ranks` (lower is better), `order`
            (indices from 0, the best one's first), `best` (index of the best, from 0), `verdicts` (a matrix
            of how often i won over j, or labels for the pairs (1, 2), (1, 3), … (2, 3), …; each judged pair
            becomes a row), `probability` (of a pair) and `kind` as this stage writes them, or alone when
            already best first; `completion` with `score` or `rank`, or with `label` (true or false; a
            prompt's true ones are paired with its false ones), one candidate per row, grouped by prompt. Any
            of them goes with `input` (appended to the prompt on a line of its own) and `system` (a
            conversation's system message, or a paragraph before a plain prompt), and all but `completion`
            with `weight` (at least 0, kept as a column of the dataset). `completions`, `scores`, `ranks`,
            `verdicts` and `votes` take one list column or a list of columns. A path such as `answers[].text`
            or `meta.score` reaches into nested columns. Empty: columns named like a role, or by a well-known
            name, are used; log, page and `stats.json` say which. Prompt, system and weight columns are
            found by name whether or not `columns` is given; `{"prompt": null}` switches that off.
        dimensions: what rows are judged by, where that is more than one thing: from a dimension's name to the
            roles of its own label, beside `columns`, such as `{"helpful": {"best": "better_response_id"},
            "harmless": {"best": "safer_response_id"}}`, or `{"helpful": {"score": "helpfulness"}, …}`. A row
            gives a row of the dataset for each dimension that it says something of, with the name in the
            column `dimension`; training takes one after another (`dimensions` of `SPOConfig`). `{}` for a
            name: labels are objects with a number for it, such as `"probability": {"helpful": 0.8,
            "harmless": 0.3}`, or all rows of the source are of this one dimension: of a file for each
            dimension, give one as `source` and the others as `mixture`, each with its own `dimensions`.
            Empty: labels that are objects, and columns of well-known data sets, are recognised; a column
            `dimension` (a role of `columns`) names that of each row. Of the story world: `trait` and
            `brevity`; of the storyteller: `warmth` and `brevity`.
        preference_values: what the labels of `preference`, `votes` or a list of `verdicts` mean, from value
            to `"a"`, `"b"` or `"tie"`. Empty: `a`, `b`, `tie`, also 1, 2 and `model_a`, `model_b`; for
            `votes` 0 is a tie.
        score_scale: makes probabilities of two scores, margins and strengths: P(first beats second) =
            σ(score_scale · difference); 1 by default, which makes a strength of 1, 2, 3 a probability of
            0.73, 0.88, 0.95. Scores and margins beside `chosen` and `rejected` are used only when this is
            given or `columns` names them.
        prompt_template: builds the prompt from `{column}` fields instead of a prompt column. In it and in
            `implicit_prompt_end`, `\\n`, `\\t` and `\\\\` stand for a line break, a tab and a backslash,
            for line breaks and tabs are hard to give in a shell or a form.
        implicit_prompt: for plain texts without a prompt column, take the words that all completions of a row
            begin with as the prompt. Otherwise this is done only where a source has `chosen` and `rejected`
            alone, TRL's implicit format, and other rows are refused.
        implicit_prompt_end: asks for the same, with a prompt that ends after the last common occurrence of
            this text (for example `"\\n\\nAnswer:"`). Otherwise it ends at the last word boundary that all
            completions share.
        transcripts: `"messages"` makes messages of texts that begin with `Human:` and have turns
            `\\n\\nHuman:` and `\\n\\nAssistant:`; `"text"` keeps them as text, whose prompt ends after the
            last `\\n\\nAssistant:` that they share.
        as_messages: turn plain prompts and completions into user and assistant messages, for models with a
            chat template.
        system_prompt: put in front of conversational prompts that have none.
        list_kind: `"ranking"` trusts the whole order of a list, `"best_of_n"` only its best.
        group_size: the most completions in a ranking made from one-candidate rows; the stories of a row of
            the story world when `story_kind` is not `"pairwise"`.
        labels: `"soft"` keeps the share of votes as a probability (a single vote is a hard label), `"hard"`
            keeps only the winner.
        ties: `"half"` counts a tie as half a vote for each (and refuses rankings of three or more with equal
            scores); `"drop"` ignores tied votes, leaves out rows that stay even, and keeps only the first of
            equally scored completions.
        min_votes: rows with fewer counted votes are left out.
        duplicates: `"drop"` keeps the first of equal rows, `"keep"` all; `"auto"` keeps them for the story
            world, whose repeated draws are independent, and drops them elsewhere.
        contradictions: whether to keep or drop all rows whose completions another row of the same prompt
            orders differently. They are counted in any case.
        degree_ranking_weight: γ ≥ 0. Above 0 the training split gets further rows that no person has judged:
            rankings of a completion, the same without some of its key content, and so on until none of it is
            left (phrases found by RAKE; see `degree_weight` of `softpref train`, whose loss this states as
            preferences, without a head). They weigh γ beside the others' 1, half of it each where `degree_on`
            is `both`, and their column `degree` is true: no judge and no reference model learns from them. A
            variant of our own: since a whole text always wins, policies can learn from it to write at length.
        degree_levels: completions of such a ranking, at least 2.
        degree_on: of which completions of a row: its `preferred` (first) one, its `dispreferred` (last), or
            `both`.
        degree_language: whose stop words divide a text into phrases; `en` is the only list there is.
        max_characters: rows whose prompt and longest completion together exceed this are left out.
        rows: preference rows to draw from the story world (4000 by default), or the size of a seeded sample
            of the accepted rows of any other source (all by default; of a mixture, as many as its shares
            allow).
        max_source_rows: stop reading the source after this many rows.
        max_rejected_fraction: a larger share of refused rows is an error.
        validation_fraction: share of the distinct prompts held out for validation.
        test_fraction: share of the distinct prompts held out for the test.
        judge_fraction: share of the prompts that validation and test leave, for the split `judge`: a judge
            learns from it (`bradley-terry`, `softpref judge`), and the policy and its reference never see it.
            0: a judge learns from the very pairs that the policy learns from.
        seed: of the splits, of samples and of the story world's draws.
        votes: votes per pair of the story world: 1 gives hard labels, more give shares of votes, 0 the
            experts' exact probability.
        story_kind: what experts of the story world judge: `"pairwise"` two stories; `"ranking"` `group_size`
            stories, which one expert orders by Plackett-Luce; `"best_of_n"` as many, of which the expert
            names only the best.
        sft_rows: demonstrations to draw from the story world (4000 by default), or the most to take from
            `sft_source`.
        sft_source: demonstrations for the reference model, read like `source`.
        sft_columns: from `prompt` and `completion` to the columns of `sft_source`; also `input` and `system`.
        prompts_source: further prompts to sample from in training, read like `source`. The story world has
            some of its own.
        prompts_columns: from `prompt` to the column of `prompts_source`; also `input` and `system`.
        unpaired_source: completions without a counterpart, read like `source`: a `prompt`, a `completion` and
            a `label`, true or false. Only the method `kto` learns from them, beside the preferences. Each row
            counts, also where several judged the same completion. Those whose prompt is among the preferences
            are left out.
        unpaired_columns: from `prompt`, `completion` and `label` to the columns of `unpaired_source`; also
            `input` and `system`.

    Raises:
        ConfigError: a value outside its range, an unknown role, or values that do not go together.
    """

    source: str = "story"
    mixture: dict[str, object] = dataclasses.field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
    columns: dict[str, object] = dataclasses.field(default_factory=dict)
    dimensions: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)
    preference_values: dict[str, str] = dataclasses.field(default_factory=dict)
    score_scale: float | None = None
    prompt_template: str = ""
    implicit_prompt: bool = False
    implicit_prompt_end: str = ""
    transcripts: Literal["messages", "text"] = "messages"
    as_messages: bool = False
    system_prompt: str = ""
    list_kind: Literal["ranking", "best_of_n"] = "ranking"
    group_size: int = 4
    labels: Literal["soft", "hard"] = "soft"
    ties: Literal["half", "drop"] = "half"
    min_votes: int = 1
    duplicates: Literal["auto", "drop", "keep"] = "auto"
    contradictions: Literal["keep", "drop"] = "keep"
    degree_ranking_weight: float = 0.0
    degree_levels: int = 4
    degree_on: Literal["both", "preferred", "dispreferred"] = "both"
    degree_language: str = "en"
    max_characters: int | None = None
    rows: int | None = None
    max_source_rows: int | None = None
    max_rejected_fraction: float = 0.5
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    judge_fraction: float = 0.0
    seed: int = 0
    votes: int = 1
    story_kind: Literal["pairwise", "best_of_n", "ranking"] = "pairwise"
    sft_rows: int | None = None
    sft_source: str | None = None
    sft_columns: dict[str, str] = dataclasses.field(default_factory=dict)
    prompts_source: str | None = None
    prompts_columns: dict[str, str] = dataclasses.field(default_factory=dict)
    unpaired_source: str | None = None
    unpaired_columns: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in WITH_ESCAPES:
            text = re.sub(r"\\([nt\\])", lambda escape: _ESCAPES[escape[1]], getattr(self, name))
            setattr(self, name, text)
        self.check()
        parts_of(self)

    def check(self) -> None:
        """Refuse values outside their range, and values that do not go together."""
        if not self.source:
            raise ConfigError(
                'source is empty; give "story", "storyteller", a file, a folder, a URL or a Hub dataset id'
            )
        for name, least in (
            ("group_size", 2),
            ("degree_levels", 2),
            ("min_votes", 1),
            ("votes", 0),
            ("seed", 0),
            ("rows", 1),
            ("max_source_rows", 1),
            ("sft_rows", 1),
            ("max_characters", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        for name in ("validation_fraction", "test_fraction", "judge_fraction", "max_rejected_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {value}")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on; their sum must stay below 1"
            )
        if self.judge_fraction == 1:
            raise ConfigError("judge_fraction 1 leaves nothing to train on; it must stay below 1")
        if not 0 <= self.degree_ranking_weight < math.inf:
            raise ConfigError(f"degree_ranking_weight must be at least 0, got {self.degree_ranking_weight}")
        check_language(self.degree_language)
        if self.score_scale is not None and not 0 < self.score_scale < math.inf:
            raise ConfigError(f"score_scale must be a number above 0, got {self.score_scale}")
        for value, meaning in self.preference_values.items():
            if meaning not in ("a", "b", "tie"):
                raise ConfigError(
                    f"preference_values maps {value!r} to {meaning!r}; each must be 'a', 'b' or 'tie'"
                )
        fields = self.template_fields
        if self.prompt_template and not fields:
            raise ConfigError(
                f"prompt_template {self.prompt_template!r} has no {{column}} field, so all prompts are equal"
            )
        for name, roles in self.dimensions.items():
            if not is_dimension(name) or not isinstance(roles, Mapping):
                raise ConfigError(
                    'dimensions must be like {"helpful": {"best": "better_response_id"}, "harmless": {}}: '
                    f"names of up to 40 letters and digits, and roles as in columns; got {shown(name)}: "
                    f"{shown(roles)}"
                )
            if self.embedded and (name not in EMBEDDED[self.source] or roles):
                has = EMBEDDED[self.source]
                raise ConfigError(
                    f'source "{self.source}" has the dimensions {", ".join(has)}, each without roles, as in '
                    f'{{"{has[0]}": {{}}}}; got {shown(name)}: {shown(roles)}'
                )
        for roles in [*self.dimensions.values()] or [{}]:
            if self.columns:
                check_roles({**self.columns, **roles}, has_template=bool(fields))
            elif roles:
                raise ConfigError(
                    f"dimensions gives roles ({', '.join(roles)}), so columns must name prompt and "
                    'completions, as in {"completions": ["response_0", "response_1"]}'
                )
        for further, roles_of in FURTHER.items():
            name = f"{further}_columns"
            for role, column in getattr(self, name).items():
                if role not in (allowed := (*roles_of, "input", "system")):
                    raise ConfigError(f"{name} has the role {role!r}; known: {', '.join(allowed)}")
                if not isinstance(column, str) or not column:
                    raise ConfigError(f"{name}[{role!r}] must be one column name, got {column!r}")
            if getattr(self, name) and further not in self.further_sources:
                raise ConfigError(
                    f"{name} has no effect without {further}_source; give that, or leave it out"
                )
        if self.embedded:
            fixed = ("columns", "prompt_template", "as_messages", "system_prompt", "sft_source")
            for name in (*fixed, "degree_ranking_weight"):  # a text with less has no known reward
                if getattr(self, name):
                    raise ConfigError(
                        f'{name} does not go with source "{self.source}", whose rows are fixed plain text'
                    )
        if self.story_kind != "pairwise":
            self._check_story_lists()

    def _check_story_lists(self) -> None:
        kind = f"story_kind {self.story_kind!r}"
        if not self.embedded:
            raise ConfigError(
                f'{kind} goes with source "story" or "storyteller", got {self.source!r}; list_kind says how '
                "its lists are read"
            )
        if self.votes != 1:
            raise ConfigError(
                f"{kind} goes with votes 1, got {self.votes}: a row is one order of stories, so one expert "
                "gives it"
            )
        if not 3 <= self.group_size <= STORIES:
            raise ConfigError(
                f"{kind} needs a group_size of 3 to {STORIES:,} stories, got {self.group_size}; for two, "
                "take story_kind 'pairwise'"
            )
        if self.list_kind == "best_of_n" and self.story_kind == "ranking":
            raise ConfigError(f"{kind} contradicts list_kind 'best_of_n'; take story_kind 'best_of_n'")

    @property
    def embedded(self) -> bool:
        """Whether the source is a world of our own."""
        return self.source in EMBEDDED

    @property
    def further_sources(self) -> dict[str, str]:
        """The sources of what lies beside the preferences, by the name of its folder."""
        given = {name: getattr(self, f"{name}_source") for name in FURTHER}
        return {name: source for name, source in given.items() if source}

    @property
    def template_fields(self) -> list[str]:
        """The columns that `prompt_template` names, in order."""
        try:
            parts = list(string.Formatter().parse(self.prompt_template))
        except ValueError as error:
            raise ConfigError(f"prompt_template {self.prompt_template!r} is malformed: {error}") from error
        fields = []
        for _, field, spec, conversion in parts:
            if field is None:
                continue
            if not field or spec or conversion:
                raise ConfigError(
                    f"prompt_template {self.prompt_template!r} may only hold plain {{column}} fields, and "
                    "{{ }} for literal braces"
                )
            fields.append(field)
        return fields


class Part(NamedTuple):
    """One source of a dataset.

    Attributes:
        name: how records call it.
        share: of the dataset's rows; None: all of its rows.
        config: how it is read, with its place as `source` and no mixture.
    """

    name: str
    share: Fraction | None
    config: DataConfig


def parts_of(config: DataConfig) -> list[Part]:
    """The sources of a configuration: `source`, with what the others leave of the dataset, and the others.

    Raises:
        ConfigError: a share out of range, an unknown option, a source twice, or one that cannot be mixed.
    """
    if not config.mixture:
        return [Part(public_url(config.source), None, config)]
    if config.embedded:
        raise ConfigError(_STORY)
    others = [_part(config, str(name), given) for name, given in config.mixture.items()]
    shares = [part.share for part in others if part.share is not None]
    if shares and len(shares) < len(others):
        name = next(part.name for part in others if part.share is None)
        raise ConfigError(f"mixture[{name!r}] {_NEEDS_SHARE}, as others have one; got none")
    rest = Fraction(1) - sum(shares) if shares else None
    if rest is not None and rest <= 0:
        raise ConfigError(
            f"the shares of mixture add up to {float(1 - rest):g}; their sum must stay below 1, since source "
            "has the rest"
        )
    first = copy.copy(config)
    first.mixture = {}
    parts = [Part(public_url(config.source), rest, first), *others]
    names: set[str] = set()
    places: dict[tuple[str | None, ...], str] = {}
    for part in parts:
        place = _identity(part.config)
        other = places.setdefault(place, part.name)
        if part.name in names or other != part.name:
            raise ConfigError(
                f"mixture: {part.name} and {other} are one source; give each once. Another split or subset "
                f'of it needs a name: {{"NAME": {{"source": "{public_url(part.config.source)}", "split": …, '
                '"share": …}}'
            )
        names.add(part.name)
    return parts


def _part(config: DataConfig, name: str, given: object) -> Part:
    where = f"mixture[{public_url(name)!r}]"
    options: dict[str, object] = dict(given) if isinstance(given, Mapping) else {"share": given}
    share = _share(options.pop("share"), where) if "share" in options else None
    for option in options:
        if option not in _OPTIONS:
            raise ConfigError(f"{where} has no option {option!r}{closest(option, _OPTIONS)}")
    if options.get("source", name) in EMBEDDED:
        raise ConfigError(_STORY)
    part = copy.copy(config)
    part.mixture = {}
    try:
        own = build_config(DataConfig, {"source": name, **options})
        for option in ("source", *_OF_A_PLACE, *options):
            setattr(part, option, getattr(own, option))
        part.check()
    except ConfigError as error:
        raise ConfigError(f"{where}, read as source where it says nothing else: {error}") from error
    return Part(public_url(name), share, part)


def _share(value: object, where: str) -> Fraction:
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not 0 < number < 1:
        raise ConfigError(
            f'{where} {_NEEDS_SHARE}, as in 0.3 or {{"share": 0.3, "split": "train"}}; got {shown(value)}'
        )
    return Fraction(repr(number))  # 0.3 as it is written, so that sums and counts are exact


def _identity(config: DataConfig) -> tuple[str | None, ...]:
    """What is the same for two spellings of one source."""
    place = re.sub("^(file|local)://", "", config.source)
    place = os.path.realpath(place) if os.path.exists(place) else place
    return place, config.subset, config.split or "train", config.revision
