"""Rows are tokenized alike by one process and by many, and once where several train."""

import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from softpref.errors import DataError
from softpref.lm import tokenizing
from softpref.lm.row_files import read_rows, write_rows
from softpref.lm.tokenization import TokenizedSequence, tokenize_prompt, tokenize_row
from softpref.lm.tokenizing import RowText, tokenize_here, tokenize_rows, usable_cpus

LIMITS = {"max_prompt_length": 12, "max_completion_length": 8}
KNOWN = [TokenizedSequence([1, 2], [3], False)]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


def texts(count):
    rng = random.Random(0)
    words = ("the", "fox", "and", "bell", "moon", "owl")

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 4)))

    return [RowText(text(), [text() for _ in range(rng.choice((0, 1, 2, 3)))]) for _ in range(count)]


def direct(tokenizer, row):
    if row.completions:
        return tokenize_row(tokenizer, *row, **LIMITS)
    ids, cut = tokenize_prompt(tokenizer, row.prompt, max_length=LIMITS["max_prompt_length"])
    return [TokenizedSequence(ids, [], False, cut)]


def here(jobs, tokenizer, processes, **options):
    args = SimpleNamespace(dataset_num_proc=processes)
    return list(tokenize_here(enumerate(jobs), tokenizer, args, count=len(jobs), **{**LIMITS, **options}))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_the_rows_in_their_order(tokenizer, processes, capfd, caplog):
    rows = texts(700)  # several chunks for each
    found = here(rows, tokenizer, processes)
    assert found == [(number, direct(tokenizer, row)) for number, row in enumerate(rows)]
    assert capfd.readouterr().err == ""
    assert not caplog.records


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_cannot_be_used_says_why_in_its_place_and_what_is_known_stays(tokenizer, processes):
    refused = DataError("has no prompt")
    jobs = [RowText("a", [""]), KNOWN, refused, *texts(300), RowText("a", [[{"role": "user"}]])]
    found = [answer for _, answer in here(jobs, tokenizer, processes)]
    assert isinstance(found[0], DataError)
    assert str(found[0]) == "the completion '' has no token"
    assert found[1] is KNOWN
    assert found[2] is refused
    assert isinstance(found[-1], DataError)
    assert "must both be text" in str(found[-1])
    assert found[3:-1] == [direct(tokenizer, row) for row in jobs[3:-1]]


def test_chats_are_tokenized_by_processes_with_their_template(tokenizer):
    rows = [
        RowText([{"role": "user", "content": f"{'fox ' * n}?"}], [[{"role": "assistant", "content": "owl"}]])
        for n in range(9)
    ] * 30
    assert here(rows, tokenizer, 2) == here(rows, tokenizer, 1)


def test_rows_of_a_process_that_has_gone_are_tokenized_here(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("sys.executable", "/bin/false")
    rows = texts(300)
    assert here(rows, tokenizer, 2) == [(n, direct(tokenizer, row)) for n, row in enumerate(rows)]
    assert "a process that tokenizes has gone" in caplog.text


def test_processes_import_nothing_from_the_current_folder(tokenizer, tmp_path, monkeypatch, caplog):
    (tmp_path / "tokenizers.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*map(Path, sys.path[:1]), *sys.path[1:]])  # whatever stands in it
    rows = texts(300)
    assert here(rows, tokenizer, 2) == [(n, direct(tokenizer, row)) for n, row in enumerate(rows)]
    assert not caplog.records


def test_rows_are_tokenized_here_where_no_process_can_be_begun(tokenizer, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError

    monkeypatch.setattr("subprocess.Popen", refuse)
    rows = texts(300)
    assert here(rows, tokenizer, 2) == [(n, direct(tokenizer, row)) for n, row in enumerate(rows)]


def test_a_tokenizer_that_cannot_be_handed_over_works_here(make_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was begun"))
    own = make_tokenizer()
    own.of_this_process_alone = lambda text: text
    rows = texts(5)
    assert here(rows, own, 2) == [(n, direct(own, row)) for n, row in enumerate(rows)]
    assert "the tokenizer cannot be handed to others" in caplog.text


def test_processes_end_where_not_all_rows_are_taken(tokenizer, monkeypatch):
    begun = []
    popen = tokenizing.subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1])
    args = SimpleNamespace(dataset_num_proc=2)
    rows = tokenize_here(enumerate(texts(2000)), tokenizer, args, count=2000, **LIMITS)
    assert next(rows)[0] == 0
    rows.close()
    assert len(begun) == 2
    assert all(process.poll() is not None for process in begun)


@pytest.mark.parametrize(
    ("rows", "cpus", "expected"), [(3999, 8, 1), (12_000, 8, 3), (10**6, 2, 2), (10**6, 99, 4)]
)
def test_few_rows_begin_no_process_and_many_as_many_as_there_are_cpus(
    tokenizer, monkeypatch, rows, cpus, expected
):
    begun = []

    class Workers(tokenizing._Workers):
        def __init__(self, count, settings):
            begun.append(count)
            super().__init__(1, settings)

    monkeypatch.setattr(tokenizing, "_Workers", Workers)
    monkeypatch.setattr(tokenizing, "usable_cpus", lambda: cpus)
    args = SimpleNamespace(dataset_num_proc=None)
    assert list(tokenize_here([], tokenizer, args, count=rows, **LIMITS)) == []
    assert begun == ([expected] if expected > 1 else [])


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "99900000 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({}, None),
    ],
)
def test_cpus_are_those_that_the_process_is_bound_to_within_its_containers_limit(
    tmp_path, monkeypatch, files, limit
):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tokenizing, "_CGROUP", tmp_path)
    assert usable_cpus() == (limit or len(os.sched_getaffinity(0)))


class Process(SimpleNamespace):
    """One of two processes of a machine that train; `meet` is called where it waits for the other."""

    def __init__(self, folder, rank, meet=lambda: None):
        super().__init__(
            output_dir=str(folder),
            world_size=2,
            process_index=4 + rank,
            local_process_index=rank,
            dataset_num_proc=1,
            distributed_state=SimpleNamespace(wait_for_everyone=meet),
        )

    @contextmanager
    def main_process_first(self, local, desc):
        assert local
        yield


def of_two_processes(folder, tokenizer, monkeypatch, jobs):
    """What the first and the second process find, and how often each tokenized a row."""
    calls, found = [[], []], [[], []]

    def run(rank, meet=lambda: None):
        def counted(*args, **options):
            calls[rank].append(args)
            return tokenize_row(*args, **options)

        monkeypatch.setattr(tokenizing, "tokenize_row", counted)
        process = Process(folder, rank, meet)
        rows = tokenize_rows(
            lambda: enumerate(jobs), tokenizer, process, name="training row", count=len(jobs), **LIMITS
        )
        found[rank] += rows

    run(0, meet=lambda: run(1))  # the second reads before the first goes on
    return found, [len(made) for made in calls]


def test_the_first_process_of_a_machine_tokenizes_and_the_others_read(tmp_path, tokenizer, monkeypatch):
    rows = [row for row in texts(60) if row.completions]
    stale = tmp_path / "training-rows-4"
    write_rows(stale, [KNOWN])
    (stale / "whole").touch()
    found, calls = of_two_processes(tmp_path, tokenizer, monkeypatch, rows)
    assert found[0] == found[1] == [(n, direct(tokenizer, row)) for n, row in enumerate(rows)]
    assert calls == [len(rows), 0]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_read(tmp_path, tokenizer, monkeypatch):
    stale = tmp_path / "training-rows-4"
    write_rows(stale, [KNOWN])
    (stale / "whole").touch()
    other = [TokenizedSequence([4], [5], False)]
    process = Process(tmp_path, 0)
    options = {"name": "training row", "count": 0}
    assert list(tokenize_rows(lambda: [(0, other)], tokenizer, process, **options)) == [(0, other)]


def test_every_process_says_which_row_cannot_be_used(tmp_path, tokenizer, monkeypatch):
    rows = [RowText("a", ["b"]), RowText("a", [""])]
    found, _calls = of_two_processes(tmp_path, tokenizer, monkeypatch, rows)
    assert [str(answers[1][1]) for answers in found] == ["the completion '' has no token"] * 2


def test_rows_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr("softpref.lm.row_files._PART_ROWS", 2)
    rows = [
        [
            TokenizedSequence([1, 70_000], [3], False, True, False),
            TokenizedSequence([1, 70_000], [], True, True),
        ],
        [TokenizedSequence([5], [6, 7], True, False, True)],
        [TokenizedSequence([8], [65_535], False)],
    ]
    write_rows(tmp_path / "rows", rows)
    assert len(list((tmp_path / "rows").iterdir())) == 2
    assert list(read_rows(tmp_path / "rows")) == rows


def test_a_long_list_holds_each_id_once(tokenizer):
    args = SimpleNamespace(dataset_num_proc=1, world_size=1)
    big = [[TokenizedSequence([int("70000")], [int("70000"), int("70000")], False)] for _ in range(2)]
    found = [row for _, row in tokenize_rows(lambda: enumerate(big), tokenizer, args, name="row", count=2)]
    ids = [token for row in found for one in row for token in (*one.prompt, *one.completion)]
    assert ids == [70_000] * 6
    assert len({*map(id, ids)}) == 1
