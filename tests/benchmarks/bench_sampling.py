"""Sampling speed: softpref's loop beside `model.generate`, the same model, prompts and length limit.

    python tests/benchmarks/bench_sampling.py        # or: make bench

Runs in turn, A B A B, after one warm-up of each; prints medians, spread and the ratio of medians. Weights are
random, so lengths are those that a per-token chance of stopping of about 1 in 40 gives.
"""

import argparse
import resource
import statistics
import time

import torch
from softpref.lm.sampling import sample_completions, sampling_noise
from transformers import LlamaConfig, LlamaForCausalLM


def build_model(vocabulary: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = build_model(options.vocabulary, options.device)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (options.batch,), generator=generator).tolist()
    prompts = [torch.randint(3, options.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    # one token in forty ends a completion: ids 0 and those just above 2 stand in for the end token
    stops = [0, *range(3, 3 + options.vocabulary // 40)]

    def ours(round_: int) -> int:
        noise = sampling_noise(options.batch, options.new_tokens, seed=round_)
        samples = sample_completions(
            model, prompts, noise=noise, stop_ids=stops, pad_id=2, batch_size=options.batch
        )
        return sum(len(sample.completion) for sample in samples)

    width = max(lengths)
    padded = torch.tensor([[2] * (width - len(p)) + p for p in prompts], device=options.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=options.device)

    def generate(round_: int) -> int:
        torch.manual_seed(round_)
        output = model.generate(
            input_ids=padded,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=options.new_tokens,
            eos_token_id=stops,
            pad_token_id=2,
        )[:, width:].tolist()
        ends = [next((i + 1 for i, t in enumerate(row) if t in set(stops)), len(row)) for row in output]
        return sum(ends)

    speeds: dict[str, list[float]] = {"softpref": [], "model.generate": []}
    for round_ in range(options.rounds + 1):
        for name, run in (("softpref", ours), ("model.generate", generate)):
            started = time.perf_counter()
            tokens = run(round_)
            if round_:  # the first is the warm-up
                speeds[name].append(tokens / (time.perf_counter() - started))
    print(
        f"{options.device}, batch {options.batch}, vocabulary {options.vocabulary}, {options.rounds} rounds"
    )
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:16} {median:8.0f} tokens/s   ({min(values):.0f} to {max(values):.0f})")
    medians = [statistics.median(values) for values in speeds.values()]
    print(f"ratio            {medians[0] / medians[1]:8.2f}")
    if options.device == "cpu":
        print(f"peak memory      {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:8.0f} MiB, both")
    else:
        print(f"peak memory      {torch.cuda.max_memory_allocated() / 2**20:8.0f} MiB, both")


if __name__ == "__main__":
    main()
