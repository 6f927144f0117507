"""Self-contained HTML pages: what one policy is like. Loads nothing from a network; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softpref.evaluation.exact import ExactPrompt
    from softpref.evaluation.measure import PromptRecord

_SHOWN_PROMPTS, _SHOWN_SAMPLES = 6, 4

LABELS = {
    "win_rate": ("Win rate", "probability that the judge prefers its sample to the reference's"),
    "expected_reward": ("Expected reward", "mean score under the judge"),
    "reference_expected_reward": ("Expected reward of the reference", "the same for the SFT model"),
    "kl_sequence": ("KL to the reference", "per completion, from its own samples"),
    "entropy_sequence": ("Entropy", "per completion: how many answers it keeps alive"),
    "preference_accuracy": ("Preference accuracy", "held-out pairs ranked as people did"),
    "preference_margin": ("Preference margin", "log-probability of preferred minus other"),
    "perplexity": ("Perplexity", "per token, on the best held-out completions"),
    "distinct_1": ("Distinct-1", "distinct words among all words of a prompt's samples"),
    "distinct_2": ("Distinct-2", "distinct word pairs among all"),
    "self_bleu": ("Self-BLEU", "likeness of a prompt's samples to each other; 1 = all equal"),
    "completion_length": ("Completion length", "tokens, end included"),
    "kl_token": ("KL to the reference per token", "the same, by the tokens"),
    "truncated_fraction": ("Truncated", "samples that met the length limit"),
    "reference_truncated_fraction": ("Truncated, of the reference's", "its samples that met the limit"),
    "repetition": ("Repetition", "4-grams of tokens that a sample has already had, of all"),
    "reference_repetition": ("Repetition, of the reference's", "the same in its samples"),
    "cross_entropy": ("Cross-entropy under the reference", "how its samples surprise the reference"),
    "reference_cross_entropy": ("Cross-entropy, of the reference's", "its own samples: its entropy"),
    "kl_optimum_to_policy": ("KL(optimum ‖ policy)", "what the policy is short of theory; 0 is perfect"),
    "entropy": ("Entropy on the set", "of the policy, exact"),
    "optimum_entropy": ("Entropy of the optimum", "what theory promises"),
    "reference_entropy": ("Entropy of the reference", "where training began"),
    "optimum_expected_reward": ("Expected reward of the optimum", "what theory promises"),
    "kl": ("KL to the reference", "of the policy, per completion"),
    "optimum_kl": ("KL of the optimum to the reference", "what theory promises"),
    "effective_sample_size": ("Effective share of the samples", "how many of them the optimum rests on"),
    "mass_on_set": ("Mass on the set", "probability the policy gives to texts the experts know"),
    "least_mass_on_set": ("Least mass on the set", "of the prompt that leaks most"),
    "reference_mass_on_set": ("Mass of the reference", "probability it gives to these texts"),
}

_STYLE = """
:root { color-scheme: light dark; --policy: #2f7fc1; --warn: #c9821b; --good: #2a9d5c;
  --line: color-mix(in srgb, currentColor 16%, transparent);
  --soft: color-mix(in srgb, currentColor 6%, transparent);
  --dim: color-mix(in srgb, currentColor 62%, transparent); }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0 auto; max-width: 66rem;
  padding: 2rem 1.5rem 4rem; background: light-dark(#fff, #16181b); color: light-dark(#1c2024, #e4e6e9); }
body.wide { max-width: 84rem; }
h1 { font-size: 1.65rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 48rem; }
.dim, small { color: var(--dim); }
code { font-size: .9em; }
.chips span { display: inline-block; border: 1px solid var(--line); border-radius: 1rem;
  padding: .05rem .7rem; margin: .2rem .4rem .2rem 0; font-size: .9rem; }
.warn { border-left: 3px solid var(--warn); background: var(--soft); padding: .5rem .9rem; margin: 1rem 0; }
.warn p { margin: .25rem 0; max-width: none; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; font-size: .85rem; color: var(--dim); }
td.n, th.n { text-align: right; }
td.n, td:first-child { white-space: nowrap; }
tr.chosen td { background: color-mix(in srgb, var(--good) 14%, transparent); }
tr.chosen td:first-child { box-shadow: inset 3px 0 var(--good); padding-left: .7rem; }
.scroll { overflow-x: auto; }
.tiles { display: grid; gap: .8rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.25; }
svg.chart { width: 100%; height: auto; margin: .4rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 0 1.4rem; }
.sample { border-bottom: 1px solid var(--line); padding: .4rem 0; display: grid; gap: .8rem;
  grid-template-columns: 1fr auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: var(--soft); border-radius: .4rem; padding: .45rem .8rem; font-weight: 600;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 1.4rem 0 .5rem; }
.score { font-variant-numeric: tabular-nums; color: var(--dim); white-space: nowrap; }
"""


def trust_sentence(theory: Mapping[str, Any]) -> str:
    """How far the optimum's figures that rest on samples can be trusted."""
    from softpref.evaluation.theory import TRUSTED

    share = theory["effective_sample_size"]["value"]
    if share is None:
        return "That minimiser is not known."
    if share < TRUSTED:
        return (
            f"They cannot be trusted: the optimum rests on {share:.1%} of the samples, less than "
            f"{TRUSTED:.0%}; it lies too far from the reference."
        )
    return f"The optimum rests on {share:.0%} of the samples."


def write_report(
    path: Path,
    evaluation: Mapping[str, Any],
    records: Sequence[PromptRecord],
    exact: Sequence[ExactPrompt] = (),
) -> None:
    """Write the page of one evaluated policy.

    Args:
        evaluation: what `evaluation.json` holds.
        records: the samples of each prompt.
        exact: the enumerated prompts, empty where there are none.
    """
    from softpref.evaluation import charts

    metrics = evaluation["metrics"]
    order = [name for name in LABELS if name in metrics]
    confidence = evaluation["settings"]["confidence"]
    count = evaluation["settings"]["samples_per_prompt"]
    body = [
        f"<h1>{escape(evaluation['name'])}</h1>",
        chips(evaluation),
        f"<p>{escape(softness_sentence(evaluation))}</p>",
        warning_box(evaluation["warnings"]),
        tiles(metrics, ("win_rate", "expected_reward", "kl_sequence", "entropy_sequence")),
        "<h2>Scores of samples</h2>",
        f"<p class=dim>{len(records)} held-out prompts, {count} samples each from the policy and from the "
        f"reference. Judge: "
        f"{escape(evaluation['judge']['description'])}.{_accuracy(evaluation['judge'])}</p>",
        charts.reward_distribution(
            [sample["score"] for record in records for sample in record.policy],
            [sample["score"] for record in records for sample in record.reference],
            exact,
        ),
    ]
    if evaluation["exact"]:
        optimum_known = evaluation["exact"]["optimum_entropy"]["value"] is not None
        body += [
            "<h2>Against theory</h2>",
            f"<p>All {len(exact[0].rewards):,} completions of {len(exact)} held-out prompts were scored, so "
            "the trained distribution can be set beside "
            + ("the exact minimiser of its own objective, and beside " if optimum_known else "")
            + "the reference it began from.</p>",
            tiles(evaluation["exact"], ("kl_optimum_to_policy", "entropy", "expected_reward", "mass_on_set")),
        ]
        if optimum_known:
            body += [charts.optimum_against_policy(exact)]
        body += [charts.entropy_and_reward(exact), figure_table(evaluation["exact"], confidence)]
    if theory := evaluation["theory"]:
        body += [
            "<h2>Against theory</h2>",
            f"<p>The reward of any text is known here, so {evaluation['settings']['theory_samples']:,} more "
            f"samples of the reference on each of {theory['kl']['prompts']} held-out prompts tell by their "
            "rewards where the minimiser of this policy's own objective lies. "
            f"{escape(trust_sentence(theory))} Pairs are taken to be drawn from the reference: where people "
            "wrote them, an optimum with a regulariser lies a little farther from it.</p>",
            figure_table(theory, confidence),
        ]
    body += [
        "<h2>All figures</h2>",
        figure_table({name: metrics[name] for name in order}, confidence),
        f"<p class=dim>Intervals: {confidence:.0%} bootstrap over prompts, for samples of one prompt "
        f"are alike."
        "</p>",
        "<h2>Samples</h2>",
        f"<p class=dim>The first {min(_SHOWN_SAMPLES, count)} drawn for each prompt, not the best; with the "
        "judge's score. All of them are in samples.jsonl.</p>",
    ]
    for record in records[:_SHOWN_PROMPTS]:
        body.append(
            side_by_side(record.prompt, {"Reference": record.reference, evaluation["name"]: record.policy})
        )
    body.append(provenance(evaluation))
    path.write_text(page(f"Evaluation of {evaluation['name']}", body), encoding="utf-8")


def page(title: str, body: Iterable[str], *, wide: bool = False) -> str:
    """A whole HTML document around `body`, which is trusted; `title` is escaped; `wide` suits broad
    tables."""
    width = "wide" if wide else "narrow"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{_STYLE}</style></head><body class="{width}">{"".join(body)}</body></html>\n'
    )


def softness_sentence(evaluation: Mapping[str, Any]) -> str:
    """What this model's softness means, in one sentence."""
    alpha, method = evaluation["alpha"], evaluation["method"]
    anchor = evaluation.get("anchor")
    if method == "spo" and alpha is not None and anchor:
        power = "" if anchor == 1 else f" to the power of {anchor:g}"
        return (
            f"Softness α = {alpha:g}, relative to the reference: the optimum is the reference{power} · "
            "exp(reward / α). α = 1 tilts it by the experts' own odds, α → 0 towards their favourite; the "
            "larger α, the closer the model stays to it."
        )
    if method == "spo" and alpha is not None:
        if alpha == 1:
            meaning = "the model should answer as diversely as the experts themselves would choose"
        elif alpha < 1:
            meaning = "the model should sharpen the experts' preferences towards their favourite answers"
        else:
            meaning = "the model should stay softer than the experts, spreading over more answers"
        return (
            f"Softness α = {alpha:g}: {meaning} (α = 1 is the experts' own distribution, α → 0 their single "
            "favourite, α → ∞ any answer alike)."
        )
    if method:
        return f"Trained with {method.upper()}, which has no softness: β alone ties it to the reference."
    return "A model that softpref did not train."


def chips(evaluation: Mapping[str, Any]) -> str:
    """Method, α, anchor, β, what the KL term is taken on, extrapolation and judge as small labels."""
    parts = [
        f"{label} {evaluation[key]:g}" if isinstance(evaluation[key], float | int) else str(evaluation[key])
        for key, label in (("method", ""), ("alpha", "α"), ("anchor", "anchor"), ("beta", "β"))
        if evaluation.get(key) is not None
        and not (key == "alpha" and evaluation["method"] != "spo")
        and not (key == "anchor" and not evaluation[key])
    ]
    if (evaluation.get("kl_on") or "samples") != "samples":
        parts.append(f"KL on {evaluation['kl_on']}")
    if evaluation.get("extrapolation"):
        parts.append(f"extrapolated by {evaluation['extrapolation']:g}")
    parts.append(f"judge: {evaluation['judge']['name']}")
    return '<div class="chips">' + "".join(f"<span>{escape(part)}</span>" for part in parts) + "</div>"


def warning_box(warnings: Sequence[str]) -> str:
    """The warnings, or nothing."""
    return (
        '<div class="warn">' + "".join(f"<p>{escape(text)}</p>" for text in warnings) + "</div>"
        if warnings
        else ""
    )


def tiles(figures: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """The headline figures, large."""
    cells = []
    for name in names:
        figure = figures[name]
        unit = {"probability": "", "nats": " nats"}.get(figure["unit"], f" {figure['unit']}")
        cells.append(
            f'<div class="tile">{escape(LABELS[name][0])}<b>{number(figure["value"])}</b>'
            f'<span class="dim">{span(figure)}{escape(unit)}</span></div>'
        )
    return '<div class="tiles">' + "".join(cells) + "</div>"


def figure_table(figures: Mapping[str, Mapping[str, Any]], confidence: float) -> str:
    """Every figure with interval, unit, count and meaning."""
    rows = [
        f"<tr><td>{escape(LABELS[name][0])}</td><td class=n>{number(figure['value'])}</td>"
        f"<td class=n>{span(figure)}</td><td>{escape(figure['unit'])}</td>"
        f"<td class=n>{figure['n']:,}</td><td class=n>{figure['prompts']:,}</td>"
        f'<td class="dim">{escape(LABELS[name][1])}</td></tr>'
        for name, figure in figures.items()
    ]
    return (
        '<div class="scroll"><table><tr><th>Figure<th class=n>Value'
        f"<th class=n>{confidence:.0%} interval<th>Unit<th class=n>n<th class=n>Prompts<th>Meaning</tr>"
        + "".join(rows)
        + "</table></div>"
    )


def side_by_side(prompt: str, sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One prompt's samples in columns, one per model."""
    columns = []
    for title, samples in sides.items():
        lines = "".join(
            f'<div class="sample"><span>{escape(sample["text"]) or "<i class=dim>(empty)</i>"}'
            f"{' <span class=dim>✂</span>' if sample['truncated'] else ''}</span>"
            f'<span class="score">{sample["score"]:+.2f}</span></div>'
            for sample in samples[:_SHOWN_SAMPLES]
        )
        columns.append(f"<div><small>{escape(title)}</small>{lines}</div>")
    return f'<div class="prompt">{escape(prompt.strip())}</div><div class="sides">{"".join(columns)}</div>'


def provenance(evaluation: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    facts = {
        "policy": evaluation["model_uri"],
        "reference": evaluation["reference_uri"],
        "run": evaluation["run_id"],
        "data hash": evaluation["dataset_hash"],
        "evaluation id": evaluation["evaluation_id"],
        "settings": ", ".join(f"{key} {value}" for key, value in evaluation["settings"].items()),
    }
    lines = "".join(
        f"<tr><td>{escape(key)}</td><td><code>{escape(str(value))}</code></td></tr>"
        for key, value in facts.items()
        if value
    )
    return f'<h2>Provenance</h2><div class="scroll"><table>{lines}</table></div>'


def number(value: float | None) -> str:
    """Three significant decimals, or a dash."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def span(figure: Mapping[str, Any]) -> str:
    """The interval as text, or a dash."""
    return "–" if figure["low"] is None else f"{number(figure['low'])} … {number(figure['high'])}"


def _accuracy(judge: Mapping[str, Any]) -> str:
    figure = judge["accuracy"]
    if figure is None:
        return ""
    return f" It agrees with {number(figure['value'])} ({span(figure)}) of the validation preferences."
