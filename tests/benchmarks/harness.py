"""What the benchmarks share: options, models, rows, both trainers, alternating rounds, peaks of memory.

A benchmark sets softpref beside a peer on the same rows and the same weights, in one process, in turn A B A
B, and reports medians, the spread from least to greatest, and the ratio of the medians. Peaks of memory are
those of a process of its own for each side. Nothing here is a test, and nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import figure, progress

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "components")]  # a clone measures itself, whatever is installed

# (hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings): Llama's shapes
SIZES = {
    "tiny": (32, 64, 2, 2, 2, 256, False),
    "small": (256, 688, 6, 8, 8, 32000, False),
    "0.1b": (768, 2048, 12, 12, 12, 32000, False),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
END, PAD, FIRST = 0, 1, 2  # token ids of the word tokenizer: the end, the padding, the first word
# dense bf16 peaks in FLOP/s by what the device calls itself; others: --peak-tflops
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
LEARNING_RATE = 1e-6


# ---------------------------------------------------------------------------------------- options


def arguments(description: str | None, parts: Iterable[str], **defaults: Any) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have; `parts` are those of this one."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(parts), help="of this benchmark; all by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on the CPU, else bf16")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--size", default="small", choices=SIZES, help="Llama shapes with random weights")
    parser.add_argument("--model", default="", help="a real model instead: a GGUF file, checkpoint or Hub id")
    parser.add_argument("--vocabularies", type=int, nargs="+", help="in place of the usual ones")
    parser.add_argument(
        "--rounds", type=int, default=defaults.get("rounds", 3), help="of A B, after a warm-up"
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.get("steps", 4), help="optimizer steps per round"
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs, or rows, of an optimizer step")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths of rows and samples")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense peak, for its utilisation")
    parser.add_argument("--json", type=Path, help="write the result there too")
    return parser


def has_trl() -> bool:
    """Whether the peer is installed: the extra `bench`."""
    return importlib.util.find_spec("trl") is not None


# ---------------------------------------------------------------------------------------- models and rows


def set_up(options: argparse.Namespace) -> None:
    """Threads and silence, before anything is measured."""
    for name in ("TQDM_DISABLE", "TRL_EXPERIMENTAL_SILENCE", "HF_HUB_OFFLINE"):  # read when they are imported
        os.environ.setdefault(name, "1")
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()


def make_model(options: argparse.Namespace, vocabulary: int | None = None) -> Any:
    """The model of `--model`, or a Llama of `--size` with random weights, alike at every call."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision(options)]
    if options.model:
        from softpref.lm.loading import load_model

        return load_model(options.model, dtype=str(dtype).removeprefix("torch.")).to(options.device)
    hidden, intermediate, layers, heads, kv_heads, default_vocabulary, tied = SIZES[options.size]
    config = LlamaConfig(
        vocab_size=vocabulary or default_vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_tokenizer(options: argparse.Namespace, vocabulary: int, rare_end: bool = False) -> Any:
    """The tokenizer of `--model`, or one whose words are the token ids themselves, set apart by spaces.

    Args:
        rare_end: a real model's end token becomes one that it hardly ever draws, so that samples have the
            greatest length allowed, as they have under random weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if options.model:
        from softpref.lm.loading import load_tokenizer

        tokenizer = load_tokenizer(options.model)
        if rare_end:
            usual = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
            tokenizer.eos_token = next(token for token in tokenizer.get_added_vocab() if token not in usual)
        return tokenizer
    words = {str(i): i for i in range(FIRST, vocabulary)}
    text = Tokenizer(models.WordLevel({"<end>": END, "<pad>": PAD, **words}, unk_token="<end>"))
    text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="<end>")


class Lengths(NamedTuple):
    """Least and greatest number of tokens, the end token included."""

    prompt: tuple[int, int] = (32, 96)
    completion: tuple[int, int] = (64, 128)

    def scaled(self, factor: float) -> Lengths:
        return Lengths(*((max(2, round(low * factor)), max(2, round(high * factor))) for low, high in self))


def make_rows(
    options: argparse.Namespace,
    vocabulary: int,
    count: int,
    lengths: Lengths | None = None,
    completions: int = 2,
    first: int = FIRST,
) -> list[dict[str, Any]]:
    """Rows of random words, alike at every call: `prompt` and `completions`, best first, as text.

    A completion of n tokens is n − 1 words, for both trainers put the end token after it.

    Args:
        first: the least token id that a word may be.
    """
    lengths = (lengths or Lengths()).scaled(options.scale)
    generator = random.Random(0)
    if options.model:
        return _english_rows(generator, make_tokenizer(options, vocabulary), count, lengths, completions)

    def words(number: int) -> str:
        return " ".join(str(generator.randrange(first, vocabulary)) for _ in range(number))

    rows = []
    for _ in range(count):
        prompt = words(generator.randint(*lengths.prompt))
        answers = [" " + words(generator.randint(*lengths.completion) - 1) for _ in range(completions)]
        rows.append({"prompt": prompt, "completions": answers})
    return rows


# words that are one token of most vocabularies with a space before them
_ENGLISH = """\
the of and to in is that for it as was with be by on not he this are or his from at which but have
an had they you were there one all we can her has their been if more when will would who so no out up into
than them some could time other only new these two may then do first any my now such like our over man me even
most made after also did many before must through back years where much your way well down should because each
just those people how too little state good very make world still own see men work long get here between both
life being under never day same another know while last might us great old year off come since against go came
right used take three"""


def _english_rows(
    generator: random.Random, tokenizer: Any, count: int, lengths: Lengths, completions: int
) -> list[dict[str, Any]]:
    words = [
        word
        for word in _ENGLISH.split()
        if len(tokenizer(" " + word, add_special_tokens=False).input_ids) == 1
    ]

    def text(number: int) -> str:
        return "".join(" " + generator.choice(words) for _ in range(number))

    rows = []
    for _ in range(count):
        prompt = text(generator.randint(*lengths.prompt))
        answers = [text(generator.randint(*lengths.completion) - 1) for _ in range(completions)]
        rows.append({"prompt": prompt, "completions": answers})
    return rows


def vocabularies(options: argparse.Namespace, usual: Sequence[int]) -> list[int]:
    """The vocabularies to measure: as asked; else `usual` for the small Llama, and the others' own."""
    if options.model:
        return [len(make_tokenizer(options, 0))]
    return options.vocabularies or (list(usual) if options.size == "small" else [SIZES[options.size][5]])


def precision(options: argparse.Namespace) -> str:
    """`fp32` or `bf16`: weights, gradients, optimizer state and products alike."""
    return options.precision or ("fp32" if options.device == "cpu" else "bf16")


def goals_of(options: argparse.Namespace, vocabulary: int) -> int | None:
    """The vocabulary whose goals speak of these settings, or None; a real model has those of 32,000."""
    asked = (options.size, options.device, precision(options), options.scale)
    if asked != ("small", "cpu", "fp32", 1.0):
        return None
    return 32000 if options.model else vocabulary


def describe(options: argparse.Namespace) -> str:
    """The model and the machine's part in it, for a section's first lines."""
    hidden, _, layers, *_ = SIZES[options.size]
    model = f"`{Path(options.model).name}`" if options.model else f"Llama of {layers} layers, width {hidden}"
    threads = f", {options.threads} threads" if options.device == "cpu" else ""
    device = f"{precision(options)}, {options.device}{threads}"
    return f"{model}, {device}; {options.rounds} rounds after a warm-up"


# ---------------------------------------------------------------------------------------- trainers


def step_clock() -> Any:
    """A callback of `transformers.Trainer` that notes when optimizer steps end."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.ends = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    return StepClock()


@functools.cache
def _output_folder() -> tempfile.TemporaryDirectory[str]:
    """Where trainers may write; gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="softpref-bench-")


def shared_arguments(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments` that both trainers get."""
    return {
        "output_dir": _output_folder().name,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": options.device == "cpu",
        "bf16": precision(options) == "bf16",
        "seed": 0,
    }


class Timed:
    """A trainer that can be run again and again, timed from the end of its first step to that of its last.

    The first step of a run allocates anew what the other side's run has thrown out, and is left out.
    """

    def __init__(self, trainer: Any, steps: int) -> None:
        from transformers import PrinterCallback

        self.trainer, self.steps, self.clock = trainer, steps, step_clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.clock)

    def seconds(self) -> float:
        """Seconds per optimizer step of one run."""
        self.trainer.train()
        ends = self.clock.ends
        assert len(ends) == self.steps + 1, f"{len(ends)} steps ended, {self.steps + 1} were due"
        return (ends[-1] - ends[0]) / self.steps


def spo_trainer(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    vocabulary: int,
    model: Any = None,
    **arguments: Any,
) -> Timed:
    """softpref's trainer on these rows, for `options.steps` timed steps."""
    from softpref.spo import SPOConfig, SPOTrainer

    steps = arguments.pop("steps", options.steps)
    tokenizer = arguments.pop("tokenizer", None) or make_tokenizer(options, vocabulary)
    values = {"beta": 0.0, "max_prompt_length": 2048, **shared_arguments(options, steps + 1), **arguments}
    trainer = SPOTrainer(
        make_model(options, vocabulary) if model is None else model,
        SPOConfig(**values),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    return Timed(trainer, steps)


def dpo_trainer(
    options: argparse.Namespace, rows: list[dict[str, Any]], vocabulary: int, **arguments: Any
) -> Timed:
    """TRL's DPOTrainer on the same rows; what is not named here is as TRL has it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    steps = arguments.pop("steps", options.steps)
    pairs = []
    for row in rows:
        chosen, rejected = row["completions"]
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    trainer = DPOTrainer(
        make_model(options, vocabulary),
        ref_model=make_model(options, vocabulary),  # it would load one from a folder, and there is none
        args=DPOConfig(**{**shared_arguments(options, steps + 1), **arguments}),
        train_dataset=Dataset.from_list(pairs),
        processing_class=make_tokenizer(options, vocabulary),
    )
    return Timed(trainer, steps)


def check_same_rows(ours: Timed, dpo: Timed) -> None:
    """Refuse to compare trainers that made different tokens of the rows."""
    for mine, theirs in zip(ours.trainer.train_dataset, dpo.trainer.train_dataset, strict=True):
        own = (list(mine["prompt"]), *(list(completion) for completion in mine["completions"]))
        if own != (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"]):
            raise AssertionError(f"rows differ: {own} here, {theirs} there")


def alternate(sides: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Run all sides in turn, `rounds` times after a warm-up; what each returned."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            value = run(number)
            progress(f"  {'warm-up' if number == 0 else f'round {number}'}  {name}: {figure(value)}")
            if number:
                values[name].append(value)
    return values


# ---------------------------------------------------------------------------------------- memory


def peak_memory(device: str) -> int:
    """Bytes: the greatest resident set of this process so far, libraries included; the allocator's on a GPU.

    Linux hands `ru_maxrss` on to a child that replaces its program, so that a small process would report its
    parent's peak; `VmHWM` is the same mark for this program alone, and is taken where it can be read.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_own_process(script: str, *words: str) -> dict[str, Any]:
    """Run a benchmark script in a process of its own; its last line is the JSON that it returns."""
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------- work done


def device_peak(options: argparse.Namespace) -> float | None:
    """The device's dense bf16 peak in FLOP/s, as asked or as its maker states it; None where unknown."""
    if options.peak_tflops:
        return options.peak_tflops * 1e12
    if options.device != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def work_of_rows(model: Any, rows: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Tokens of rows, a prompt counted once, and the FLOP that one forward and backward on them need.

    Six for each weight and token (the head's at completion tokens alone), and attention's two products
    forward and four backward over what each token can see.
    """
    config = model.config
    embeddings = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    body = (
        sum(p.numel() for p in model.parameters()) - embeddings - (0 if config.tie_word_embeddings else head)
    )
    tokens, flops = 0, 0.0
    for row in rows:
        prompt = len(row["prompt"].split())
        answers = [len(answer.split()) + 1 for answer in row["completions"]]
        tokens += prompt + sum(answers)
        seen = prompt**2 / 2 + sum(answer * prompt + answer**2 / 2 for answer in answers)
        flops += 6.0 * (body * (prompt + sum(answers)) + head * sum(answers))
        flops += 12.0 * config.num_hidden_layers * config.hidden_size * seen
    return tokens, flops
