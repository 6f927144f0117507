"""The page that shows what a dataset holds: one HTML text with its figures inside. Computes no statistics."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from softpref.data.config import EMBEDDED

_STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5b6b7b; --line: #dfe5eb; --fill: #f6f8fa;
  --blue: #2f6fab; --teal: #2a9d8f; --amber: #e9a23b; --red: #c8553d; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 36px 0 12px; font-size: 18px; }
h3 { margin: 0 0 8px; font-size: 14px; font-weight: 600; }
p.note, figcaption, td.note { color: var(--soft); font-size: 13px; margin: 4px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-top: 20px; }
@media (max-width: 640px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tile { background: var(--fill); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.2; }
.tile span { color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: 20px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; }
.bar i { display: block; min-width: 2px; }
.key { display: inline-flex; align-items: center; gap: 6px; margin: 8px 18px 0 0; font-size: 13px; }
.key i { width: 11px; height: 11px; border-radius: 3px; }
article { margin-top: 14px; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
article pre { margin: 6px 0; padding: 9px 12px; border-radius: 6px; background: var(--fill);
  font-family: inherit; font-size: 14px; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; border-left: 4px solid var(--line); }
article pre.best { border-left-color: var(--teal); } article pre.other { border-left-color: var(--amber); }
article small { color: var(--soft); }
code { font-size: 13px; overflow-wrap: anywhere; }
"""
_SPLIT_COLOURS = {"train": "#2f6fab", "validation": "#2a9d8f", "test": "#e9a23b"}
_SHOWN_CHARACTERS = 700


def render_page(stats: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """Draw the page.

    Args:
        stats: what `stats.json` holds.
        examples: accepted rows to show, with the columns of the dataset.

    Returns:
        A whole HTML document that loads nothing from elsewhere.
    """
    rows = sum(stats["rows"].values())
    refused, left_out = sum(stats["rejected"].values()), sum(stats["left_out"].values())
    sets = "pairs" if list(stats["kinds"]) == ["pairwise"] else "sets"
    tiles = [
        (rows, "preference rows"),
        (sum(stats["prompts"].values()), "distinct prompts"),
        (stats["labels"]["soft"], "soft labels"),
        (stats["labels"]["hard"], "hard labels"),
        (refused, "rows refused"),
        (left_out, "rows left out as asked"),
        (stats["duplicates"], "duplicates"),
        (stats["contradictions"]["sets"], f"{sets} with contradicting winners"),
    ]
    figures = [
        _length_figure("Prompt length", stats["characters"]["prompt"], "#2f6fab"),
        _length_figure("Completion length", stats["characters"]["completion"], "#2a9d8f"),
        _confidence_figure(stats),
    ]
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in stats["kinds"].items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Preference dataset: {_escape(_name(stats))}</title><style>{_STYLE}</style></head><body><main>
<h1>Preference dataset</h1>
<p class="note">from <code>{_escape(_name(stats))}</code> · {stats["rows_read"]:,} rows read · kept as {kinds}
{" · conversational" if stats["conversational"] else ""}{_taken_over(stats)}</p>
<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>
{_mixture(stats)}<h2>Splits</h2>{_splits(stats)}
<h2>Lengths and labels</h2><div class="figures">{"".join(figures)}</div>
<h2>Rows that were not taken</h2>{_rejections(stats, refused, left_out)}
<h2>Examples</h2><p class="note">From the training split; the better completion stands first.</p>
{"".join(_example(row) for row in examples)}
<h2>Origin</h2>{_origin(stats)}
</main></body></html>
"""


def _taken_over(stats: Mapping[str, Any]) -> str:
    if "taken_over" not in stats:
        return ""
    return f" · taken over, finished, from <code>{_escape(str(stats['taken_over']))}</code>"


def _name(stats: Mapping[str, Any]) -> str:
    if "mixture" in stats:
        return " + ".join(one["name"] for one in stats["mixture"])
    return f"the {stats['source']} world" if stats["source"] in EMBEDDED else str(stats["source"])


def _tile(count: int, label: str) -> str:
    return f'<div class="tile"><b>{count:,}</b><span>{label}</span></div>'


def _mixture(stats: Mapping[str, Any]) -> str:
    """A table of the sources, where there are several."""
    if "mixture" not in stats:
        return ""
    names = ("rows read", "refused", "left out", "usable", "in the dataset", "not sampled")
    lines = []
    for one in stats["mixture"]:
        counts = (
            *(one["rows_read"], sum(one["rejected"].values()), sum(one["left_out"].values())),
            *(one["usable"], one["rows"], one["not_sampled"]),
        )
        bound = '<span class="note"> · bounds the dataset</span>' if one["binding"] else ""
        lines.append(
            f'<tr><td><code>{_escape(one["name"])}</code>{bound}</td><td class="n">{one["share"]:.4g}</td>'
            + "".join(f'<td class="n">{count:,}</td>' for count in counts)
            + "</tr>"
        )
    heads = "".join(f'<th class="n">{name}</th>' for name in ("share", *names))
    why = (
        f"{stats['config']['rows']:,} rows were asked for, with these shares."
        if stats["config"]["rows"]
        else "As many rows as have these shares: the source that bounds the dataset has no more."
    )
    return (
        f"<h2>Sources</h2><table><tr><th>source</th>{heads}</tr>{''.join(lines)}</table>"
        f'<p class="note">{why}</p>'
    )


def _splits(stats: Mapping[str, Any]) -> str:
    total = sum(stats["rows"].values())
    bar, keys, lines = [], [], []
    for split, colour in _SPLIT_COLOURS.items():
        rows, prompts = stats["rows"][split], stats["prompts"][split]
        bar.append(f'<i style="flex:{rows};background:{colour}"></i>' if rows else "")
        keys.append(f'<span class="key"><i style="background:{colour}"></i>{split} {rows / total:.1%}</span>')
        lines.append(f'<tr><td>{split}</td><td class="n">{rows:,}</td><td class="n">{prompts:,}</td></tr>')
    for name, title in (
        ("sft", "demonstrations for the reference"),
        ("extra_prompts", "further prompts to sample"),
    ):
        for split, count in stats.get(name, {}).items():
            if split in _SPLIT_COLOURS:
                lines.append(
                    f'<tr><td>{title}, {split}</td><td class="n">{count:,}</td><td class="n">–</td></tr>'
                )
    return (
        f'<div class="bar">{"".join(bar)}</div>{"".join(keys)}'
        '<table style="margin-top:12px"><tr><th>split</th><th class="n">rows</th>'
        f'<th class="n">prompts</th></tr>{"".join(lines)}</table>'
        '<p class="note">Splits go by prompt: prompts that differ only in case or white space share one.</p>'
    )


def _length_figure(title: str, lengths: Mapping[str, Any], colour: str) -> str:
    caption = (
        f"characters; median {lengths['median']:,.0f}, middle half {lengths['p25']:,.0f} to "
        f"{lengths['p75']:,.0f}, 95 % up to {lengths['p95']:,.0f}, longest {lengths['max']:,.0f} "
        "(the last bar holds the longest 1 %)"
    )
    edges = lengths["histogram"]["edges"]
    ticks = [f"{edges[0]:,.0f}", f"{edges[len(edges) // 2]:,.0f}", f"{edges[-1]:,.0f}"]
    return _figure(title, _bars(lengths["histogram"]["counts"], ticks, colour), caption)


def _confidence_figure(stats: Mapping[str, Any]) -> str:
    soft, hard = stats["labels"]["soft"], stats["labels"]["hard"]
    if not soft:
        text = f"All {hard:,} labels are hard: each row says what is better, and not how surely."
        return _figure("Label confidence", "", text)
    caption = "probability that the better completion beats the other; 0.5 is a tie, 1 unanimous" + (
        f". {hard:,} hard labels are not drawn" if hard else ""
    )
    ticks = ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    return _figure("Label confidence", _bars(stats["confidence"]["counts"], ticks, "#e9a23b"), caption)


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{title}</h3>{drawing}<figcaption>{caption}</figcaption></figure>"


def _bars(counts: Sequence[int], ticks: Sequence[str], colour: str) -> str:
    """A bar chart, with evenly spread tick labels under it and the greatest count beside it."""
    width, height, left, base = 360.0, 170.0, 34.0, 148.0
    top, span = 16.0, width - left - 8.0
    greatest = max(*counts, 1)
    step = span / len(counts)
    parts = [
        f'<line x1="{left}" y1="{y:.1f}" x2="{width - 8}" y2="{y:.1f}" stroke="#dfe5eb"/>'
        f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{_compact(greatest * share)}</text>'
        for share in (0.0, 0.5, 1.0)
        for y in [base - (base - top) * share]
    ]
    for index, count in enumerate(counts):
        tall = (base - top) * count / greatest
        if count:
            tall = max(tall, 1.0)
        parts.append(
            f'<rect x="{left + index * step + 0.5:.1f}" y="{base - tall:.1f}" width="{max(step - 1, 1):.1f}" '
            f'height="{tall:.1f}" fill="{colour}"><title>{count:,}</title></rect>'
        )
    for index, tick in enumerate(ticks):
        share = index / (len(ticks) - 1)
        anchor = "start" if index == 0 else "end" if share == 1 else "middle"
        parts.append(
            f'<text x="{left + span * share:.1f}" y="{base + 16}" text-anchor="{anchor}">{tick}</text>'
        )
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _compact(count: float) -> str:
    return f"{count / 1000:.3g}k" if count >= 1000 else f"{count:.3g}"


def _rejections(stats: Mapping[str, Any], refused: int, left_out: int) -> str:
    sampled = ""
    if stats["not_sampled"]:
        sampled = f'<p class="note">{stats["not_sampled"]:,} sound rows are not in the sample asked for.</p>'
    if not refused and not left_out:
        return sampled or '<p class="note">None: every row that was read is in the dataset.</p>'
    lines = "".join(
        f'<tr><td>{_escape(rule)}</td><td class="note">{kind}</td><td class="n">{count:,}</td></tr>'
        for kind, counts in (("refused", stats["rejected"]), ("left out as asked", stats["left_out"]))
        for rule, count in counts.items()
    )
    return (
        f'<table><tr><th>reason</th><th></th><th class="n">rows</th></tr>{lines}</table>'
        '<p class="note">Each row with its number and reason is in <code>rejected.jsonl</code>.</p>' + sampled
    )


def _example(row: Mapping[str, Any]) -> str:
    probability = row["probability"]
    label = (
        "hard label"
        if probability is None
        else f"the first beats the second with probability {probability:.2f}"
    )
    if row["kind"] != "pairwise":
        label = f"{row['kind'].replace('_', ' ')} of {len(row['completions'])}, best first"
    completions = "".join(
        f'<pre class="{"best" if place == 0 else "other"}">{_escape(_shorten(_plain(completion)))}</pre>'
        for place, completion in enumerate(row["completions"])
    )
    return (
        f"<article><small>row {row['source_row']:,} of {_escape(row.get('source', 'the source'))} · {label}"
        "</small>"
        f"<pre>{_escape(_shorten(_plain(row['prompt'])))}</pre>{completions}</article>"
    )


def _origin(stats: Mapping[str, Any]) -> str:
    mappings = {f"{one['name']}: ": one["mapping"] for one in stats.get("mixture", ())}
    lines = []
    for of, mapping in (mappings or {"": stats["mapping"]}).items():
        columns = ", ".join(f"{role} ← {column}" for role, column in mapping["columns"].items())
        lines += [
            (f"{of}columns", columns + (" (guessed from their names)" if mapping["guessed"] else "")),
            (f"{of}read as", "; ".join(mapping.get("notes", [])) or "–"),
            (f"{of}columns without use", ", ".join(mapping.get("unused", [])) or "–"),
            (f"{of}prompt template", mapping["prompt_template"] or "–"),
        ]
    lines += [
        ("seed", stats["config"]["seed"]),
        ("dataset hash", stats["dataset_hash"]),
        ("test split hash", stats["test_hash"]),
    ]
    cells = "".join(
        f"<tr><td>{_escape(name)}</td><td><code>{_escape(str(value))}</code></td></tr>"
        for name, value in lines
    )
    return f"<table>{cells}</table>"


def _plain(text: Any) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def _shorten(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} … ({len(text):,} characters)"


def _escape(text: str) -> str:
    return html.escape(text)
