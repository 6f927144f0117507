"""Which completion of a row is better, and how surely: votes, scores, ranks and labels put it in order.

What cannot be read is `Refused`; what the configuration does not want is `LeftOut`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from softpref.data.columns import Layout, Record, value_at
from softpref.data.config import DataConfig
from softpref.data.texts import LeftOut, Refused, describe, read_field, read_list, read_number, short
from softpref.errors import ConfigError

Votes = tuple[float, float, float]  # for the first, for the second, for neither

_MEANINGS = {
    "preference": {
        **{"a": "a", "b": "b", "tie": "tie", "1": "a", "2": "b"},
        **{"model_a": "a", "model_b": "b", "tie (bothbad)": "tie"},
    },
    "votes": {"1": "a", "2": "b", "0": "tie"},
}


class Order(NamedTuple):
    """Which of a row's completions count, best first.

    Attributes:
        places: their places among those given.
        kind: `pairwise`, `best_of_n` or `ranking`.
        probability: that the first of a pair with a soft label beats the second, else None.
    """

    places: Sequence[int]
    kind: str
    probability: float | None = None


def order_pair(record: Record, layout: Layout, config: DataConfig) -> Order:
    """The order of two completions, by whatever the record says of them."""
    columns, label = layout.columns, layout.label
    if not label:
        return _pair(1.0, True, config)
    if label == ("probability",):
        probability = read_number(read_field(record, columns["probability"]), "probability")
        if not 0 <= probability <= 1:
            raise Refused("probability is outside 0 to 1", str(probability))
        return _pair(probability, False, config)
    if label[0].startswith("score_") or label[0] in ("margin", "strength"):
        numbers = [read_number(read_field(record, columns[role]), role) for role in label]
        difference = numbers[0] - numbers[1] if len(numbers) == 2 else numbers[0]
        if label == ("strength",):
            if abs(difference) > 3:
                raise Refused("strength is outside -3 to 3", f"{difference:g}")
            difference = -difference  # negative where the first is better
        if not math.isfinite(difference):
            raise Refused("difference is not finite", str(numbers))
        return _pair(_sigmoid((config.score_scale or 1.0) * difference), False, config)
    if label == ("preference",):
        return _by_votes(_vote(read_field(record, columns["preference"]), "preference", config), config)
    if label == ("votes",):
        each = [_vote(value, "votes", config) for value in read_list(record, "votes", columns["votes"])]
        votes = (sum(one[0] for one in each), sum(one[1] for one in each), sum(one[2] for one in each))
    else:
        roles = [*label, *(["votes_equal"] if "votes_equal" in columns else [])]
        counts = [read_number(read_field(record, columns[role]), role) for role in roles]
        if min(counts) < 0:
            raise Refused("negative votes", str(counts))
        votes = (counts[0], counts[1], counts[2] if len(counts) == 3 else 0.0)
    return _by_votes(votes, config, least=config.min_votes)


def order_list(count: int, record: Record, layout: Layout, config: DataConfig) -> Order:
    """The order of a list of completions, by its scores, ranks, order or best, or as this stage writes it."""
    falling = [float(-place) for place in range(count)]
    if not layout.label:
        return order_by_scores(falling, config)
    role = layout.label[0]
    column = layout.columns[role]
    if role == "probability":  # beside kind; null unless the label of a pair is soft
        if value_at(record, column) is None:
            only_best = read_field(record, layout.columns["kind"]) == "best_of_n"
            return order_by_scores(falling, config, only_best=only_best)
        if count != 2:
            raise Refused("probability of a list that is no pair", f"{count} completions")
        return order_pair(record, layout._replace(label=("probability",)), config)
    if role == "best":
        best = read_number(read_field(record, column), "best")
        if not best.is_integer() or not 0 <= best < count:
            raise Refused("best is out of range", f"{best:g}, expected 0 to {count - 1}")
        scores = [float(place == best) for place in range(count)]
        return order_by_scores(scores, config, only_best=True)
    numbers = [read_number(value, role) for value in read_list(record, role, column)]
    if role == "order":
        if sorted(numbers) != list(range(count)):
            raise Refused("order does not name each completion once", f"{numbers}, expected 0 to {count - 1}")
        return order_by_scores([float(-numbers.index(place)) for place in range(count)], config)
    if len(numbers) != count:
        raise Refused(f"{role} and completions differ in number", f"{len(numbers)} and {count}")
    return order_by_scores([-number for number in numbers] if role == "ranks" else numbers, config)


def order_by_scores(scores: Sequence[float], config: DataConfig, *, only_best: bool = False) -> Order:
    """The order of completions with scores, higher is better.

    Args:
        only_best: trust the best alone, whatever `config.list_kind` says.

    Raises:
        Refused: equal scores, which a ranking cannot hold; `LeftOut` for a tie.
    """
    only_best = only_best or config.list_kind == "best_of_n"
    order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: ties stay in given order
    top = scores[order[0]]
    if len(order) == 2:
        tie = scores[order[1]] == top
        return _pair(0.5 if tie else 1.0, not tie, config, order)
    if only_best:  # ties below the best do no harm
        kept = [order[0], *(index for index in order if scores[index] != top)]
    else:
        kept = [next(same) for _, same in itertools.groupby(order, key=lambda index: scores[index])]
    if len(kept) < len(order):
        if config.ties == "half":
            raise Refused("equal scores", "a ranking has no ties; ties='drop' leaves out all but the first")
        if len(kept) < 2:
            raise LeftOut("tie")
    if len(kept) == 2:
        return _pair(1.0, True, config, kept)
    return Order(kept, "best_of_n" if only_best else "ranking")


def order_by_verdicts(
    count: int, record: Record, layout: Layout, config: DataConfig
) -> list[Order | LeftOut]:
    """The order of each judged pair of completions.

    Verdicts are a matrix, in whose row i and column j is how often i won over j (a number or a share; nothing
    in both places of a pair means that nobody judged it), or a list of labels like those of `preference`, for
    the pairs (1, 2), (1, 3), … (2, 3), … in this order.
    """
    pairs = list(itertools.combinations(range(count), 2))
    values = read_list(record, "verdicts", layout.columns["verdicts"])
    rows = [value for value in values if isinstance(value, list)]
    if len(rows) == len(values) == count and all(len(row) == count for row in rows):
        wins = [
            [read_number(int(cell) if isinstance(cell, bool) else cell or 0, "verdict") for cell in row]
            for row in rows
        ]
        if min(map(min, wins)) < 0:
            raise Refused("negative verdicts", short(wins))
        judged: list[Votes] = [(wins[first][second], wins[second][first], 0.0) for first, second in pairs]
    elif len(values) == len(pairs) and not rows:
        nothing = (0.0, 0.0, 0.0)
        judged = [nothing if value is None else _vote(value, "preference", config) for value in values]
    else:
        expected = f"{count} rows of {count}, or {len(pairs)} labels, for {count} completions"
        raise Refused("verdicts fit neither a matrix nor a list of all pairs", f"expected {expected}")
    found: list[Order | LeftOut] = []
    for pair, votes in zip(pairs, judged, strict=True):
        if any(votes):
            try:
                least = config.min_votes if config.min_votes > 1 else 0
                found.append(_by_votes(votes, config, pair, least=least))
            except LeftOut as reason:
                found.append(reason)
    if not found:
        raise Refused("no votes")
    return found


def read_thumb(value: object) -> float:
    """1 for a label true, 0 for false."""
    text = str(value).strip().casefold()
    if text not in ("true", "false", "1", "0", "1.0", "0.0"):
        raise Refused("label is neither true nor false", describe(value))
    return float(text in ("true", "1", "1.0"))


def _vote(value: object, role: str, config: DataConfig) -> Votes:
    """What one label says of a pair."""
    meanings = config.preference_values or _MEANINGS[role]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    key = value if isinstance(value, str) else json.dumps(value, default=str)
    key = key.strip().casefold()
    meaning = {known.casefold(): meaning for known, meaning in meanings.items()}.get(key)
    if meaning is None:
        if key == "0" and meanings is _MEANINGS["preference"]:
            raise ConfigError(
                'a label 0 can mean two things; say which in preference_values: {"1": "a", "2": "b", "0": '
                '"tie"} or {"0": "a", "1": "b"}'
            )
        raise Refused(f"unknown {role} value (known: {', '.join(meanings)})", short(value))
    return float(meaning == "a"), float(meaning == "b"), float(meaning == "tie")


def _by_votes(
    votes: Votes, config: DataConfig, places: Sequence[int] = (0, 1), *, least: float = 0.0
) -> Order:
    """A pair by the share of votes for its first completion; a single vote is a hard label.

    Args:
        least: votes that a pair needs.
    """
    first, second, equal = votes
    if not first + second + equal:
        raise Refused("no votes")
    if config.ties == "drop":
        equal = 0.0
    total = first + second + equal
    if not total:
        raise LeftOut("tie")
    if total < least and not math.isclose(total, least):  # shares of votes sum to 0.999…
        raise LeftOut("fewer votes than min_votes", f"{total:g} of {config.min_votes}")
    hard = total == 1 and {first, second} == {0, 1}
    return _pair((first + equal / 2) / total, hard, config, places)


def _pair(probability: float, hard: bool, config: DataConfig, places: Sequence[int] = (0, 1)) -> Order:
    """A pair of which the first completion is better with this probability."""
    if probability < 0.5:
        places, probability = places[::-1], 1 - probability
    if probability == 0.5 and (config.ties == "drop" or config.labels == "hard"):
        raise LeftOut("tie")
    soft = not hard and config.labels == "soft"
    return Order(places, "pairwise", probability if soft else None)


def _sigmoid(value: float) -> float:
    tail = math.exp(-abs(value))  # does not overflow
    return 1 / (1 + tail) if value >= 0 else tail / (1 + tail)
