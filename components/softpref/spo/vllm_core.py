"""One vLLM engine inside this process: weights and token ids go in, sampled tokens come out.

Used by the in-process sampling engine and by the server; knows neither trainer nor network. It samples from
exactly the model's own distribution: temperature 1 over the whole vocabulary, with double-precision noise,
since in single precision tokens below a probability of about 1e-7 are never drawn. It reports the
log-probabilities of the distribution that was sampled, after all processing, so that a setting that changed
the distribution would show in the comparison with the trainer's.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softpref.errors import ConfigError, SoftprefError

_KV_BLOCK = 128  # tokens, the largest block of vLLM's back ends; a sequence's cache is rounded up to blocks


class EngineSpec(NamedTuple):
    """What an engine is built from; one with the same spec can be used again.

    Attributes:
        config: the model's `config.json` as a dictionary, `architectures` included.
        dtype: precision of weights and computation: `float32`, `bfloat16` or `float16`.
        max_model_len: longest prompt and completion together, tokens.
        max_sequences: sequences sampled at once; the key-value cache has room for them at full length.
    """

    config: dict[str, Any]
    dtype: str
    max_model_len: int
    max_sequences: int


class Drawn(NamedTuple):
    """A sampled completion: ids with the stop token, each one's log-probability in nats, and how it ended."""

    completion: list[int]
    token_logps: list[float]
    truncated: bool


class VLLMCore:
    """A vLLM engine with dummy weights until `load` or `load_files` has been called.

    Args:
        spec: the model and its limits.
        tensor_parallel_size: GPUs that share the model; above 1 vLLM starts processes of its own.
        gpu_memory_utilization: share of the device's memory for weights and key-value cache together. None
            takes only what `spec.max_sequences` need, and leaves the rest to the trainer.
        trust_remote_code: run model code that comes with a checkpoint.
        beside_trainer: whether the trained model is in this process too.

    Attributes:
        most_weight_bytes: what no checkpoint of the model exceeds: twice its weights, and a megabyte.

    Raises:
        ConfigError: vLLM is not installed, or cannot run this model here.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        trust_remote_code: bool = False,
        beside_trainer: bool = False,
    ) -> None:
        _prepare_environment()
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise ConfigError(
                "sampling_engine=vllm needs vLLM, which cannot be imported "
                f"({error}); install softpref[vllm], or sample with sampling_engine=transformers"
            ) from error

        self.spec = spec
        self._vocabulary = _text_config(spec.config).get("vocab_size")
        self._requests = 0
        name = "/".join(spec.config.get("architectures") or ["this model"])
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # every process of a distributed run has an engine of its own, and vLLM must be told of the others
        external = distributed and torch.distributed.get_world_size() > 1
        memory: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        if gpu_memory_utilization is None:
            memory = {"gpu_memory_utilization": 0.01, "kv_cache_memory_bytes": kv_cache_bytes(spec)}
        try:
            with tempfile.TemporaryDirectory(prefix="softpref-vllm-") as folder, _isolated():
                # only a config: no generation config whose top-k or temperature could find its way in
                Path(folder, "config.json").write_text(json.dumps(spec.config), encoding="utf-8")
                config = EngineArgs(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    generation_config="vllm",
                    trust_remote_code=trust_remote_code,
                    dtype=spec.dtype,
                    max_model_len=spec.max_model_len,
                    max_num_seqs=spec.max_sequences,
                    tensor_parallel_size=tensor_parallel_size,
                    distributed_executor_backend="external_launcher" if external else None,
                    logprobs_mode="processed_logprobs",
                    use_fp64_gumbel=True,
                    # on a CPU compiling makes nothing faster; on a GPU it brings CUDA graphs
                    enforce_eager=not torch.cuda.is_available(),
                    disable_log_stats=True,
                    seed=0,
                    **memory,
                ).create_engine_config()
                if beside_trainer and config.model_config.using_transformers_backend():
                    # vLLM then rewrites the very class of transformers that the trained model is of
                    raise ConfigError(
                        f"vLLM has no implementation of its own for {name} and borrows that of transformers, "
                        "which does not work beside the model in training; start a server with "
                        "`python -m softpref.spo.vllm_server` and name it as vllm_server"
                    )
                self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
            _engines.append(self._engine)
            # on some devices some shapes have no kernel
            self.sample([[0]], [0], max_new_tokens=1, stop_ids=[])
            # a checkpoint may hold an output layer that the model ties to its embeddings, and has headers
            self.most_weight_bytes: int = 2 * sum(self._engine.collective_rpc(_weight_bytes)) + (1 << 20)
        except SoftprefError:
            raise
        except (ValueError, RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"vLLM cannot run {name} in {spec.dtype} here: {error}; sample with "
                "sampling_engine=transformers instead"
            ) from error

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by `(checkpoint name, tensor)` pairs; caches of the old ones are dropped."""
        with _isolated():
            self._engine.collective_rpc(_load_tensors, args=(weights,))
        self._forget_prefixes()

    def load_files(self, files: Sequence[str]) -> None:
        """As `load`, from safetensors files, which every worker process reads for itself."""
        with _isolated():
            self._engine.collective_rpc(_load_files, args=(list(files),))
        self._forget_prefixes()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> list[Drawn]:
        """One completion for each prompt, in the order given.

        Args:
            prompts: prompt ids, each with at least one token.
            seeds: fixes each sample's randomness.
            max_new_tokens: limit on a completion's length.
            stop_ids: tokens that end a completion; no other does.
            progress: called with the number of completions finished since the last call.

        Raises:
            ConfigError: a prompt leaves no room for `max_new_tokens` in the engine's length limit.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_new_tokens > self.spec.max_model_len:
            raise ConfigError(
                f"a prompt of {longest} tokens and a completion of up to {max_new_tokens} do not fit into "
                f"the {self.spec.max_model_len} tokens of the vLLM engine; lower max_prompt_length or "
                "max_completion_length"
            )
        # a token that the model does not have is never drawn; vLLM refuses it
        stops = sorted({stop for stop in stop_ids if self._vocabulary is None or stop < self._vocabulary})
        names = [str(self._requests + i) for i in range(len(prompts))]
        self._requests += len(prompts)
        drawn: dict[str, Drawn] = {}
        with _isolated():
            try:
                for name, prompt, seed in zip(names, prompts, seeds, strict=True):
                    params = SamplingParams(
                        temperature=1.0,
                        top_p=1.0,
                        top_k=0,
                        min_p=0.0,
                        seed=seed,
                        max_tokens=max_new_tokens,
                        stop_token_ids=stops,
                        ignore_eos=True,  # of end tokens only stop_ids count, not the checkpoint's
                        logprobs=0,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
                while self._engine.has_unfinished_requests():
                    finished = [output for output in self._engine.step() if output.finished]
                    drawn.update((output.request_id, _drawn(output.outputs[0])) for output in finished)
                    if progress and finished:
                        progress(len(finished))
            except BaseException:
                self._engine.abort_request([name for name in names if name not in drawn])
                raise
        return [drawn[name] for name in names]

    def _forget_prefixes(self) -> None:
        """Drop key-value blocks that prompts shared: they were computed with the old weights."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache over a change of weights: requests still run")


_engines: list[Any] = []
"""All engines of this process, kept forever: when an engine is garbage-collected, vLLM shuts down all of
`torch.distributed`, with the groups of other engines and of the trainer."""

_cores: dict[str, VLLMCore] = {}


def shared_core(spec: EngineSpec, *, trust_remote_code: bool = False) -> VLLMCore:
    """The engine of `spec` beside the trainer, built at the first call.

    It is kept until the process ends; the next trainer of a model of the same shape uses it again.
    """
    key = json.dumps([spec, trust_remote_code], sort_keys=True)
    if key not in _cores:
        _cores[key] = VLLMCore(spec, trust_remote_code=trust_remote_code, beside_trainer=True)
    return _cores[key]


def kv_cache_bytes(spec: EngineSpec) -> int:
    """Memory that `max_sequences` sequences of `max_model_len` tokens need for keys and values, bytes."""
    config = _text_config(spec.config)
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    width = config.get("hidden_size") or config.get("n_embd") or 1
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 1
    head_width = config.get("head_dim") or -(-width // heads)
    key_heads = config.get("num_key_value_heads") or heads
    blocks = -(-spec.max_model_len // _KV_BLOCK) * spec.max_sequences + 2  # vLLM keeps one of them empty
    itemsize = getattr(torch, spec.dtype).itemsize
    return int(2 * layers * key_heads * head_width * itemsize * blocks * _KV_BLOCK)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config") or config


def _drawn(output: Any) -> Drawn:
    ids = list(output.token_ids)
    logps = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
    return Drawn(ids, logps, output.finish_reason != "stop")


def _weight_bytes(worker: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in worker.get_model().parameters())


def _load_tensors(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    worker.reload_weights(weights_iterator=iter(weights))
    _pack_output_layer(worker)


def _load_files(worker: Any, files: list[str]) -> None:
    worker.reload_weights(weights_iterator=_read(files))
    _pack_output_layer(worker)


def _pack_output_layer(worker: Any) -> None:
    """Rebuild vLLM's CPU kernel of the output layer, which keeps a packed copy of the weights.

    Reloading does this for the layers that it loads. An output layer tied to the embeddings is not among
    them, and would keep the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _read(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_tensor(name)


def _prepare_environment() -> None:
    """vLLM reads these when it is imported or builds an engine."""
    # the engine runs in this very process: weights need no copy, and scheduling is deterministic
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is reported to anybody
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def _isolated() -> Iterator[None]:
    """Inside, vLLM cannot change the trainer's random state, precision and thread settings."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
