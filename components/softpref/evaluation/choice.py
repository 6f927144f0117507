"""Which member of a sweep is chosen: the softest healthy one that is not inferior to the best, or the next if
that one does not pass the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from softpref.errors import ConfigError
from softpref.fitness import Limits, ailments, gate_failures, judge_doubt, number
from softpref.records.evaluation import Evaluation

METRIC_NAMES = {"expected_reward": "expected reward", "win_rate": "win rate"}
"""The metrics that may rank members, as people read them."""

NON_INFERIORITY = 0.1
"""δ: the share of the best member's gain over the reference that a softer one may lack."""


class Choice(NamedTuple):
    """The member chosen and why.

    Attributes:
        name: None when none may be chosen.
        reason: in a sentence or two.
        passed_over: members that the rule ranks higher, in this order, each with what keeps it from passing
            the gate.
    """

    name: str | None
    reason: str
    passed_over: Mapping[str, list[str]] = MappingProxyType({})


def check_rule(rule: str, max_kl: float | None) -> None:
    """Refuse an unknown rule, and a limit that is not positive."""
    if rule not in METRIC_NAMES:
        raise ConfigError(f"the rule of choice must be one of {', '.join(METRIC_NAMES)}, got {rule!r}")
    if max_kl is not None and not max_kl > 0:
        raise ConfigError(f"max_kl must be a positive number of nats or left out, got {max_kl}")


def no_scores(judge: str) -> str:
    """What is said where members cannot be ranked by expected reward."""
    return (
        f"the judge {judge!r} compares completions and gives no scores, so there is no expected reward to "
        "rank models by; set selection_rule to win_rate"
    )


def choose(
    members: Sequence[Evaluation], rule: str, max_kl: float | None = None, limits: Limits | None = None
) -> Choice:
    """Choose by the rule, and as long as that member does not pass the gate, by the rule among the others.

    Args:
        members, rule, max_kl: as in `choose_healthy`.
        limits: of the gate; None asks for none.
    """
    left, passed_over = list(members), dict[str, list[str]]()
    choice = choose_healthy(left, rule, max_kl)
    while limits and choice.name is not None:
        (chosen,) = (member for member in left if member.name == choice.name)
        if not (failures := gate_failures(chosen, limits)):
            break
        passed_over[choice.name] = failures
        left.remove(chosen)
        choice = choose_healthy(left, rule, max_kl)
    if not passed_over:
        return choice
    failed = "; ".join(f"{name} ({'; '.join(failures)})" for name, failures in passed_over.items())
    if choice.name is None:
        others = f" {choice.reason}" if left else ""
        return Choice(None, f"No member passes the gate: {failed}.{others}", passed_over)
    before = f"The rule ranks higher, but the gate refuses: {failed}."
    return Choice(choice.name, f"{choice.reason} {before}", passed_over)


def choose_healthy(members: Sequence[Evaluation], rule: str, max_kl: float | None = None) -> Choice:
    """Of the healthy members within `max_kl`, the softest that is not inferior to the best.

    Not inferior is a member whose paired difference to the best, prompt by prompt, lies above −δ with its
    whole interval, where δ is `NON_INFERIORITY` of the best's gain over the reference. So a wide interval is
    no reason to take a model. Softness is α; models of other methods have none and rank last.

    Args:
        members: all evaluated alike.
        rule: the metric that ranks.
        max_kl: nats; None sets no limit.
    """
    label = METRIC_NAMES[rule]
    scores = {member.name: value for member in members if (value := number(member.metrics, rule)) is not None}
    valued = [member for member in members if member.name in scores]
    if not valued:
        return Choice(None, f"No member has a value of {label}.")
    if doubt := judge_doubt(valued[0]):
        return Choice(None, f"Nothing is chosen: {doubt}.")
    ills = {member.name: ailments(member) for member in valued}
    unfit = "; ".join(f"{name} {' and '.join(ailing)}" for name, ailing in ills.items() if ailing)
    allowed = [member for member in valued if not ills[member.name]]
    if not allowed:
        return Choice(None, f"No member may be chosen: {unfit}.")
    left_out = f" Never chosen: {unfit}." if unfit else ""
    if max_kl is not None:
        near = [member for member in allowed if (number(member.metrics, "kl_sequence") or 0.0) <= max_kl]
        if not near:
            least = min(number(member.metrics, "kl_sequence") or 0.0 for member in allowed)
            return Choice(
                None,
                f"Every member exceeds the limit of {max_kl:g} nats of KL; the nearest has {least:.2f}. "
                f"Raise max_kl, or train with a larger beta.{left_out}",
            )
        allowed = near
    best = max(allowed, key=lambda member: scores[member.name])
    margin = NON_INFERIORITY * max(0.0, scores[best.name] - _level(best, rule, scores[best.name]))
    kept = [member for member in allowed if member is best or _not_inferior(member, best, rule, margin)]
    softest = max(kept, key=lambda member: (_softness(member), scores[member.name]))
    within = f" among the members within {max_kl:g} nats of KL" if max_kl is not None else ""
    stated = f"{scores[best.name]:.3f}"
    if len(allowed) == 1:
        alone = f"{best.name} is the only one to choose{within} ({label} {stated})."
        return Choice(best.name, alone + left_out)
    if softest is best:
        others = "no softer one keeps" if len(kept) > 1 else "no other is sure to keep"
        return Choice(
            best.name,
            f"{best.name} has the best {label}{within} ({stated}), and {others} nine tenths of its gain "
            f"over the reference.{left_out}",
        )
    return Choice(
        softest.name,
        f"{best.name} has the best {label}{within} ({stated}); {softest.name} with "
        f"{scores[softest.name]:.3f} is softer and not inferior by more than "
        f"{margin:.3g} {best.metrics[rule].unit}, a tenth of the best's gain over the "
        f"reference.{left_out}",
    )


def rule_in_words(rule: str, max_kl: float | None, limits: Limits | None = None) -> str:
    """The rule as people read it on the report."""
    asked = []
    if limits and limits.min_win_rate:
        asked.append(f"the low end of its win rate's interval is above {limits.min_win_rate:g}")
    if limits and limits.max_kl is not None:
        asked.append(f"the high end of its KL's is at most {limits.max_kl:g} nats")
    gate = (
        f" It must pass the gate: {' and '.join(asked)}. If it does not, choose among the others."
        if asked
        else ""
    )
    limit = f" within {max_kl:g} nats of KL to the reference" if max_kl is not None else ""
    return (
        f"Find the best member by {METRIC_NAMES[rule]} among the healthy ones{limit}: those that keep "
        "the reference's probability on a known set, end and repeat themselves as it does, and write what "
        "it might have written. Of it and all that are not inferior (the 95% interval of the difference, "
        "prompt by prompt, stays within a tenth of the best's gain over the reference), choose the softest. "
        f"A judge that is no better than a coin, or than length alone, chooses nothing.{gate}"
    )


def _level(member: Evaluation, rule: str, unknown: float) -> float:
    """The reference's value of the metric that ranks."""
    level = 0.5 if rule == "win_rate" else number(member.metrics, "reference_expected_reward")
    return unknown if level is None else level


def _not_inferior(member: Evaluation, best: Evaluation, rule: str, margin: float) -> bool:
    """Whether `member` falls short of `best` by less than `margin`; unknown, so no, with too few prompts.

    Prompts differ more than members do, so only paired differences tell members apart.
    """
    from softpref.intervals import interval

    pairs = zip(member.by_prompt[rule], best.by_prompt[rule], strict=True)
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    low = interval(differences, range(len(differences))).low
    return low is not None and low > -margin


def _softness(member: Evaluation) -> float:
    return member.alpha if member.method == "spo" and member.alpha is not None else -1.0
