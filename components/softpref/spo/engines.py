"""What draws the policy's samples in training: the model itself, or vLLM, in this process or on a server.

Every engine is called like `softpref.lm.sampling.sample_completions` and draws from the same distribution,
the model's own. A vLLM engine first loads the model's weights, at each call.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import logging
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from softpref.errors import ConfigError, SoftprefError
from softpref.lm.head import completion_hidden
from softpref.lm.packing import evaluation_mode
from softpref.lm.sampling import Sample, sample_completions
from softpref.lm.scoring import computing_precision, scoring_batches
from softpref.spo.config import SPOConfig
from softpref.spo.vllm_core import Drawn, EngineSpec, shared_core

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "SOFTPREF_VLLM_TOKEN"
"""Environment variable with the secret that trainer and server share."""

_ATTEMPTS = 6
_FIRST_PAUSE = 1.0  # seconds, doubled after each attempt: about half a minute in all
_PATIENCE = 3600.0  # seconds that a server may take to answer: it may have to build an engine first
_PART_BYTES = 1 << 30
_TOLERANCE = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.1}
_NOTICED = 1e-3  # nats per token in float32


class Engine(Protocol):
    """Draws one completion for each prompt; see `softpref.lm.sampling.sample_completions`."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        noise: Tensor,
        stop_ids: Sequence[int],
        batch_size: int = 64,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]: ...


def sampling_engine(args: SPOConfig, model: Any) -> Engine:
    """The engine that `args.sampling_engine` and `args.vllm_server` name, for models like `model`.

    Raises:
        ConfigError: vLLM is asked for and is not installed, or the server does not answer or refuses.
    """
    if args.sampling_engine == "transformers":
        return sample_completions
    spec = engine_spec(args, model)
    if args.vllm_server:  # which serves all processes at once
        spec = spec._replace(max_sequences=spec.max_sequences * args.world_size)
        return VLLMServerEngine(spec, args.vllm_server)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "sampling_engine=vllm needs vLLM in this environment; install softpref[vllm], name a "
            "vllm_server, or take sampling_engine=transformers"
        )
    return VLLMEngine(spec, trust_remote_code=args.trust_remote_code)


def engine_spec(args: SPOConfig, model: Any) -> EngineSpec:
    """What a vLLM engine for `model` is built from; it computes in the precision that the trainer does."""
    base = _without_wrappers(model)
    dtype = computing_precision(args, model)
    config = json.loads(base.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "use_cache"):  # where weights came from, what a trainer switches: no matter
        config.pop(name, None)
    config.update(architectures=[type(base).__name__], dtype=dtype)
    longest = args.max_prompt_length + args.max_completion_length
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or longest
    return EngineSpec(config, dtype, min(longest, positions), args.sampling_batch_size)


class VLLMEngine:
    """vLLM inside this process; in a distributed run each process has its own, for its share of the prompts.

    It is built at the first call and kept until the process ends. Beside the trainer's own weights it holds a
    copy in `spec.dtype` and a key-value cache for `spec.max_sequences` sequences.
    """

    def __init__(self, spec: EngineSpec, *, trust_remote_code: bool = False) -> None:
        self._spec, self._trust_remote_code = spec, trust_remote_code

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        noise: Tensor,
        stop_ids: Sequence[int],
        batch_size: int = 64,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """Load the model's weights, then sample; the batch size is the spec's."""
        _check_noise(prompts, noise)
        core = shared_core(self._spec, trust_remote_code=self._trust_remote_code)
        core.load(policy_weights(model).items())
        drawn = core.sample(
            prompts, noise_seeds(noise), max_new_tokens=noise.shape[1], stop_ids=stop_ids, progress=progress
        )
        return _samples(prompts, drawn)


class VLLMServerEngine:
    """vLLM in a process of its own, here or on another machine: `python -m softpref.spo.vllm_server`.

    In a distributed run process 0 gathers all prompts, sends weights and prompts, and hands out the samples.

    Args:
        spec: what the server builds its engine from.
        url: `http://host:port`. Where the server asks for a token, `SOFTPREF_VLLM_TOKEN` holds it.

    Raises:
        ConfigError: the server does not answer.
    """

    def __init__(self, spec: EngineSpec, url: str) -> None:
        self._spec = spec
        self._client = ServerClient(url)
        if PartialState().process_index == 0:
            self._client.request("GET", "/engine")

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        noise: Tensor,
        stop_ids: Sequence[int],
        batch_size: int = 64,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """Send the model's weights and the prompts of all processes, and give this process its samples."""
        _check_noise(prompts, noise)
        rank = PartialState().process_index
        shares = gather_object([([list(prompt) for prompt in prompts], noise_seeds(noise))])
        answer: list[Any] = [None]
        failure: Exception | None = None
        if rank == 0:
            try:
                answer = [self._sample(model, shares, noise.shape[1], stop_ids)]
            except Exception as error:  # the others must hear of it, or they would wait in vain
                failure, answer = error, [f"process 0 could not draw samples: {error}"]
        broadcast_object_list(answer)
        if failure is not None:
            raise failure
        if isinstance(answer[0], str):
            raise ConfigError(answer[0])
        if progress:
            progress(len(prompts))
        return _samples(prompts, [Drawn(*one) for one in answer[0][rank]])

    def _sample(
        self,
        model: Any,
        shares: list[tuple[list[list[int]], list[int]]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ) -> list[list[Any]]:
        """Each process's samples, in the order of the processes."""
        request = {
            "prompts": [prompt for prompts, _ in shares for prompt in prompts],
            "seeds": [seed for _, seeds in shares for seed in seeds],
            "max_new_tokens": max_new_tokens,
            "stop_ids": list(stop_ids),
        }
        for last in (False, True):
            try:
                version = self._client.synchronise(self._spec, policy_weights(model))
                answer = self._client.request("POST", "/samples", {**request, "weights": version})
                break
            except _WeightsGone as error:  # the server was restarted, or serves another trainer as well
                if last:
                    raise ConfigError(f"{error}; give each trainer a server of its own") from error
        drawn = iter(answer["samples"])
        return [[next(drawn) for _ in prompts] for prompts, _ in shares]


class ServerClient:
    """Talks to `softpref.spo.vllm_server`: JSON, and weights as safetensors."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        # without the environment's proxy, which is for the outside world
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def synchronise(self, spec: EngineSpec, weights: dict[str, Tensor]) -> str:
        """Have the server build its engine, if it has none, and load these weights; returns their name."""
        self.request("PUT", "/engine", spec._asdict())
        version, parts = uuid.uuid4().hex, 0
        for part in _parts(weights, getattr(torch, spec.dtype)):
            self.request("PUT", f"/weights/{version}/{parts}", part)
            parts += 1
        self.request("POST", f"/weights/{version}", {"parts": parts})
        return version

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send bytes or JSON and read the JSON answer; try again while the server is away.

        Raises:
            ConfigError: it stays away, refuses the token or the request, or fails.
        """
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        pause = _FIRST_PAUSE
        for attempt in range(_ATTEMPTS):
            try:
                with self._opener.open(request, timeout=_PATIENCE) as response:
                    answer: dict[str, Any] = json.load(response)
                    return answer
            except urllib.error.HTTPError as error:
                what = _message(error)
                if error.code == 409:
                    raise _WeightsGone(f"the vLLM server at {self._url} {what}") from error
                if error.code in (401, 403):
                    what = f"refuses the token: {TOKEN_VARIABLE} must hold the same here and there"
                raise ConfigError(f"the vLLM server at {self._url} {what} ({method} {path})") from error
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:  # away, or gone
                reason = getattr(error, "reason", error)
                if attempt == _ATTEMPTS - 1 or isinstance(reason, TimeoutError):
                    raise ConfigError(
                        f"the vLLM server at {self._url} does not answer {method} {path} "
                        f"({reason!r}), tried {attempt + 1} times; start it with "
                        "`python -m softpref.spo.vllm_server`, or correct vllm_server"
                    ) from error
                time.sleep(pause)
                pause *= 2
        raise AssertionError("the loop returns or raises")


class Agreement(NamedTuple):
    """How far an engine's log-probabilities lie from the trainer's, nats per token."""

    mean: float
    largest: float


@torch.no_grad()
def check_agreement(
    model: Any, samples: Sequence[Sample], *, precision: str, sequences: int = 8, plain: bool = False
) -> Agreement:
    """Compare the log-probabilities that came with samples with those that the trainer's model gives them.

    Two implementations of a model round differently, the more so the fewer bits they have. Beyond that they
    agree, unless the engine has other weights, samples another distribution or computes another model: the KL
    term would then be estimated on samples of something else. The mean over tokens is judged: single tokens
    differ much more in bfloat16. The limits are 0.01 nats in float32 (rounding alone gives about 1e-6, TF32
    1e-3), 0.03 in float16 and 0.1 in bfloat16 (0.01 to 0.05, more for a sharper model).

    Args:
        samples: the first `sequences` of them are compared; call it in the context that the trainer computes
            in.
        plain: as in `softpref.lm.head.completion_hidden`.
        precision: `float32`, `bfloat16` or `float16`, the coarser of trainer and engine.

    Raises:
        SoftprefError: the mean difference is above the limit.
    """
    chosen = samples[:sequences]
    differences = []
    with evaluation_mode(model):
        pairs = [(sample.prompt, sample.completion) for sample in chosen]
        for places, batch in scoring_batches(model, pairs, batch_size=sequences, plain=plain):
            logps = completion_hidden(model, batch, plain=plain).logps().cpu()
            for place, right in zip(places, torch.split(logps, batch.lengths.tolist()), strict=True):
                differences.append((right - torch.tensor(chosen[place].token_logps)).abs())
    if not differences:
        return Agreement(0.0, 0.0)
    every = torch.cat(differences)
    found = Agreement(float(every.mean()), float(every.max()))
    limit = _TOLERANCE[precision]
    if not found.mean <= limit:
        raise SoftprefError(
            f"the sampling engine's log-probabilities differ from the trainer's by {found.mean:.3g} nats per "
            f"token on average (at most {found.largest:.3g}) over {len(every)} tokens, more than the "
            f"{limit:g} that {precision} explains: it has other weights or computes the model differently, "
            "and the KL term would be wrong; take sampling_engine=transformers for this model, or beta 0, "
            "which needs no samples"
        )
    if precision == "float32" and found.mean > _NOTICED:
        logger.warning(
            "the sampling engine's log-probabilities differ from the trainer's by %.2g nats per token on "
            "average (at most %.2g), more than rounding in float32 explains",
            *found,
        )
    return found


def noise_seeds(noise: Tensor) -> list[int]:
    """A seed of 62 bits for each row of `noise`, fixed by the row alone."""
    rows = noise.detach().to("cpu", torch.float64).numpy()
    return [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big") >> 2 for row in rows]


def policy_weights(model: Any) -> dict[str, Tensor]:
    """The model's present weights by the names that its checkpoint would have; an adapter is merged in.

    The model itself is left as it is: merged layers are copies, the other tensors are the model's own. Tied
    weights come once.

    Raises:
        ConfigError: the weights are spread over processes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = _without_wrappers(model)
    if any(
        hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in base.parameters()
    ):
        raise ConfigError(
            "sampling_engine=vllm needs the whole model on each process, and its weights are spread over "
            "several (FSDP, ZeRO-3); take sampling_engine=transformers"
        )
    seen: dict[int, Tensor] = {}  # which keeps them alive: a new tensor could reuse the id of a dead one
    weights = {}
    with torch.no_grad():
        for name, tensor in _merged_tensors(base, ""):
            if id(tensor) not in seen:
                seen[id(tensor)] = tensor
                weights[name] = tensor.detach()
    converted: dict[str, Tensor] = revert_weight_conversion(base, weights)
    return converted


def _merged_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers as they would be with every adapter merged into its layer."""
    if hasattr(module, "unload_and_optionally_merge_module"):  # what PEFT trains in place of a whole layer
        copy: Any = deepcopy(module)
        module = copy.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    elif hasattr(module, "base_layer") and hasattr(module, "merge"):
        copy = deepcopy(module)
        copy.merge()
        module = copy.get_base_layer()
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _merged_tensors(child, f"{prefix}{name}.")


def _without_wrappers(model: Any) -> Any:
    """The transformers model inside a compiled one or one with an adapter."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _parts(weights: dict[str, Tensor], dtype: torch.dtype) -> Iterator[bytes]:
    """Weights as safetensors files of about `_PART_BYTES`; matrices in the precision they are used in."""
    from safetensors.torch import save

    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor = tensor.to(dtype)
        part[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        if size >= _PART_BYTES:
            yield save(part)
            part, size = {}, 0
    if part:
        yield save(part)


def _samples(prompts: Sequence[Sequence[int]], drawn: Iterable[Drawn]) -> list[Sample]:
    return [
        Sample(list(prompt), one.completion, one.token_logps, one.truncated)
        for prompt, one in zip(prompts, drawn, strict=True)
    ]


def _check_noise(prompts: Sequence[Any], noise: Tensor) -> None:
    if len(noise) != len(prompts):
        raise ValueError(f"noise needs one row per prompt: {len(prompts)} prompts, {len(noise)} rows")


class _WeightsGone(ConfigError):
    """The server does not have the weights, or not the engine, that a request names."""


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return f"says: {json.load(error)['error']}"
    except (ValueError, KeyError, OSError):
        return f"answers {error.code} {error.reason}"
