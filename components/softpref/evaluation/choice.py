"""Which member of a sweep is chosen: the softest healthy one that is not inferior to the best. No files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softpref.errors import ConfigError

METRIC_NAMES = {"expected_reward": "expected reward", "win_rate": "win rate"}
"""The metrics that may rank members, as people read them."""

NON_INFERIORITY = 0.1
"""δ: the part of the best member's gain over the reference that a softer one may lack."""
_LEAKED = 0.05  # of the probability on a known set beyond what the reference lacks; it counts as entropy
_MORE_TRUNCATED = 0.05  # share of samples that meet the length limit beyond the reference's


class Choice(NamedTuple):
    """The member chosen (None when none may be) and why, in a sentence or two."""

    name: str | None
    reason: str


def check_rule(rule: str, max_kl: float | None) -> None:
    """Refuse a rule that is none.

    Raises:
        ConfigError: says which rules there are.
    """
    if rule not in METRIC_NAMES:
        raise ConfigError(f"the rule of choice must be one of {', '.join(METRIC_NAMES)}, got {rule!r}")
    if max_kl is not None and not max_kl > 0:
        raise ConfigError(f"max_kl must be a positive number of nats or left out, got {max_kl}")


def choose(members: Sequence[Mapping[str, Any]], rule: str, max_kl: float | None = None) -> Choice:
    """Choose by the rule: of healthy members within `max_kl`, the softest that is not inferior to the best.

    Not inferior is a member whose paired difference to the best, prompt by prompt, lies above −δ with its
    whole interval, where δ is `NON_INFERIORITY` of what the best gains over the reference. Wide intervals are
    no reason to take a model. Softness is α; models of other methods have none, and come behind by the rule.

    Args:
        members: summaries with `name`, `method`, `alpha`, `metrics`, `exact`, `by_prompt` and `judge`.
        rule: the metric that ranks.
        max_kl: nats; None sets no limit.
    """
    label = METRIC_NAMES[rule]
    valued = [member for member in members if _value(member, rule) is not None]
    if not valued:
        return Choice(None, f"No member has a value of {label}.")
    if coin := _coin(valued[0]):
        return Choice(None, coin)
    ailments = {member["name"]: _ailment(member) for member in valued}
    unfit = "; ".join(f"{name} {ailment}" for name, ailment in ailments.items() if ailment)
    allowed = [member for member in valued if not ailments[member["name"]]]
    if not allowed:
        return Choice(None, f"No member may be chosen: {unfit}.")
    left_out = f" Never chosen: {unfit}." if unfit else ""
    if max_kl is not None:
        near = [member for member in allowed if (_value(member, "kl_sequence") or 0.0) <= max_kl]
        if not near:
            least = min(_value(member, "kl_sequence") or 0.0 for member in allowed)
            return Choice(
                None,
                f"Every member exceeds the limit of {max_kl:g} nats of KL; the nearest has {least:.2f}. "
                f"Raise max_kl, or train with a larger beta.{left_out}",
            )
        allowed = near
    best = max(allowed, key=lambda member: member["metrics"][rule]["value"])
    margin = NON_INFERIORITY * max(0.0, _gain(best, rule))
    kept = [member for member in allowed if member is best or _not_inferior(member, best, rule, margin)]
    softest = max(kept, key=lambda member: (_softness(member), member["metrics"][rule]["value"]))
    within = f" among the members within {max_kl:g} nats of KL" if max_kl is not None else ""
    stated = f"{_value(best, rule):.3f}"
    if len(allowed) == 1:
        alone = f"{best['name']} is the only one to choose{within} ({label} {stated})."
        return Choice(best["name"], alone + left_out)
    if softest is best:
        others = "no softer one keeps" if len(kept) > 1 else "no other is sure to keep"
        return Choice(
            best["name"],
            f"{best['name']} has the best {label}{within} ({stated}), and {others} nine tenths of its gain "
            f"over the reference.{left_out}",
        )
    return Choice(
        softest["name"],
        f"{best['name']} has the best {label}{within} ({stated}); {softest['name']} with "
        f"{softest['metrics'][rule]['value']:.3f} is softer and not inferior by more than "
        f"{margin:.3g} {best['metrics'][rule].get('unit') or ''}, a tenth of the best's gain over the "
        f"reference.{left_out}",
    )


def rule_in_words(rule: str, max_kl: float | None) -> str:
    """The rule as people read it on the report."""
    limit = f" within {max_kl:g} nats of KL to the reference" if max_kl is not None else ""
    return (
        f"Find the best member by {METRIC_NAMES[rule]} among the healthy ones{limit}: those that keep "
        "the reference's probability on a known set, and meet the length limit no more often. Of it and "
        "all that are not inferior (the 95% interval of the difference, prompt by prompt, stays within a "
        "tenth of what the best gains over the reference), choose the softest. A judge that cannot be told "
        "from a coin chooses nothing."
    )


def _value(member: Mapping[str, Any], metric: str) -> float | None:
    return (member["metrics"].get(metric) or {}).get("value")


def _coin(member: Mapping[str, Any]) -> str:
    """Why the judge that all members share may not choose; empty where it may."""
    accuracy = (member.get("judge") or {}).get("accuracy")
    if not accuracy or accuracy.get("low") is None or accuracy["low"] > 0.5:
        return ""
    return (
        f"The judge agrees with {accuracy['value']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] of "
        "the held-out preferences, which cannot be told from a coin: nothing is chosen by it. Give more "
        "preferences, or another judge."
    )


def _ailment(member: Mapping[str, Any]) -> str:
    """Why a member may not be chosen, whatever its figures; empty where it may."""
    exact = member.get("exact") or {}
    mass, usual = ((exact.get(name) or {}).get("value") for name in ("mass_on_set", "reference_mass_on_set"))
    if mass is not None and usual is not None and mass < usual - _LEAKED:
        return f"has only {mass:.2f} of its probability on the known set, the reference {usual:.2f}"
    ours, theirs = (
        member["metrics"].get(name) or {} for name in ("truncated_fraction", "reference_truncated_fraction")
    )
    if None in (ours.get("low"), theirs.get("high")):
        return ""
    if ours["low"] > theirs["high"] and ours["value"] > theirs["value"] + _MORE_TRUNCATED:
        cut, usual = (f"{figure['value']:.0%}" for figure in (ours, theirs))
        return f"has {cut} of its samples cut at the length limit, the reference {usual}"
    return ""


def _gain(member: Mapping[str, Any], rule: str) -> float:
    """What a member gains over the reference, in the metric's unit."""
    level = 0.5 if rule == "win_rate" else _value(member, "reference_expected_reward")
    return 0.0 if level is None else member["metrics"][rule]["value"] - level


def _not_inferior(member: Mapping[str, Any], best: Mapping[str, Any], rule: str, margin: float) -> bool:
    """Whether `member` falls short of `best` by less than `margin`; unknown, so no, with a single prompt.

    All members answer the same prompts, and prompts differ more than members do: only paired differences
    tell.
    """
    from softpref.evaluation.intervals import interval

    pairs = zip(member["by_prompt"][rule], best["by_prompt"][rule], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    low = interval(differences, range(len(differences))).low
    return low is not None and low > -margin


def _softness(member: Mapping[str, Any]) -> float:
    return member["alpha"] if member["method"] == "spo" and member["alpha"] is not None else -1.0
