"""Sampling: softpref's loop beside `model.generate`, other ways that transformers offers, and vLLM.

    python tests/benchmarks/bench_sampling.py
    python tests/benchmarks/bench_sampling.py --parts generate --vocabularies 4096 --rounds 5
    python tests/benchmarks/bench_sampling.py --device cuda --size 1b

All get the same prompts of mixed lengths, temperature 1 over the whole vocabulary, and one limit of length.
Weights are random, so that the end token alone would hardly ever come: one token in forty ends a completion,
for all alike. Tokens are counted up to that end, per second of the whole call. softpref and vLLM also give
each token's log-probability, `model.generate` does not.

`generate` is the comparison; `ways` measures what else could have been softpref's engine within transformers:
a static cache, the same compiled by torch (which needs a C++ compiler), and continuous batching. A way that
fails here is listed with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import report
from harness import END, FIRST, PAD
from report import Section

SHORTEST, LONGEST = 8, 64  # tokens of a prompt
ENDING = 40  # one token in so many ends a completion


class Task:
    """The model, the prompts, and the ways to complete them; each returns the tokens it made."""

    def __init__(self, options: argparse.Namespace, vocabulary: int) -> None:
        import torch

        self.model = harness.make_model(options, vocabulary).eval()
        # a GGUF's or Hub model's own end tokens stay as they are
        self.stops = [END, *range(FIRST, FIRST + max(1, vocabulary // ENDING))]
        if options.model:
            self.stops = [harness.make_tokenizer(options, vocabulary).eos_token_id]
        self.limit = max(2, round(options.new_tokens * options.scale))
        self.device = options.device
        generator = random.Random(0)
        lengths = [generator.randint(SHORTEST, LONGEST) for _ in range(options.samples)]
        lengths = [max(1, round(length * options.scale)) for length in lengths]
        self.prompts = [[generator.randrange(FIRST, vocabulary) for _ in range(n)] for n in lengths]
        width = max(lengths)
        rows = [[PAD] * (width - len(prompt)) + prompt for prompt in self.prompts]
        masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        self.ids = torch.tensor(rows, device=options.device)
        self.mask = torch.tensor(masks, device=options.device)

    def length(self, completion: Sequence[int]) -> int:
        """Tokens up to the first that ends the completion, that one included."""
        return next((i + 1 for i, token in enumerate(completion) if token in self._ends), len(completion))

    @property
    def _ends(self) -> set[int]:
        return set(self.stops)

    def softpref(self, seed: int) -> int:
        from softpref.lm.sampling import sample_completions, sampling_noise

        noise = sampling_noise(len(self.prompts), self.limit, seed=seed)
        samples = sample_completions(
            self.model,
            self.prompts,
            noise=noise,
            stop_ids=self.stops,
            batch_size=len(self.prompts),
        )
        return sum(len(sample.completion) for sample in samples)

    def _options(self) -> dict[str, Any]:
        return {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": self.limit,
            "eos_token_id": self.stops,
            "pad_token_id": PAD,
        }

    def generate(self, seed: int, **extra: Any) -> int:
        import torch

        torch.manual_seed(seed)
        output = self.model.generate(input_ids=self.ids, attention_mask=self.mask, **self._options(), **extra)
        return sum(map(self.length, output[:, self.ids.shape[1] :].tolist()))

    def static_cache(self, seed: int) -> int:
        return self.generate(seed, cache_implementation="static", disable_compile=True)

    def compiled(self, seed: int) -> int:
        from transformers.generation import CompileConfig

        how = CompileConfig(fullgraph=False, mode="default")
        how._compile_all_devices = True  # transformers compiles on accelerators alone unless told so
        return self.generate(seed, cache_implementation="static", compile_config=how)

    def continuous_batching(self, seed: int) -> int:
        import torch
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        torch.manual_seed(seed)
        # left to itself it takes most of the machine's memory; this is enough for all prompts at once
        pages = -(-(LONGEST + self.limit) // 256) * len(self.prompts)
        outputs = self.model.generate_batch(
            inputs=self.prompts,
            generation_config=GenerationConfig(**self._options()),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=2 * pages, max_batch_tokens=2048, max_requests_per_batch=len(self.prompts)
            ),
        )
        errors = [output.error for output in outputs.values() if output.error]
        if errors or len(outputs) < len(self.prompts):
            raise RuntimeError(errors[0] if errors else f"{len(outputs)} of {len(self.prompts)} came back")
        return sum(self.length(output.generated_tokens) for output in outputs.values())

    def vllm(self) -> Callable[[int], int]:
        import torch
        from softpref.lm.sampling import sampling_noise
        from softpref.spo import SPOConfig
        from softpref.spo.engines import VLLMEngine, engine_spec

        config = SPOConfig(
            output_dir="unused",
            use_cpu=self.device == "cpu",
            bf16=self.model.dtype == torch.bfloat16,
            sampling_batch_size=len(self.prompts),
            max_prompt_length=LONGEST,
            max_completion_length=self.limit,
        )
        engine = VLLMEngine(engine_spec(config, self.model))

        def run(seed: int) -> int:
            noise = sampling_noise(len(self.prompts), self.limit, seed=seed)
            samples = engine(self.model, self.prompts, noise=noise, stop_ids=self.stops)
            return sum(len(sample.completion) for sample in samples)

        return run


def per_second(run: Callable[[int], int], device: str) -> Callable[[int], float]:
    """Tokens per second of a call; the round is its seed."""

    def timed(round_: int) -> float:
        import torch

        started = time.perf_counter()
        tokens = run(round_)
        if device == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - started)

    return timed


def measure_generate(options: argparse.Namespace) -> Section:
    section = Section("Sampling", _setting(options))
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        task = Task(options, vocabulary)
        ways = {"softpref": task.softpref, "model.generate": task.generate}
        if importlib.util.find_spec("vllm") is not None:
            ways["vLLM"] = task.vllm()
        sides = {name: per_second(way, options.device) for name, way in ways.items()}
        speeds = harness.alternate(sides, options.rounds)
        agreed = harness.goals_of(options, vocabulary) is not None
        for name in speeds:
            if name != "softpref":
                goal = 1.3 if name == "model.generate" and agreed else None
                what = f"vocabulary {vocabulary:,}"
                section.compare(what, speeds["softpref"], speeds[name], "tokens/s", name, goal=goal)
    return section


def measure_ways(options: argparse.Namespace) -> Section:
    section = Section("Sampling: other ways within transformers", _setting(options))
    rows = []
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        task = Task(options, vocabulary)
        ways = {
            "softpref": task.softpref,
            "model.generate": task.generate,
            "generate, static cache": task.static_cache,
            "generate, static cache, torch.compile": task.compiled,
            "generate_batch (continuous batching)": task.continuous_batching,
        }
        sides, warm_ups = {}, {}
        for name, way in ways.items():
            started = time.perf_counter()
            try:
                way(0)
            except Exception as error:  # what a way may stumble over here is what is to be known of it
                reason = str(error).strip().splitlines() or [""]
                rows.append([name, f"{vocabulary:,}", f"{type(error).__name__}: {reason[0][:150]}", "", ""])
                report.progress(f"  {name}: {rows[-1][2]}")
                continue
            warm_ups[name] = time.perf_counter() - started
            sides[name] = per_second(way, options.device)
        speeds = harness.alternate(sides, options.rounds)
        usual = statistics.median(speeds["model.generate"])
        for name, values in speeds.items():
            ratio = f"{statistics.median(values) / usual:.2f}"
            first = f"{warm_ups[name]:.1f}"
            rows.append([name, f"{vocabulary:,}", report.spread(values), ratio, first])
    head = ["way", "vocabulary", "tokens/s", "against generate", "first call, s"]
    section.notes.append("\n".join(report.table(head, rows)))
    return section


def _setting(options: argparse.Namespace) -> str:
    limit = max(2, round(options.new_tokens * options.scale))
    ends = "its own end token ends one" if options.model else f"one token in {ENDING} ends one"
    return (
        f"{harness.describe(options)}. {options.samples} prompts of {SHORTEST} to {LONGEST} tokens (times "
        f"{options.scale:g}) as one batch, at most {limit} tokens each, {ends}; tokens up to the end per "
        "second."
    )


PARTS = {"generate": measure_generate, "ways": measure_ways}


def main() -> None:
    parser = harness.arguments(__doc__, PARTS)
    parser.add_argument("--samples", type=int, default=32, help="prompts, all of them one batch")
    parser.add_argument("--new-tokens", type=int, default=96, help="limit of a completion's length")
    options = parser.parse_args()
    harness.set_up(options)
    report.run_parts(PARTS, options)


if __name__ == "__main__":
    main()
