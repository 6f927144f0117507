"""Many rows to tokens: in several processes where that pays, and once for all processes that train.

The processes are new ones that hold little but the tokenizer. Forks of a training process would inherit its
threads' locks, and processes that `multiprocessing` spawns would run the user's script again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from softpref.errors import DataError, SoftprefError
from softpref.lm.row_files import read_rows, write_rows
from softpref.lm.tokenization import TokenizedSequence, tokenize_prompt, tokenize_row
from softpref.records.dataset import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softpref.lm.arguments import StageArguments

logger = logging.getLogger(__name__)

Payload = TypeVar("Payload")

_CHUNK = 128  # rows that a process gets at once
_ROWS_EACH = 4000  # at least, for each process: it takes a second or two to start
_MOST = 4  # processes by default: one process feeds them all, and each takes some 100 MB
_CGROUP = Path("/sys/fs/cgroup")
_WHOLE = "whole"  # a file in a folder of rows that are all there


class RowText(NamedTuple):
    """A prompt with its completions; without any, it is tokenized alone, ready for generation."""

    prompt: Text
    completions: Sequence[Text] = ()


Job = RowText | list[TokenizedSequence] | SoftprefError
"""What to tokenize, or what is known already: tokens, or why the row cannot be used."""
Found = list[TokenizedSequence] | SoftprefError
"""A row's sequences, one for each completion (of a prompt alone, one without ids), or why there are none."""


def tokenize_rows(
    jobs: Callable[[], Iterable[tuple[Payload, Job]]],
    tokenizer: PreTrainedTokenizerBase,
    args: StageArguments,
    *,
    name: str,
    count: int,
    lenient: bool = False,
    **options: Any,
) -> Iterator[tuple[Payload, list[TokenizedSequence]]]:
    """Tokenize rows, in their order; the same whatever the number of processes of either kind.

    With several training processes, the first of each machine tokenizes, and the others read what it wrote
    into `args.output_dir`. All of them must call this, and take everything that it yields.

    Args:
        jobs: yields each row with whatever is handed on with it; may be called twice.
        args: `TrainingArguments` with `dataset_num_proc`.
        name: of one of the rows, for messages and files.
        count: how many of them are to be tokenized.
        lenient: whether a row that cannot be used comes as one sequence without ids, and is no error.
        options: of `tokenize_row`.

    Raises:
        DataError: a row cannot be used; names it.
        ConfigError: the tokenizer does not suit the rows.
    """

    def here() -> Iterator[tuple[Payload, Found]]:
        rows = tokenize_here(jobs(), tokenizer, args, count=count, **options)
        if not lenient:
            return rows
        none = [TokenizedSequence([], [], False)]
        return ((payload, none if isinstance(found, DataError) else found) for payload, found in rows)

    if args.world_size == 1:
        yield from _usable(here(), name)
        return
    first = args.process_index - args.local_process_index  # machines can share a disk
    folder = Path(str(args.output_dir)) / f"{name.replace(' ', '-')}s-{first}"
    with args.main_process_first(local=True, desc=f"tokenizing {name}s"):
        if args.local_process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
            if count:
                with contextlib.suppress(SoftprefError):  # every process meets it below, and says it
                    write_rows(folder, (found for _, found in _usable(here(), name)))
                    (folder / _WHOLE).touch()
    if (folder / _WHOLE).exists():
        rows = (payload for payload, _ in jobs())
        yield from _usable(zip(rows, read_rows(folder), strict=True), name)
    else:  # there was nothing to tokenize, or a row cannot be used
        yield from _usable(here(), name)
    args.distributed_state.wait_for_everyone()
    if args.local_process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)


def tokenize_here(
    jobs: Iterable[tuple[Payload, Job]],
    tokenizer: PreTrainedTokenizerBase,
    args: StageArguments,
    *,
    count: int,
    **options: Any,
) -> Iterator[tuple[Payload, Found]]:
    """As `tokenize_rows`, whatever other processes train."""
    processes = args.dataset_num_proc or min(usable_cpus(), _MOST, count // _ROWS_EACH)
    settings = _pickled((tokenizer, options)) if min(processes, count) > 1 else None
    if settings is None:
        for payload, job in jobs:
            yield payload, _answer(tokenizer, job, options) if isinstance(job, RowText) else job
        return
    rows = iter(jobs)
    waiting: deque[tuple[list[tuple[Payload, Job]], Future[list[Found] | None]]] = deque()
    with _Workers(processes, settings) as workers:
        while True:
            chunk = list(islice(rows, _CHUNK))
            if chunk:
                asked = [job for _, job in chunk if isinstance(job, RowText)]
                waiting.append((chunk, workers.submit(asked)))
                if len(waiting) <= 2 * processes:
                    continue
            if not waiting:
                return
            done, future = waiting.popleft()
            answers = iter(future.result() or ())
            for payload, job in done:
                if isinstance(job, RowText):  # if its process has died, it is tokenized here
                    yield payload, next(answers, None) or _answer(tokenizer, job, options)
                else:
                    yield payload, job


def usable_cpus() -> int:
    """CPUs that this process may use: those it is bound to, up to its container's limit."""
    bound = getattr(os, "sched_getaffinity", None)  # macOS has none
    cpus = len(bound(0)) if bound else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2 and 1
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            quota, period = map(int, " ".join((_CGROUP / file).read_text() for file in files).split())
            return max(1, min(cpus, quota // period)) if quota > 0 else cpus
    return cpus


def _usable(
    rows: Iterable[tuple[Payload, Found]], name: str
) -> Iterator[tuple[Payload, list[TokenizedSequence]]]:
    """The rows with their tokens, one object in memory for each id, not for each token."""
    share: dict[int, int] = {}
    for number, (payload, found) in enumerate(rows):
        if isinstance(found, DataError):
            raise DataError(f"{name} {number}: {found}") from found
        if isinstance(found, SoftprefError):
            raise found
        for ids in (found[0].prompt, *(sequence.completion for sequence in found)):
            ids[:] = [share.setdefault(token, token) for token in ids]
        yield payload, found


def _answer(tokenizer: PreTrainedTokenizerBase, text: RowText, options: dict[str, Any]) -> Found:
    try:
        if text.completions:
            return tokenize_row(tokenizer, text.prompt, text.completions, **options)
        ids, truncated = tokenize_prompt(tokenizer, text.prompt, max_length=options.get("max_prompt_length"))
        return [TokenizedSequence(ids, [], False, truncated)]
    except SoftprefError as error:
        return error


def _pickled(settings: tuple[Any, dict[str, Any]]) -> bytes | None:
    try:
        return pickle.dumps(settings)
    except Exception as error:  # any type, of a tokenizer's own state
        logger.warning("tokenizing in one process: the tokenizer cannot be sent to others: %s", error)
        return None


class _Workers:
    """Processes that tokenize; each has a thread here that sends it rows and waits for their tokens."""

    def __init__(self, count: int, settings: bytes) -> None:
        self._settings = settings
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = False
        self._threads = ThreadPoolExecutor(count, initializer=self._begin)

    def submit(self, texts: list[RowText]) -> Future[list[Found] | None]:
        """The texts' tokens; None if the process has died."""
        return self._threads.submit(self._ask, texts)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = True
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(OSError):  # what a pipe still held
                process.communicate()

    def _begin(self) -> None:
        # with several processes a tokenizer's own threads would only compete
        environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        self._own.process = None
        try:
            process = self._start(environment)
        except OSError:
            return
        self._own.process = process
        self._processes.append(process)
        with contextlib.suppress(OSError):
            process.stdin.write(self._settings)  # type: ignore[union-attr]

    def _start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],  # the current folder is no place to import from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,  # an interrupt is for this process; the others end with their input
        )

    def _ask(self, texts: list[RowText]) -> list[Found] | None:
        if not texts:
            return []
        process = self._own.process
        try:
            if process is None:
                raise OSError
            pickle.dump(texts, process.stdin)
            process.stdin.flush()
            found: list[Found] = pickle.load(process.stdout)
            return found
        except (OSError, EOFError, pickle.UnpicklingError):
            if not self._ended:
                logger.warning("a process that tokenizes has died; its rows are tokenized in this one")
            return None


def _serve() -> None:
    """Answer what comes on standard input, to its end; other output goes to standard error."""
    texts, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(ImportError):  # where the classes are of a tokenizer with code of its own
        from transformers import dynamic_module_utils

        dynamic_module_utils.init_hf_modules()  # type: ignore[no-untyped-call]
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer, options = pickle.load(texts)
        while True:
            pickle.dump([_answer(tokenizer, text, options) for text in pickle.load(texts)], answers)
            answers.flush()


if __name__ == "__main__":
    _serve()
