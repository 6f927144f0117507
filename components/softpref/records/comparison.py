"""What a comparison leaves: the members of a sweep, and which was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from softpref.records.evaluation import Evaluation, plain
from softpref.records.figures import Figures, figures_of
from softpref.records.files import read_object, typed, write_object

COMPARISON_FILE, FRONTIER_FILE, CHOSEN_FOLDER = "comparison.json", "frontier.png", "chosen"


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
        return typed(path, read_object(path, "a comparison folder"), lambda values: cls._of(values, path))

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
        uses = [plain(one._asdict()) for one in self.best_for]
        write_object(folder / COMPARISON_FILE, {**vars(self), "members": members, "best_for": uses})
