"""A sweep with a secret in every address and variable, of which nothing that it writes may show one."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from softpref.data.story_world import StoryWorld
from werkzeug import Response
from werkzeug.exceptions import abort

from tests.pipelines.conftest import REPOSITORY
from tests.served import ChatEndpoint, marked_texts, served

# each is found by its own word
TRACKING, SOURCE, SIGNED, DEMONSTRATIONS = "trackers5ecret", "sources5ecret", "signeds5ecret", "demos5ecret"
VARIABLES = {
    name: f"variables5ecret{number}"
    for number, name in enumerate(
        (
            "OPENAI_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
            "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "KFP_TOKEN", "KFP_COOKIES",
            "SOFTPREF_VLLM_TOKEN",
        )
    )
}  # fmt: skip
SECRETS = [TRACKING, SOURCE, SIGNED, DEMONSTRATIONS, *VARIABLES.values()]


def judged(messages):
    """The answer of an endpoint that knows the experts' rewards."""
    prompt, *answers = marked_texts(messages)
    world = StoryWorld()
    found = world.outcomes(next(one for one in world.prompts if one.strip() == prompt.strip()))
    rewards = dict(zip(found.completions, found.rewards, strict=True))
    a, b = (rewards.get(answer.strip(), -9.0) for answer in answers)
    return json.dumps({"verdict": "A" if a > b else "B"})


@pytest.fixture
def server(tmp_path, empty_store, monkeypatch):
    """MLflow, the sources and a judge behind one address, which ask for their secrets."""
    import mlflow
    from mlflow.server import app, handlers
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(handlers, "_tracking_store", SqlAlchemyStore(uri, f"{tmp_path}/mlartifacts"))
    monkeypatch.setattr(handlers, "_model_registry_store", Registry(uri))
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)  # a server asks itself, too
    world, rows = StoryWorld(), {"pairs": [], "demonstrations": [*StoryWorld().demonstrations(400, seed=1)]}
    for row in world.preferences(400, seed=0, votes=0):
        a, b = row["completion_a"], row["completion_b"]
        first = row["probability"] > np.random.default_rng(len(rows["pairs"])).random()
        pair = (a, b) if first else (b, a)
        rows["pairs"].append({"prompt": row["prompt"], "chosen": pair[0], "rejected": pair[1]})
    endpoint = ChatEndpoint(judged)

    def answer(request):
        if request.path.startswith("/api/"):
            if not request.authorization or request.authorization.password != TRACKING:
                abort(401)
            return Response.from_app(app, request.environ)
        if request.path.startswith("/v1/"):
            return endpoint.answer(request)
        name = request.path.strip("/").removesuffix(".jsonl")
        known = {"pairs": SOURCE, "demonstrations": DEMONSTRATIONS}[name]
        if request.authorization.password != known or request.args.get("X-Amz-Signature") != SIGNED:
            abort(403)
        return "".join(json.dumps(row) + "\n" for row in rows[name])

    with served(answer) as url:
        yield url.removeprefix("http://")
    mlflow.set_tracking_uri(before)


def holding(folder, words):
    """The files below a folder that others may read and that hold one of the words, with the word."""
    return {
        (str(file.relative_to(folder)), word)
        for file in folder.rglob("*")
        if file.is_file() and file.stat().st_mode & 0o077
        for word in words
        if word.encode() in file.read_bytes()
    }


def test_nothing_that_a_sweep_writes_shows_a_secret(server, quick_recipe, tmp_path, tmp_path_factory):
    recipe = quick_recipe(
        source=f"http://me:{SOURCE}@{server}/pairs.jsonl?X-Amz-Signature={SIGNED}",
        data_overrides={
            "sft_source": f"http://me:{DEMONSTRATIONS}@{server}/demonstrations.jsonl?X-Amz-Signature={SIGNED}",
            "validation_fraction": 0.17,  # ten prompts or more, for intervals
            "test_fraction": 0.17,
        },
        judge="llm",
        judge_model="tiny",
        selection_rule="win_rate",
        anchor=1,
        evaluation_overrides={"judge_options": {"url": f"http://{server}/v1", "logprobs": False}},
        baselines=[],
    )
    home = tmp_path / "home"
    given = tmp_path_factory.mktemp("given") / "recipe.yaml"  # what the user wrote is the user's
    shutil.move(recipe, given)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    result = subprocess.run(
        [sys.executable, REPOSITORY / "pipelines/spo_sweep.py", "--recipe", given, "--output", "out"],
        cwd=tmp_path,
        env={
            **environment,
            **VARIABLES,
            "MLFLOW_TRACKING_URI": f"http://me:{TRACKING}@{server}",
            "XDG_CACHE_HOME": str(home),
            "HF_HOME": str(home / "hub"),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    (tmp_path / "stdout").write_text(result.stdout)
    (tmp_path / "stderr").write_text(result.stderr)
    assert holding(tmp_path, SECRETS) == set()
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert json.loads((tmp_path / "out/registration.json").read_text())["registered"]
    # what is not shown was there to be shown
    assert holding(tmp_path, [f"http://{server}/pairs.jsonl"])
    assert holding(tmp_path, [f"http://{server}/demonstrations.jsonl"])
