"""Stage 4: measures one policy on held-out prompts, and what was extrapolated from it, each into an
evaluation folder. Chooses between no models."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from softpref.errors import ConfigError, DataError
from softpref.evaluation.config import EvaluationConfig
from softpref.judges import OUTCOMES_FILE, as_text, check_judge, load_judge, read_outcomes, text_rows
from softpref.lm.extrapolation import extrapolated_folders
from softpref.lm.loading import METADATA_FILE, check_model_source, load_metadata

if TYPE_CHECKING:
    from softpref.evaluation.exact import ExactPrompt
    from softpref.evaluation.intervals import Bootstrap, Figure
    from softpref.evaluation.measure import PromptRecord
    from softpref.judges import Judge, Outcomes
    from softpref.lm.sampling import Sample

EVALUATION_FILE, SAMPLES_FILE, REPORT_FILE = "evaluation.json", "samples.jsonl", "report.html"
_FEW_PROMPTS = 20
# what changes the meaning of a figure; batch sizes, devices and addresses do not
_DEFINING = ("split", "max_prompts", "max_rows", "samples_per_prompt", "judge_max_rows", "seed")


def run(
    config: EvaluationConfig,
    *,
    dataset_dir: str,
    reference_dir: str,
    policy_dir: str,
    output_dir: str,
    policy_uri: str = "",
    reference_uri: str = "",
) -> dict[str, Any]:
    """Evaluate `policy_dir` against `reference_dir` on `dataset_dir`; write `output_dir`; return the figures.

    Writes `evaluation.json` (last, so that its presence means success), `samples.jsonl` and `report.html`,
    and logs every figure as `eval/NAME` (`eval/exact/NAME`) to the policy's own MLflow run. Models that were
    extrapolated from the policy (`extrapolated-W` in its folder) are evaluated before it, on the same prompts
    with the same seeds, into evaluation folders `extrapolated-W` of `output_dir`; their figures are
    `eval/expo-W/NAME` of the same run.

    Args:
        policy_uri, reference_uri: where the models are known outside this machine; default their folders.

    Raises:
        ConfigError: a model or the dataset is absent, the two do not fit together, no judge can be had,
            completions could outgrow the model's positions, or `output_dir` already holds an evaluation.
        DataError: the split is absent or empty, or `outcomes.jsonl` is damaged.
    """
    output = Path(output_dir)
    if (output / EVALUATION_FILE).exists():
        raise ConfigError(f"{output} already holds an evaluation; give another folder, or remove it first")
    metadata = load_metadata(policy_dir)
    policy = _Member(policy_dir, policy_uri or policy_dir, metadata)
    members = [*_extrapolated(policy), policy]
    for source in (*(member.folder for member in members), reference_dir):
        check_model_source(source)
    if not config.max_new_tokens and not metadata.get("max_completion_length"):
        raise ConfigError(
            f"{policy_dir} has no softpref.json that says max_completion_length; set max_new_tokens"
        )
    dataset = _load_dataset(dataset_dir, config)
    output.mkdir(parents=True, exist_ok=True)

    from softpref.tracking import Tracker

    with Tracker(
        output,
        experiment=config.experiment,
        run_name=f"evaluate {policy.name}",
        parent_run_id=config.parent_run_id or None,
        run_id=metadata.get("run_id"),
        tracking_uri=config.tracking_uri or None,
    ) as tracker:
        places = {
            "dataset": dataset_dir,
            "policy": policy_dir,
            "reference": reference_dir,
            "reference_uri": reference_uri or reference_dir,
        }
        run_id = metadata.get("run_id") or tracker.run_id
        task = _prepare(config, dataset, places, metadata)
        for member in members:
            folder = output / member.subfolder
            folder.mkdir(exist_ok=True)
            evaluation = _evaluate(config, task, places, member, run_id, folder)
            text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
            (folder / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")
            weight = member.metadata.get("extrapolation")
            prefix = f"eval/expo-{weight:g}/" if weight else "eval/"
            tracker.metrics(flat_figures(evaluation, prefix=prefix), step=0)
            for file in (EVALUATION_FILE, SAMPLES_FILE, REPORT_FILE):
                tracker.artifact(folder / file, folder=f"evaluation/{member.subfolder}".rstrip("/"))
        tracker.tags({"evaluation_id": evaluation["evaluation_id"]})
    return evaluation


def by_prompt(records: Sequence[PromptRecord]) -> dict[str, list[float]]:
    """Expected reward and win rate of each prompt, for paired comparisons of members of a sweep."""
    import numpy as np

    from softpref.evaluation.metrics import sigmoid

    values: dict[str, list[float]] = {"expected_reward": [], "win_rate": []}
    for record in records:
        ours, theirs = (np.array([s["score"] for s in side]) for side in (record.policy, record.reference))
        values["expected_reward"].append(float(ours.mean()))
        values["win_rate"].append(float(sigmoid(ours[:, None] - theirs).mean()))
    return values


def flat_figures(evaluation: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """`{NAME: value, exact/NAME: value}` of the figures that have a value, for metric stores."""
    groups = {"": evaluation["metrics"], "exact/": evaluation["exact"] or {}}
    return {
        f"{prefix}{group}{name}": figure["value"]
        for group, figures in groups.items()
        for name, figure in figures.items()
        if figure["value"] is not None
    }


class _Member(NamedTuple):
    """A model to evaluate: the policy, or in its `subfolder` one that was extrapolated from it."""

    folder: str
    uri: str
    metadata: Mapping[str, Any]
    subfolder: str = ""

    @property
    def name(self) -> str:
        return self.metadata.get("name") or Path(self.folder).name


class _Models(NamedTuple):
    """Both models (a task's still without the policy), and how texts become their tokens."""

    policy: Any
    reference: Any
    tokenizer: Any
    max_prompt_length: int | None
    max_new_tokens: int
    batch_size: int

    @property
    def batching(self) -> dict[str, int]:
        return {"pad_id": self.tokenizer.pad_token_id, "batch_size": self.batch_size}


class _Task(NamedTuple):
    """What every member is measured on and against.

    Attributes:
        identity: `evaluation_id`.
        prompts, rows: held-out prompts to draw from, their preference rows to score.
        outcomes: every completion of a prompt's set, where the dataset knows them.
        judge_accuracy: on the validation split, of a trained judge.
        models: the reference alone.
        reference: its samples, by prompt.
    """

    identity: str
    prompts: list[Any]
    rows: list[dict[str, Any]]
    outcomes: dict[str, Outcomes]
    judge: Judge
    judge_accuracy: Figure | None
    bootstrap: Bootstrap
    models: _Models
    reference: list[list[dict[str, Any]]]


def _extrapolated(policy: _Member) -> list[_Member]:
    """The models extrapolated from the policy that lie in its folder.

    Raises:
        ConfigError: one is incomplete.
    """
    members = []
    for folder in extrapolated_folders(policy.folder):
        metadata = load_metadata(folder)
        if not metadata.get("extrapolation"):
            raise ConfigError(
                f"{folder} is no finished extrapolated model: it has no {METADATA_FILE} that says its "
                "extrapolation; train again, or remove it"
            )
        uri = f"{policy.uri.rstrip('/')}/{folder.name}"
        members.append(_Member(str(folder), uri, metadata, folder.name))
    return members


def _prepare(
    config: EvaluationConfig, dataset: Any, places: Mapping[str, str], metadata: Mapping[str, Any]
) -> _Task:
    """Choose prompts and rows, find the judge, load the reference and draw its samples."""
    from softpref.evaluation.intervals import Bootstrap
    from softpref.evaluation.metrics import prompt_key

    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, config.seed)
    rows = [dict(row) for row in dataset[config.split]]
    chosen = _choose(
        {prompt_key(row["prompt"]): row["prompt"] for row in rows}, config.max_prompts, config.seed
    )
    prompts = list(chosen.values())
    kept = [row for row in rows if prompt_key(row["prompt"]) in chosen]
    kept = list(_choose(dict(enumerate(kept)), config.max_rows, config.seed).values())
    outcomes_path = Path(places["dataset"]) / OUTCOMES_FILE
    outcomes = read_outcomes(outcomes_path) if outcomes_path.is_file() else {}
    judge, judge_accuracy = _judge(config, dataset, outcomes, bootstrap)
    models = _load_reference(config, places, metadata)
    _check_positions(models.reference, models, prompts)
    return _Task(
        _evaluation_id(config, rows, judge, places["reference"], models.max_new_tokens),
        prompts,
        kept,
        outcomes,
        judge,
        judge_accuracy,
        bootstrap,
        models,
        _draw(models, "reference", prompts, judge, config)[1],
    )


def _evaluate(
    config: EvaluationConfig,
    task: _Task,
    places: Mapping[str, str],
    member: _Member,
    run_id: str | None,
    output: Path,
) -> dict[str, Any]:
    """Measure one member, write its samples and report, return what `evaluation.json` will hold."""
    from softpref.evaluation.exact import exact_figures, softmax_frontier
    from softpref.evaluation.report import write_report

    metadata, prompts, judge, bootstrap = member.metadata, task.prompts, task.judge, task.bootstrap
    models = _load_policy(config, task.models, member.folder)
    _check_positions(models.policy, models, prompts)

    figures, warnings = _held_out(models, task.rows, bootstrap)
    sampled, records = _sampled(models, task, config)
    figures |= sampled
    stats = _stats(places["dataset"])
    exact = _enumerated(models, task.outcomes, prompts, config, metadata, stats, warnings)
    warnings += _outside(judge, records)
    warnings += _warnings(config, figures, task.judge_accuracy, metadata, places["dataset"], len(prompts))
    evaluation = {
        "name": member.name,
        "method": metadata.get("method"),
        "alpha": metadata.get("alpha"),
        "beta": metadata.get("beta"),
        "rounds": metadata.get("rounds") or 1,
        "train_on": metadata.get("train_on") or "preferences",
        "extrapolation": metadata.get("extrapolation") or 0.0,
        "model_uri": member.uri,
        "reference_uri": places["reference_uri"],
        "run_id": run_id,
        "dataset_hash": stats.get("dataset_hash"),
        "evaluation_id": task.identity,
        "judge": {
            "name": judge.name,
            "description": judge.description,
            "accuracy": task.judge_accuracy._asdict() if task.judge_accuracy else None,
        },
        "metrics": {key: figure._asdict() for key, figure in sorted(figures.items())},
        "exact": (
            {key: figure._asdict() for key, figure in exact_figures(exact, bootstrap).items()}
            if exact
            else None
        ),
        "softmax_frontier": softmax_frontier(exact) if exact else None,
        "by_prompt": by_prompt(records),
        "settings": {key: getattr(config, key) for key in (*_DEFINING, "confidence", "bootstrap_samples")}
        | {"max_new_tokens": models.max_new_tokens},
        "warnings": warnings,
    }
    with open(output / SAMPLES_FILE, "w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")
    write_report(output / REPORT_FILE, evaluation, records, exact)
    return evaluation


def _load_reference(
    config: EvaluationConfig, places: Mapping[str, str], metadata: Mapping[str, Any]
) -> _Models:
    import torch

    from softpref.lm.loading import load_model, load_tokenizer

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _Models(
        None,
        load_model(places["reference"], dtype=config.dtype, device=device).eval(),
        load_tokenizer(places["policy"]),
        metadata.get("max_prompt_length"),
        config.max_new_tokens or metadata["max_completion_length"],
        config.batch_size,
    )


def _load_policy(config: EvaluationConfig, models: _Models, folder: str) -> _Models:
    from softpref.evaluation.measure import check_same_vocabulary
    from softpref.lm.loading import load_model

    device = next(models.reference.parameters()).device
    policy = load_model(folder, dtype=config.dtype, device=str(device)).eval()
    check_same_vocabulary(policy, models.reference)
    return models._replace(policy=policy)


def _check_positions(model: Any, models: _Models, prompts: Sequence[Any]) -> None:
    """Refuse prompts after which the longest completion would outgrow the model, before anything is drawn."""
    from softpref.evaluation.measure import check_positions
    from softpref.lm.tokenization import tokenize_prompt

    limit = models.max_prompt_length
    longest = max(len(tokenize_prompt(models.tokenizer, prompt, max_length=limit)) for prompt in prompts)
    remedy = "lower max_new_tokens, or train with a lower max_prompt_length"
    check_positions(model, longest, models.max_new_tokens, remedy)


def _held_out(
    models: _Models, rows: Sequence[Mapping[str, Any]], bootstrap: Bootstrap
) -> tuple[dict[str, Figure], list[str]]:
    """Score the held-out preferences under the policy: its figures, and warnings about rows."""
    from softpref.evaluation.measure import score
    from softpref.evaluation.metrics import PerplexityMetric, PreferenceMetric, prompt_key
    from softpref.lm.tokenization import tokenize_sequence

    limits = {
        "max_prompt_length": models.max_prompt_length,
        "max_completion_length": models.max_new_tokens,
    }
    used, tokens = [], []
    for row in rows:
        try:
            tokens.append(
                [
                    tokenize_sequence(models.tokenizer, row["prompt"], completion, **limits)
                    for completion in row["completions"]
                ]
            )
        except DataError:  # a text that this tokenizer cannot express; counted below
            continue
        used.append(row)
    if not used:
        raise DataError("no held-out row can be tokenized with the policy's tokenizer")
    sequences = [sequence for group in tokens for sequence in group]
    with _progress(len(sequences), "held-out preferences", "sequence") as progress:
        flat = iter(
            score(
                models.policy,
                [(sequence.prompt, sequence.completion) for sequence in sequences],
                **models.batching,
                progress=progress,
            ).tolist()
        )
    logps = [[next(flat) for _ in group] for group in tokens]
    keys = [prompt_key(row["prompt"]) for row in used]
    figures = PreferenceMetric(keep_in_memory=True).compute(
        scores=logps,
        kind=[row["kind"] for row in used],
        probability=[row["probability"] for row in used],
        prompt=keys,
        bootstrap=bootstrap,
    ) | PerplexityMetric(keep_in_memory=True).compute(
        logp=[group[0] for group in logps],
        tokens=[len(group[0].completion) for group in tokens],
        prompt=keys,
        bootstrap=bootstrap,
    )
    warnings = []
    if len(used) < len(rows):
        warnings.append(
            f"{len(rows) - len(used)} of {len(rows)} held-out rows cannot be tokenized and were left out."
        )
    cut = sum(sequence.truncated for sequence in sequences)
    if cut:
        warnings.append(
            f"{cut} of {len(sequences)} held-out completions exceed {models.max_new_tokens} tokens and "
            f"were cut "
            "for scoring."
        )
    return figures, warnings


def _draw(
    models: _Models,
    side: Literal["policy", "reference"],
    prompts: Sequence[Any],
    judge: Judge,
    config: EvaluationConfig,
) -> tuple[list[list[Sample]], list[list[dict[str, Any]]]]:
    """Draw from one model for each prompt, let the judge score: what was drawn, and its texts and scores."""
    from softpref.evaluation import measure
    from softpref.lm.tokenization import decode, stop_token_ids, tokenize_prompt

    ids = [
        tokenize_prompt(models.tokenizer, prompt, max_length=models.max_prompt_length) for prompt in prompts
    ]
    count = config.samples_per_prompt
    model = getattr(models, side)
    with _progress(len(ids) * count, f"{side} samples", "sample") as progress:
        drawn = measure.draw(
            model,
            ids,
            count,
            max_new_tokens=models.max_new_tokens,
            stop_ids=stop_token_ids(models.tokenizer, model),
            seed=2 * config.seed + (side == "reference"),  # independent streams of one seed
            **models.batching,
            progress=progress,
        )
    shown = []
    for prompt, group in zip(prompts, drawn, strict=True):
        completions = [decode(models.tokenizer, drawing.completion) for drawing in group]
        scores = judge.scores([as_text(prompt, roles=True)] * count, completions).tolist()
        shown.append(
            [
                {"text": completion, "score": score, "truncated": drawing.truncated}
                for completion, score, drawing in zip(completions, scores, group, strict=True)
            ]
        )
    return drawn, shown


def _sampled(
    models: _Models, task: _Task, config: EvaluationConfig
) -> tuple[dict[str, Figure], list[PromptRecord]]:
    """Draw from the policy on the prompts that the reference answered: figures, and what was drawn."""
    from softpref.evaluation import measure
    from softpref.evaluation.metrics import DiversityMetric, SampleMetric, WinRateMetric

    bootstrap, count = task.bootstrap, config.samples_per_prompt
    drawn, shown = _draw(models, "policy", task.prompts, task.judge, config)
    with _progress(len(drawn) * count, "KL and entropy", "sample") as progress:
        divergences = measure.divergences(
            models.policy,
            models.reference,
            [sample for group in drawn for sample in group],
            **models.batching,
            progress=progress,
        )
    kl, entropy = (values.reshape(-1, count).tolist() for values in divergences)
    for lines, values in zip(shown, kl, strict=True):
        for line, value in zip(lines, values, strict=True):
            line["kl"] = value
    figures = WinRateMetric(keep_in_memory=True).compute(
        policy=[[sample["score"] for sample in group] for group in shown],
        reference=[[sample["score"] for sample in group] for group in task.reference],
        bootstrap=bootstrap,
    )
    figures |= SampleMetric(keep_in_memory=True).compute(
        kl=kl,
        entropy=entropy,
        length=[[float(len(sample.completion)) for sample in group] for group in drawn],
        truncated=[[float(sample.truncated) for sample in group] for group in drawn],
        bootstrap=bootstrap,
    )
    figures |= DiversityMetric(keep_in_memory=True).compute(
        completions=[[sample["text"] for sample in group] for group in shown], bootstrap=bootstrap
    )
    records = [
        measure.PromptRecord(as_text(prompt, roles=True), reference, policy)
        for prompt, reference, policy in zip(task.prompts, task.reference, shown, strict=True)
    ]
    return figures, records


def _enumerated(
    models: _Models,
    outcomes: Mapping[str, Any],
    prompts: Sequence[Any],
    config: EvaluationConfig,
    metadata: Mapping[str, Any],
    stats: Mapping[str, Any],
    warnings: list[str],
) -> list[ExactPrompt]:
    """Score every outcome of the first `exact_prompts` prompts whose outcomes are known."""
    from softpref.evaluation.exact import exact_prompt, trained_objective, why_unknown
    from softpref.evaluation.measure import score_outcomes
    from softpref.lm.tokenization import tokenize_prompt, tokenize_sequence

    known = [prompt for prompt in prompts if isinstance(prompt, str) and prompt in outcomes]
    known = known[: config.exact_prompts]
    if not known:
        return []
    objective = trained_objective(metadata, stats)
    if reason := why_unknown(objective):
        warnings.append(f"The exact optimum is not known: {reason}.")
    found = []
    total = 2 * sum(len(outcomes[prompt].completions) for prompt in known)
    with _progress(total, "every outcome", "sequence") as progress:
        for prompt in known:
            entry = outcomes[prompt]
            ids = tokenize_prompt(models.tokenizer, prompt, max_length=models.max_prompt_length)
            completions = [
                tokenize_sequence(models.tokenizer, prompt, text).completion for text in entry.completions
            ]
            policy, reference = (
                score_outcomes(model, ids, completions, **models.batching, progress=progress)
                for model in (models.policy, models.reference)
            )
            found.append(exact_prompt(entry, policy, reference, objective, seed=config.seed))
    return found


def _outside(judge: Judge, records: Sequence[PromptRecord]) -> list[str]:
    """A warning when policy samples left the set that an expert knows."""
    if not hasattr(judge, "outside"):
        return []
    left = [judge.outside([r.prompt] * len(r.policy), [s["text"] for s in r.policy]).mean() for r in records]
    share = sum(left) / len(left)
    if not share:
        return []
    return [
        f"{share:.1%} of the policy's samples lie outside the set that the experts know; each scores 1 "
        f"nat below "
        "the worst within."
    ]


def _judge(
    config: EvaluationConfig, dataset: Any, outcomes: dict[str, Any], bootstrap: Any
) -> tuple[Any, Any]:
    """The judge asked for, and the validation accuracy of a trained one (None where there is none)."""
    from softpref.evaluation.metrics import PreferenceMetric

    judge = load_judge(config.judge, dataset, outcomes, seed=config.seed, max_rows=config.judge_max_rows)
    if judge.name == "expert":
        return judge, None
    held_out = list(text_rows(dataset.get("validation", ())))
    if not held_out:
        return judge, None
    sizes = [len(row["completions"]) for row in held_out]
    flat = judge.scores(
        [row["prompt"] for row in held_out for _ in row["completions"]],
        [completion for row in held_out for completion in row["completions"]],
    ).tolist()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    accuracy = PreferenceMetric(keep_in_memory=True).compute(
        scores=[flat[start : start + size] for start, size in zip(starts, sizes, strict=True)],
        kind=[row["kind"] for row in held_out],
        probability=[row["probability"] for row in held_out],
        prompt=[row["prompt"] for row in held_out],
        bootstrap=bootstrap,
    )["preference_accuracy"]
    return judge, accuracy


def _warnings(
    config: EvaluationConfig,
    figures: Mapping[str, Any],
    judge_accuracy: Any,
    metadata: Mapping[str, Any],
    dataset_dir: str,
    prompts: int,
) -> list[str]:
    """What a reader should know before trusting the figures."""
    found = []
    if prompts < 2:
        found.append("Only one held-out prompt: there are no intervals, and nothing generalises from it.")
    elif prompts < _FEW_PROMPTS:
        found.append(f"Only {prompts} held-out prompts: intervals are wide, and rough by nature.")
    truncated = figures["truncated_fraction"].value
    if truncated > 0.1:
        found.append(
            f"{truncated:.0%} of the policy's samples met the length limit: they are judged unfinished, "
            f"and KL "
            "and entropy count up to the cut."
        )
    if config.samples_per_prompt < 2:
        found.append("One sample per prompt: self-BLEU needs two.")
    if judge_accuracy is not None and judge_accuracy.low is not None and judge_accuracy.low <= 0.5:
        found.append(
            f"The judge's accuracy on the validation split ({judge_accuracy.value:.2f}) cannot be told from "
            "chance: do not rely on win rate and expected reward."
        )
    ours, theirs = metadata.get("dataset_hash"), _stats(dataset_dir).get("dataset_hash")
    if ours and theirs and ours != theirs:
        found.append(
            "The policy was trained on another dataset than this one; its training data may hold these "
            "prompts."
        )
    return found


def _evaluation_id(
    config: EvaluationConfig, rows: Sequence[Mapping[str, Any]], judge: Any, reference_dir: str, max_new: int
) -> str:
    """Equal for two evaluations exactly when their figures can be compared.

    The reference belongs to it: win rate and KL are relative to it.
    """
    digest = hashlib.sha256()
    for row in rows:
        part = {key: row[key] for key in ("prompt", "completions", "kind", "probability")}
        digest.update(json.dumps(part, sort_keys=True).encode())
    settings = {key: getattr(config, key) for key in _DEFINING} | {"max_new_tokens": max_new}
    digest.update(json.dumps([judge.name, judge.fingerprint, settings], sort_keys=True).encode())
    weights = sorted(Path(reference_dir).glob("*.safetensors"))
    digest.update(b"" if weights else reference_dir.encode())
    for file in weights:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _load_dataset(dataset_dir: str, config: EvaluationConfig) -> Any:
    """The dataset with a judge and a non-empty split, or an error that says what there is."""
    path, split = Path(dataset_dir), config.split
    if not (path / "dataset_dict.json").is_file():
        raise ConfigError(f"{path} is no dataset folder of the data stage (it has no dataset_dict.json)")
    check_judge(config.judge, path)  # before the import below, which takes seconds
    import datasets

    dataset = datasets.load_from_disk(str(path))
    if split not in dataset:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(dataset)}")
    if not len(dataset[split]):
        raise DataError(f"{path}: the split {split!r} is empty; hold out a fraction of the prompts for it")
    return dataset


def _stats(dataset_dir: str) -> dict[str, Any]:
    path = Path(dataset_dir) / "stats.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _choose(items: dict[Any, Any], most: int, seed: int) -> dict[Any, Any]:
    """All items, or `most` of them by seed, in their order."""
    import numpy as np

    if not most or len(items) <= most:
        return items
    keep = set(np.random.default_rng(seed).choice(len(items), most, replace=False).tolist())
    return {key: value for i, (key, value) in enumerate(items.items()) if i in keep}


@contextmanager
def _progress(total: int, title: str, unit: str) -> Iterator[Any]:
    """A progress bar whose updater is handed out; in a log file it speaks every ten seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, desc=title, unit=unit, mininterval=interval) as bar:
        yield bar.update
