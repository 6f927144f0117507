"""The judge of a dataset, by name: one of ours, or one that an installed package brings."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from softpref.errors import ConfigError
from softpref.judges.bradley_terry import BradleyTerryJudge
from softpref.judges.expert import ExpertJudge, RewardJudge
from softpref.judges.outcomes import Outcomes, read_outcomes
from softpref.judges.protocol import Judge
from softpref.judges.reward_model import load_reward_judge
from softpref.judges.texts import preference_pairs, text_rows
from softpref.lm.sources import check_model_source
from softpref.records.dataset import JUDGE_SPLIT, OUTCOMES_FILE, REWARD_FILE, PreferenceRow, read_dataset
from softpref.rewards import read_rewards

JudgeName = Literal["auto", "expert", "bradley-terry", "reward-model", "llm"]
ENTRY_POINTS = "softpref.judges"
"""The group of entry points by which a package brings judges: a name, and a class or function that is called
with `judge_options` (and `model`, where `judge_model` is given) and returns a `Judge`."""


def check_judge_options(name: str, model: str = "", options: Mapping[str, Any] | None = None) -> None:
    """Refuse, in milliseconds, a judge that there is not, and options that it does not take.

    Raises:
        ConfigError: with what would be right.
    """
    known = get_args(JudgeName)
    if name not in known:
        own = _own_judges()
        if name not in own:
            raise ConfigError(f"judge must be one of {', '.join([*known, *own])}, got {name!r}")
    elif name == "llm":
        from softpref.judges.llm import llm_options

        llm_options(model, options or {})
    elif options:
        raise ConfigError(f"the judge {name!r} takes no judge_options; leave them out, or set judge to llm")
    elif name == "reward-model":
        if not model:
            raise ConfigError(
                "the judge 'reward-model' needs judge_model: a checkpoint of `softpref judge`, or a reward "
                "model of the Hub"
            )
        check_model_source(model)
    elif model:
        raise ConfigError(
            f"the judge {name!r} takes no judge_model; leave it out, or set judge to reward-model or llm"
        )


def check_judge(
    name: str, dataset_dir: str | Path, *, model: str = "", options: Mapping[str, Any] | None = None
) -> None:
    """Refuse, in milliseconds, a judge that cannot be had for this dataset folder, or on this machine.

    Raises:
        ConfigError: there is no judge of this name, it does not take these options, or lacks something: the
            expert the folder's outcomes, a language model its key.
    """
    check_judge_options(name, model, options)
    known = (OUTCOMES_FILE, REWARD_FILE)
    if name == "expert" and not any((Path(dataset_dir) / file).is_file() for file in known):
        raise ConfigError(
            f"the judge 'expert' needs the dataset's {' or '.join(known)}, but {dataset_dir} has none; use "
            "'bradley-terry' or 'auto'"
        )
    check_judge_here(name, model=model, options=options)


def check_judge_here(name: str, *, model: str = "", options: Mapping[str, Any] | None = None) -> None:
    """Refuse, in milliseconds, a judge for which this machine lacks something, whatever the dataset."""
    if name == "llm":
        from softpref.judges.llm import llm_options

        llm_options(model, options or {}).check_ready()


def gives_scores(name: str) -> bool:
    """Whether the judge of this name gives scores; True where that is known only of the judge itself."""
    if name == "llm":
        return False
    found = _own_judges().get(name) if name not in get_args(JudgeName) else None
    made = found.load() if found else None
    return not isinstance(made, type) or hasattr(made, "scores")


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
    options: Mapping[str, Any] | None = None,
) -> Judge:
    """The judge of a dataset by name: its known rewards, trained on its preferences, or a model of its own.

    Args:
        name: `expert`, `bradley-terry`, `reward-model`, or `auto`: the expert where rewards are known, else
            `bradley-terry`; `llm`, a language model; or the name of an entry point of the group
            `softpref.judges`.
        dataset_dir: the data stage's folder.
        model, trust_remote_code, device, tracking_uri: of a `reward-model`; see
            `softpref.judges.reward_model.load_reward_judge`.
        splits, outcomes: those of that folder, if they have been read; None reads them as needed.
        seed, max_rows: of a `bradley-terry` judge, which learns from the split `judge` where there is one.
        options: with `model` of `llm`, see `softpref.judges.llm`, and of a judge of your own.

    Raises:
        ConfigError: there is no such judge, or this dataset cannot provide it.
        DataError: the outcomes or the reward are damaged.
    """
    check_judge(name, dataset_dir, model=model, options=options)
    if name == "llm":
        from softpref.judges.llm import LLMJudge, llm_options

        return LLMJudge(model, llm_options(model, options or {}))
    if name not in get_args(JudgeName):
        return _own_judge(name, model, options or {})
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
            return RewardJudge(read_rewards(folder / REWARD_FILE))
    if splits is None:
        splits = read_dataset(dataset_dir)
    split = JUDGE_SPLIT if JUDGE_SPLIT in splits else "train"
    pairs = preference_pairs(text_rows(splits.get(split, ())))
    return BradleyTerryJudge(pairs, seed=seed, max_rows=max_rows, split=split)


def _own_judges() -> dict[str, importlib.metadata.EntryPoint]:
    return {one.name: one for one in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _own_judge(name: str, model: str, options: Mapping[str, Any]) -> Judge:
    """The judge that an entry point makes.

    Raises:
        ConfigError: it refuses the options, or what it made is no judge.
    """
    point = _own_judges()[name]
    try:
        judge: Judge = point.load()(**{**options, **({"model": model} if model else {})})
    except TypeError as error:
        raise ConfigError(f"the judge {name!r} ({point.value}) takes other judge_options: {error}") from error
    needed = ("name", "description", "fingerprint", "probabilities")
    if lacking := [part for part in needed if not hasattr(judge, part)]:
        raise ConfigError(
            f"the judge {name!r} ({point.value}) lacks {', '.join(lacking)}; see softpref.judges.protocol"
        )
    return judge
