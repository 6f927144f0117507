"""The judge of a dataset, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from softpref.errors import ConfigError
from softpref.judges.bradley_terry import BradleyTerryJudge
from softpref.judges.expert import ExpertJudge, RewardJudge
from softpref.judges.outcomes import Outcomes, read_outcomes
from softpref.judges.protocol import ScoringJudge
from softpref.judges.texts import preference_pairs, text_rows
from softpref.records import OUTCOMES_FILE, REWARD_FILE, PreferenceRow
from softpref.rewards import read_reward

JudgeName = Literal["auto", "expert", "bradley-terry"]


def check_judge(name: str, dataset_dir: str | Path) -> None:
    """Refuse, in milliseconds, a judge that this dataset folder cannot provide.

    Raises:
        ConfigError: there is no judge of this name, or it is the expert and the folder has no outcomes.
    """
    if name not in get_args(JudgeName):
        raise ConfigError(f"judge must be one of {', '.join(get_args(JudgeName))}, got {name!r}")
    known = (OUTCOMES_FILE, REWARD_FILE)
    if name == "expert" and not any((Path(dataset_dir) / file).is_file() for file in known):
        raise ConfigError(
            f"the judge 'expert' needs the dataset's {' or '.join(known)}, but {dataset_dir} has none; use "
            "'bradley-terry' or 'auto'"
        )


def load_judge(
    name: str,
    dataset_dir: str | Path,
    *,
    splits: Mapping[str, Iterable[PreferenceRow]] | None = None,
    outcomes: Mapping[str, Outcomes] | None = None,
    seed: int = 0,
    max_rows: int = 20000,
) -> ScoringJudge:
    """The judge of a dataset by name: its known rewards, or trained on its training split.

    Args:
        name: `expert`, `bradley-terry`, or `auto`: the expert where rewards are known.
        dataset_dir: the data stage's folder.
        splits, outcomes: those of that folder, if they have been read; None reads them as needed.
        seed, max_rows: of a `bradley-terry` judge.

    Raises:
        ConfigError: there is no such judge, or this dataset cannot provide it.
        DataError: the outcomes or the reward are damaged.
    """
    check_judge(name, dataset_dir)
    folder = Path(dataset_dir)
    if name != "bradley-terry":
        if outcomes is None and (folder / OUTCOMES_FILE).is_file():
            outcomes = read_outcomes(folder / OUTCOMES_FILE)
        if outcomes:
            return ExpertJudge(outcomes)
        if (folder / REWARD_FILE).is_file():
            return RewardJudge(read_reward(folder / REWARD_FILE))
    if splits is None:
        import datasets

        splits = datasets.load_from_disk(str(dataset_dir))
    pairs = preference_pairs(text_rows(splits.get("train", ())))
    return BradleyTerryJudge(pairs, seed=seed, max_rows=max_rows)
