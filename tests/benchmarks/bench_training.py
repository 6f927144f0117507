"""Training steps: softpref's trainer beside TRL's DPOTrainer and OnlineDPOTrainer, and ways of its own.

    python tests/benchmarks/bench_training.py                         # every part, on the CPU
    python tests/benchmarks/bench_training.py --parts pairs --vocabularies 4096
    python tests/benchmarks/bench_training.py --parts pairs kl --device cuda --size 1b
    python tests/benchmarks/bench_training.py --parts pairs --device cuda --size 8b --apart
    python tests/benchmarks/bench_training.py --parts pairs --model SmolLM2-135M-Instruct.Q4_1.gguf --steps 2

`pairs`: the preference term alone against DPO, whose reference needs a forward more. `kl`: with the KL term,
its samples drawn within the time, against DPO and, per optimizer step, against online DPO. `shared`: rows of
one prompt and several completions, the prompt computed once against once for each.

A step's time runs from the end of one optimizer step to that of the next: loading, forward, backward,
optimizer, and what the trainer does around them. Both trainers get the same rows in the same order, AdamW,
the same learning rate, no evaluation, no checkpoint, and no gradient checkpointing but where a row says so;
everything else of TRL's is as it comes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import harness
import report
from harness import FIRST, Lengths, Timed
from report import Section

INTERVAL = 16  # optimizer steps between refreshes
KL_BETA = 0.05
CHECKPOINTING = "softpref, gradient checkpointing"
ANCHORED = "softpref, anchor 1"
PRECOMPUTED = "DPOTrainer, reference precomputed"
SPO_VARIANTS: dict[str, dict[str, Any]] = {
    "softpref": {},
    ANCHORED: {"anchor": 1.0},
    CHECKPOINTING: {"gradient_checkpointing": True},
}
DPO_VARIANTS: dict[str, dict[str, Any]] = {
    "DPOTrainer": {},
    PRECOMPUTED: {"precompute_ref_log_probs": True},
    "DPOTrainer, gradient checkpointing": {"gradient_checkpointing": True},
}
GOALS_OF_PAIRS = {4096: 2.0, 32000: 3.0}


def measure_pairs(options: argparse.Namespace) -> Section:
    section = Section(
        "Training step on pairs, without the KL term",
        f"{harness.describe(options)}. {_rows_in_words(options)} softpref: `beta=0`, which needs no "
        "reference; with `anchor=1`, which does, its log-probabilities come from `reference_cache`, computed "
        "before the clock starts. TRL: `DPOTrainer`, which runs its reference at each step. Further rows set "
        "it up better, or as it comes: with `precompute_ref_log_probs`, and with its own default of gradient "
        "checkpointing, beside softpref without and with it. Its "
        "`padding_free` is out of order in this version (it warns and pads), Liger's kernels need Triton "
        "and a GPU.",
    )
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        rows = harness.make_rows(options, vocabulary, options.batch * options.steps)
        sides: dict[str, Callable[[], Timed]] = {}
        cache = tempfile.TemporaryDirectory()  # of the reference's log-probabilities
        for variants, make in ((SPO_VARIANTS, harness.spo_trainer), (DPO_VARIANTS, harness.dpo_trainer)):
            if variants is SPO_VARIANTS or harness.has_trl():
                for name, arguments in variants.items():
                    kept = {"reference_cache": cache.name} if name == ANCHORED else {}
                    sides[name] = functools.partial(make, options, rows, vocabulary, **arguments, **kept)
        label = f"vocabulary {vocabulary:,}"
        speeds: dict[str, list[float]] = {}
        for together in [[name] for name in sides] if options.apart else [list(sides)]:
            trainers = {name: sides[name]() for name in together}
            speeds |= _pairs_per_second(trainers, options)
            for note in _utilisation(options, rows, trainers, speeds, label):
                section.notes += [] if note in section.notes else [note]
            _forget(trainers)
        for name in DPO_VARIANTS if harness.has_trl() else ():
            goal = _goal(options, vocabulary, GOALS_OF_PAIRS) if name == "DPOTrainer" else None
            section.compare(label, speeds["softpref"], speeds[name], "pairs/s", name, goal=goal)
        if harness.has_trl():
            what = f"{label}, {ANCHORED}"
            goal = _goal(options, vocabulary, dict.fromkeys(GOALS_OF_PAIRS, 1.0))
            section.compare(what, speeds[ANCHORED], speeds[PRECOMPUTED], "pairs/s", PRECOMPUTED, goal=goal)
            name = "DPOTrainer, gradient checkpointing"
            section.compare(f"{label}, {CHECKPOINTING}", speeds[CHECKPOINTING], speeds[name], "pairs/s", name)
        else:
            section.notes.append(f"{label}: {report.spread(speeds['softpref'])} pairs/s, no peer installed")
    return section


def measure_kl(options: argparse.Namespace) -> Section:
    samples = options.batch // 2
    # a real model hardly ever draws its end token after random words: all rows have its samples' length then
    lengths = Lengths(completion=(96, 96)) if options.model else Lengths()
    longest = lengths.scaled(options.scale).completion[1]
    ends = (
        "Samples have the rows' length, for the end token hardly ever comes earlier."
        if options.model
        else "Under random weights so many tokens end a completion that samples cut at the rows' greatest "
        "length have the rows' mean length."
    )
    section = Section(
        "Training step with the KL term, sampling included",
        f"{harness.describe(options)}. {_rows_in_words(options, lengths)} softpref: `beta={KL_BETA}`, "
        f"`sampling_interval={INTERVAL}`, {samples} fresh samples a step "
        f"(`samples_per_refresh={INTERVAL * samples}`), drawn within the time; a run is {INTERVAL} steps "
        f"with one refresh. {ends} DPOTrainer as above, on the same rows.",
    )
    for vocabulary in harness.vocabularies(options, (32000,)):
        stops = max(1, round(0.0047 * vocabulary))  # (1 − (1 − p)^128) / p is 96, as the rows have
        count = options.batch * options.steps
        rows = harness.make_rows(options, vocabulary, count, lengths, first=FIRST + stops)
        model = harness.make_model(options, vocabulary)
        if not options.model:
            model.generation_config.eos_token_id = [harness.END, *range(FIRST, FIRST + stops)]
        trainers = {"softpref": _with_kl(options, rows, vocabulary, model, longest)}
        if harness.has_trl():
            trainers["DPOTrainer"] = harness.dpo_trainer(options, rows, vocabulary)
        speeds = _pairs_per_second(trainers, options)
        if "DPOTrainer" in speeds:
            goal = _goal(options, vocabulary, {32000: 1.7})
            what = f"vocabulary {vocabulary:,}"
            section.compare(
                what, speeds["softpref"], speeds["DPOTrainer"], "pairs/s", "DPOTrainer", goal=goal
            )
        section.notes.append(_samples_in_words(trainers["softpref"], options, speeds["softpref"]))
        _forget(trainers)
    return section


def measure_online(options: argparse.Namespace) -> Section:
    length = round(96 * options.scale)
    section = Section(
        "Training step with the KL term, against online DPO",
        f"{harness.describe(options)}. Equal: {options.batch} prompts a step of 32 to 96 tokens (times "
        f"{options.scale:g}), two completions of {length} tokens each per prompt, sampled completions of "
        f"{length} tokens (only an end token that the weights hardly ever draw ends one earlier), "
        "temperature 1. softpref takes the pairs from the data, and draws "
        f"{options.batch // 2} samples a step for its KL term, sixteen steps' at once; OnlineDPOTrainer "
        "(`trl.experimental.online_dpo`) draws both completions of every prompt at every step, and a "
        "reward function that returns zeros judges them. Its default of gradient checkpointing, which "
        "would also switch its cache off while it samples, is off.",
    )
    if not harness.has_trl():
        section.notes.append("TRL is not installed.")
        return section
    for vocabulary in harness.vocabularies(options, (32000,)):
        lengths = Lengths(completion=(96, 96))
        rows = harness.make_rows(options, vocabulary, options.batch * options.steps, lengths)
        tokenizer = harness.make_tokenizer(options, vocabulary, rare_end=True)
        model = harness.make_model(options, vocabulary)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        trainers = {
            "softpref": _with_kl(options, rows, vocabulary, model, length, tokenizer=tokenizer),
            "OnlineDPOTrainer": _online_dpo(options, rows, tokenizer, vocabulary, length),
        }
        speeds = _pairs_per_second(trainers, options)
        goal = _goal(options, vocabulary, {32000: 2.5})
        section.compare(
            f"vocabulary {vocabulary:,}",
            [speed / options.batch for speed in speeds["softpref"]],
            [speed / options.batch for speed in speeds["OnlineDPOTrainer"]],
            "steps/s",
            "OnlineDPOTrainer",
            goal=goal,
        )
        section.notes.append(_samples_in_words(trainers["softpref"], options, speeds["softpref"]))
        _forget(trainers)
    return section


def measure_shared(options: argparse.Namespace) -> Section:
    rows_a_step = max(1, options.batch // 4)
    section = Section(
        "Shared prompts",
        f"{harness.describe(options)}. Rankings of four completions of 64 tokens to a prompt of 512 (times "
        f"{options.scale:g}), {rows_a_step} rows a step. Training steps without the KL term against those "
        "with `plain_forward`, which pads every completion with a prompt of its own and has full logits; "
        "and forward and backward of the log-probabilities alone, packed, sharing the prompt or not, and "
        "nothing else different.",
    )
    agreed = options
    options = argparse.Namespace(**{**vars(options), "batch": rows_a_step})
    for vocabulary in harness.vocabularies(options, (4096, 32000)):
        goal = _goal(agreed, vocabulary, {4096: 2.0, 32000: 2.0})
        lengths = Lengths((512, 512), (64, 64))
        rows = harness.make_rows(options, vocabulary, rows_a_step * options.steps, lengths, completions=4)
        trainers = {
            "softpref": harness.spo_trainer(options, rows, vocabulary),
            "each whole": harness.spo_trainer(options, rows, vocabulary, plain_forward=True),
        }
        speeds = _pairs_per_second(trainers, options)
        what = f"vocabulary {vocabulary:,}, training step"
        ours, plain = speeds["softpref"], speeds["each whole"]
        section.compare(what, ours, plain, "rows/s", "plain_forward", goal=goal)
        tokenized = [dict(row) for row in trainers["softpref"].trainer.train_dataset]
        _forget(trainers)
        model = harness.make_model(options, vocabulary)
        sides = {
            name: _forward_and_backward(options, model, tokenized[:rows_a_step], shared)
            for name, shared in (("shared", True), ("apart", False))
        }
        speeds = harness.alternate(sides, options.rounds)
        what = f"vocabulary {vocabulary:,}, forward and backward"
        section.compare(what, speeds["shared"], speeds["apart"], "rows/s", "packed apart", goal=goal)
    return section


def _forward_and_backward(
    options: argparse.Namespace, model: Any, rows: list[dict[str, Any]], shared: bool
) -> Callable[[int], float]:
    """Rows per second of the log-probabilities of one packed batch and their gradient."""
    import torch
    from softpref.lm.packing import pack_sequences
    from softpref.lm.scoring import sequence_logps

    sequences = [(row["prompt"], completion) for row in rows for completion in row["completions"]]
    batch = pack_sequences(sequences, share_prompts=shared).to(options.device)

    def run(_: int) -> float:
        started = time.perf_counter()
        for _ in range(options.steps):
            sequence_logps(model, batch).sum().backward()
            model.zero_grad(set_to_none=True)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return options.steps * len(rows) / (time.perf_counter() - started)

    return run


def _with_kl(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    vocabulary: int,
    model: Any,
    limit: int,
    **arguments: Any,
) -> Timed:
    """softpref with the KL term: as many timed steps as a refresh lasts."""
    if INTERVAL % options.steps:
        raise SystemExit(f"--steps must divide {INTERVAL}, so that every row comes equally often")
    return harness.spo_trainer(
        options,
        rows,
        vocabulary,
        model,
        steps=INTERVAL,
        beta=KL_BETA,
        sampling_interval=INTERVAL,
        samples_per_refresh=INTERVAL * (options.batch // 2),
        max_completion_length=limit,
        **arguments,
    )


def _online_dpo(
    options: argparse.Namespace, rows: list[dict[str, Any]], tokenizer: Any, vocabulary: int, length: int
) -> Timed:
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def indifferent(completions: list[str], **ignored: Any) -> list[float]:
        return [0.0] * len(completions)

    model = harness.make_model(options, vocabulary)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    arguments = harness.shared_arguments(options, options.steps + 1)
    trainer = OnlineDPOTrainer(
        model,
        reward_funcs=indifferent,
        args=OnlineDPOConfig(**arguments, max_new_tokens=length, temperature=1.0),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
    )
    return Timed(trainer, options.steps)


def _pairs_per_second(trainers: dict[str, Timed], options: argparse.Namespace) -> dict[str, list[float]]:
    """Rows per second of each trainer in each round, after a look at whether they have the same tokens."""
    if {"softpref", "DPOTrainer"} <= trainers.keys():
        harness.check_same_rows(trainers["softpref"], trainers["DPOTrainer"])
    progress = {
        name: (lambda _, each=each: options.batch / each.seconds()) for name, each in trainers.items()
    }
    return harness.alternate(progress, options.rounds)


def _utilisation(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    trainers: dict[str, Timed],
    speeds: dict[str, list[float]],
    label: str,
) -> list[str]:
    """Tokens per second and the share of the device's peak, where there is one to speak of."""
    peak = harness.device_peak(options)
    if peak is None:
        return []
    tokens, flops = harness.work_of_rows(next(iter(trainers.values())).trainer.model, rows)
    notes = []
    for name in trainers:
        speed = statistics.median(speeds[name]) / len(rows)
        notes.append(
            f"{label}, {name}: {speed * tokens:,.0f} tokens/s (each prompt counted once), "
            f"{speed * flops / peak:.1%} of {peak / 1e12:g} TFLOP/s"
        )
    notes.append(
        "Counted are the products of one forward and backward of the policy, a prompt once, the head at "
        "completion tokens: what the loss needs, not what a trainer does besides."
    )
    return notes


def _samples_in_words(timed: Timed, options: argparse.Namespace, speeds: list[float]) -> str:
    """What sampling took of a run's time, by the trainer's own clock in the last of them."""
    logged = [log for log in timed.trainer.state.log_history if "sampling/tokens_per_second" in log][-1]
    speed, length = logged["sampling/tokens_per_second"], logged["completions/mean_length"]
    seconds = timed.trainer.args.samples_per_refresh * length / speed
    share = seconds / (INTERVAL * options.batch / speeds[-1])
    return (
        f"Of softpref's time {share:.0%} went into sampling, at {speed:,.0f} tokens/s; samples had "
        f"{length:.0f} tokens on average."
    )


def _rows_in_words(options: argparse.Namespace, lengths: Lengths | None = None) -> str:
    lengths = (lengths or Lengths()).scaled(options.scale)
    return (
        f"{options.batch} pairs a step, prompts of {lengths.prompt[0]} to {lengths.prompt[1]} tokens, "
        f"completions of {lengths.completion[0]} to {lengths.completion[1]}, {options.steps} batches in "
        "turn."
    )


def _goal(options: argparse.Namespace, vocabulary: int, goals: dict[int, float]) -> float | None:
    """The goal of this vocabulary; they are all of eight rows a step."""
    speaks_of = harness.goals_of(options, vocabulary)
    return goals.get(speaks_of) if speaks_of is not None and options.batch == 8 else None


def _forget(trainers: dict[str, Timed]) -> None:
    """Give trainers up, with the models and optimizers that reference cycles would keep."""
    import gc

    trainers.clear()
    gc.collect()


PARTS = {"pairs": measure_pairs, "kl": measure_kl, "online": measure_online, "shared": measure_shared}


def main() -> None:
    parser = harness.arguments(__doc__, PARTS)
    parser.add_argument(
        "--apart", action="store_true", help="pairs: one side after another, if memory is short"
    )
    options = parser.parse_args()
    harness.set_up(options)
    report.run_parts(PARTS, options)


if __name__ == "__main__":
    main()
