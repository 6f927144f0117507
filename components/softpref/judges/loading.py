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
from softpref.judges.reward_model import load_reward_judge
from softpref.judges.texts import preference_pairs, text_rows
from softpref.records import JUDGE_SPLIT, OUTCOMES_FILE, REWARD_FILE, PreferenceRow
from softpref.rewards import read_reward

JudgeName = Literal["auto", "expert", "bradley-terry", "reward-model"]


def check_judge(name: str, dataset_dir: str | Path, *, model: str = "") -> None:
    """Refuse, in milliseconds, a judge that this dataset folder or this model cannot provide.

    Args:
        model: `judge_model` of the configuration.

    Raises:
        ConfigError: there is no judge of this name; it is the expert and the folder has no outcomes; or it
            needs a model, and there is none.
    """
    if name not in get_args(JudgeName):
        raise ConfigError(f"judge must be one of {', '.join(get_args(JudgeName))}, got {name!r}")
    check_judge_model(name, model)
    known = (OUTCOMES_FILE, REWARD_FILE)
    if name == "expert" and not any((Path(dataset_dir) / file).is_file() for file in known):
        raise ConfigError(
            f"the judge 'expert' needs the dataset's {' or '.join(known)}, but {dataset_dir} has none; use "
            "'bradley-terry' or 'auto'"
        )


def check_judge_model(name: str, model: str) -> None:
    """Refuse a model for a judge that takes none, and a judge without the model that it needs.

    Raises:
        ConfigError: says which, or that a reward model is absent here.
    """
    if name == "reward-model":
        if not model:
            raise ConfigError(
                "the judge 'reward-model' needs judge_model: a checkpoint of `softpref judge`, or a reward "
                "model of the Hub"
            )
        from softpref.lm.sources import check_model_source

        check_model_source(model)
    elif model:
        raise ConfigError(
            f"judge_model is for the judge 'reward-model', and judge is {name!r}; leave one out"
        )


def load_judge(
    name: str,
    dataset_dir: str | Path,
    *,
    model: str = "",
    trust_remote_code: bool = False,
    device: str = "",
    tracking_uri: str = "",
    splits: Mapping[str, Iterable[PreferenceRow]] | None = None,
    outcomes: Mapping[str, Outcomes] | None = None,
    seed: int = 0,
    max_rows: int = 20000,
) -> ScoringJudge:
    """The judge of a dataset by name: its known rewards, trained on its preferences, or a model of its own.

    Args:
        name: `expert`, `bradley-terry`, `reward-model`, or `auto`: the expert where rewards are known.
        dataset_dir: the data stage's folder.
        model, trust_remote_code, device, tracking_uri: of a `reward-model`; see
            `softpref.judges.reward_model.load_reward_judge`.
        splits, outcomes: those of that folder, if they have been read; None reads them as needed.
        seed, max_rows: of a `bradley-terry` judge, which learns from the split `judge` where there is one.

    Raises:
        ConfigError: there is no such judge, or this dataset cannot provide it.
        DataError: the outcomes or the reward are damaged.
    """
    check_judge(name, dataset_dir, model=model)
    folder = Path(dataset_dir)
    if name == "reward-model":
        return load_reward_judge(
            model, trust_remote_code=trust_remote_code, device=device, tracking_uri=tracking_uri
        )
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
    split = JUDGE_SPLIT if JUDGE_SPLIT in splits else "train"
    pairs = preference_pairs(text_rows(splits.get(split, ())))
    return BradleyTerryJudge(pairs, seed=seed, max_rows=max_rows, split=split)
