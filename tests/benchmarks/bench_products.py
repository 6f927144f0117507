"""How much of a training step is matrix products: the step's own, run again alone, against the whole of it.

    python tests/benchmarks/bench_products.py
    python tests/benchmarks/bench_products.py --vocabularies 4096 --steps 2

One optimizer step is watched as it runs, and every product that reaches the backend is noted: those of
linear layers (one forward, two backward), of the head (forward, what is computed anew in chunks, two
backward) and of attention. Its fused kernel performs two products forward and five backward, the scores
computed anew among them; they count as batched products of whole matrices, or half of it where the kernel is
told that it is causal, for that skips the other half. The same products are then run alone, in two ways:

- warm: each many times over in one loop, on numbers of the same sizes and strides; the medians of their
  times are added up. Operands and results lie in cache, as in no step.
- in order: all of the step's, one after another as they came, on its own tensors. Operands come from where
  the products before have left them; in the step, what stands between two products has just read some.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import harness
import report
from report import Section


class Product(NamedTuple):
    """`left [b, m, k] · right [b, k, n]` by sizes and strides; `share` of it is computed.

    Operands are of `dtype`; `out_dtype` is the result's, where it is another one.
    """

    kind: str
    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: Any
    adds: bool = False
    share: float = 1.0
    out_dtype: Any = None

    @property
    def flops(self) -> float:
        *batch, m, k = self.left[0]
        return 2.0 * (batch[0] if batch else 1) * m * k * self.right[0][-1] * self.share


class Call(NamedTuple):
    """A product as it was carried out, and the same once more on the same tensors."""

    product: Product
    again: Callable[[], Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """The products that are carried out meanwhile; their tensors stay in memory."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[Call] = []
    operands = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
    rooms: dict[tuple[int, ...], Any] = {}  # for scores, which never reach memory in the fused kernel

    def note(kind: str, left: Any, right: Any, again: Callable[[], Any], **more: Any) -> None:
        sizes = ((tuple(each.shape), tuple(each.stride())) for each in (left, right))
        calls.append(Call(Product(kind, *sizes, left.dtype, **more), again))

    def attention(q: Any, k: Any, v: Any, slope: Any, causal: bool) -> None:
        """Of all heads: queries `[B·H, L, D]`, keys and values `[B·H, S, D]`, scores `[B·H, L, S]`."""
        heads = q.shape[1]
        q, k, v, slope = (
            each if each is None else each.repeat_interleave(heads // each.shape[1], 1).flatten(0, 1)
            for each in (q, k, v, slope)
        )
        size = (*q.shape[:2], k.shape[1])
        if size not in rooms:
            rooms[size] = torch.rand(size, dtype=q.dtype, device=q.device)
        scores = rooms[size]
        products = [(q, k.mT, scores)]
        if slope is None:
            products += [(scores, v, None)]
        else:  # of the probabilities, then of queries, keys and values
            products += [(slope, v.mT, scores), (scores, k, None), (scores.mT, q, None)]
            products += [(scores.mT, slope, None)]
        for left, right, out in products:
            again = functools.partial(torch.bmm, left, right, **({} if out is None else {"out": out}))
            note("attention", left, right, again, share=0.5 if causal else 1.0)

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = func.overloadpacket.__name__
            if name in operands:
                left, right = (args[place] for place in operands[name])
                adds = name in ("addmm", "baddbmm") and kwargs.get("beta", 1) != 0
                out = kwargs.get("out")
                wide = None if out is None or out.dtype == left.dtype else out.dtype
                again = functools.partial(func, *args, **kwargs)
                note("linear", left, right, again, adds=adds, out_dtype=wide)
            elif name.startswith("_scaled_dot_product"):
                schema = [argument.name for argument in func._schema.arguments]
                given = dict(zip(schema, args, strict=False)) | kwargs
                slope = args[0] if name.endswith("backward") else None
                attention(given["query"], given["key"], given["value"], slope, bool(given.get("is_causal")))
            return func(*args, **kwargs)

    with Recorder():
        yield calls


class Warm:
    """Products on numbers of their own, to be run again and again."""

    def __init__(self, products: Iterable[Product], device: str) -> None:
        import torch

        def numbers(place: Any, dtype: Any) -> Any:
            sizes, strides = place
            extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            return torch.randn(extent, device=device).to(dtype).as_strided(sizes, strides)

        self._device = device
        self._runs: dict[Product, Callable[[], Any]] = {}
        for product in products:
            left, right = numbers(product.left, product.dtype), numbers(product.right, product.dtype)
            sizes = (*product.left[0][:-1], product.right[0][-1])
            out = torch.zeros(sizes, device=device, dtype=product.out_dtype or product.dtype)
            options = {"out": out} | ({"out_dtype": out.dtype} if product.out_dtype else {})
            if product.adds:
                add = torch.addmm if left.dim() == 2 else torch.baddbmm
                run = functools.partial(add, out, left, right, beta=0.5, **options)
            else:
                run = functools.partial(torch.mm if left.dim() == 2 else torch.bmm, left, right, **options)
            self._runs[product] = run

    def seconds(self, repeats: int = 3) -> dict[Product, float]:
        """Seconds of each product: the median of `repeats` one after another, after one to warm it."""
        medians = {}
        for product, run in self._runs.items():
            times = _seconds([run] * (repeats + 1), self._device)
            medians[product] = statistics.median(times[1:]) * product.share
        return medians


def seconds_in_order(calls: Sequence[Call], device: str) -> float:
    """Seconds of all calls, one after another as they came."""
    import torch

    with torch.no_grad():
        times = _seconds([again for _, again in calls], device)
    return sum(each * product.share for each, (product, _) in zip(times, calls, strict=True))


def _seconds(runs: Sequence[Callable[[], Any]], device: str) -> list[float]:
    """Seconds of each of these, run one after another; a GPU does not wait between them, as in a step."""
    import torch

    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        marks[0].record()
        for run, mark in zip(runs, marks[1:], strict=True):
            run()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]
    times = []
    for run in runs:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def measure_products(options: argparse.Namespace) -> Section:
    section = Section(
        "Training step against its matrix products alone",
        f"{harness.describe(options)}. softpref on {options.batch} pairs, `beta=0`, the same step again and "
        "again. Every product that a step hands to the backend was noted as it ran; the same products were "
        "then run alone. *Warm*: each in a loop of its own, so that operands lie in cache, and the median "
        "times added up. *In order*: one after another as they came, on the step's own tensors. Attention "
        "counts as two batched products forward and five backward of whole matrices (half of that where its "
        "kernel is told that it is causal). The goal is their share of the step's time.",
    )
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        _compare_products(options, vocabulary, section)
    return section


def _compare_products(options: argparse.Namespace, vocabulary: int, section: Section) -> None:
    rows = harness.make_rows(options, vocabulary, options.batch)
    one_step = harness.spo_trainer(options, rows, vocabulary, steps=0).trainer
    one_step.train()  # the first one also tries out what the model can
    with recorded() as calls:
        one_step.train()
    timed = harness.spo_trainer(options, rows * (options.steps + 1), vocabulary)  # the noted step each time
    counts = Counter(product for product, _ in calls)
    warm = Warm(counts, options.device)
    rounds: list[dict[Product, float]] = []

    def sum_warm(_: int) -> float:
        rounds.append(warm.seconds())
        return sum(count * rounds[-1][product] for product, count in counts.items())

    sides = {
        "warm": sum_warm,
        "in order": lambda _: seconds_in_order(calls, options.device),
        "step": lambda _: timed.seconds(),
    }
    times = harness.alternate(sides, options.rounds)
    goal = None if harness.goals_of(options, vocabulary) is None else 0.75
    for name in ("warm", "in order"):
        what = f"vocabulary {vocabulary:,}, {name}"
        section.compare(what, times[name], times["step"], "s", "the step", goal=goal)
    totals: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for product, count in counts.items():
        kind = "head" if product.kind == "linear" and _touches(product, vocabulary) else product.kind
        totals[kind] += count * statistics.median(seconds[product] for seconds in rounds[1:])
        flops[kind] += count * product.flops
    whole = statistics.median(times["step"])
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
        f"Vocabulary {vocabulary:,}, {_tokens_in_words(rows, options)}, warm:\n\n"
        + "\n".join(report.table(["products", "ms a step", "of the step", "GFLOP/s"], lines))
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
    return f"Vocabulary {vocabulary:,}, {whole:.2f} s a step:\n\n" + "\n".join(report.table(head, lines))


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
        f"{sum(prompts) / steps:,.0f} prompt and {sum(map(sum, answers)) / steps:,.0f} completion tokens a "
        "step (a prompt counted once)"
    )


PARTS = {"products": measure_products, "profile": profile_step}


def main() -> None:
    options = harness.arguments(__doc__, PARTS).parse_args()
    harness.set_up(options)
    report.run_parts(PARTS, options)


if __name__ == "__main__":
    main()
