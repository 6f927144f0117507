"""What a registered model answers: through `mlflow models serve`, and the distribution it answers from."""

import json
import os
import sys
import urllib.request
from pathlib import Path

import pytest
from softpref.registry.config import RegistryConfig
from softpref.registry.stage import run

from tests.served import free_port, kill_server, start_server


def registered(tmp_path, store, model, write_evaluation):
    return run(
        RegistryConfig("story", tracking_uri=store),
        model,
        write_evaluation(tmp_path / "evaluation"),
        tmp_path / "registration",
    )


def answer(uri, **request):
    body = json.dumps(request).encode()
    call = urllib.request.Request(uri + "/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=30) as response:
        return json.load(response)


@pytest.fixture
def served(tmp_path, store, write_model, write_evaluation):
    registered(tmp_path, store, write_model(tmp_path / "model"), write_evaluation)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/story@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # `mlflow models serve` calls uvicorn by name, as it would in an activated environment
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": store}
    uri = f"http://127.0.0.1:{port}"
    process = start_server(command, f"{uri}/ping", tmp_path / "serve.log", env=environment)
    yield uri
    kill_server(process)


def test_served_champion_samples_and_honours_the_request(served):
    answers = [answer(served, prompt="a fox") for _ in range(4)]
    texts = [reply[0]["choices"][0]["text"] for reply in answers]
    assert any(texts)
    assert len(set(texts)) > 1
    assert all(reply[0]["usage"]["completion_tokens"] <= 13 for reply in answers)  # the start token counts
    cold = {answer(served, prompt="a fox", temperature=0.001)[0]["choices"][0]["text"] for _ in range(3)}
    assert len(cold) == 1
    short = answer(served, prompt="a fox", max_tokens=2)[0]
    assert short["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize("generation", [{}, {"do_sample": True, "temperature": 0.3, "top_k": 2}])
def test_model_answers_at_temperature_one_whatever_its_generation_config_says(
    generation, tmp_path, store, write_model, write_evaluation
):
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = write_model(tmp_path / "model", generation=generation, max_completion_length=1)
    decision = registered(tmp_path, store, model, write_evaluation)
    assert "generation_config.json says" in " ".join(decision.warnings)

    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(tokenizer("afo", return_tensors="pt").input_ids)
    odds = logits.logits[0, -1].double()
    mlflow.set_tracking_uri(store)
    served = mlflow.pyfunc.load_model(decision.model_uri)._model_impl
    torch.manual_seed(0)
    settings = served.model_config
    drawn = served.pipeline(["afo"] * 1500, **settings, return_tensors=True)
    tokens = torch.tensor([reply[0]["generated_token_ids"][-1] for reply in drawn])
    frequency = torch.bincount(tokens, minlength=len(odds)) / len(tokens)

    def distance(temperature):  # total variation
        return float((frequency - torch.softmax(odds / temperature, 0)).abs().sum() / 2)

    assert distance(1.0) < 0.09
    assert distance(0.7) > 2 * distance(1.0)


def test_chat_prompts_get_one_start_token(tmp_path, store, write_model, write_evaluation):
    import mlflow

    model = write_model(tmp_path / "model", chat=True)
    decision = registered(tmp_path, store, model, write_evaluation)
    mlflow.set_tracking_uri(store)
    served = mlflow.pyfunc.load_model(decision.model_uri)
    pipeline, seen = served._model_impl.pipeline, []
    forward = pipeline.model.generate
    pipeline.model.generate = lambda input_ids, **options: (
        seen.append(input_ids) or forward(input_ids, **options)
    )
    reply = served.predict({"messages": [{"role": "user", "content": "a fox"}]})
    assert reply[0]["choices"][0]["message"]["role"] == "assistant"
    assert seen[0][0].tolist().count(0) == 1
