"""Compares the members of a sweep: a drawing, a table, and a choice by a stated rule. Evaluates no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from softpref.artifacts import plain
from softpref.disk import says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.evaluation.addresses import find_evaluations
from softpref.evaluation.choice import check_rule, choose, no_scores, rule_in_words
from softpref.evaluation.curves import all_exact, equal_reward, position
from softpref.evaluation.interactive import MOST_PROMPTS
from softpref.evaluation.meanings import title
from softpref.evaluation.report import chips, provenance
from softpref.evaluation.tables import Column, columns, softness
from softpref.evaluation.uses import best_for, use_lines
from softpref.fitness import Limits, ailments, number
from softpref.pages import render
from softpref.records.comparison import CHOSEN_FOLDER, COMPARISON_FILE, FRONTIER_FILE, Comparison
from softpref.records.evaluation import EVALUATION_FILE, REPORT_FILE, Evaluation, PromptRecord, read_samples
from softpref.tracking import current_pipeline_run


@says_disk_trouble
def run(
    evaluations: Sequence[str],
    output_dir: str,
    rule: str = "expected_reward",
    max_kl: float | None = None,
    *,
    limits: Limits | None = None,
    required: bool = True,
    parent_run_id: str | None = None,
    experiment: str = "softpref",
    tracking_uri: str | None = None,
) -> Comparison:
    """Compare evaluations; write `output_dir`; return what `comparison.json` holds.

    The members are these evaluations and those of extrapolated models in their folders. Writes
    `comparison.json`, `report.html`, `frontier.png`, and the chosen member's `chosen/evaluation.json`, which
    is all that registration needs beside the model. With `parent_run_id` they are logged to that MLflow run.

    Args:
        evaluations: folders of stage 4, one per trained model, or addresses in MLflow (see
            `find_evaluations`), all evaluated in the same way.
        rule: the metric that ranks members, `expected_reward` or `win_rate`.
        max_kl: members whose sequence KL to the reference, in nats, exceeds this cannot be chosen.
        limits: of the registry's gate, so that the chosen model can be registered; None sets none.
        required: whether it is an error when no member may be chosen.
        parent_run_id: the sweep's MLflow run; by default that of the pipeline run, if there is one.
        experiment, tracking_uri: where that run is; by default `MLFLOW_TRACKING_URI` or a local store.

    Raises:
        ConfigError: no folder, a folder without evaluation, two members of one name, or a wrong rule, which
            `expected_reward` is where the judge gave no scores.
        DataError: members evaluated on different data, judge, reference or settings; or no member may be
            chosen though one is `required` (the report is written in any case).
    """
    check_rule(rule, max_kl)
    output = Path(output_dir)
    found = find_evaluations(evaluations, output / "evaluations", tracking_uri)
    members = sorted((one.evaluation for one in found), key=position)
    check_comparable(members)
    if rule == "expected_reward" and not any(rule in member.metrics for member in members):
        raise ConfigError(no_scores(members[0].judge.name))
    choice = choose(members, rule, max_kl, limits)
    output.mkdir(parents=True, exist_ok=True)
    (output / COMPARISON_FILE).unlink(missing_ok=True)  # of an earlier call: the last file says what is whole
    comparison = Comparison(
        rule=rule_in_words(rule, max_kl, limits),
        chosen=choice.name,
        reason=choice.reason,
        passed_over=dict(choice.passed_over),
        equal_reward=equal_reward(members),
        members=members,
        best_for=best_for(members),
    )
    folder_of = {one.evaluation.name: one.folder for one in found}
    samples = {name: read_samples(folder, MOST_PROMPTS) for name, folder in folder_of.items()}
    _write_report(output, comparison, samples)
    shutil.rmtree(output / CHOSEN_FOLDER, ignore_errors=True)
    if choice.name is not None:
        (output / CHOSEN_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(folder_of[choice.name] / EVALUATION_FILE, output / CHOSEN_FOLDER / EVALUATION_FILE)
    comparison.write(output)
    if parent_run_id or current_pipeline_run():
        _track(output, comparison, parent_run_id, experiment, tracking_uri)
    if required and choice.name is None:
        raise DataError(f"{choice.reason} The report is in {output / REPORT_FILE}.")
    return comparison


def outcome_lines(comparison: Comparison) -> list[str]:
    """What a terminal shows of a comparison: the choice, its reason, the model's place, and all warnings."""
    lines = [f"chosen:   {comparison.chosen or 'none'}. {comparison.reason}"]
    if chosen := comparison.chosen_member:
        lines.append(f"model:    {chosen.model_uri}")
    lines += use_lines(comparison.best_for)
    return lines + warning_lines(comparison.members)


def warning_lines(members: Sequence[Evaluation]) -> list[str]:
    """What a terminal shows of the warnings that a report has, each once, by model."""
    return [f"warning:  {text}" for text in gathered_warnings(members)]


def check_comparable(members: Sequence[Evaluation]) -> None:
    """Refuse members whose figures do not mean the same.

    Raises:
        ConfigError: no member, or two of one name.
        DataError: their evaluations differ in data, judge, reference or settings; both sides are named.
    """
    if not members:
        raise ConfigError("there is nothing to compare: no evaluation folder was given")
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"members need different names; more than one is called {', '.join(twice)}")
    groups: dict[str, list[str]] = {}
    for member in members:
        groups.setdefault(member.evaluation_id, []).append(member.name)
    if len(groups) > 1:
        parts = "; ".join(f"{', '.join(group)} ({identity})" for identity, group in groups.items())
        known = [member.evaluated_on for member in members if member.evaluated_on]
        differing = [
            name
            for name in ("data", "judge", "reference", "settings")
            if len({json.dumps(one.get(name), sort_keys=True) for one in known}) > 1
        ]
        what = " and ".join(differing) if len(known) == len(members) else "data, judge, reference or settings"
        raise DataError(
            f"members were evaluated on different {what}: {parts}; evaluate them in the same way first"
        )


def _write_report(output: Path, comparison: Comparison, samples: Mapping[str, list[PromptRecord]]) -> None:
    from softpref.evaluation.charts import reliability_diagram
    from softpref.evaluation.frontier import frontier
    from softpref.evaluation.interactive import calibrated, frontier_data, samples_data

    members = comparison.members
    shown = [
        column
        for column in (*columns(members), *_ON_THE_PAGE)
        if any(column.of(member) for member in members)
    ]
    calibration = calibrated(members)
    listed = {member.name: records for member in members if (records := samples[member.name])}
    first = next(iter(listed.values()), [])
    sides = [
        ("Reference", [record.reference for record in first]),
        *((name, [record.policy for record in records]) for name, records in listed.items()),
    ]
    prompts = [record.prompt for record in first]
    browsed = samples_data(sides, prompts, of=max(len(prompts), _sampled_prompts(members)))
    page = render(
        "comparison.html",
        data={
            "frontier": frontier_data(members, comparison.chosen),
            "reliability": [one._asdict() for one in calibration],
            "samples": browsed,
            "chosen": comparison.chosen,
        },
        comparison=comparison,
        names_of={one.figure: title(one.figure) for one in comparison.best_for},
        run=_what_was_run(members),
        provenance=provenance(members),
        warnings=gathered_warnings(members),
        titles=[column.title for column in shown],
        rows=[(member, softness(member), [column.of(member) for column in shown]) for member in members],
        confidence=members[0].settings.get("confidence", 0.95),
        exact=all_exact(members),
        frontier=frontier(members, comparison.chosen, output / FRONTIER_FILE),
        reliability=reliability_diagram(calibration) if calibration else "",
        calibration_titles=[title(name) for name in _CALIBRATION],
        calibration=[
            (member.name, [member.metrics.get(name) for name in _CALIBRATION])
            for member in members
            if member.reliability
        ],
        health_titles=list(_HEALTH),
        health=[_health(member, comparison.passed_over) for member in members],
        samples=browsed,
        models=[(member, ", ".join(chips(member)[:-1])) for member in members],  # the judge is said above
    )
    (output / REPORT_FILE).write_text(page, encoding="utf-8")


def _what_was_run(members: Sequence[Evaluation]) -> list[str]:
    """Models, data, prompts and judge, for the head of the page."""
    first = members[0]
    split, samples = first.settings.get("split"), first.settings.get("samples_per_prompt")
    prompts = _sampled_prompts(members)
    parts = [
        f"{len(members)} model{'s' if len(members) > 1 else ''}",
        f"trained from {first.base_model}" if first.base_model else "",
        f"on {first.data_source}" if first.data_source else "",
        f"{prompts:,} prompts of the {split} split" if split and prompts else "",
        f"{samples} samples of each" if samples else "",
        f"judge: {first.judge.description or first.judge.name}",
    ]
    return [part for part in parts if part]


def _sampled_prompts(members: Sequence[Evaluation]) -> int:
    """How many prompts there are samples of."""
    return max(int(number(member.metrics, "kl_sequence", "prompts") or 0) for member in members)


_CALIBRATION = ("vote_divergence", "overconfidence", "calibration_error", "calibration_floor")
_ON_THE_PAGE = (
    Column("sure win rate", "metrics", "sure_win_rate"),
    Column("relative accuracy", "metrics", "relative_accuracy"),
    Column("divergence from the votes", "metrics", "vote_divergence"),
    Column("win rate at equal length", "metrics", "length_controlled_win_rate"),
    Column("variety among good answers", "metrics", "good_diversity"),
)
_HEALTH = {  # figures that show a broken model, each beside its reference's
    "mass on the set": "mass_on_set",
    "truncated": "truncated_fraction",
    "repetition": "repetition",
    "nats per token under the reference": "cross_entropy",
    "KL per token": "kl_token",
}


def _health(
    member: Evaluation, passed_over: Mapping[str, Sequence[str]]
) -> tuple[str, list[tuple[float | None, float | None]], str]:
    """A member's name, its figures of health with the reference's, and what keeps it from being chosen."""
    known = {**member.metrics, **(member.exact or {})}
    pairs = [(number(known, name), number(known, f"reference_{name}")) for name in _HEALTH.values()]
    against = [f"it {ailment}" for ailment in ailments(member)] or passed_over.get(member.name, [])
    return member.name, pairs, "; ".join(against)


def gathered_warnings(members: Sequence[Evaluation]) -> list[str]:
    """Each warning once, with the members' names unless all have it."""
    owners: dict[str, list[str]] = {}
    for member in members:
        for text in member.warnings:
            owners.setdefault(text, []).append(member.name)
    return [
        text if len(names) == len(members) else f"{', '.join(names)}: {text}"
        for text, names in owners.items()
    ]


def _note(comparison: Comparison) -> str:
    """The description of the sweep's run: the runs of its models, since cached ones are not its children."""
    lines = [plain(comparison.reason), "", "| model | its MLflow run |", "| :-- | :-- |"]
    lines += [f"| {plain(member.name)} | {member.run_id or 'none'} |" for member in comparison.members]
    return "\n".join(lines)


def _track(
    output: Path,
    comparison: Comparison,
    run_id: str | None,
    experiment: str,
    tracking_uri: str | None,
) -> None:
    """Log the comparison to the sweep's run: the chosen member's figures, the drawing and the report."""
    from softpref.tracking import Tracker

    with Tracker(
        output,
        experiment=experiment,
        run_name="compare",
        run_id=run_id,
        root=run_id is None,
        tracking_uri=tracking_uri or None,
    ) as tracker:
        if chosen := comparison.chosen_member:
            tracker.metrics(chosen.values("chosen/"), step=0)
        tracker.tags(
            {
                "chosen": str(comparison.chosen),
                "reason": comparison.reason,
                "mlflow.note.content": _note(comparison),
            }
        )
        for file in (COMPARISON_FILE, REPORT_FILE, FRONTIER_FILE):
            tracker.artifact(output / file, folder="comparison")
