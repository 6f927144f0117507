"""A judge of words and lengths, trained in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from softpref.errors import ConfigError
from softpref.judges.protocol import ScoringJudge, digest, sigmoid

if TYPE_CHECKING:
    from scipy import sparse

_HASHES = 2**14
_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # inverse regularisation, tried in turn


class BradleyTerryJudge(ScoringJudge):
    """A reward model small enough to be trained in seconds: logistic regression on what texts contain.

    Features are hashed word 1- and 2-grams and character 2- to 4-grams (each normalised to length 1), the
    logarithm of a text's length, its mean word length, its variety of words and the share of them that the
    prompt names. A pair's features are the difference of its texts', without intercept, which makes it a
    Bradley-Terry model; a soft label p counts as p of a win and 1 − p of a loss. Regularisation is chosen by
    log-loss on prompts left out in turn. Deterministic by seed.

    Args:
        pairs: `(prompt, better, worse, probability)`.
        split: of the dataset, from which they are.
        seed: of the folds and of the choice of `max_rows` among more pairs.

    Raises:
        ConfigError: fewer than two pairs, or none with a preference.
    """

    name = "bradley-terry"

    def __init__(
        self,
        pairs: Iterable[tuple[str, str, str, float]],
        *,
        seed: int = 0,
        max_rows: int = 20000,
        split: str = "train",
    ) -> None:
        from sklearn.model_selection import GroupKFold

        self.split = split
        table = list(pairs)
        random = np.random.default_rng(seed)
        if len(table) > max_rows:
            table = [table[i] for i in sorted(random.choice(len(table), max_rows, replace=False))]
        if len(table) < 2:
            raise ConfigError(
                f"the judge 'bradley-terry' needs training pairs, and the split {split} has {len(table)}"
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
            f"split {split}; its win rate is worth as much as its accuracy on the validation split"
        )
        self.fingerprint = digest([table, seed])

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
