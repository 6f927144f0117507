"""A pipeline whose data are several sources: every place that names files, URLs or Hub ids knows them all."""

import json
from types import SimpleNamespace

import datasets
import pytest
from softpref.config import without_secrets
from softpref.errors import ConfigError
from softpref.pipelines import command
from softpref.pipelines.recipes import pipeline_parameters, typed
from softpref.preflight import stage
from softpref.preflight.stage import FurtherSource, further_sources, plan
from softpref.remote import Pinned


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder with two sources, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        rows = [{"prompt": f"Q{i}?", "chosen": f"{name} good {i}", "rejected": "bad"} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def parameters(pipeline, **overrides):
    given = {"source": "a.jsonl", "judge": "bradley-terry", "data_overrides": overrides}
    return pipeline_parameters(pipeline, "embedded", {}) | given


def test_all_that_the_data_stage_reads_is_listed():
    overrides = {
        "sft_source": "s.jsonl",
        "unpaired_source": "u.jsonl",
        "mixture": {
            "https://me:word@host/b.jsonl?key=1": 0.1,
            "c": {"source": "owner/c", "share": 0.2, "revision": "v2"},
        },
    }
    expected = [
        FurtherSource("sft_source", "s.jsonl", None),
        FurtherSource("unpaired_source", "u.jsonl", None),
        FurtherSource("mixture['https://host/b.jsonl']", "https://me:word@host/b.jsonl?key=1", None),
        FurtherSource("mixture['c']", "owner/c", "v2"),
    ]
    assert further_sources(overrides) == further_sources(json.dumps(overrides)) == expected
    assert further_sources("") == further_sources({}) == []


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        ({"absent.jsonl": 0.3}, r"mixture\['absent.jsonl'\] absent.jsonl does not exist"),
        ({"minio://mlpipeline/x": 0.3}, "KFP's own store, which only the parameter source may name"),
        ({"b.jsonl": 30}, "needs its share of the dataset"),
        ({"b.jsonl": {"share": 0.3, "colums": {}}}, "did you mean 'columns'"),
        ({"story": 0.3}, "cannot be mixed"),
    ],
)
def test_a_wrong_mixture_is_refused_by_the_plan(sweep, rows, mixture, says):
    with pytest.raises(ConfigError, match=says):
        plan(parameters(sweep, mixture=mixture))


def test_a_right_one_is_planned_and_may_stand_beside_an_artifact(sweep, rows):
    given = parameters(sweep, mixture={"b.jsonl": {"share": 0.3, "split": None}})
    assert plan(given)
    assert plan({**given, "source": "minio://mlpipeline/v2/artifacts/dataset"}, here=False)


@pytest.mark.parametrize(
    "overrides",
    [
        {"mixture": {"b.jsonl": 0.3}},
        {"mixture": {"b": {"source": "b.jsonl", "share": 0.3}}},
        {"prompts_source": "b.jsonl"},
    ],
)
def test_no_further_source_of_this_machine_is_sent_to_a_cluster(sweep, rows, overrides, capsys):
    arguments = ["compile", "--recipe", "own", "--output", "package.yaml", "--source", "owner/name"]
    assert command.main(sweep, [*arguments, "--data-overrides", json.dumps(overrides)]) == 2
    assert "b.jsonl is on this machine, and no step of the cluster sees it" in capsys.readouterr().err
    assert not (rows / "package.yaml").exists()


def test_unpaired_completions_are_refused_where_no_model_learns_from_them(sweep, rows):
    given = parameters(sweep, unpaired_source="b.jsonl") | {"alphas": [1.0]}
    for other in ("dpo:0.1", "kto:0.1,train_on=self_play"):
        with pytest.raises(ConfigError, match=r"the method kto learns.* such as baselines kto:0\.1\)"):
            plan(given | {"baselines": [other]})
    assert [member.method for member in plan(given | {"baselines": ["kto:0.1"]})] == ["spo", "kto"]


def test_a_signed_url_is_no_file_of_this_machine():
    command._refuse_local("source", f"https://host/a.jsonl?key={'x' * 600}")


def test_a_changed_source_changes_the_version_that_the_cache_goes_by(sweep, rows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "softpref.data.sources.pin", lambda *of: seen.append(of) or Pinned(of[0], None, of[0])
    )
    monkeypatch.setattr("softpref.tracking.check_server", lambda **_: False)
    mixture = {"b.jsonl": 0.3, "owner/c": {"share": 0.1, "revision": "v2"}}
    begun = stage.begin_run({**parameters(sweep, mixture=mixture), "run_name": ""}, "record")
    assert seen == [("a.jsonl", None), ("b.jsonl", None), ("owner/c", "v2")]
    assert begun.source_version == "a.jsonl; b.jsonl; owner/c"


def test_what_is_recorded_of_a_run_holds_no_secret_of_a_url():
    text = '{"https://me:word@host/b?key=1": 0.3}'
    as_text = without_secrets({"data_overrides": {"mixture": text}})
    assert json.loads(as_text["data_overrides"]["mixture"]) == {"https://host/b": 0.3}
    recorded = without_secrets({"data_overrides": {"mixture": {"https://me:word@host/b?key=1": 0.3}}})
    assert recorded == {"data_overrides": {"mixture": {"https://host/b": 0.3}}}


def test_containers_see_the_files_of_a_mixture(rows):
    from softpref.pipelines.containers import Containers

    containers = Containers([])
    containers._engine = SimpleNamespace(rootless=True)
    overrides = {"mixture": {str(rows / "b.jsonl"): 0.3}}
    given = {"tracking_uri": "http://mlflow", "source": str(rows / "a.jsonl"), "data_overrides": overrides}
    containers.open(rows / "out", given)
    readable = {path for path, mode in containers._volumes.items() if mode == "ro"}
    assert readable >= {str(rows / "a.jsonl"), str(rows / "b.jsonl")}


def test_containers_share_what_is_kept_of_the_reference(rows, monkeypatch):
    from softpref.pipelines.containers import Containers

    kept = str(rows / "out" / "reference-cache")
    monkeypatch.setenv("SOFTPREF_REFERENCE_CACHE", kept)
    containers = Containers([])
    containers._engine = SimpleNamespace(rootless=True)
    containers.open(rows / "out", {"tracking_uri": "http://mlflow"})
    assert containers._volumes[kept] == "rw"
    assert containers._environment["SOFTPREF_REFERENCE_CACHE"] == kept


def test_the_data_step_of_a_run_mixes(rows, monkeypatch):
    """From the command line's text through KFP's own runner, which hands numbers over as floats."""
    from kfp import local
    from softpref.data.component import prepare_data

    text = json.dumps({"mixture": {"b.jsonl": {"share": 0.25, "group_size": 3, "split": None}}})
    overrides = typed("data_overrides", command._argument_type("data_overrides", dict)(text), dict)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(rows / "out"), raise_on_error=True)
    task = prepare_data(source="a.jsonl", overrides=overrides)
    saved = datasets.load_from_disk(task.outputs["dataset"].path)
    sources = [source for split in saved.values() for source in split["source"]]
    assert (sources.count("a.jsonl"), sources.count("b.jsonl")) == (40, 13)
    assert task.outputs["page"].metadata["title"] == "What the preferences of a.jsonl + b.jsonl hold"
