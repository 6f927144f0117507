"""vLLM draws what the model itself would: its distribution, its present weights, its log-probabilities."""

import collections
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from copy import deepcopy

import pytest
import torch
from softpref.errors import ConfigError, SoftprefError
from softpref.lm.sampling import sample_completions, sampling_noise
from softpref.spo import SPOConfig, engines
from softpref.spo.engines import (
    VLLMEngine,
    VLLMServerEngine,
    check_agreement,
    engine_spec,
    noise_seeds,
    policy_weights,
    sampling_engine,
)
from softpref.spo.vllm_core import shared_core

from tests.enumeration import outcome_probabilities

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` sets up an environment")

STOP = 3
PROMPTS = [[1, 5, 6, 7], [1], [1, 7], [1, 6, 6, 5, 5, 7, 7], [1, 5]]


@pytest.fixture(scope="module")
def build(make_model, tokenizer):
    """`build(**options) -> model`, of a shape that vLLM has kernels for."""

    def build(**options):
        defaults = {"width": 64, "layers": 2, "spread": 0.2, "head_dim": 32}
        return make_model(tokenizer, **{**defaults, **options})

    return build


def settings(**options):
    defaults = {"output_dir": "unused", "use_cpu": True, "bf16": False, "sampling_engine": "vllm"}
    lengths = {"max_prompt_length": 180, "max_completion_length": 12, "sampling_batch_size": 32}
    return SPOConfig(**{**defaults, **lengths, **options})


@pytest.fixture(scope="module")
def in_process(build):
    return VLLMEngine(engine_spec(settings(), build()))


class Server:
    """A server process, started as a person would, with a secret."""

    token = "a secret of this test"

    def __init__(self):
        command = [sys.executable, "-m", "softpref.spo.vllm_server", "--port", "0"]
        environment = {**os.environ, engines.TOKEN_VARIABLE: self.token}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("listening at "), line
        self.url = line.split()[-1]

    def stop(self):
        self.process.terminate()
        return self.process.wait(timeout=60)

    def request(self, method, path, body=None, token=""):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    assert server.stop() == 0


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv(engines.TOKEN_VARIABLE, Server.token)


@pytest.fixture(params=["in process", "server"])
def engine(request, build, monkeypatch):
    if request.param == "in process":
        return request.getfixturevalue("in_process")
    monkeypatch.setenv(engines.TOKEN_VARIABLE, Server.token)
    return VLLMServerEngine(engine_spec(settings(), build()), request.getfixturevalue("server").url)


def draw(engine, model, prompts, *, seed=0, length=6, stop_ids=(STOP,), **options):
    noise = sampling_noise(len(prompts), length, seed)
    return engine(model, prompts, noise=noise, stop_ids=stop_ids, **options)


@torch.no_grad()
def shake(parameters, scale, *, seed):
    """Add noise to parameters, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def largest_difference(model, samples):
    """Between the log-probabilities that came with samples and those of the model, nats per token."""
    return check_agreement(model, samples, precision="float32", sequences=len(samples)).largest


def assert_follows(samples, chances):
    """Whether counts of completions are what their probabilities give, by a chi-square test."""
    from scipy.stats import chisquare

    count = len(samples)
    counts = collections.Counter(tuple(sample.completion) for sample in samples)
    assert set(counts) <= set(chances)
    common = [outcome for outcome, chance in chances.items() if chance * count >= 5]
    seen = [counts[outcome] for outcome in common]
    expected = [chances[outcome] * count for outcome in common]
    seen.append(count - sum(seen))
    expected.append(count - sum(expected))
    assert len(common) > 30
    assert chisquare(seen, expected).pvalue > 0.001


def test_the_samples_distribution_is_the_models_whatever_its_generation_config_says(engine, build):
    model, prompt, count = build(), PROMPTS[0], 4000
    chances = outcome_probabilities(model, prompt, length=3, stop=STOP)
    assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_p=0.5, top_k=1, repetition_penalty=2.0, eos_token_id=[5, 6]
    )
    assert_follows(draw(engine, model, [prompt] * count, length=3, seed=4), chances)


def test_the_chi_square_test_would_see_another_temperature(in_process, build):
    model = build()
    chances = outcome_probabilities(model, PROMPTS[0], length=3, stop=STOP)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    with pytest.raises(AssertionError):
        assert_follows(draw(in_process, model, [PROMPTS[0]] * 4000, length=3, seed=4), chances)


def test_the_log_probabilities_are_the_trainers(engine, build):
    model = build()
    samples = draw(engine, model, PROMPTS * 8, length=12)
    assert [sample.prompt for sample in samples] == PROMPTS * 8
    assert largest_difference(model, samples) < 1e-4
    agreement = check_agreement(model, samples, precision="float32")
    assert 0 < agreement.mean <= agreement.largest < 1e-4


def test_every_call_takes_over_the_weights_as_they_are(engine, build):
    model = build()
    prompts = [[1, *range(5, 8)] * 40, *PROMPTS]  # the first fills blocks that a cache of prefixes would keep
    for step in range(3):
        samples = draw(engine, model, prompts, seed=1, length=12)
        assert largest_difference(model, samples) < 1e-4, f"after {step} changes"
        before = deepcopy(model)
        shake(model.parameters(), 0.05, seed=step)
        with pytest.raises(SoftprefError, match=r"differ from the trainer's by .* other weights"):
            check_agreement(model, samples, precision="float32")
        check_agreement(before, samples, precision="float32")


def test_tied_embeddings_are_taken_over(build):
    model = build(tie_word_embeddings=True, seed=3)
    assert "lm_head.weight" not in policy_weights(model)
    engine = VLLMEngine(engine_spec(settings(), model))
    for _ in range(2):
        assert largest_difference(model, draw(engine, model, PROMPTS * 4)) < 1e-4
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.3)


def test_an_adapter_is_merged_and_the_model_left_alone(engine, build):
    from peft import LoraConfig, get_peft_model

    base = build()
    model = get_peft_model(
        deepcopy(base), LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    )
    shake([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1, seed=1)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = draw(engine, model, PROMPTS * 4, length=12)
    assert largest_difference(model, samples) < 1e-4
    with pytest.raises(SoftprefError):
        check_agreement(base, samples, precision="float32")
    after = model.state_dict()
    assert list(after) == list(kept)
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    assert set(policy_weights(model)) == set(policy_weights(base))


def test_only_the_given_stop_tokens_end_a_completion_and_the_limit_truncates_it(engine, build):
    model = build(spread=0.1)
    assert model.generation_config.eos_token_id == STOP
    for stops in ((STOP, 6), (5,)):
        samples = draw(engine, model, PROMPTS * 20, length=8, stop_ids=stops)
        assert {sample.truncated for sample in samples} == {False, True}
        assert {sample.completion[-1] for sample in samples if not sample.truncated} == set(stops)
        for sample in samples:
            assert not set(stops) & set(sample.completion[:-1])
            assert sample.truncated == (sample.completion[-1] not in stops)
            assert len(sample.completion) == 8 if sample.truncated else len(sample.completion) <= 8
            assert len(sample.token_logps) == len(sample.completion)
    assert any(STOP in sample.completion for sample in samples)  # the checkpoint's end token ends nothing


def test_a_stop_token_that_the_model_does_not_have_is_no_error(in_process, build):
    assert all(s.truncated for s in draw(in_process, build(), PROMPTS, stop_ids=(4000,)))


def test_a_sample_depends_on_its_row_alone(engine, build):
    model = build()
    prompts = PROMPTS * 8
    noise = sampling_noise(len(prompts), 12, seed=1)
    options = {"stop_ids": (STOP,)}
    whole = engine(model, prompts, noise=noise, **options)
    assert len({len(sample.completion) for sample in whole}) > 3
    assert engine(model, prompts, noise=noise, **options) == whole
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()[:17]
    shuffled = engine(model, [prompts[i] for i in order], noise=noise[order], **options)
    assert [sample.completion for sample in shuffled] == [whole[i].completion for i in order]
    other = engine(model, prompts, noise=sampling_noise(len(prompts), 12, seed=2), **options)
    assert [sample.completion for sample in other] != [sample.completion for sample in whole]


def test_server_and_process_draw_the_same(in_process, build, server, secret):
    model = build()
    there = VLLMServerEngine(engine_spec(settings(), model), server.url)
    here, sent = (draw(one, model, PROMPTS * 8, length=12) for one in (in_process, there))
    assert [sample.completion for sample in here] == [sample.completion for sample in sent]


def test_seeds_differ_between_rows_and_between_refreshes():
    seeds = [seed for number in range(20) for seed in noise_seeds(sampling_noise(500, 4, seed=number))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert noise_seeds(sampling_noise(500, 4, seed=0)) == seeds[:500]


def test_sampling_leaves_random_state_threads_and_training_mode_alone(in_process, build):
    model = build().train()
    before, threads = torch.get_rng_state(), torch.set_num_threads
    with torch.autocast("cpu", torch.bfloat16):  # what the trainer computes in does not reach the engine
        samples = draw(in_process, model, PROMPTS * 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.set_num_threads is threads
    assert model.training
    assert largest_difference(model, samples) < 1e-4


def test_progress_counts_every_completion(engine, build):
    seen = []
    draw(engine, build(), PROMPTS * 10, progress=seen.append)
    assert sum(seen) == 50


def test_no_prompts_give_no_samples(engine, build):
    assert draw(engine, build(), []) == []


def test_bfloat16_agrees_within_its_tolerance(build):
    model = build(seed=5)
    engine = VLLMEngine(engine_spec(settings(bf16=True), model))
    samples = draw(engine, model, PROMPTS * 8, length=12)
    with torch.autocast("cpu", torch.bfloat16):
        agreement = check_agreement(model, samples, precision="bfloat16", sequences=40)
    assert 1e-4 < agreement.mean < 0.05, agreement


def test_a_prompt_that_leaves_no_room_is_refused(engine, build):
    with pytest.raises(ConfigError, match=r"185 tokens and a completion of up to 12 do not fit into the 192"):
        draw(engine, build(), [[1] * 185], length=12)
    draw(engine, build(), [[1] * 180], length=12)  # and the engine goes on


def test_a_model_that_vllm_does_not_know_is_named(build):
    spec = engine_spec(settings(), build())
    spec.config.update(architectures=["NobodysForCausalLM"], model_type="nobodys")
    with pytest.raises(ConfigError, match=r"vLLM cannot run NobodysForCausalLM in float32 here"):
        draw(VLLMEngine(spec), build(), PROMPTS)


def small(config_class, **options):
    """A model of another family, small and with odds that are far from uniform."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    tokens = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": STOP, "pad_token_id": 0}
    config = config_class(**shape, **tokens, max_position_embeddings=256, initializer_range=0.2, **options)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "Gemma2", "GPT2"])
def test_other_families_agree_and_have_room_for_every_sequence(family):
    import transformers

    options = {
        "Qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
        "Mistral": {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8},
        "Gemma2": {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32},
        "GPT2": {},  # other names for the shape, transposed matrices
    }
    model = small(getattr(transformers, f"{family}Config"), **options[family])
    spec = engine_spec(settings(max_prompt_length=100), model)
    engine = VLLMEngine(spec)
    for seed in range(2):
        prompts = [[5 + (i * k) % 30 for i in range(3 + 8 * k)] for k in range(1, 8)]
        samples = draw(engine, model, prompts, seed=seed, length=12)
        check_agreement(model, samples, precision="float32", sequences=7)
        shake(model.parameters(), 0.02, seed=seed)
    cache = shared_core(spec)._engine.vllm_config.cache_config
    blocks = -(-spec.max_model_len // cache.block_size) * spec.max_sequences
    assert blocks <= cache.num_gpu_blocks


def test_a_model_that_vllm_would_borrow_from_transformers_needs_a_server():
    from transformers import Olmo2Config

    model = small(Olmo2Config)
    with pytest.raises(ConfigError, match=r"no implementation of its own for Olmo2ForCausalLM .* server"):
        draw(VLLMEngine(engine_spec(settings(), model)), model, PROMPTS)
    model(torch.tensor([[1, 2]]))  # and transformers' class is as it was


def test_a_shape_without_a_kernel_is_named(build):
    model = build(head_dim=8)
    with pytest.raises(ConfigError, match=r"vLLM cannot run LlamaForCausalLM in float32 here: .*head_dim=8"):
        draw(VLLMEngine(engine_spec(settings(), model)), model, PROMPTS)


def test_the_configuration_picks_the_engine(build, server, secret):
    model = build()
    assert sampling_engine(settings(sampling_engine="transformers"), model) is sample_completions
    assert isinstance(sampling_engine(settings(), model), VLLMEngine)
    assert isinstance(sampling_engine(settings(vllm_server=server.url), model), VLLMServerEngine)
    with pytest.raises(ConfigError, match=r"vllm_server must be a URL like http://"):
        settings(vllm_server="localhost:8021")


def test_a_server_that_is_away_is_named_after_some_attempts(build, monkeypatch):
    pauses = []
    monkeypatch.setattr(engines.time, "sleep", pauses.append)
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 does not answer .* tried 6 times; start it"):
        VLLMServerEngine(engine_spec(settings(), build()), "http://127.0.0.1:9")
    assert pauses == [1, 2, 4, 8, 16]


def test_weights_that_another_trainer_replaced_are_sent_again(build, server, secret, monkeypatch):
    model, other = build(), build(seed=1)
    engine, rival = (VLLMServerEngine(engine_spec(settings(), one), server.url) for one in (model, other))
    before = draw(engine, model, PROMPTS)
    request, rivalries = engine._client.request, []

    def interrupted(method, path, body=None):
        if path == "/samples" and rivalries:
            rivalries.pop()
            draw(rival, other, PROMPTS)
        return request(method, path, body)

    monkeypatch.setattr(engine._client, "request", interrupted)
    rivalries.append("once")
    assert draw(engine, model, PROMPTS) == before
    rivalries += ["again", "and again"]
    with pytest.raises(ConfigError, match=r"has other weights than .* give each trainer a server of its own"):
        draw(engine, model, PROMPTS)


def test_a_wrong_token_and_a_stranger_are_turned_away(build, server, monkeypatch):
    monkeypatch.setenv(engines.TOKEN_VARIABLE, "guessed")
    with pytest.raises(ConfigError, match=r"refuses the token: SOFTPREF_VLLM_TOKEN must hold"):
        VLLMServerEngine(engine_spec(settings(), build()), server.url)
    assert server.request("GET", "/engine")[0] == 401
    for method, path in (("PUT", "/engine"), ("POST", "/samples"), ("POST", "/weights/0")):
        assert server.request(method, path, b"{}")[0] == 401
    assert server.request("GET", "/health") == (200, {"status": "ok"})


def test_a_server_refuses_what_makes_no_sense_and_goes_on(build, server, secret):
    model = build()
    engine = VLLMServerEngine(engine_spec(settings(), model), server.url)
    draw(engine, model, PROMPTS)
    samples = {"prompts": [[1]], "seeds": [1], "max_new_tokens": 4, "stop_ids": []}
    name = "0" * 32
    for method, path, body, status in (
        ("PUT", f"/weights/../{name}/0", b"", 404),
        ("POST", f"/weights/{name}", b'{"parts": 1}', 409),
        ("POST", "/samples", json.dumps({**samples, "weights": name}).encode(), 409),
        ("POST", "/samples", b"{}", 400),
        ("POST", "/samples", b"no JSON", 400),
        ("GET", "/elsewhere", None, 404),
    ):
        assert server.request(method, path, body, Server.token)[0] == status, (method, path)
    assert server.request("PUT", f"/weights/{name}/0", b"no safetensors", Server.token)[0] == 200
    assert server.request("POST", f"/weights/{name}", b'{"parts": 1}', Server.token)[0] >= 400
    with pytest.raises(ConfigError, match=r"another model or other limits \(max_model_len: 192, not 21\)"):
        draw(VLLMServerEngine(engine_spec(settings(max_prompt_length=9), model), server.url), model, PROMPTS)
    assert largest_difference(model, draw(engine, model, PROMPTS)) < 1e-4


def test_weights_travel_in_parts(build, server, secret, monkeypatch):
    monkeypatch.setattr(engines, "_PART_BYTES", 10_000)
    model = build(seed=9)
    assert len(list(engines._parts(policy_weights(model), torch.float32))) > 5
    engine = VLLMServerEngine(engine_spec(settings(), model), server.url)
    assert largest_difference(model, draw(engine, model, PROMPTS)) < 1e-4


SCRIPT = """
import sys, torch
from softpref.lm.sampling import sampling_noise
from softpref.spo.engines import VLLMEngine, VLLMServerEngine, check_agreement
from softpref.spo.vllm_core import EngineSpec
from transformers import AutoModelForCausalLM

folder, url, prompts, spec = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
torch.distributed.init_process_group("gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = AutoModelForCausalLM.from_pretrained(folder)
engine = VLLMServerEngine(EngineSpec(*spec), url) if url else VLLMEngine(EngineSpec(*spec))
noise = sampling_noise(len(prompts), 12, 0)
for round_ in range(2):
    mine = list(range(rank, len(prompts), processes))
    samples = engine(model, [prompts[i] for i in mine], noise=noise[mine], stop_ids=[3])
    assert [sample.prompt for sample in samples] == [prompts[i] for i in mine]
    check_agreement(model, samples, precision="float32", sequences=99)
    found = [None] * processes
    torch.distributed.all_gather_object(found, [(i, s.completion) for i, s in zip(mine, samples)])
    if rank == 0:
        print("drawn", [completion for _, completion in sorted(sum(found, []))])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
"""


@pytest.mark.parametrize("place", ["in process", "server"])
def test_two_processes_draw_what_one_does(place, request, in_process, build, tmp_path, monkeypatch):
    model = build()
    model.save_pretrained(tmp_path)
    prompts = PROMPTS * 3
    url = ""
    if place == "server":
        url = request.getfixturevalue("server").url
        monkeypatch.setenv(engines.TOKEN_VARIABLE, Server.token)
    spec = engine_spec(settings(), model)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(tmp_path), url, repr(prompts), repr(tuple(spec))]
    result = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    drawn = [eval(line.removeprefix("drawn ")) for line in result.stdout.splitlines() if "drawn" in line]
    for completions in drawn:
        alone = in_process(model, prompts, noise=sampling_noise(15, 12, 0), stop_ids=[STOP])
        assert completions == [sample.completion for sample in alone]
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    assert len(drawn) == 2


def test_a_trainer_draws_from_it(make_trainer, make_rows, build, weights, logs_of, server, secret):
    def train(output, resume_from=None, **options):
        lengths = {"max_prompt_length": 180, "max_completion_length": 12, "sampling_batch_size": 32}
        every_step = {"sampling_interval": 1, "samples_per_refresh": 24, "max_steps": 4}
        trainer = make_trainer(
            make_rows(16), model=build(), output=output, **{**lengths, **every_step, **options}
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    first = train("first", sampling_engine="vllm")
    logs = logs_of(first)
    assert len(logs) == 4
    assert all(0 < log["sampling/logps_difference"] < 1e-5 for log in logs)
    # samples are fresh at every step, so their log-probabilities are those of the loss
    assert all(log["sampling/ess"] == pytest.approx(1, abs=1e-6) for log in logs)
    assert logs[0]["kl/sequence"] == pytest.approx(0, abs=1e-6)
    assert logs[-1]["kl/sequence"] > 1e-4
    again = train("again", sampling_engine="vllm")
    assert torch.equal(weights(first.model), weights(again.model))
    sent = train("sent", sampling_engine="vllm", vllm_server=server.url)
    assert torch.allclose(weights(first.model), weights(sent.model), atol=1e-5)
    saved = train("saved", sampling_engine="vllm", save_strategy="steps", save_steps=2)
    resumed = train("saved", sampling_engine="vllm", resume_from=f"{saved.args.output_dir}/checkpoint-2")
    assert torch.equal(weights(first.model), weights(resumed.model))
    own = train("own")
    assert not torch.equal(weights(first.model), weights(own.model))
    assert logs[0]["loss/preference"] == pytest.approx(logs_of(own)[0]["loss/preference"])


def test_a_server_for_others_needs_a_secret(monkeypatch, capsys):
    from softpref.spo.vllm_server import main

    monkeypatch.delenv(engines.TOKEN_VARIABLE, raising=False)
    assert main(["--host", "0.0.0.0"]) == 2
    assert "put a secret into SOFTPREF_VLLM_TOKEN" in capsys.readouterr().err
