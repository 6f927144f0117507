"""Compares the members of a sweep: one figure, one table, one choice by a stated rule. Evaluates no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softpref.artifacts import plain
from softpref.errors import ConfigError, DataError
from softpref.evaluation.choice import check_rule, choose, rule_in_words
from softpref.evaluation.curves import all_exact, equal_reward, position
from softpref.evaluation.stage import EVALUATION_FILE, REPORT_FILE, SAMPLES_FILE
from softpref.fitness import Limits, ailments
from softpref.lm.extrapolation import extrapolated_folders
from softpref.pages import render
from softpref.tracking import current_pipeline_run

COMPARISON_FILE, FRONTIER_FILE, CHOSEN_FOLDER = "comparison.json", "frontier.png", "chosen"

_SUMMARY = (
    "name",
    "method",
    "alpha",
    "anchor",
    "beta",
    "kl_beta",
    "kl_on",
    "rounds",
    "train_on",
    "extrapolation",
    "model_uri",
    "run_id",
    "evaluation_id",
    "judge",
    "metrics",
    "exact",
    "softmax_frontier",
    "theory",
    "reward_frontier",
    "by_prompt",
    "warnings",
)
_SHOWN_PROMPTS = 3
_GAP = "&nbsp;&nbsp;"


def run(
    evaluation_dirs: Sequence[str],
    output_dir: str,
    rule: str = "expected_reward",
    max_kl: float | None = None,
    *,
    limits: Limits | None = None,
    required: bool = True,
    parent_run_id: str | None = None,
    experiment: str = "softpref",
    tracking_uri: str | None = None,
) -> dict[str, Any]:
    """Compare evaluation folders; write `output_dir`; return what `comparison.json` holds.

    The members are the evaluations given and those of extrapolated models in their folders. Writes
    `comparison.json`, `report.html`, `frontier.png`, and the chosen member's `chosen/evaluation.json`, all
    that registration needs beside the model. With `parent_run_id` they are logged to that MLflow run.

    Args:
        evaluation_dirs: folders of stage 4, one per trained model; all evaluated alike.
        rule: the metric that ranks members, `expected_reward` or `win_rate`.
        max_kl: members whose sequence KL to the reference, in nats, exceeds this cannot be chosen.
        limits: of the registry's gate, so that what is chosen can be registered; None asks for none.
        required: whether it is an error when no member may be chosen.
        parent_run_id: the sweep's MLflow run; None takes that of the pipeline run, and where there is none
            logs nothing.
        experiment, tracking_uri: where that run is; the URI's default is `MLFLOW_TRACKING_URI` or a local
            store.

    Raises:
        ConfigError: no folder, a folder without evaluation, two members of one name, or a wrong rule.
        DataError: members evaluated on different data, judge, reference or settings; or no member may be
            chosen, and one is `required` (the report is written all the same).
    """
    check_rule(rule, max_kl)
    folders = evaluation_folders(evaluation_dirs)
    evaluations = [_read(folder) for folder in folders]
    members = sorted(({key: evaluation[key] for key in _SUMMARY} for evaluation in evaluations), key=position)
    check_comparable(members)
    choice = choose(members, rule, max_kl, limits)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    comparison = {
        "rule": rule_in_words(rule, max_kl, limits),
        "chosen": choice.name,
        "reason": choice.reason,
        "passed_over": dict(choice.passed_over),
        "equal_reward": equal_reward(members),
        "members": members,
    }
    samples = {
        evaluation["name"]: _first_samples(folder)
        for folder, evaluation in zip(folders, evaluations, strict=True)
    }
    _write_report(output, comparison, samples, evaluations[0])
    for folder, evaluation in zip(folders, evaluations, strict=True):
        if evaluation["name"] == choice.name:
            (output / CHOSEN_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(Path(folder) / EVALUATION_FILE, output / CHOSEN_FOLDER / EVALUATION_FILE)
    text = json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False)
    (output / COMPARISON_FILE).write_text(text + "\n", encoding="utf-8")
    if parent_run_id or current_pipeline_run():
        _track(output, comparison, parent_run_id, experiment, tracking_uri)
    if required and choice.name is None:
        raise DataError(f"{choice.reason} The report is in {output / REPORT_FILE}.")
    return comparison


def outcome_lines(comparison: Mapping[str, Any]) -> list[str]:
    """What a terminal shows of a comparison: the choice and its reason, where the model is, every warning."""
    chosen = comparison["chosen"]
    lines = [f"chosen:   {chosen or 'none'}. {comparison['reason']}"]
    lines += [f"model:    {one['model_uri']}" for one in comparison["members"] if one["name"] == chosen]
    return lines + warning_lines(comparison["members"])


def warning_lines(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a terminal shows of the warnings that a report has, each once, by model."""
    return [f"warning:  {text}" for text in gathered_warnings(members)]


def evaluation_folders(folders: Iterable[str | Path]) -> list[Path]:
    """These evaluation folders, each followed by those of the models extrapolated from its policy."""
    found = ((Path(folder), *extrapolated_folders(folder)) for folder in folders)
    return list(dict.fromkeys(folder for group in found for folder in group))


def check_comparable(members: Sequence[Mapping[str, Any]]) -> None:
    """Refuse members whose figures do not mean the same.

    Raises:
        ConfigError: no member, or two of one name.
        DataError: their evaluations differ in data, judge, reference or settings; both sides are named.
    """
    if not members:
        raise ConfigError("there is nothing to compare: no evaluation folder was given")
    names = [member["name"] for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"members need different names; {', '.join(twice)} stands for more than one")
    groups: dict[str, list[str]] = {}
    for member in members:
        groups.setdefault(member["evaluation_id"], []).append(member["name"])
    if len(groups) > 1:
        parts = "; ".join(f"{', '.join(group)} ({identity})" for identity, group in groups.items())
        raise DataError(
            f"members were evaluated on different data, judge, reference or settings: {parts}; evaluate them "
            "alike first"
        )


def format_table(members: Sequence[Mapping[str, Any]]) -> str:
    """The plain-text table by α that the console prints, each figure with its interval.

    Args:
        members: summaries, or whole evaluations.
    """
    columns = [
        ("win rate", "metrics", "win_rate"),
        ("expected reward", "metrics", "expected_reward"),
        ("KL (nats)", "metrics", "kl_sequence"),
        ("entropy (nats)", "metrics", "entropy_sequence"),
    ]
    if any(member["exact"] for member in members):
        columns += [
            ("entropy on set", "exact", "entropy"),
            ("optimum's", "exact", "optimum_entropy"),
            ("KL(optimum‖policy)", "exact", "kl_optimum_to_policy"),
            ("mass on set", "exact", "mass_on_set"),
        ]
    if any(member.get("theory") for member in members):
        columns += [
            ("optimum's reward", "theory", "optimum_expected_reward"),
            ("optimum's KL", "theory", "optimum_kl"),
            ("effective share", "theory", "effective_sample_size"),
        ]
    lines = [["model", "α", *(title for title, _, _ in columns)]]
    for member in sorted(members, key=position):
        alpha = member["alpha"] if member["method"] == "spo" else None
        cells = [member["name"], "–" if alpha is None else f"{alpha:g}"]
        for _, group, metric in columns:
            cells.append(_cell((member.get(group) or {}).get(metric), interval=group == "metrics"))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rendered = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([rendered[0], "─" * max(map(len, rendered)), *rendered[1:]])


def markdown_table(members: Sequence[Mapping[str, Any]], chosen: str | None) -> str:
    """The table by α in Markdown, six columns wide, for UIs that cut off more; the chosen model is bold.

    Cells begin with spaces that stay, for KFP's UI puts nothing between columns.

    The last column is the mass on the set of all outcomes where that is known, else the win rate.

    Args:
        members: summaries, or whole evaluations.
        chosen: name of a member, or None.
    """
    columns = [
        ("expected reward", "metrics", "expected_reward"),
        ("KL (nats)", "metrics", "kl_sequence"),
        ("entropy (nats)", "metrics", "entropy_sequence"),
        ("mass on set", "exact", "mass_on_set")
        if any(member["exact"] for member in members)
        else ("win rate", "metrics", "win_rate"),
    ]
    lines = [
        ["model", *(f"{_GAP}{title}" for title in ("α", *(title for title, _, _ in columns)))],
        [":--", *["--:"] * (1 + len(columns))],
    ]
    for member in sorted(members, key=position):
        name = plain(member["name"])
        alpha = member["alpha"] if member["method"] == "spo" else None
        cells = [f"**{name}**, chosen" if member["name"] == chosen else name]
        cells.append(_GAP + ("–" if alpha is None else f"{alpha:g}"))
        for _, group, metric in columns:
            cell = _cell((member.get(group) or {}).get(metric), interval=group == "metrics")
            cells.append(_GAP + cell.replace(", ", ",\N{NO-BREAK SPACE}"))  # an interval stays on one line
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(figure: Mapping[str, Any] | None, *, interval: bool) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    text = f"{figure['value']:.2f}" if interval else f"{figure['value']:.3f}"
    if interval and figure["low"] is not None:
        text += f" [{figure['low']:.2f}, {figure['high']:.2f}]"
    return text


def _read(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / EVALUATION_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} is no evaluation folder: it has no {EVALUATION_FILE}")
    older = {"anchor": 0.0, "kl_beta": 0.0, "kl_on": "samples", "theory": None, "reward_frontier": None}
    evaluation = {**older, **json.loads(path.read_text(encoding="utf-8"))}
    missing = [key for key in (*_SUMMARY, "judge", "settings") if key not in evaluation]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; was it written by this version's evaluation?")
    return evaluation


def _first_samples(folder: str | Path) -> list[dict[str, Any]]:
    """The first prompts of `samples.jsonl`, empty where it is absent."""
    path = Path(folder) / SAMPLES_FILE
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(_SHOWN_PROMPTS), lines, strict=False)]


def _write_report(
    output: Path,
    comparison: Mapping[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
    any_evaluation: Mapping[str, Any],
) -> None:
    from softpref.evaluation import charts

    members = comparison["members"]
    columns = [
        ("Win rate", "metrics", "win_rate"),
        ("Expected reward", "metrics", "expected_reward"),
        ("KL, nats", "metrics", "kl_sequence"),
        ("Entropy, nats", "metrics", "entropy_sequence"),
        ("Preference accuracy", "metrics", "preference_accuracy"),
        ("Self-BLEU", "metrics", "self_bleu"),
    ]
    if any(member["exact"] for member in members):
        columns += [
            ("Optimum's entropy", "exact", "optimum_entropy"),
            ("KL(optimum ‖ policy)", "exact", "kl_optimum_to_policy"),
            ("Mass on the set", "exact", "mass_on_set"),
        ]
    if any(member.get("theory") for member in members):
        columns += [
            ("Optimum's reward", "theory", "optimum_expected_reward"),
            ("Optimum's KL, nats", "theory", "optimum_kl"),
            ("Effective share", "theory", "effective_sample_size"),
        ]
    listed = [member["name"] for member in members if samples[member["name"]]]
    page = render(
        "comparison.html",
        comparison=comparison,
        warnings=gathered_warnings(members),
        titles=[title for title, _, _ in columns],
        rows=[
            (member, [(member.get(group) or {}).get(metric) for _, group, metric in columns])
            for member in members
        ],
        confidence=any_evaluation["settings"]["confidence"],
        judge=any_evaluation["judge"],
        exact=all_exact(members),
        frontier=charts.frontier(members, comparison["chosen"], output / FRONTIER_FILE),
        health_titles=list(_HEALTH),
        health=[_health(member, comparison["passed_over"]) for member in members],
        samples=[
            (
                record["prompt"],
                [
                    ("Reference", record["reference"]),
                    *((name, samples[name][i]["policy"]) for name in listed if i < len(samples[name])),
                ],
            )
            for i, record in enumerate(samples[listed[0]] if listed else ())
        ],
    )
    (output / REPORT_FILE).write_text(page, encoding="utf-8")


_HEALTH = {  # figures by which a broken model is told, each with its reference's
    "mass on the set": "mass_on_set",
    "truncated": "truncated_fraction",
    "repetition": "repetition",
    "nats per token under the reference": "cross_entropy",
    "KL per token": "kl_token",
}


def _health(
    member: Mapping[str, Any], passed_over: Mapping[str, Sequence[str]]
) -> tuple[str, list[tuple[float | None, float | None]], str]:
    """A member's name, its figures of health with the reference's, and what keeps it from being chosen."""
    known = {**member["metrics"], **(member["exact"] or {})}
    pairs = [
        ((known.get(name) or {}).get("value"), (known.get(f"reference_{name}") or {}).get("value"))
        for name in _HEALTH.values()
    ]
    against = [f"it {ailment}" for ailment in ailments(member)] or passed_over.get(member["name"], [])
    return member["name"], pairs, "; ".join(against)


def gathered_warnings(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings of all members once, those of some with their names."""
    owners: dict[str, list[str]] = {}
    for member in members:
        for text in member["warnings"]:
            owners.setdefault(text, []).append(member["name"])
    return [
        text if len(names) == len(members) else f"{', '.join(names)}: {text}"
        for text, names in owners.items()
    ]


def _note(comparison: Mapping[str, Any]) -> str:
    """The description of the sweep's run: which runs trained its models, for one from a cache is no child."""
    lines = [plain(comparison["reason"]), "", "| model | its MLflow run |", "| :-- | :-- |"]
    lines += [
        f"| {plain(member['name'])} | {member['run_id'] or 'none'} |" for member in comparison["members"]
    ]
    return "\n".join(lines)


def _track(
    output: Path,
    comparison: Mapping[str, Any],
    run_id: str | None,
    experiment: str,
    tracking_uri: str | None,
) -> None:
    """Log the comparison to the sweep's run: the chosen member's figures, the figure and the report."""
    from softpref.evaluation.stage import flat_figures
    from softpref.tracking import Tracker

    with Tracker(
        output,
        experiment=experiment,
        run_name="compare",
        run_id=run_id,
        root=run_id is None,
        tracking_uri=tracking_uri or None,
    ) as tracker:
        for member in comparison["members"]:
            if member["name"] == comparison["chosen"]:
                tracker.metrics(flat_figures(member, prefix="chosen/"), step=0)
        tracker.tags(
            {
                "chosen": str(comparison["chosen"]),
                "reason": comparison["reason"],
                "mlflow.note.content": _note(comparison),
            }
        )
        for file in (COMPARISON_FILE, REPORT_FILE, FRONTIER_FILE):
            tracker.artifact(output / file, folder="comparison")
