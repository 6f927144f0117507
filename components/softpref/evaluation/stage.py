"""Stage 4: measures a policy, and the models extrapolated from it, on held-out prompts. Chooses no model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softpref.artifacts import readable, strengths
from softpref.config import without_secrets, write_parameters
from softpref.disk import content_hash, says_disk_trouble
from softpref.errors import ConfigError
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.doubts import doubts, outside_the_set, shared_pairs
from softpref.evaluation.harness import find_tasks, measured
from softpref.evaluation.identity import DEFINING
from softpref.evaluation.measure import held_out, sampled
from softpref.evaluation.members import Member, members_of
from softpref.evaluation.models import check_prompts, load_policy
from softpref.evaluation.optima import against_theory, enumerated
from softpref.evaluation.task import Task, load_dataset, prepare
from softpref.finished import as_recorded, finished_result, write_result
from softpref.fitness import ailments
from softpref.judges.protocol import is_telling
from softpref.lm.sources import check_model_source, check_remote_code, local_source, source_name
from softpref.progress import settle_output
from softpref.records.dataset import STATS_FILE, read_stats
from softpref.records.evaluation import (
    EVALUATION_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SAMPLES_TABLE_FILE,
    Evaluation,
    write_samples,
    write_samples_table,
)
from softpref.records.model import METADATA_FILE
from softpref.timings import PhaseTimer

if TYPE_CHECKING:
    from softpref.tracking import Tracker

logger = logging.getLogger(__name__)

_HEADLINE = ("win_rate", "expected_reward", "kl_sequence", "entropy_sequence", "preference_accuracy")
_EXACT_HEADLINE = ("exact/kl_optimum_to_policy", "exact/mass_on_set")
_SAMPLED_HEADLINE = ("self_bleu", "truncated_fraction")
# where and how figures are computed, which changes none of them
_NOT_OF_FIGURES = (
    *("batch_size", "plain_forward", "device", "reference_cache"),
    *("experiment", "tracking_uri", "parent_run_id"),
)
_SHOWN_SETTINGS = ("confidence", "bootstrap_samples", "theory_samples")


@says_disk_trouble
def run(
    config: EvaluationConfig,
    *,
    dataset_dir: str,
    reference_dir: str,
    policy_dir: str,
    output_dir: str,
    policy_uri: str = "",
    reference_uri: str = "",
) -> Evaluation:
    """Evaluate `policy_dir` against `reference_dir` on `dataset_dir`; write `output_dir`; return the figures.

    Writes `evaluation.json` (last, so that its presence means success), `samples.jsonl` (and the policy's as
    MLflow's table, `samples.json`) and `report.html`, and logs every figure as `eval/NAME`
    (`eval/exact/NAME`), its interval as `eval/low/NAME` and `eval/high/NAME`, to the policy's own MLflow run.
    Models of earlier rounds on other dimensions (`round-N` in its folder) and models that were
    extrapolated from the policy (`extrapolated-W` in its folder) are evaluated before it, on the same prompts
    with the same seeds, into folders of the same names; the same run has their figures, `eval/round-N/NAME`
    and `eval/expo-W/NAME`.
    Called again with the same models, data and settings, it returns what is there, and completes the run.

    Args:
        policy_dir, reference_dir: model folders, their URLs, or models of the MLflow registry.
        policy_uri, reference_uri: the models' addresses outside this machine; by default what was given.

    Raises:
        ConfigError: a model or the dataset is absent, the models do not match, there is no such judge,
            completions could exceed the model's positions, or `output_dir` holds another evaluation.
        DataError: the split is absent or empty, or `outcomes.jsonl` is damaged.
    """
    timer = PhaseTimer("loading")
    settle_output()
    output = Path(output_dir)
    sources = {"tracking_uri": config.tracking_uri}
    policy_uri = policy_uri or source_name(policy_dir, **sources)
    reference_uri = reference_uri or source_name(reference_dir, **sources)
    policy_dir, reference_dir = local_source(policy_dir, **sources), local_source(reference_dir, **sources)
    members = members_of(policy_dir, policy_uri)
    policy = members[-1]
    metadata = policy.metadata
    places = {
        "dataset": dataset_dir,
        "policy": policy_dir,
        "reference": reference_dir,
        "reference_uri": reference_uri,
    }
    if (output / EVALUATION_FILE).exists():
        finished_result(output, _made_from(config, places), "an evaluation")
        logger.warning("%s holds this very evaluation, finished: nothing is evaluated", output)
        return _completed(config, output, members, dataset_dir)
    for source in (*(member.folder for member in members), reference_dir):
        check_model_source(source)
        check_remote_code(source, config.trust_remote_code)
    if not config.max_new_tokens and not metadata.get("max_completion_length"):
        if not Path(policy_dir).exists():
            raise ConfigError(
                f"policy {policy_dir}: there is no such folder; for a Hub id set max_new_tokens"
            )
        raise ConfigError(
            f"{policy_dir} has no {METADATA_FILE} with max_completion_length; set max_new_tokens"
        )
    dataset = load_dataset(dataset_dir, config)
    tasks = find_tasks(config.lm_eval_tasks)
    output.mkdir(parents=True, exist_ok=True)

    write_result(output, _made_from(config, places), None)
    write_parameters(config, output)
    with _tracker(config, output, policy) as tracker:
        run_id = _run_of(policy) or tracker.run_id
        task = prepare(config, dataset, places, metadata, tasks, timer)
        for member in members:
            folder = output / member.subfolder
            folder.mkdir(exist_ok=True)
            evaluation = _evaluate(config, task, places, member, run_id, folder, timer)
            evaluation.write(folder)
        _track(tracker, output, members, dataset_dir)
        timer.enter("tracking")
        tracker.metrics({f"{policy.prefix}{name}": value for name, value in timer.metrics().items()}, step=0)
    timer.write(output)
    return evaluation


def _made_from(config: EvaluationConfig, places: Mapping[str, str]) -> dict[str, object]:
    """What decides the figures: settings and inputs, these by their content where they are here."""

    def content(folder: str) -> str:
        files = sorted([*Path(folder).rglob("*.safetensors"), *Path(folder).glob(METADATA_FILE)])
        return content_hash(*files) if files else folder

    stats = Path(places["dataset"]) / STATS_FILE
    settings = {name: value for name, value in vars(config).items() if name not in _NOT_OF_FIGURES}
    return as_recorded(
        {
            **without_secrets(settings),
            "dataset": content_hash(stats) if stats.is_file() else places["dataset"],
            "policy": content(places["policy"]),
            "reference": content(places["reference"]),
            "judge_model": config.judge_model and content(config.judge_model),
        }
    )


def _run_of(policy: Member) -> str | None:
    """The run that trained the policy, where that is known."""
    from softpref.tracking import run_tracked_in

    return policy.metadata.get("run_id") or run_tracked_in(policy.folder)


def _tracker(config: EvaluationConfig, output: Path, policy: Member) -> Tracker:
    """Of the policy's own run, or of a new one."""
    from softpref.tracking import Tracker

    return Tracker(
        output,
        experiment=config.experiment,
        run_name=f"evaluate {policy.name}",
        parent_run_id=config.parent_run_id or None,
        run_id=_run_of(policy),
        tracking_uri=config.tracking_uri or None,
    )


def _track(tracker: Tracker, output: Path, members: Sequence[Member], dataset_dir: str) -> None:
    """Track what was measured of all members, the policy last; nothing a second time."""
    tables = []
    for member in members:
        folder = output / member.subfolder
        evaluation = Evaluation.read(folder)
        prefix = member.prefix
        took = {f"{prefix}judge/{name}": float(n) for name, n in (evaluation.judge.usage or {}).items()}
        tracker.metrics(
            {
                **evaluation.values(prefix),
                **evaluation.values(f"{prefix}low/", "low"),
                **evaluation.values(f"{prefix}high/", "high"),
                **took,
            },
            step=0,
        )
        place = f"evaluation/{member.subfolder}".rstrip("/")
        for file in (EVALUATION_FILE, SAMPLES_FILE, SAMPLES_TABLE_FILE, REPORT_FILE):
            tracker.artifact(folder / file, folder=place)
        tables.append({"path": f"{place}/{SAMPLES_TABLE_FILE}", "type": "table"})
    tracker.dataset(read_stats(dataset_dir), "evaluation")
    tracker.tags({"evaluation_id": evaluation.evaluation_id, "mlflow.loggedArtifacts": json.dumps(tables)})


def _completed(
    config: EvaluationConfig, output: Path, members: Sequence[Member], dataset_dir: str
) -> Evaluation:
    """A finished evaluation, and what a kill after it has kept from the tracking run."""
    from softpref.tracking import finish, is_finished

    if not is_finished(output):
        with _tracker(config, output, members[-1]) as tracker:
            _track(tracker, output, members, dataset_dir)
    finish(output)
    return Evaluation.read(output)


def headline(evaluation: Evaluation) -> dict[str, float]:
    """α, β and the figures that tell models of a sweep apart, few enough for one page of the UI's table."""
    shown = (*_HEADLINE, *(_EXACT_HEADLINE if evaluation.exact else _SAMPLED_HEADLINE))
    figures = evaluation.values()
    return readable({**strengths(vars(evaluation)), **{name: figures.get(name) for name in shown}})


def _evaluate(
    config: EvaluationConfig,
    task: Task,
    places: Mapping[str, str],
    member: Member,
    run_id: str | None,
    output: Path,
    timer: PhaseTimer,
) -> Evaluation:
    """Measure one member, write its samples and report, return what `evaluation.json` will hold."""
    from softpref.evaluation.exact import exact_figures, softmax_frontier
    from softpref.evaluation.report import write_report
    from softpref.evaluation.theory import reward_frontier, sampled_figures

    metadata, prompts, judge, bootstrap = member.metadata, task.prompts, task.judge, task.bootstrap
    lineage = metadata.get("lineage") or []
    timer.enter("loading")
    models = load_policy(config, task.models, member.folder)
    check_prompts(models.policy, models, task.tokenized)
    timer.enter("evaluation")

    preferences = held_out(models, task.rows, metadata, bootstrap)
    samples = sampled(models, prompts, task.tokenized, task.reference, judge, config, bootstrap)
    records = samples.records
    warnings = [*preferences.warnings, *task.judge_warnings, *samples.warnings]
    figures = {**preferences.figures, **samples.figures}
    if task.tasks:
        figures |= measured(
            task.tasks,
            models.policy,
            models.tokenizer,
            batch_size=config.batch_size,
            confidence=config.confidence,
        )
    stats = read_stats(places["dataset"])
    began = {"reference": places["reference"]}
    exact = enumerated(models, task.outcomes, prompts, config, metadata, stats, warnings, **began)
    theory = against_theory(models, task.theory, records, metadata, stats, config.seed, warnings, **began)
    warnings += outside_the_set(judge, records)
    warnings += shared_pairs(judge, metadata.get("dataset_hash"))
    warnings += doubts(config, figures, task.judged, metadata, places["dataset"], len(prompts))
    evaluation = Evaluation(
        name=member.name,
        method=metadata.get("method"),
        alpha=metadata.get("alpha"),
        anchor=metadata.get("anchor") or 0.0,
        beta=metadata.get("beta"),
        kl_beta=metadata.get("kl_beta") or 0.0,
        kl_on=metadata.get("kl_on") or "samples",
        rounds=metadata.get("rounds") or 1,
        train_on=metadata.get("train_on") or "preferences",
        extrapolation=metadata.get("extrapolation") or 0.0,
        model_uri=member.uri,
        reference_uri=places["reference_uri"],
        run_id=run_id,
        dataset_hash=stats.get("dataset_hash"),
        evaluation_id=task.identity,
        evaluated_on=task.identity_parts,
        judge=task.judged._replace(usage=dict(judge.usage) if is_telling(judge) else None),
        metrics=dict(sorted(figures.items())),
        reliability=preferences.reliability,
        exact=exact_figures(exact, bootstrap) if exact else None,
        softmax_frontier=softmax_frontier(exact) if exact else None,
        theory=sampled_figures(theory, bootstrap) if theory else None,
        reward_frontier=reward_frontier(theory) if theory else None,
        by_prompt={**samples.by_prompt, **preferences.by_prompt},
        dimensions=[one["dimension"] for one in lineage],
        dimension_weights=list(lineage[-1]["dimension_weights"]) if lineage else [],
        settings={key: getattr(config, key) for key in (*DEFINING, *_SHOWN_SETTINGS)}
        | {"max_new_tokens": models.max_new_tokens},
        data_source=stats.get("source") or "",
        base_model=metadata.get("base_model") or "",
        example=prompts[0],
        warnings=warnings,
    )
    if ills := ailments(evaluation):
        warnings.append(f"The model is broken, and will not be registered: it {' and '.join(ills)}.")
    timer.enter("report")
    write_samples(output, records)
    write_samples_table(output, records)
    write_report(output / REPORT_FILE, evaluation, records, exact)
    return evaluation
