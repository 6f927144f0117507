"""Training rows that change with each round: drawn from the present policy, judged, made into rows.

Knows no trainer: drawing, scoring and gathering over processes are the caller's functions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from softpref.errors import ConfigError
from softpref.judges.protocol import is_telling
from softpref.judges.texts import as_text
from softpref.lm.sampling import Sample, sampling_noise
from softpref.lm.tokenization import decode_completion
from softpref.lm.tokenizing import RowText
from softpref.objectives.preference import PreferenceKind
from softpref.progress import progress
from softpref.records.dataset import Text
from softpref.spo.config import SPOConfig
from softpref.spo.degree import add_removed
from softpref.spo.reference import Scorer, set_reference_logps
from softpref.spo.rows import Row, extremes, with_levels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softpref.judges.protocol import Judge

logger = logging.getLogger(__name__)

_FILE = "round_rows.json"
_DRAWN_AT_ONCE = 4096


class RoundRows(Dataset[Row]):
    """The rows of the present round, all of them on every process.

    Args:
        rows: one for each row of a round: `prompt` (ids) and `completions`, where the first round trains on
            given rows or the first completion is the answer of self-play.
        prompts: the same prompts, text or messages.
        args: see `SPOConfig`: `rounds`, `train_on`, `completions_per_prompt`, `method`, `opponent_history`.
        tokenizer: decodes what was drawn.
        stop_ids: ids that end a completion; one that ends with another id was cut.
        judge: see `softpref.judges.protocol`; None in self-play.
        draw: `(prompts, noise [n, max_completion_length], progress) -> samples` of the present policy.
        score: sequence log-probabilities under the present policy of `(prompt, completion)` ids.
        score_initial: the same under the initial model, for `args.mixes_references`.
        shares: from this process's part of a list to the whole; part r of w has every w-th element from r.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Text],
        args: SPOConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        judge: Judge | None,
        draw: Callable[[list[list[int]], Tensor, Callable[[int], object]], list[Sample]],
        score: Scorer,
        score_initial: Scorer,
        shares: Callable[[list[Any], int], list[Any]],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._given, self._prompts, self._args = rows, prompts, args
        self._tokenizer, self._stop_ids, self._judge = tokenizer, frozenset(stop_ids), judge
        self._draw, self._shares = draw, shares
        self._score, self._score_initial = score, score_initial
        self._rank, self._world_size = rank, world_size
        self.rows: list[Row] = []
        self._opponents: list[list[list[int]]] = []  # of the latest rounds, a completion for each row
        self.number: int | None = None
        """The present round, from 0; None before the first."""
        self.epoch = 0
        """Of training, from 0, which gives rows their degree levels."""
        self.left_out = 0.0
        """Share of the rows drawn last that are left out, see `SPOConfig.cut_rows`."""

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, index: int) -> Row:
        return with_levels(self.rows[index], self._args, self.epoch, index)

    def begin(self, number: int) -> None:
        """Draw the rows of round `number`, unless they are here (from a checkpoint)."""
        if self.number == number:
            return
        if self._args.train_on == "preferences" and number == 0:
            self.rows = [row.copy() for row in self._given]
        else:
            self.rows = self._drawn(number)
            if self._args.degree_weight:
                self._add_removed(number)
        if self._args.refers_to_previous:
            set_reference_logps(self.rows, self._score_reference)
        self.number = number

    def _score_reference(self, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
        """Under this round's reference: the present policy, or its mixture with the initial model."""
        previous, share = self._score(sequences), self._args.initial_share
        if not self._args.mixes_references:
            return previous
        initial = self._score_initial(sequences)
        return [share * ours + (1 - share) * one for ours, one in zip(initial, previous, strict=True)]

    def forget(self) -> None:
        """Have the next round draw its rows, whichever it is."""
        self.number, self.left_out, self._opponents = None, 0.0, []

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint what the present rows have beyond the given ones."""
        rows = [
            {name: value for name, value in row.items() if value != given.get(name)}
            for row, given in zip(self.rows, self._given, strict=True)
        ]
        lacks = [
            [
                name for name in given if name not in row
            ]  # a drawn row has no log-probabilities of the given one
            for row, given in zip(self.rows, self._given, strict=True)
        ]
        state = {
            "round": self.number,
            "left_out": self.left_out,
            "rows": rows,
            "lacks": lacks,
            "opponents": self._opponents,
        }
        (Path(folder) / _FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Continue with a checkpoint's rows.

        Raises:
            ConfigError: the checkpoint holds none, or another number of them.
        """
        file = Path(folder) / _FILE
        if not file.is_file():
            raise ConfigError(
                f"checkpoint {folder} holds no rows of a round ({_FILE}); resume with the settings of rounds "
                "and train_on that it was saved with"
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        if len(state["rows"]) != len(self):
            raise ConfigError(
                f"checkpoint {folder} holds a round of {len(state['rows'])} rows, the training data have "
                f"{len(self)}; resume with the data that it was saved with"
            )
        self.number, self.left_out = state["round"], state.get("left_out", 0.0)
        self._opponents = state.get("opponents", [])
        lacks = state.get("lacks") or [[]] * len(self)
        rows: Any = [
            {**{name: value for name, value in given.items() if name not in lacking}, **row}
            for given, row, lacking in zip(self._given, state["rows"], lacks, strict=True)
        ]
        self.rows = rows

    def _drawn(self, number: int) -> list[Row]:
        count = 1 if self._judge is None else self._args.completions_per_prompt
        at_once = max(1, _DRAWN_AT_ONCE // count)
        rows: list[Row] = []
        with progress(
            f"round {number + 1}, drawing completions",
            total=-(-len(self) * count // self._world_size),
            unit="completion",
            disable=bool(self._args.disable_tqdm) or self._rank > 0,
        ) as loop:
            for start in range(0, len(self), at_once):
                here = range(start, min(start + at_once, len(self)))
                # the 1 separates the seed from those of `SampleBuffer`: zeros at a seed's end do not count
                rows += self._chunk(here, count, (self._args.seed, number, start, 1), loop.update)
        if self._args.opponent_history > 1 and self._args.train_on == "self_play":
            rows = self._against_history(rows, number)
        if self._args.cut_rows == "leave_out":
            self._leave_cut_rows_out(rows, number)
        return rows

    def _against_history(self, rows: list[Row], number: int) -> list[Row]:
        """The rows, each with the opponent of a round chosen by chance among the latest."""
        newest = [row["completions"][1] for row in rows]
        self._opponents = [*self._opponents, newest][-self._args.opponent_history :]
        random = np.random.default_rng((self._args.seed, number, 2))
        rounds = random.integers(len(self._opponents), size=len(rows)).tolist()
        return [self._against_answer(i, self._opponents[one][i]) for i, one in enumerate(rounds)]

    def _add_removed(self, number: int) -> None:
        """Give what was drawn its texts for the degree loss."""
        texts = (
            RowText(prompt, [self._message(index, one) for one in row["completions"]])
            for index, (prompt, row) in enumerate(zip(self._prompts, self.rows, strict=True))
        )
        name = f"row of round {number + 1}"
        add_removed(self.rows, texts, self._tokenizer, self._args, stop_ids=self._stop_ids, name=name)

    def _message(self, index: int, completion: list[int]) -> Text:
        """A completion as its prompt is, text or messages."""
        text = self._text(index, completion)
        plain = isinstance(self._prompts[index], str)
        return text if plain else [{"role": "assistant", "content": text}]

    def _leave_cut_rows_out(self, rows: list[Row], number: int) -> None:
        """Give weight 0 to rows with a completion that was cut, and theirs to the others.

        Raises:
            ConfigError: in the first round none is left.
        """
        whole = [all(map(self._ended, row["completions"])) for row in rows]
        cut = whole.count(False)
        self.left_out = cut / len(rows)
        limit = f"max_completion_length={self._args.max_completion_length}"
        weights = [row.get("weight", 1.0) * kept for row, kept in zip(rows, whole, strict=True)]
        if not any(weights) and number == 0:
            raise ConfigError(
                f"in every row drawn for the first round a completion reached {limit}, so none takes part; "
                "raise it, or set cut_rows to keep"
            )
        if cut and self._rank == 0:
            logger.warning(
                "round %d: %d of %d rows have a completion that reached %s, and are left out",
                number + 1,
                cut,
                len(rows),
                limit,
            )
        if cut or any("weight" in row for row in rows):
            scale = len(rows) / (sum(weights) or 1)  # where none takes part
            for row, weight in zip(rows, weights, strict=True):
                row["weight"] = weight * scale

    def _ended(self, completion: list[int]) -> bool:
        return completion[-1] in self._stop_ids

    def _chunk(
        self, here: range, count: int, seed: tuple[int, ...], progress: Callable[[int], object]
    ) -> list[Row]:
        """Rows of some prompts; samples and judging are dealt to the processes round robin."""
        total = len(here) * count
        noise = sampling_noise(
            total,
            self._args.max_completion_length,
            seed=int(np.random.default_rng(seed).integers(2**62)),
        )
        mine = list(range(self._rank, total, self._world_size))
        drawn = self._draw([self._given[here[g // count]]["prompt"] for g in mine], noise[mine], progress)
        completions = self._shares([sample.completion for sample in drawn], total)
        groups = [completions[i * count : (i + 1) * count] for i in range(len(here))]
        own = range(self._rank, len(here), self._world_size)
        if self._judge is None:
            rows = [self._against_answer(here[i], groups[i][0]) for i in own]
        else:
            prompts = [as_text(self._prompts[here[i]], roles=True) for i in own]
            texts = [[self._text(here[i], one) for one in groups[i]] for i in own]
            tables = win_tables(self._judge, prompts, texts)
            rows = [self._judged(here[i], groups[i], table) for i, table in zip(own, tables, strict=True)]
        return self._shares(rows, len(here))

    def _text(self, index: int, completion: list[int]) -> str:
        ids = self._given[index]["prompt"]
        return decode_completion(self._tokenizer, self._prompts[index], ids, completion)

    def _against_answer(self, index: int, completion: list[int]) -> Row:
        answer = self._given[index]["completions"][0]
        return self._row(index, [answer, completion], 1.0, "pairwise", [1.0, 0.0])

    def _judged(self, index: int, completions: list[list[int]], table: np.ndarray) -> Row:
        """A row of all completions drawn, or of the two that the judge thinks farthest apart.

        If cut ones are to be left out and at least two have ended, only those that have.
        """
        ended = [place for place, one in enumerate(completions) if self._ended(one)]
        if self._args.cut_rows == "leave_out" and len(ended) > 1:
            completions, table = [completions[place] for place in ended], table[np.ix_(ended, ended)]
        wins = table.sum(1) / (len(completions) - 1)
        order = np.argsort(-wins, kind="stable").tolist()
        if self._args.method != "sppo":
            order = [order[0], order[-1]]
        pair = len(order) == 2
        return self._row(
            index,
            [completions[place] for place in order],
            float(table[order[0], order[1]]) if pair else 1.0,
            "pairwise" if pair else "ranking",
            [float(wins[place]) for place in order],
        )

    def _row(
        self,
        index: int,
        completions: list[list[int]],
        probability: float,
        kind: PreferenceKind,
        wins: list[float],
    ) -> Row:
        given = self._given[index]
        row: Row = {
            "prompt": given["prompt"],
            "completions": completions,
            "probability": probability,
            "kind": kind,
        }
        if "weight" in given:
            row["weight"] = given["weight"]
        if self._args.method == "sppo":
            row["win_probabilities"] = wins
            if self._args.sppo_completions == "extremes":
                row = extremes(row)
        return row


def win_tables(judge: Judge, prompts: Sequence[str], groups: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """P(completion i beats completion j) of each prompt's completions: `[n, n]`, zero on the diagonal.

    Raises:
        ConfigError: the judge answers with anything but a probability for each pair, or leaves one unjudged.
    """
    places = [np.triu_indices(len(texts), k=1) for texts in groups]
    triples = [
        (prompt, texts[i], texts[j])
        for prompt, texts, place in zip(prompts, groups, places, strict=True)
        for i, j in zip(*(indices.tolist() for indices in place), strict=True)
    ]
    asked, first, second = zip(*triples, strict=True) if triples else ((), (), ())
    chances = np.asarray(judge.probabilities(asked, first, second), float) if triples else np.zeros(0)
    if missing := int(np.isnan(chances).sum()):
        reason = f": {judge.ended}" if is_telling(judge) and judge.ended else ""
        raise ConfigError(
            f"the judge left {missing} of {len(triples)} pairs unjudged{reason}; a round needs a verdict of "
            "every pair. Give the same command again once it can answer: training continues from its last "
            "checkpoint"
        )
    if chances.shape != (len(triples),) or not ((chances >= 0) & (chances <= 1)).all():
        raise ConfigError(
            f"the judge was asked to compare {len(triples)} pairs; its probabilities must be as many numbers "
            f"in [0, 1], got {chances!r:.200}"
        )
    tables, start = [], 0
    for texts, (i, j) in zip(groups, places, strict=True):
        table = np.zeros((len(texts), len(texts)))
        table[i, j] = chances[start : start + len(i)]
        table[j, i] = 1 - table[i, j]
        tables.append(table)
        start += len(i)
    return tables
