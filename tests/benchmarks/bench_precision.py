"""How exact log-probabilities in bf16 are: in chunks from hidden states, and from full logits.

    python tests/benchmarks/bench_precision.py
    python tests/benchmarks/bench_precision.py --device cuda --vocabularies 32000 128000

Hidden states and a head, both of them bf16 numbers, fix the exact log-probabilities: those of a computation
in float64. Beside them stand softpref's, computed in chunks with products that leave their accumulation in
fp32 where the device can do so; full logits as a model in bf16 gives them, made fp32 before the softmax; and
the softmax in bf16 too. The gradient with respect to hidden states is compared as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import report
from harness import SIZES
from report import Section

TOKENS = 1024


def measure_precision(options: argparse.Namespace) -> Section:
    section = Section(
        "Log-probabilities in bf16",
        f"{options.device}; {TOKENS} tokens, width {SIZES[options.size][0]}, hidden states and head drawn "
        "so that logits have a standard deviation of 3. Distance from float64 on the same bf16 numbers, in "
        "nats, root of the mean square; of the gradient with respect to hidden states, relative to its "
        "size.",
    )
    rows = []
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        found = _distances(options, vocabulary)
        for name, (distance, greatest, gradient) in found.items():
            rows.append([name, f"{vocabulary:,}", f"{distance:.2e}", f"{greatest:.2e}", f"{gradient:.2e}"])
        chunked, full = found["softpref, chunks"], found["full logits, softmax in fp32"]
        what = f"vocabulary {vocabulary:,}"
        section.compare(
            f"{what}, distance", [chunked[0]], [full[0]], "nats", "full logits", goal=0.5, at_most=True
        )
    head = ["way", "vocabulary", "distance", "greatest", "gradient's, relative"]
    section.notes.append("\n".join(report.table(head, rows)))
    return section


def _distances(options: argparse.Namespace, vocabulary: int) -> dict[str, tuple[float, float, float]]:
    import torch
    from softpref.objectives import token_logps

    width = SIZES[options.size][0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=generator).bfloat16().to(options.device)
    head = (torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5).bfloat16()
    head = head.to(options.device)
    targets = torch.randint(vocabulary, (TOKENS,), generator=generator).to(options.device)

    def gradient_of(logps: Callable[[Any], Any], start: Any = hidden) -> tuple[Any, Any]:
        """Log-probabilities, and the gradient of their sum, in float64."""
        own = start.clone().requires_grad_()
        values = logps(own)
        [gradient] = torch.autograd.grad(values.sum(), [own])
        return values.detach().double(), gradient.double()

    def gathered(logits: Any) -> Any:
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    def exact(own: Any) -> Any:
        return gathered(own @ head.double().T)

    ways = {
        "softpref, chunks": lambda own: token_logps(own, head, targets),
        "full logits, softmax in fp32": lambda own: gathered((own @ head.T).float()),
        "full logits, softmax in bf16": lambda own: gathered(own @ head.T),
    }
    expected, slope = gradient_of(exact, hidden.double())
    found = {}
    for name, way in ways.items():
        values, gradient = gradient_of(way)
        difference = (values - expected).abs()
        slip = (gradient - slope).norm() / slope.norm()
        found[name] = (difference.square().mean().sqrt().item(), difference.max().item(), slip.item())
    return found


PARTS = {"precision": measure_precision}


def main() -> None:
    options = harness.arguments(__doc__, PARTS).parse_args()
    harness.set_up(options)
    report.run_parts(PARTS, options)


if __name__ == "__main__":
    main()
