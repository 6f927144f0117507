"""Judges: which of two completions is better, without a network. They see texts, never a model.

Evaluation asks them about samples, training rounds about new pairs. Scores are in nats under Bradley-Terry:
P(a beats b) = σ(score_a − score_b).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypedDict, get_args

import numpy as np

from softpref.errors import ConfigError, DataError
from softpref.records import OUTCOMES_FILE, REWARD_FILE, PreferenceRow, Text
from softpref.rewards import TextReward, read_reward

if TYPE_CHECKING:
    from scipy import sparse

JudgeName = Literal["auto", "expert", "bradley-terry"]
_HASHES = 2**14
_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # inverse regularisation of the trained judge, tried in turn


class Judge(Protocol):
    """Anything that scores completions; by default its comparisons follow from the scores by Bradley-Terry.

    It is asked about texts: a conversational prompt as `as_text(prompt, roles=True)`.

    Attributes:
        name: short and stable, like `expert`.
        description: for a reader of the report: what its scores are and where they come from.
        fingerprint: changes when its scores could change.
    """

    name: str
    description: str
    fingerprint: str

    @abstractmethod
    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]` scores in nats, of which only differences within a prompt mean anything."""

    def probabilities(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> np.ndarray:
        """`[n]`: P(first beats second) = σ(score of first − score of second)."""
        return sigmoid(self.scores(prompts, first) - self.scores(prompts, second))


class Outcomes(NamedTuple):
    """Every completion that belongs to a prompt.

    Attributes:
        completions: `N` texts.
        rewards: `[N]`, the expert's, in nats.
        weights: `[N]`, the probability that one candidate of a pair is this one; sums to 1.
    """

    completions: list[str]
    rewards: np.ndarray
    weights: np.ndarray


def read_outcomes(path: str | Path) -> dict[str, Outcomes]:
    """Read `outcomes.jsonl`: prompt → every completion that belongs to its set.

    Raises:
        DataError: a line is not JSON, lacks a field, or its lists differ in length.
    """
    outcomes = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                completions, rewards, weights = row["completions"], row["rewards"], row["weights"]
                entry = Outcomes(completions, np.asarray(rewards, float), np.asarray(weights, float))
                outcomes[row["prompt"]] = entry
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}, line {number}: expected prompt, completions, rewards, weights ({error!r})"
                ) from error
            if not len(completions) == len(rewards) == len(weights) or not completions:
                raise DataError(f"{path}, line {number}: completions, rewards and weights differ in length")
    return outcomes


class ExpertJudge(Judge):
    """The expert whose rewards the data were drawn from: looks completions up among the known outcomes.

    A completion outside its prompt's set (see `outside`) scores 1 nat less than the worst within.
    """

    name = "expert"

    def __init__(self, outcomes: Mapping[str, Outcomes]) -> None:
        self._rewards = {
            prompt: dict(zip(map(str.strip, entry.completions), entry.rewards.tolist(), strict=True))
            for prompt, entry in outcomes.items()
        }
        self._lowest = {prompt: min(rewards.values()) - 1.0 for prompt, rewards in self._rewards.items()}
        self.description = (
            f"the experts' own rewards, known for every completion of {len(outcomes)} prompts; "
            "a completion outside its prompt's set scores 1 nat less than the worst within"
        )
        self.fingerprint = _digest(self._rewards)

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Rewards, `[n]`.

        Raises:
            DataError: a prompt that `outcomes.jsonl` does not hold.
        """
        rewards = self._known_rewards(prompts, completions)
        lowest = np.array([self._lowest[prompt] for prompt in prompts])
        return np.where(np.isnan(rewards), lowest, rewards)

    def outside(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]` of bool: which completions do not belong to their prompt's set."""
        outside: np.ndarray = np.isnan(self._known_rewards(prompts, completions))
        return outside

    def _known_rewards(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]`, NaN for completions outside the set."""
        for prompt in prompts:
            if prompt not in self._rewards:
                raise DataError(f"{OUTCOMES_FILE} has no prompt {prompt!r}; use the judge 'bradley-terry'")
        pairs = zip(prompts, completions, strict=True)
        return np.array([self._rewards[prompt].get(text.strip(), np.nan) for prompt, text in pairs])


class BradleyTerryJudge(Judge):
    """A reward model small enough to be trained in seconds: logistic regression on what texts contain.

    Features are hashed word 1- and 2-grams and character 2- to 4-grams (each normalised to length 1), the
    logarithm of a text's length, its mean word length, its variety of words and the share of them that the
    prompt names. A pair's features are the difference of its texts', without intercept, which makes it a
    Bradley-Terry model; a soft label p counts as p of a win and 1 − p of a loss. Regularisation is chosen by
    log-loss on prompts left out in turn. Deterministic by seed.

    Args:
        pairs: `(prompt, better, worse, probability)` of the training split.
        seed: of the folds and of the choice of `max_rows` among more pairs.

    Raises:
        ConfigError: fewer than two pairs, or none with a preference.
    """

    name = "bradley-terry"

    def __init__(
        self, pairs: Iterable[tuple[str, str, str, float]], *, seed: int = 0, max_rows: int = 20000
    ) -> None:
        from sklearn.model_selection import GroupKFold

        table = list(pairs)
        random = np.random.default_rng(seed)
        if len(table) > max_rows:
            table = [table[i] for i in sorted(random.choice(len(table), max_rows, replace=False))]
        if len(table) < 2:
            raise ConfigError(
                f"the judge 'bradley-terry' needs training pairs, and the training split has {len(table)}"
            )
        share = np.array([row[3] for row in table])
        if not ((share != 0.5) & np.array([row[1] != row[2] for row in table])).any():
            raise ConfigError("the judge 'bradley-terry' needs pairs with a preference; all labels are ties")
        places: dict[tuple[str, str], int] = {}  # a text may meet many others: its features are made once
        first = np.array([places.setdefault((row[0], row[1]), len(places)) for row in table])
        second = np.array([places.setdefault((row[0], row[2]), len(places)) for row in table])
        features = self._features([prompt for prompt, _ in places], [text for _, text in places])
        compared = _Pairs(features, features.T.tocsr(), first, second, share)

        groups = np.unique([row[0] for row in table], return_inverse=True)[1]
        folds = min(3, groups.max() + 1)
        losses = np.zeros(len(_STRENGTHS))
        if folds > 1:
            for train, held in GroupKFold(folds).split(share, groups=groups):
                weights = None
                for i, strength in enumerate(_STRENGTHS):
                    weights = _fit_bradley_terry(compared.some(train), strength, weights)
                    losses[i] += _log_loss(compared.some(held).margins(weights), share[held])
        self._weights = _fit_bradley_terry(compared, _STRENGTHS[int(losses.argmin())])
        self.description = (
            f"a Bradley-Terry model of words, characters and length, trained on {len(table)} pairs of the "
            "training split; its win rate is worth as much as its accuracy on the validation split"
        )
        self.fingerprint = _digest([table, seed])

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Scores in nats, `[n]`."""
        return np.asarray(self._features(prompts, completions) @ self._weights).reshape(-1)

    def _features(self, prompts: Sequence[str], completions: Sequence[str]) -> sparse.csr_matrix:
        """Sparse `[n, features]`."""
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer

        word = HashingVectorizer(ngram_range=(1, 2), n_features=_HASHES, token_pattern=r"(?u)\w+|[^\w\s]")
        character = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=_HASHES)
        dense = np.zeros((len(completions), 4))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens = completion.lower().split()
            asked = set(prompt.lower().split())
            if tokens:
                dense[row] = (
                    np.log1p(len(tokens)),
                    sum(map(len, tokens)) / len(tokens) / 10,
                    len(set(tokens)) / len(tokens),
                    sum(token in asked for token in tokens) / len(tokens),
                )
        features = [word.transform(completions), character.transform(completions), sparse.csr_matrix(dense)]
        return sparse.hstack(features).tocsr()


class _Pairs(NamedTuple):
    """Pairs of texts: `features` of all texts, its transpose, row of the better, of the worse, P(better)."""

    features: sparse.csr_matrix
    transposed: sparse.csr_matrix
    first: np.ndarray
    second: np.ndarray
    share: np.ndarray

    def some(self, rows: np.ndarray) -> _Pairs:
        return self._replace(first=self.first[rows], second=self.second[rows], share=self.share[rows])

    def margins(self, weights: np.ndarray) -> np.ndarray:
        scores = self.features @ weights
        margins: np.ndarray = scores[self.first] - scores[self.second]
        return margins

    def gradient(self, errors: np.ndarray) -> np.ndarray:
        """Of Σ errors · margins with respect to the weights."""
        count = self.features.shape[0]
        by_text = np.bincount(self.first, errors, count) - np.bincount(self.second, errors, count)
        gradient: np.ndarray = self.transposed @ by_text
        return gradient


def _fit_bradley_terry(pairs: _Pairs, strength: float, start: np.ndarray | None = None) -> np.ndarray:
    """Weights `w` that minimise the log-loss of σ(margins) against soft labels + |w|² / (2 strength)."""
    from scipy import optimize

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = pairs.margins(weights)
        errors = sigmoid(margin) - pairs.share
        loss = _log_loss(margin, pairs.share) + weights @ weights / (2 * strength)
        return loss, pairs.gradient(errors) + weights / strength

    if start is None:
        start = np.zeros(pairs.features.shape[1])
    options = {"maxiter": 200, "gtol": 1e-3, "ftol": 1e-7}
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x)


def _log_loss(margin: np.ndarray, share: np.ndarray) -> float:
    """−Σ log-likelihood of soft labels under margins in nats."""
    return float((np.logaddexp(0, margin) - share * margin).sum())


def preference_pairs(rows: Iterable[TextRow]) -> Iterator[tuple[str, str, str, float]]:
    """Dataset rows with text prompts and completions as `(prompt, better, worse, P(better wins))`.

    Rankings and best-of-n rows give hard pairs: all ordered ones, or the best against each other.
    """
    for row in rows:
        completions = row["completions"]
        last = len(completions) - 1 if row["kind"] == "ranking" else 1
        for better in range(last):
            for worse in range(better + 1, len(completions)):
                share = row["probability"] if len(completions) == 2 else None
                yield row["prompt"], completions[better], completions[worse], 1.0 if share is None else share


def as_text(text: Text, *, roles: bool = False) -> str:
    """Plain text unchanged; messages as lines of their contents, with `roles` in front."""
    if isinstance(text, str):
        return text
    return "\n".join(
        f"{message['role']}: {message['content']}" if roles else message["content"] for message in text
    )


class TextRow(TypedDict):
    """A row of the dataset as judges are asked about it: all messages as texts, the prompt's with roles."""

    prompt: str
    completions: list[str]
    kind: str
    probability: float | None


def text_rows(rows: Iterable[PreferenceRow]) -> Iterator[TextRow]:
    """Dataset rows as judges are asked about them."""
    for row in rows:
        yield {
            "prompt": as_text(row["prompt"], roles=True),
            "completions": [as_text(completion) for completion in row["completions"]],
            "kind": row["kind"],
            "probability": row["probability"],
        }


class RewardJudge(Judge):
    """The expert whose reward can be read off any text, as the dataset's `reward.json` describes."""

    name = "expert"

    def __init__(self, reward: TextReward) -> None:
        self._reward = reward
        self.description = (
            f"the experts' own reward, known for every text: {len(reward.warmth)} words, and ease of reading"
        )
        self.fingerprint = _digest(dataclasses.asdict(reward))

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Rewards, `[n]`."""
        return np.array([self._reward(completion) for completion in completions])


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
) -> Judge:
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


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x) without overflow."""
    return 0.5 * (1 + np.tanh(values / 2))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
