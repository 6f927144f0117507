"""The parameters of stage 4, evaluation. Evaluates nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from softpref.errors import ConfigError


@dataclass
class EvaluationConfig:
    """How a policy is measured on held-out prompts.

    There are no sampling options: completions are drawn from exactly the model's own distribution, which is
    what softness shapes.

    Args:
        split: split of the dataset to measure on.
        max_prompts: distinct prompts that are sampled on, drawn with `seed`; 0 takes all.
        max_rows: preference rows that are scored, of all prompts of the split, drawn with `seed`; 0
            takes all.
        samples_per_prompt: completions drawn for each prompt, from the policy and from the reference.
            Distinct-n and self-BLEU depend on it: compare them only at the same number.
        max_new_tokens: longest completion in tokens, end token included; 0 takes `max_completion_length` from
            the policy's `softpref.json`.
        batch_size: sequences per forward pass, fewer where full logits would take too much memory.
        plain_forward: pad every completion with a prompt of its own and compute full logits: slower, with the
            same figures up to rounding, for a model whose fast path you doubt.
        judge: `expert` (the known reward in the dataset's `outcomes.jsonl` or `reward.json`), `bradley-terry`
            (trained on the preferences of the split `judge`, or of the training split where there is none),
            `reward-model`, `auto`: the expert where there is one, else `bradley-terry`; `llm`, a language
            model behind an OpenAI-compatible endpoint; or the name of a judge that an installed package
            brings (entry points `softpref.judges`).
        judge_model: of `reward-model` what `softpref judge` wrote, or another checkpoint with one label: a
            folder, the URL of one, a model of the MLflow registry, or a Hub id. Of `llm` the model's name at
            its endpoint.
        judge_options: of `llm` its address, rubric and budget, see `softpref.judges.llm`, such as
            `{"url": "http://HOST:8000/v1", "max_requests": 2000}`; of a judge of your own what it takes.
        judge_max_rows: most training pairs for the Bradley-Terry judge.
        judge_pairs_per_prompt: samples of each prompt, policy's beside reference's, that a judge without
            scores is asked of; 0 takes all.
        judge_validation_pairs: pairs of the validation split that a judge without scores is asked of, to
            know how often it agrees with people; 0 takes all.
        exact_prompts: prompts that are compared with theory: every outcome is scored where the dataset
            enumerates them, else see `theory_samples`; 0 leaves theory out.
        theory_samples: samples of the reference for each of these prompts, from which the optimum is
            estimated where the reward of any text is known; 0 leaves that out.
        reference_cache: folder that keeps what the reference writes and scores here, which is the same beside
            every model of a sweep; empty takes `SOFTPREF_REFERENCE_CACHE`, or keeps nothing.
        lm_eval_tasks: tasks of the LM Evaluation Harness to measure the policy by as well, names or files of
            tasks (`.yaml`); needs `softpref[lm-eval]`.
        bootstrap_samples: resamples per confidence interval.
        confidence: coverage of the intervals, in (0, 1).
        seed: of the choice of prompts and rows, the sampling, the judge and the bootstrap.
        dtype: weights of both models; figures are always computed in float32.
        trust_remote_code: run model code that comes with the models.
        device: where the models run; empty takes a GPU when there is one.
        experiment: MLflow experiment, when no run exists to attach to.
        tracking_uri: MLflow server; empty takes `MLFLOW_TRACKING_URI` or a local store.
        parent_run_id: parent of the run that is opened when the policy names none.
    """

    split: str = "test"
    max_prompts: int = 100
    max_rows: int = 2000
    samples_per_prompt: int = 32
    max_new_tokens: int = 0
    batch_size: int = 256
    plain_forward: bool = False
    judge: str = "auto"
    judge_model: str = ""
    judge_options: dict[str, Any] = field(default_factory=dict)
    judge_max_rows: int = 20000
    judge_pairs_per_prompt: int = 4
    judge_validation_pairs: int = 200
    exact_prompts: int = 8
    theory_samples: int = 1024
    reference_cache: str = ""
    lm_eval_tasks: list[str] = field(default_factory=list)
    bootstrap_samples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    device: str = ""
    experiment: str = "softpref"
    tracking_uri: str = ""
    parent_run_id: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_prompts", 0),
            ("max_rows", 0),
            ("samples_per_prompt", 1),
            ("max_new_tokens", 0),
            ("batch_size", 1),
            ("judge_max_rows", 2),
            ("judge_pairs_per_prompt", 0),
            ("judge_validation_pairs", 0),
            ("exact_prompts", 0),
            ("theory_samples", 0),
            ("bootstrap_samples", 100),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must lie between 0 and 1, like 0.95, got {self.confidence}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        if not self.split:
            raise ConfigError("split needs a name, like 'test'")
        from softpref.judges.loading import check_judge_options

        check_judge_options(self.judge, self.judge_model, self.judge_options)


@dataclass
class BenchmarkConfig:
    """How a model answers a public benchmark, or is measured by its pairs.

    Answers are drawn from exactly the model's own distribution, as in evaluation: softness is what a
    leaderboard is to see.

    Args:
        questions: the benchmark's file: AlpacaEval's JSON, or JSON lines of MT-Bench, Arena-Hard or
            RewardBench.
        name: the model's name on the leaderboard; empty takes that of its `softpref.json`, or of its folder.
        choices: answers to each question, where the format has room for more than one.
        prompt_template: how a model without chat template is asked, with `{question}` at its place.
        system_prompt: system message of each conversation; empty has none.
        max_new_tokens: longest answer in tokens, end token included; 0 takes `max_completion_length` from
            the model's `softpref.json`.
        max_prompt_length: longest question in tokens; of a longer one the beginning is cut off; 0 has no
            limit.
        batch_size: sequences per forward pass.
        seed: of the sampling.
        dtype: weights of the models.
        trust_remote_code: run model code that comes with the models.
        device: where the models run; empty takes a GPU when there is one.
    """

    questions: str = ""
    name: str = ""
    choices: int = 1
    prompt_template: str = "{question}\n"
    system_prompt: str = ""
    max_new_tokens: int = 0
    max_prompt_length: int = 0
    batch_size: int = 64
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    device: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("choices", 1),
            ("max_new_tokens", 0),
            ("max_prompt_length", 0),
            ("batch_size", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        if not self.questions:
            raise ConfigError("questions needs a benchmark's file")
        if "{question}" not in self.prompt_template:
            raise ConfigError(
                f"prompt_template needs {{question}} at its place, got {self.prompt_template!r}"
            )
