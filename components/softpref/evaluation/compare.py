"""Compares the members of a sweep: one figure, one table, one choice by a stated rule. Evaluates no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from softpref.artifacts import plain
from softpref.errors import ConfigError, DataError
from softpref.evaluation.choice import check_rule, choose, rule_in_words
from softpref.evaluation.curves import all_exact, equal_reward, position
from softpref.evaluation.stage import EVALUATION_FILE, REPORT_FILE, SAMPLES_FILE
from softpref.fitness import Limits, ailments
from softpref.lm.extrapolation import extrapolated_folders
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
    from softpref.evaluation.report import number, page, side_by_side, span, warning_box

    members, chosen = comparison["members"], comparison["chosen"]
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
    rows = []
    for member in members:
        cells = []
        for _, group, metric in columns:
            figure = (member.get(group) or {}).get(metric)
            cells.append(
                f"<td class=n>{number(figure['value'])}<br><small>{span(figure)}</small></td>"
                if figure
                else "<td class=n>–</td>"
            )
        alpha = f"{member['alpha']:g}" if member["method"] == "spo" and member["alpha"] is not None else "–"
        rows.append(
            f"<tr{' class=chosen' if member['name'] == chosen else ''}><td>{escape(member['name'])}"
            f"{'<br><small>chosen</small>' if member['name'] == chosen else ''}</td>"
            f"<td class=n>{alpha}</td>{''.join(cells)}</tr>"
        )
    settings = any_evaluation["settings"]
    body = [
        "<h1>Softness sweep</h1>",
        f"<p>{escape(comparison['reason'])}</p>",
        "<p class=dim>Softness α decides how much of the experts' diversity a model keeps: 1 is their own "
        "distribution of answers, towards 0 their favourite alone, above 1 flatter than they are.</p>",
        warning_box(gathered_warnings(members)),
        '<div class="scroll"><table><tr><th>Model<th class=n>α',
        "".join(f"<th class=n>{title}" for title, _, _ in columns),
        "</tr>" + "".join(rows) + "</table></div>",
        f"<p class=dim>Small: {settings['confidence']:.0%} bootstrap intervals over held-out prompts. Judge: "
        f"{escape(any_evaluation['judge']['description'])}.</p>",
        "<h2>The frontier</h2>",
        "<p class=dim>A model that gains reward loses entropy: it keeps fewer answers alive. What tells "
        "methods apart is how much entropy each keeps at the same expected reward. "
        + (
            "Every possible answer is known here, so both are exact, and the most that any model could keep "
            "is softmax(reward / τ). They are given that a model answers within the set: what it says off "
            "the set shows in the figures of its samples."
            if all_exact(members)
            else "Both are of samples, and a model that says nonsense has entropy too: look at its reward."
        )
        + "</p>",
        charts.frontier(members, chosen, output / FRONTIER_FILE),
        _equal_reward_table(comparison["equal_reward"]),
        "<h2>The rule</h2>",
        f"<p>{escape(comparison['rule'])}</p>",
        _health_table(members, comparison["passed_over"]),
    ]
    listed = [member["name"] for member in members if samples[member["name"]]]
    if listed:
        body.append(
            "<h2>Samples</h2><p class=dim>The first drawn for each prompt, not the best, with the "
            "judge's score."
            "</p>"
        )
        first = samples[listed[0]]
        for i, record in enumerate(first):
            sides = {"Reference": record["reference"]}
            sides |= {name: samples[name][i]["policy"] for name in listed if i < len(samples[name])}
            body.append(side_by_side(record["prompt"], sides))
    links = "".join(
        f"<tr><td>{escape(m['name'])}</td><td><code>{escape(str(m['model_uri']))}</code></td>"
        f"<td><code>{escape(str(m['run_id'] or '–'))}</code></td></tr>"
        for m in members
    )
    body.append(
        f'<h2>Models</h2><div class="scroll"><table><tr><th>Model<th>Where<th>Run</tr>{links}</table></div>'
    )
    (output / REPORT_FILE).write_text(page("Softness sweep", body, wide=True), encoding="utf-8")


def _equal_reward_table(compared: Mapping[str, Any] | None) -> str:
    """Entropy of every curve at the expected reward of each SPO member, and how far from that member's."""
    if compared is None:
        return ""
    titles = {"maximum": "Most possible"}
    rows = []
    for row in compared["rows"]:
        own, cells = row["entropy"][row["curve"]], []
        for name in compared["curves"]:
            entropy = row["entropy"][name]
            if entropy is None:
                cells.append("<td class=n>–</td>")
                continue
            difference = "" if name == row["curve"] else f"<br><small>{entropy - own:+.3f}</small>"
            cells.append(f"<td class=n>{entropy:.3f}{difference}</td>")
        rows.append(
            f"<tr><td>{escape(row['name'])}</td><td class=n>{row['expected_reward']:.3f}</td>"
            f"{''.join(cells)}</tr>"
        )
    basis = "exact, on the set" if compared["basis"] == "exact" else "of samples"
    return (
        "<h2>Entropy at equal expected reward</h2>"
        f"<p class=dim>In nats, {basis}. Each row takes the expected reward of an SPO model and reads every "
        "method's entropy there, between the models of its own curve; a dash where the curve does not reach. "
        "Small: more or less than the SPO model has.</p>"
        '<div class="scroll"><table><tr><th>At the reward of<th class=n>Expected reward'
        + "".join(f"<th class=n>{escape(titles.get(name, name))}" for name in compared["curves"])
        + "</tr>"
        + "".join(rows)
        + "</table></div>"
    )


_HEALTH = {  # figures by which a broken model is told, each with its reference's
    "mass on the set": "mass_on_set",
    "truncated": "truncated_fraction",
    "repetition": "repetition",
    "nats per token under the reference": "cross_entropy",
    "KL per token": "kl_token",
}


def _health_table(members: Sequence[Mapping[str, Any]], passed_over: Mapping[str, Sequence[str]]) -> str:
    """The figures of health beside the reference's, and what keeps a member from being chosen."""
    from softpref.evaluation.report import number

    rows = []
    for member in members:
        known = {**member["metrics"], **(member["exact"] or {})}
        cells = []
        for name in _HEALTH.values():
            ours, theirs = ((known.get(key) or {}).get("value") for key in (name, f"reference_{name}"))
            beside = "" if theirs is None else f"<br><small>{number(theirs)}</small>"
            cells.append(f"<td class=n>{number(ours)}{beside}</td>")
        against = [f"it {ailment}" for ailment in ailments(member)] or passed_over.get(member["name"], [])
        cells.append(f"<td>{escape('; '.join(against)) or '–'}</td>")
        rows.append(f"<tr><td>{escape(member['name'])}</td>{''.join(cells)}</tr>")
    titles = "".join(f"<th class=n>{title}" for title in _HEALTH)
    return (
        "<h2>Health</h2><p class=dim>Of each model's samples; small, of the reference's. What a model says "
        "off the reference's ground counts as entropy, and a judge may like it.</p>"
        f'<div class="scroll"><table><tr><th>Model{titles}<th>Against it</tr>{"".join(rows)}</table></div>'
    )


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
