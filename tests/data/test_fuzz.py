"""Damaged files give rows or a sentence, never a traceback; no good row is lost unlisted or changed.

In the suite a few fixed examples run. All of it, 20,000 rows, in some minutes:

    SOFTPREF_FUZZ=20000 python -m pytest -q tests/data/test_fuzz.py
"""

import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from softpref.config import build_config, read_mapping
from softpref.data.config import DataConfig
from softpref.data.intake import Intake, RejectionLog, Source
from softpref.data.sources import open_source
from softpref.errors import ConfigError, DataError

ROWS = 10
_FULL = int(os.environ.get("SOFTPREF_FUZZ", "0"))
_TESTS = 4
fuzz = settings(
    max_examples=-(-_FULL // (ROWS * _TESTS)) if _FULL else 60,
    derandomize=not _FULL,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(
        st.just("insert"),
        st.floats(0, 1),
        st.sampled_from(
            [
                *(b'"', b'""', b"'", b"\n", b"\r", b"\0", b",", b"{", b"[", b"}", b"NaN", b"&a *a", b"\t"),
                *(b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\x1f\x8b"),
                *(b"9" * 5000, b"[" * 20000),
            ]
        ),
    ),
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**5000),
    st.floats(),
    st.sampled_from(["", " ", "\ud800", "\0", "NaN", "[", '{"role": 1}', '[{"role": "user", "content": 1}]']),
    st.lists(st.none(), max_size=2),
    st.just([{"role": "user", "content": None}]),
    st.just([{"from": {}, "value": []}]),
    st.just({"role": [], "content": {}}),
    st.just([[[[]]]] * 2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
FORMS = {
    "pair": lambda i: {"chosen": f"better {i}", "rejected": f"worse {i}", "weight": i},
    "votes": lambda i: {
        "completion_a": f"better {i}",
        "completion_b": f"worse {i}",
        "votes_a": 2,
        "votes_b": 1,
    },
    "label": lambda i: {"response_a": f"better {i}", "response_b": f"worse {i}", "winner": "model_a"},
    "probability": lambda i: {"chosen": f"better {i}", "rejected": f"worse {i}", "probability": 0.75},
    "list": lambda i: {"completions": [f"better {i}", f"worse {i}"], "scores": [2, 1]},
    "verdicts": lambda i: {"completions": [f"better {i}", f"worse {i}"], "verdicts": [[0, 2], [1, 0]]},
}


def records(form):
    return [{"prompt": f"Question {i}?", **FORMS[form](i)} for i in range(1, ROWS + 1)]


def dumps(value):
    """JSON, also of integers that Python refuses to write."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**4000:
        return "9" * 5000
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def as_json_lines(rows):
    return "\n".join(map(dumps, rows)).encode() + b"\n"


def as_json(rows):
    return ("[\n" + ",\n".join(map(dumps, rows)) + "\n]").encode()


def as_csv(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    cells = [{k: v if isinstance(v, str) else dumps(v) for k, v in row.items()} for row in rows]
    writer.writerows(cells)
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def damaged(data, damage):
    kind, share, value = damage
    place = min(int(share * len(data)), len(data) - 1)
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ value]) + data[place + 1 :], place
    if kind == "cut":
        return data[:place], place
    return data[:place] + value + data[place:], place


def take(name, data, **options):
    """Accepted rows and reasons of listed ones, both by number, and why the file was refused (or empty)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        log = RejectionLog(Path(folder) / "rejected.jsonl")
        config = DataConfig(source=str(path), **options)
        intake = Intake(config, Path(folder) / "spool.jsonl", log)
        fault = ""
        try:
            intake.take(Source(open_source(str(path)), config, str(path)))
        except (ConfigError, DataError) as error:
            fault = str(error)
            assert fault.strip()
        log.close()
        if fault:
            return {}, {}, fault
        listed = {}
        for line in Path(folder, "rejected.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            listed[entry["source_row"]] = entry["reason"]
        return {row.source_row: row.row for row in intake.accepted()}, listed, fault


@pytest.mark.parametrize("packed", [False, True])
@given(
    form=st.sampled_from(sorted(FORMS)), name=st.sampled_from(["a.jsonl", "a.json", "a.csv"]), damage=DAMAGE
)
@fuzz
def test_damaged_bytes_cost_only_what_they_touch(packed, form, name, damage):
    make = {"a.jsonl": as_json_lines, "a.json": as_json, "a.csv": as_csv}[name]
    data = make(records(form))
    data = gzip.compress(data, mtime=0) if packed else data
    hurt, place = damaged(data, damage)
    accepted, listed, fault = take(name + ".gz" * packed, hurt)
    if fault or packed:
        return
    line = data[:place].count(b"\n")  # the damaged line's index
    header = name != "a.jsonl"  # a bracket or a header is the first line
    touched = {line + 1 - header}
    if damage[0] == "insert" or damage[0] == "flip":
        touched |= {line - header, line + 2 - header}  # a line break that came or went
    alive = [number for number in range(1, ROWS + 1) if number not in touched]
    if damage[0] == "cut":
        alive = [number for number in alive if number < line + 1 - header]
    texts = {str(row.prompt): row.completions for row in accepted.values()}
    for n in alive:
        assert texts.get(f"Question {n}?", [f"better {n}", f"worse {n}"]) == [f"better {n}", f"worse {n}"]
    lost = [n for n in alive if texts.get(f"Question {n}?") != [f"better {n}", f"worse {n}"]]
    assert len(lost) <= len(listed), (lost, listed, texts)


@given(
    form=st.sampled_from(sorted(FORMS)),
    make=st.sampled_from([("a.jsonl", as_json_lines), ("a.json", as_json), ("a.csv", as_csv)]),
    number=st.integers(1, ROWS),
    field=st.integers(0, 4),
    value=ODD,
    absent=st.booleans(),
)
@fuzz
def test_one_odd_value_costs_at_most_its_row(form, make, number, field, value, absent):
    rows = records(form)
    name = list(rows[0])[field % len(rows[0])]
    rows[number - 1][name] = value
    if absent and make[0] != "a.csv":
        del rows[number - 1][name]
    accepted, listed, fault = take(make[0], make[1](rows))
    assert not fault
    assert set(accepted) | set(listed) == set(range(1, ROWS + 1))
    for i in set(range(1, ROWS + 1)) - {number}:
        assert accepted[i].completions == [f"better {i}", f"worse {i}"]
        assert accepted[i].prompt == f"Question {i}?"


@given(form=st.sampled_from(sorted(FORMS)), damage=DAMAGE)
@fuzz
def test_a_damaged_parquet_file_is_refused_or_gives_rows(form, damage):
    accepted, listed, fault = take("a.parquet", damaged(as_parquet(records(form)), damage)[0])
    assert fault or set(accepted) | set(listed) == set(range(1, ROWS + 1))


LABELS = b"""
columns: {preference: winner}
preference_values:
  1: a
  yes: b
  tie: tie
  2024-01-01: b
seed: 3
rows: 12
"""


@given(damage=DAMAGE)
@fuzz
def test_a_damaged_configuration_is_read_or_refused(damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.yaml"
        path.write_bytes(damaged(LABELS, damage)[0])
        with contextlib.suppress(ConfigError):
            build_config(DataConfig, {"source": "rows.jsonl"}, read_mapping(path))
