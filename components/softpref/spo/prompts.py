"""The prompts that the KL term's samples answer: those of the rows, of a separate set, or of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from softpref.errors import ConfigError, DataError
from softpref.lm.tokenization import log_findings
from softpref.lm.tokenizing import Job, RowText, tokenize_rows
from softpref.spo.config import SPOConfig
from softpref.spo.rows import cell, mapping_of, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def kl_prompts(
    args: SPOConfig,
    given: Sequence[list[int]],
    prompt_dataset: Iterable[Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[list[int]]]:
    """Ids of the prompts that the KL term's samples answer, set by set, as `SPOConfig.kl_prompts` says.

    Args:
        given: those of all training rows.
        prompt_dataset: the separate ones.
    """
    if prompt_dataset is None and args.kl_prompts in ("separate", "both"):
        raise ConfigError(
            f"kl_prompts is {args.kl_prompts}, but there is no separate prompt set: give SPOTrainer a "
            "prompt_dataset, or the data stage a prompts_source"
        )
    sets: list[list[list[int]]] = []
    if prompt_dataset is None or args.kl_prompts != "separate":
        sets.append([*given])
    if prompt_dataset is not None and args.kl_prompts != "preferences":
        sets.append(_tokenized(prompt_dataset, tokenizer, args))
    return sets


def _tokenized(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, args: SPOConfig
) -> list[list[int]]:
    rows = rows_of(rows, "prompt_dataset")
    prompts: list[list[int]] = []
    counts: Counter[str] = Counter()

    def jobs() -> Iterator[tuple[None, Job]]:
        for row in rows:
            try:
                yield None, RowText(cell(mapping_of(row), "prompt"))
            except DataError as error:
                yield None, error

    limit = args.max_prompt_length
    made = tokenize_rows(jobs, tokenizer, args, name="prompt row", count=len(rows), max_prompt_length=limit)
    for _, [found] in made:
        prompts.append(found.prompt)
        counts.update(["given", *(["cut_prompt"] if found.prompt_truncated else [])])
    if not prompts:
        raise DataError("prompt_dataset holds no prompt; the KL term needs some to sample from")
    if args.process_index == 0:
        log_findings(counts, "prompt rows")
    return prompts
