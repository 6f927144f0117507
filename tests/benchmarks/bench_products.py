"""How much of a training step is matrix products: the step's own, run again alone, against the whole of it.

    python tests/benchmarks/bench_products.py
    python tests/benchmarks/bench_products.py --vocabularies 4096 --steps 2

One optimizer step is watched as it runs, and every product that reaches the backend is noted with the sizes
and strides of its operands: those of linear layers (one forward, two backward), of the head (forward, what is
computed anew in chunks, two backward) and of attention (its fused kernel performs two products forward and
five backward, the scores computed anew among them). The same products are then run alone, many times over in
one loop, on numbers of the same layout, and the medians of their times are added up. Attention's are counted
as batched products of whole matrices, or half of it where the kernel is told that it is causal, for that
skips the other half.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
from harness import Section


class Product(NamedTuple):
    """`left [b, m, k] · right [b, k, n]` by sizes and strides; `share` of it is computed."""

    kind: str
    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: Any
    adds: bool = False
    share: float = 1.0

    @property
    def flops(self) -> float:
        *batch, m, k = self.left[0]
        return 2.0 * (batch[0] if batch else 1) * m * k * self.right[0][-1] * self.share


@contextlib.contextmanager
def recorded() -> Iterator[Counter[Product]]:
    """The products that are carried out meanwhile, each with how often."""
    from torch.utils._python_dispatch import TorchDispatchMode

    products: Counter[Product] = Counter()
    operands = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}

    def layout(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(tensor.shape), tuple(tensor.stride())

    def attention(q: Any, k: Any, causal: bool, backward: bool) -> None:
        """Scores of all heads, `[B·H, L, D] · [B·H, D, S]`, and the products that have their shape."""
        (batch, heads, length, width), span = q.shape, k.shape[2]
        n, share = batch * heads, 0.5 if causal else 1.0

        def whole(rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
            return (n, rows, columns), (rows * columns, columns, 1)

        def product(m: int, inner: int, columns: int) -> Product:
            return Product("attention", whole(m, inner), whole(inner, columns), q.dtype, share=share)

        if not backward:
            products[product(length, width, span)] += 1
            products[product(length, span, width)] += 1
        else:
            products[product(length, width, span)] += 2  # scores again, and the slope of the probabilities
            products[product(length, span, width)] += 1  # of the queries
            products[product(span, length, width)] += 2  # of keys and values

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = func.overloadpacket.__name__
            if name in operands:
                left, right = (args[place] for place in operands[name])
                adds = name in ("addmm", "baddbmm") and kwargs.get("beta", 1) != 0
                products[Product("linear", layout(left), layout(right), left.dtype, adds)] += 1
            elif name.startswith("_scaled_dot_product"):
                backward = name.endswith("backward")
                q, k = args[1:3] if backward else args[:2]
                schema = [argument.name for argument in func._schema.arguments]
                given = dict(zip(schema, args, strict=False)) | kwargs
                attention(q, k, bool(given.get("is_causal")), backward)
            return func(*args, **kwargs)

    with Recorder():
        yield products


class Alone:
    """The recorded products on numbers of their own, to be run again and again."""

    def __init__(self, products: Counter[Product], device: str) -> None:
        import torch

        def numbers(place: Any, dtype: Any) -> Any:
            sizes, strides = place
            extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            return torch.randn(extent, device=device).to(dtype).as_strided(sizes, strides)

        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._runs: dict[Product, Callable[[], Any]] = {}
        for product in products:
            left, right = numbers(product.left, product.dtype), numbers(product.right, product.dtype)
            sizes = (*product.left[0][:-1], product.right[0][-1])
            out = torch.zeros(sizes, device=device, dtype=product.dtype)
            if product.adds:
                add = torch.addmm if left.dim() == 2 else torch.baddbmm
                run = functools.partial(add, out, left, right, out=out, beta=0.5)
            else:
                run = functools.partial(torch.mm if left.dim() == 2 else torch.bmm, left, right, out=out)
            self._runs[product] = run

    def seconds(self, repeats: int = 3) -> dict[Product, float]:
        """Seconds of each product: the median of `repeats` one after another, after one to warm it."""
        medians = {}
        for product, run in self._runs.items():
            times = []
            for _ in range(repeats + 1):
                self._wait()
                started = time.perf_counter()
                run()
                self._wait()
                times.append(time.perf_counter() - started)
            medians[product] = statistics.median(times[1:]) * product.share
        return medians


def measure_products(options: argparse.Namespace) -> Section:
    section = Section(
        "Training step against its matrix products alone",
        f"{harness.describe(options)}. softpref on {options.batch} pairs a step, `beta=0`. Every product "
        "that a step hands to the backend was noted with sizes and strides as it ran; the same products "
        "were then run alone, warm, and their median times added up. Attention counts as two batched "
        "products forward and five backward of whole matrices (half of that where its kernel is told that "
        "it is causal). The goal is their share of the step's time.",
    )
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        _compare_products(options, vocabulary, section)
    return section


def _compare_products(options: argparse.Namespace, vocabulary: int, section: Section) -> None:
    rows = harness.make_rows(options, vocabulary, options.batch * options.steps)
    timed = harness.spo_trainer(options, rows, vocabulary)
    with recorded() as products:
        timed.seconds()
    # the clock's first step is there too, on the first of the batches, which come in turn
    per_step = {product: count / (options.steps + 1) for product, count in products.items()}
    alone = Alone(products, options.device)
    rounds: list[dict[Product, float]] = []

    def sum_alone(_: int) -> float:
        rounds.append(alone.seconds())
        return sum(count * rounds[-1][product] for product, count in per_step.items())

    times = harness.alternate({"products": sum_alone, "step": lambda _: timed.seconds()}, options.rounds)
    totals: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for product, count in per_step.items():
        kind = "head" if product.kind == "linear" and _touches(product, vocabulary) else product.kind
        totals[kind] += count * statistics.median(seconds[product] for seconds in rounds[1:])
        flops[kind] += count * product.flops
    whole = statistics.median(times["step"])
    section.compare(
        f"vocabulary {vocabulary:,}",
        times["products"],
        times["step"],
        "s",
        "the step",
        goal=None if harness.goals_of(options, vocabulary) is None else 0.75,
    )
    lines = [
        [
            kind,
            f"{totals[kind] * 1e3:.0f}",
            f"{totals[kind] / whole:.0%}",
            f"{flops[kind] / totals[kind] / 1e9:.0f}",
        ]
        for kind in totals
    ]
    section.notes.append(
        f"Vocabulary {vocabulary:,}, {_tokens_in_words(rows, options)}:\n\n"
        + "\n".join(harness.table(["products", "ms a step", "of the step", "GFLOP/s alone"], lines))
    )


def profile_step(options: argparse.Namespace) -> Section:
    """Where the rest of a step goes, by torch's profiler."""
    section = Section(
        "What a step consists of",
        f"{harness.describe(options)}. By torch's profiler, self time of torch's operations in the main "
        "thread. What is no operation is Python: the trainer, accelerate, the model's own code, the "
        "profiler itself.",
    )
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        section.notes.append(_profile(options, vocabulary))
    return section


def _profile(options: argparse.Namespace, vocabulary: int) -> str:
    from torch.profiler import ProfilerActivity, profile

    rows = harness.make_rows(options, vocabulary, options.batch * options.steps)
    timed = harness.spo_trainer(options, rows, vocabulary)
    timed.seconds()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
    with profile(activities=activities, record_shapes=True) as profiler:
        started = time.perf_counter()
        timed.seconds()
        whole = (time.perf_counter() - started) / (options.steps + 1)
    groups: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    names: dict[str, Counter[str]] = {}
    attribute = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    for event in profiler.key_averages(group_by_input_shape=True):
        if not event.key.startswith("aten::"):
            continue
        name = event.key.removeprefix("aten::").rstrip("_")
        wide = any(vocabulary in sizes for sizes in event.input_shapes if isinstance(sizes, list))
        group = _group(name, wide)
        seconds = getattr(event, attribute) / 1e6 / (options.steps + 1)
        groups[group] += seconds
        calls[group] += event.count / (options.steps + 1)
        names.setdefault(group, Counter())[name] += seconds
    groups["Python, and waiting"] = max(0.0, whole - sum(groups.values()))
    lines = []
    for group, seconds in groups.most_common():
        parts = names.get(group, Counter()).most_common(6)
        most = ", ".join(f"{name} {value * 1e3:.0f}" for name, value in parts)
        lines.append([group, f"{seconds * 1e3:.0f}", f"{seconds / whole:.0%}", f"{calls[group]:.0f}", most])
    head = ["operations", "ms a step", "of the step", "calls", "most of it, ms"]
    return f"Vocabulary {vocabulary:,}, {whole:.2f} s a step:\n\n" + "\n".join(harness.table(head, lines))


_MEMORY = {"empty", "empty_like", "empty_strided", "zeros", "zero", "fill", "resize", "clone", "copy"}
_GATHERING = ("index", "gather", "scatter", "embedding", "nonzero", "masked_select", "repeat_interleave")


def _group(name: str, wide: bool) -> str:
    """What an operation of torch counts as; `wide`: one of its operands is as wide as the vocabulary."""
    over = "the vocabulary (logits, head)" if wide else "hidden states and smaller"
    if name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"):
        return f"matrix products, {over}"
    if "scaled_dot" in name:
        return "attention"
    if name.startswith(("_fused_adam", "_foreach")) or name in ("lerp", "addcmul", "addcdiv"):
        return "optimizer, gradient norm"
    if name in _MEMORY:
        return f"allocating, filling, copying, {over}"
    if any(part in name for part in _GATHERING):
        return f"gathering and scattering, {over}"
    return f"elementwise and reductions, {over}"


def _touches(product: Product, vocabulary: int) -> bool:
    return vocabulary in product.left[0] or vocabulary in product.right[0]


def _tokens_in_words(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    prompts = [len(row["prompt"].split()) for row in rows]
    answers = [[len(answer.split()) + 1 for answer in row["completions"]] for row in rows]
    steps = len(rows) / options.batch
    return (
        f"on average {sum(prompts) / steps:,.0f} prompt and {sum(map(sum, answers)) / steps:,.0f} "
        "completion tokens a step (a prompt counted once)"
    )


PARTS = {"products": measure_products, "profile": profile_step}


def main() -> None:
    options = harness.arguments(__doc__, PARTS).parse_args()
    harness.set_up(options)
    harness.run_parts(PARTS, options)


if __name__ == "__main__":
    main()
