"""Every kind of source gives the same numbered records, and says where it is broken."""

import csv
import gzip
import hashlib
import json
from types import SimpleNamespace

import pytest
from softpref.data.sources import open_source, pin
from softpref.errors import ConfigError, DataError

RECORDS = [{"prompt": f"p{i}", "chosen": f"good, {i}\n“ü”", "rejected": f"bad {i}"} for i in range(5)]


def write(path, kind):
    """Write RECORDS in a format; returns the path."""
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, RECORDS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(RECORDS)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet"])
def test_every_file_format_gives_the_same_records(tmp_path, kind):
    rows = list(open_source(str(write(tmp_path / f"rows.{kind}", kind))))
    assert [row.record for row in rows] == RECORDS
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1].place == f"rows.{kind}:2"


def test_a_folder_is_read_file_by_file_and_numbered_through(tmp_path):
    write(tmp_path / "b.csv", "csv")
    write(tmp_path / "a.jsonl", "jsonl")
    (tmp_path / "README.md").write_text("no data")
    rows = list(open_source(str(tmp_path)))
    assert [row.record for row in rows] == RECORDS * 2
    assert rows[5].number == 6
    assert rows[5].place == "b.csv:1"


def test_a_saved_dataset_is_read_by_its_split(tmp_path):
    import datasets

    half = datasets.Dataset.from_list(RECORDS[:2])
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS), other=half).save_to_disk(
        str(tmp_path / "both")
    )
    half.save_to_disk(str(tmp_path / "one"))
    assert [row.record for row in open_source(str(tmp_path / "both"))] == RECORDS
    assert [row.record for row in open_source(str(tmp_path / "both"), split="other")] == RECORDS[:2]
    assert [row.record for row in open_source(str(tmp_path / "one"))] == RECORDS[:2]
    with pytest.raises(ConfigError, match="no split 'test'; it has train, other"):
        open_source(str(tmp_path / "both"), split="test")


def test_a_broken_line_costs_only_its_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n"text"\n{"a": "\xff"}\n{"a": 2}\n')
    rows = list(open_source(str(path)))
    assert [(row.number, row.record) for row in rows] == [
        (1, {"a": 1}),
        (3, None),
        (4, None),
        (5, None),
        (6, None),
        (7, {"a": 2}),
    ]
    assert "not valid JSON" in rows[1].fault
    assert "must be an object with named fields, got a list" in rows[2].fault
    assert "UTF-8" in rows[4].fault


def test_a_table_row_with_other_cells_than_the_header_costs_only_its_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n1\n1,2,3\n3,4\n")
    rows = list(open_source(str(path)))
    assert [row.record for row in rows] == [{"a": "1", "b": "2"}, None, None, {"a": "3", "b": "4"}]
    assert rows[1].fault == "line 3: 1 cells, the header has 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2', "element 2 is not valid JSON"),
        ('[{"a": 1} {"a": 2}]', "after element 1"),
        ('[{"a": 1},', "ends inside its JSON array"),
        ('[{"a": 1},]', "element 2 is not valid JSON"),
    ],
)
def test_a_broken_array_is_an_error_that_says_where(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(open_source(str(path)))


def test_an_array_larger_than_a_piece_of_reading_is_whole(tmp_path):
    path = tmp_path / "rows.json"
    records = [{"text": "ä" * (i * 999 % 300_000), "n": i} for i in range(40)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert [row.record for row in open_source(str(path))] == records
    path.write_text("[]")
    assert list(open_source(str(path))) == []


def test_json_lines_under_the_name_json_are_recognised(tmp_path):
    write(tmp_path / "rows.json", "jsonl")
    assert [row.record for row in open_source(str(tmp_path / "rows.json"))] == RECORDS


def test_a_parquet_file_that_is_none_is_an_error(tmp_path):
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"rows.parquet is not a readable Parquet file"):
        list(open_source(str(tmp_path / "rows.parquet")))


@pytest.mark.parametrize("source", ["absent.jsonl", "/absent", "./absent", "a b", "too/many/parts"])
def test_a_source_that_does_not_exist_is_refused_at_once(source):
    with pytest.raises(ConfigError, match="does not exist"):
        open_source(source)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("name", ["dataset", "rows.data"])
def test_a_file_without_a_known_suffix_is_told_by_its_first_bytes(tmp_path, kind, name):
    path = write(tmp_path / name, kind)
    assert [row.record for row in open_source(str(path))] == RECORDS


def test_files_without_suffix_in_a_folder_are_read_where_no_other_is(tmp_path):
    write(tmp_path / "part-0", "jsonl")
    write(tmp_path / "part-1", "parquet")
    (tmp_path / "_SUCCESS").touch()
    assert [row.place for row in open_source(str(tmp_path))][4:6] == ["part-0:5", "part-1:1"]
    write(tmp_path / "rows.csv", "csv")
    assert {row.place.split(":")[0] for row in open_source(str(tmp_path))} == {"rows.csv"}


@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8bbroken"])
def test_a_file_that_neither_name_nor_content_tells_asks_for_its_format(tmp_path, content):
    path = tmp_path / "rows.data"
    write(path, "csv") if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match="set format"):
        open_source(str(path))
    if content is None:
        assert [row.record for row in open_source(str(path), format="csv")] == RECORDS


def test_a_file_called_gz_that_a_server_unpacked_is_read(tmp_path):
    assert [row.record for row in open_source(str(write(tmp_path / "rows.jsonl.gz", "jsonl.gz")))] == RECORDS
    write(tmp_path / "rows.jsonl", "jsonl").rename(tmp_path / "rows.jsonl.gz")
    assert [row.record for row in open_source(str(tmp_path / "rows.jsonl.gz"))] == RECORDS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
def test_a_file_behind_a_url_gives_the_same_records_as_one_here(tmp_path, bucket, kind):
    body = write(tmp_path / f"rows.{kind}", kind).read_bytes()
    bucket.put_object(Bucket="team", Key=f"deep/rows.{kind}", Body=body)
    rows = list(open_source(f"s3://team/deep/rows.{kind}"))
    assert [row.record for row in rows] == RECORDS
    assert rows[1].place == f"rows.{kind}:2"


def test_a_folder_behind_a_url_is_read_like_one_here_without_what_is_no_data(tmp_path, memory, cache):
    for name, kind in (("b.csv", "csv"), ("deep/a.jsonl", "jsonl")):
        memory.pipe(f"/folder/{name}", write(tmp_path / "rows", kind).read_bytes())
    memory.pipe("/folder/video.mp4", b"large")
    rows = list(open_source("memory://folder"))
    assert [(row.number, row.place) for row in rows][4:6] == [(5, "b.csv:5"), (6, "deep/a.jsonl:1")]
    assert not list(cache.rglob("*.mp4"))


def test_a_saved_dataset_behind_a_url_is_read_by_its_split(tmp_path, memory, cache):
    import datasets

    half = datasets.Dataset.from_list(RECORDS[:2])
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS), other=half)
    both.save_to_disk(str(tmp_path / "both"))
    memory.put(f"{tmp_path}/both", "/both", recursive=True)
    assert [row.record for row in open_source("memory://both", split="other")] == RECORDS[:2]
    with pytest.raises(ConfigError, match=r"memory://both has no split 'test'"):
        open_source("memory://both", split="test")


def test_an_error_in_a_file_behind_a_url_names_the_url(memory, cache):
    memory.pipe("/rows.parquet", b"PAR1 is not all it takes")
    with pytest.raises(DataError, match=r"^memory://rows.parquet is not a readable Parquet file"):
        list(open_source("memory://rows.parquet"))
    memory.pipe("/rows.data", b"a,b")
    with pytest.raises(ConfigError, match=r"the format of memory://rows.data from its name or content"):
        open_source("memory://rows.data")
    with pytest.raises(ConfigError, match=r"memory://absent.jsonl does not exist"):
        open_source("memory://absent.jsonl")


def test_a_pin_changes_with_the_content_and_not_without(tmp_path, memory, bucket):
    path = write(tmp_path / "rows.jsonl", "jsonl")
    sources = [str(path), str(tmp_path / "folder"), "memory://rows.jsonl", "s3://team/folder"]
    (tmp_path / "folder").mkdir()

    def put(text):
        path.write_text(text)
        (tmp_path / "folder" / "a.csv").write_text(text)
        memory.pipe("/rows.jsonl", text.encode())
        bucket.put_object(Bucket="team", Key="folder/a.csv", Body=text.encode())

    put("a")
    before = [pin(source, "v1") for source in sources]
    assert [(found.source, found.revision) for found in before] == [(source, "v1") for source in sources]
    assert [pin(source, "v1") for source in sources] == before
    put("another")
    after = [pin(source, "v1") for source in sources]
    fingerprints = [found.fingerprint for found in (*before, *after)]
    assert all(fingerprints)
    assert len(set(fingerprints)) == 8


def test_a_pin_reads_nothing(memory, monkeypatch):
    memory.pipe("/rows.jsonl", b"{}")
    for way in ("open", "_open", "get_file", "cat_file"):
        monkeypatch.setattr(type(memory), way, lambda *_, **__: pytest.fail("read"))
    assert pin("memory://rows.jsonl").fingerprint


def test_a_pin_of_a_hub_dataset_is_its_commit(monkeypatch):
    import huggingface_hub

    def info(self, repo_id, *, repo_type, revision, timeout):
        assert (repo_id, repo_type, timeout) == ("owner/name", "dataset", 10)
        return SimpleNamespace(sha=f"commit of {revision}")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    assert pin("owner/name") == ("owner/name", "commit of None", "commit of None")
    assert pin("owner/name", "v1").revision == "commit of v1"


def test_what_certainly_is_no_source_is_refused_and_what_may_be_elsewhere_is_not(memory, caplog):
    assert pin("story") == ("story", None, "")
    assert not caplog.text
    assert pin("/volume/of/another/pod.jsonl") == ("/volume/of/another/pod.jsonl", None, "")
    assert "is not on this machine" in caplog.text
    for absent in ("memory://absent.jsonl", "a b", "s4://bucket/rows.jsonl"):
        with pytest.raises(ConfigError):
            pin(absent)


def test_a_hub_dataset_streams_the_asked_split(monkeypatch):
    import datasets

    asked = {}

    def load(name, subset, *, revision, streaming):
        asked.update(name=name, subset=subset, revision=revision, streaming=streaming)
        return datasets.IterableDatasetDict(
            {
                "train": datasets.Dataset.from_list(RECORDS).to_iterable_dataset(),
                "test": datasets.Dataset.from_list(RECORDS[:1]).to_iterable_dataset(),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(open_source("owner/name", subset="en", split="test", revision="v1"))
    assert asked == {"name": "owner/name", "subset": "en", "revision": "v1", "streaming": True}
    assert [row.record for row in rows] == RECORDS[:1]
    assert [row.record for row in open_source("owner/name")] == RECORDS


def test_an_unreachable_hub_is_an_error_that_says_what_was_tried(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ConfigError, match=r"'owner/name' .*split 'train'.* ConnectionError: no route to host"
    ):
        open_source("owner/name", split="train")


def _records(path):
    return [(row.record, row.fault) for row in open_source(str(path))]


@pytest.mark.parametrize("place", [0, 1])
def test_an_open_quote_costs_its_own_row_alone(tmp_path, place):
    cells = [[f"a{number}", f"b{number}"] for number in range(5)]
    cells[2][place] = f'"{cells[2][place]}'
    (tmp_path / "x.csv").write_text("\n".join(["left,right", *(",".join(row) for row in cells)]))
    rows = _records(tmp_path / "x.csv")
    assert [record["left"] for record, _ in rows if record] == ["a0", "a1", "a3", "a4"]
    (fault,) = [fault for record, fault in rows if record is None]
    assert fault.startswith("line 4: ")


def test_a_quote_that_a_later_row_closes_swallows_no_row(tmp_path):
    (tmp_path / "x.csv").write_text('left,right\na0,"b0\na1,"b1"\na2,b2\n')
    rows = _records(tmp_path / "x.csv")
    assert [record for record, _ in rows if record] == [
        {"left": "a1", "right": "b1"},
        {"left": "a2", "right": "b2"},
    ]


def test_line_breaks_inside_of_quotes_belong_to_the_cell(tmp_path):
    text = "\n".join(f"line {number}, with quotes" for number in range(300))
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["left", "right"], ["a", text], ["b", "c"]])
    assert [record["right"] for record, _ in _records(tmp_path / "x.csv")] == [text, "c"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz"])
def test_rows_before_the_damage_of_a_packed_file_are_read_and_the_log_says_where_it_is(
    tmp_path, name, caplog
):
    lines = [json.dumps({"left": hashlib.sha256(bytes([n])).hexdigest()}) for n in range(200)]
    if "csv" in name:
        lines = ["left", *(json.loads(line)["left"] for line in lines)]
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    *rows, (record, fault) = _records(tmp_path / name)
    assert len(rows) > 10
    assert all(row for row, _ in rows)
    assert record is None
    assert "damaged from here on" in fault
    assert f"{name}, row {len(rows) + 1}: the compressed file is damaged" in caplog.text


@pytest.mark.parametrize("form", ["{}\n{}\n{}", "[{},{},{}]"])
def test_an_integer_of_thousands_of_digits_costs_no_row(tmp_path, form):
    huge = '{"left": "b", "id": ' + "7" * 5000 + "}"
    (tmp_path / "x.json").write_text(form.replace("{}", "%s") % ('{"left": "a"}', huge, '{"left": "c"}'))
    assert [record["left"] for record, _ in _records(tmp_path / "x.json")] == ["a", "b", "c"]


@pytest.mark.parametrize("depth", [100_000, 3_000_000])  # within a piece of reading, and beyond
def test_an_element_nested_too_deeply_costs_itself_alone(tmp_path, depth):
    deep = '{"a": ' + '["]\\"[", ' * depth + "1" + "]" * depth + "}"
    (tmp_path / "x.json").write_text(f'[{{"a": 1}}, {deep}, {{"a": 3}}]')
    found = _records(tmp_path / "x.json")
    assert found == [({"a": 1}, ""), (None, "nested too deeply"), ({"a": 3}, "")]


def test_an_element_nested_too_deeply_without_an_end_is_a_broken_array(tmp_path):
    (tmp_path / "x.json").write_text('[{"a": 1}, ' + "[" * 100_000)
    with pytest.raises(DataError, match="element 2 has no end"):
        _records(tmp_path / "x.json")


def test_parquet_values_that_python_does_not_have_are_missing_and_cost_no_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "left": ["a", "b"],
            "time": pyarrow.array([1, 2**60], pyarrow.int64()).cast(pyarrow.timestamp("us")),
            "text": pyarrow.array([b"x", b"\xff"]).view(pyarrow.string()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (first, _), (second, _) = _records(tmp_path / "x.parquet")
    assert (first["left"], first["text"]) == ("a", "x")
    assert second == {"left": "b"}


def test_stray_quotes_that_pair_cost_no_row_in_silence(tmp_path):
    lines = [f"p{number},good {number},bad {number}" for number in range(8)]
    lines[1], lines[5] = 'p1,"good 1,bad 1', 'p5,good 5",bad 5'
    (tmp_path / "x.csv").write_text("\n".join(["prompt,chosen,rejected", *lines]))
    rows = _records(tmp_path / "x.csv")
    assert [record["prompt"] for record, _ in rows if record] == ["p0", "p6", "p7"]
    (fault,) = [fault for record, fault in rows if record is None]
    assert fault.startswith("lines 3 to 7: ")
