"""What options of SPO training mean, and which are refused. Imports no training library: it is fast."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from softpref.config import parse_overrides
from softpref.errors import ConfigError
from softpref.key_content import check_language
from softpref.lm.extrapolation import parse_weights

logger = logging.getLogger(__name__)

REFERENCE_FREE = ("simpo", "cpo", "orpo")
_OF_PAIRS = ("dpo", "rdpo", "ipo", "slic", "ropo", "apo_zero", "apo_down", "tdpo", "tdpo1", *REFERENCE_FREE)
METHODS = ("spo", *_OF_PAIRS, "kto", "sppo")
_ONLY_FOR = {  # options that only some methods have
    "anchor": ("spo",),
    "weight_exponent": ("spo",),
    "tdpo_alpha": ("tdpo",),
    "ropo_alpha": ("ropo",),
    "simpo_gamma": ("simpo",),
    "sppo_completions": ("sppo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "label_smoothing": ("dpo", "rdpo"),
    "nll_weight": _OF_PAIRS,
    "soft_labels": ("spo", *_OF_PAIRS),
}
_IMPLY_REWARDS = ("spo", "dpo", "rdpo")  # methods whose margin is a difference of rewards, in nats


class Derived:
    """What follows from the options of `SPOConfig`."""

    if TYPE_CHECKING:
        method: str
        anchor: float
        beta: float
        kl_beta: float
        kl_on: str
        nll_weight: float | None
        reference_cache: str
        rounds: int
        train_on: str
        round_reference: str
        dimensions: list[str] | str | None
        initial_share: float

    @property
    def dimension_order(self) -> list[str]:
        """`dimensions` as a list."""
        names = self.dimensions
        if names is None or isinstance(names, str):
            names = [name.strip() for name in re.split("[,>]", names or "") if name.strip()]
        return list(names)

    @property
    def dimension(self) -> str:
        """The dimension of a single round; empty without one, or with several."""
        return self.dimension_order[0] if len(self.dimension_order) == 1 else ""

    @property
    def samples_policy(self) -> bool:
        """Whether the objective needs samples of the policy: for a KL term on samples."""
        return self.kl_strength > 0 and self.kl_on == "samples"

    @property
    def regularises_rows(self) -> bool:
        """Whether the KL term is taken on the completions of the rows."""
        return self.kl_strength > 0 and self.kl_on == "data"

    @property
    def kl_strength(self) -> float:
        """The factor of the KL regulariser; 0 where there is none."""
        strength = self.beta if self.method == "spo" else self.kl_beta
        return 0.0 if self.kl_on == "none" else strength

    @property
    def scores_reference(self) -> bool:
        """Whether the preference loss needs the reference's log-probabilities of the rows."""
        return self.anchor > 0 if self.method == "spo" else self.method not in REFERENCE_FREE

    @property
    def takes_divergences(self) -> bool:
        """Whether it needs the policy's divergence from the reference along the rows."""
        return self.method in ("tdpo", "tdpo1")

    @property
    def likelihood_weight(self) -> float:
        """The factor of the likelihood of each pair's better completion; 0 where the loss has none."""
        if self.method not in _OF_PAIRS:
            return 0.0
        if self.nll_weight is None:
            return 1.0 if self.method in ("cpo", "orpo") else 0.0
        return self.nll_weight

    @property
    def takes_reference_logps(self) -> bool:
        """Whether one log-probability for each completion is enough, so that rows may bring them."""
        return self.scores_reference and not self.takes_divergences and self.method != "kto"

    @property
    def keeps_reference_logps(self) -> bool:
        """Whether rows are given those once, instead of with each batch."""
        return self.takes_reference_logps and bool(self.reference_cache or self.refers_to_previous)

    @property
    def draws_rows(self) -> bool:
        """Whether training rows are drawn from the policy, at least in some round."""
        return self.rounds > 1 or self.train_on != "preferences"

    @property
    def uses_judge(self) -> bool:
        """Whether what the policy draws must be judged."""
        return self.draws_rows and self.train_on != "self_play"

    @property
    def takes_unpaired(self) -> bool:
        """Whether training learns from completions without a counterpart."""
        return self.method == "kto" and self.train_on == "preferences"

    @property
    def refers_to_previous(self) -> bool:
        """Whether a round's reference is the policy at its beginning."""
        wanted = self.round_reference == "previous" or (
            self.round_reference == "auto" and self.method == "sppo"
        )
        return wanted and self.draws_rows

    @property
    def mixes_references(self) -> bool:
        """Whether a round's reference is a mixture of the policy at its beginning and the initial model."""
        return self.refers_to_previous and self.initial_share > 0


def check_options(args: Any) -> None:
    """Refuse values outside their range, and values that do not go together.

    Args:
        args: an `SPOConfig`, or anything with its options and what is `Derived` of them.
    """

    def refuse(name: str, expected: str) -> None:
        raise ConfigError(f"SPOConfig.{name} must be {expected}, got {getattr(args, name)!r}")

    if not (args.alpha >= 0 and math.isfinite(args.alpha)):
        refuse("alpha", "at least 0 (softness α: optimum softmax(reward/α); 1 is the experts' own)")
    if not (args.beta >= 0 and math.isfinite(args.beta)) or (args.method != "spo" and args.beta == 0):
        refuse("beta", "at least 0 for spo, above 0 for every other method")
    if not 0 < args.ropo_alpha < math.inf:
        refuse("ropo_alpha", "above 0")
    if args.kl_gradient not in ("token", "full"):
        from softpref.objectives import kl_lambda  # imports torch

        try:
            kl_lambda(args.kl_gradient)
        except ValueError:
            refuse("kl_gradient", "token, full, or a number from 0 (token) to 1 (full)")
    if args.samples_per_refresh < args.sampling_interval:
        refuse(
            "samples_per_refresh",
            f"at least sampling_interval ({args.sampling_interval}): each optimizer step consumes a slice",
        )
    if args.vllm_server and not args.vllm_server.startswith(("http://", "https://")):
        refuse("vllm_server", "a URL like http://HOST:8021, or empty to run vLLM in the training process")
    if args.vllm_server and args.sampling_engine != "vllm":
        refuse("vllm_server", "empty unless sampling_engine is vllm")
    if not 0 < args.min_ess < 1:
        refuse("min_ess", "a fraction between 0 and 1")
    smallest = args.samples_per_refresh // args.sampling_interval
    if args.samples_policy and args.refresh == "adaptive" and smallest * args.min_ess <= 1:
        refuse(
            "min_ess",
            f"above {1 / smallest:g} where a step's slice holds {smallest} samples: the effective sample "
            "size never falls below one of them, and nothing would be drawn anew",
        )
    if args.max_importance_ratio is not None and not args.max_importance_ratio >= 1:
        refuse("max_importance_ratio", "at least 1, or left out to leave stale samples unweighted")
    if args.reverse_kl_limit is not None and not args.reverse_kl_limit > 0:
        refuse("reverse_kl_limit", "above 0 nats, or left out to set no limit")
    if args.train_sampling_strategy not in ("random", "sequential"):
        refuse("train_sampling_strategy", "random or sequential: a row has no single length")
    if "inputs" in args.include_for_metrics:
        refuse("include_for_metrics", "without inputs: a batch is packed, and holds no rows of ids")
    if args.remove_unused_columns:
        refuse("remove_unused_columns", "false: SPOTrainer makes the columns that it needs")
    if args.draws_rows:
        _check_rounds(args, refuse)
    if args.degree_weight:
        _check_degree(args, refuse)
    if args.dimension_order:
        _check_dimensions(args, refuse)
    from softpref.judges.loading import check_judge_options

    check_judge_options(args.judge, args.judge_model, parse_overrides(args.judge_options, "judge_options"))
    if parse_weights(args.extrapolation) and args.use_peft and not args.merge_adapter:
        refuse("extrapolation", "empty where the adapter is not merged, or merge_adapter true")
    for name, neutral in (("temperature", 1), ("top_p", 1), ("top_k", 0), ("repetition_penalty", 1)):
        if getattr(args, name) != neutral:
            refuse(
                name,
                f"{neutral}: the KL term takes samples as draws from the policy's own distribution, and any "
                "other setting would silently bias it",
            )


def _check_rounds(args: Any, refuse: Callable[[str, str], None]) -> None:
    if args.rounds > 1 and args.num_train_epochs != int(args.num_train_epochs):
        refuse("num_train_epochs", "a whole number where there are rounds: passes over each round's rows")
    if args.reference_cache and args.scores_reference:
        refuse("reference_cache", "empty where rows are drawn from the policy: no other run has them")
    if args.round_reference == "previous" and not args.takes_reference_logps:
        refuse(
            "round_reference",
            f"initial for {args.method}: previous is for losses that take a reference's "
            "log-probabilities (of spo, with an anchor)",
        )
    if args.dataloader_persistent_workers:
        refuse("dataloader_persistent_workers", "off with rounds: workers would keep the old rows")


def _check_degree(args: Any, refuse: Callable[[str, str], None]) -> None:
    check_language(args.degree_language)
    for name in ("degree_levels", "degree_heads"):
        if getattr(args, name) != int(getattr(args, name)):
            refuse(name, "a whole number")
    if args.fsdp:
        refuse("fsdp", "off with a degree_weight: weights in shards leave the head of the degree loss out")
    if args.dataloader_persistent_workers:
        refuse("dataloader_persistent_workers", "off with a degree_weight: workers would keep the old levels")


def parse_dimension_weights(value: float | str, rounds: int | None = None) -> list[float]:
    """λ of each earlier round, from one number for all or one for each, such as `"1, 0.5"`.

    Args:
        rounds: how many there are; None where that is not known yet.

    Raises:
        ConfigError: one is not a number of at least 0, or there is another number of them.
    """
    try:
        found = [float(part) for part in str(value).split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= weight < math.inf for weight in found):
        raise ConfigError(
            "SPOConfig.dimension_weights must be a number of at least 0, or one for each earlier round, like "
            f"'1, 0.5', got {value!r}"
        )
    if len(found) == 1:
        return found * (rounds or 0)
    if rounds is not None and len(found) != rounds:
        raise ConfigError(
            f"SPOConfig.dimension_weights has {len(found)} weights, and there are {rounds} earlier rounds; "
            f"give one for all, or one for each, got {value!r}"
        )
    return found


def _check_dimensions(args: Any, refuse: Callable[[str, str], None]) -> None:
    parse_dimension_weights(args.dimension_weights)
    names = args.dimension_order
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        refuse("dimensions", "names of dimensions, each once")
    if unknown := sorted({*parse_overrides(args.dimension_options)} - {*names}):
        refuse("dimension_options", f"about the dimensions {', '.join(names)}, not {', '.join(unknown)}")
    if args.draws_rows:
        refuse(
            "dimensions",
            "empty where rows are drawn from the policy: what earlier rounds have learned is known of the "
            "data's completions",
        )
    if args.method not in _IMPLY_REWARDS:
        refuse(
            "method",
            f"one of {', '.join(_IMPLY_REWARDS)} with dimensions: later rounds read rewards off its model",
        )
    if args.method == "spo" and args.alpha == 0:
        refuse("alpha", "above 0 with dimensions: at softness 0 a model implies no rewards")


def warn_of_idle_options(args: Any) -> None:
    """Warn of options that were set and do nothing here.

    Args:
        args: an `SPOConfig`.
    """
    spo = args.method == "spo"
    if args.kl_on == "none":
        no_samples = "there is no KL term where kl_on is none"
    elif args.kl_strength == 0:
        no_samples = "there is no KL term without a beta above 0 (of baselines, a kl_beta)"
    else:
        no_samples = "the KL term goes along the rows' own completions where kl_on is data"
    idle: list[tuple[bool, tuple[str, ...], str]] = [
        *(
            (
                args.method not in methods,
                (option,),
                f"it is an option of {', '.join(methods)}, and the method is {args.method}",
            )
            for option, methods in _ONLY_FOR.items()
        ),
        (
            not (args.takes_reference_logps or args.dimension_order),
            ("reference_cache",),
            "the loss takes no log-probabilities of the reference that could be kept",
        ),
        (spo, ("kl_beta",), "the KL term of spo has the strength beta"),
        (args.kl_on == "none" and not spo, ("kl_beta",), no_samples),
        (args.kl_on == "none" and spo and bool(args.beta), ("beta",), no_samples),
        (args.kl_on != "none" and args.kl_strength == 0, ("kl_on",), no_samples),
        # of spo alone: a sweep's baselines have its other models' options
        (
            spo and not args.samples_policy,
            ("kl_gradient", "kl_prompts", "refresh", "max_importance_ratio", "reverse_kl_limit"),
            no_samples,
        ),
        (
            not (spo and args.weight_exponent),
            ("weight_scores",),
            "rows have no weight without a weight_exponent",
        ),
        (True, ("label_smoothing_factor",), "label_smoothing is what dpo and rdpo take"),
        (args.refresh != "adaptive", ("min_ess",), "refresh is not adaptive"),
        (not (args.samples_policy or args.draws_rows), ("sampling_engine",), "nothing is sampled"),
        (not args.draws_rows, ("round_reference",), "no row is drawn from the policy"),
        (not args.refers_to_previous, ("initial_share",), "the reference is the initial model alone"),
        (
            args.train_on != "self_play" or args.rounds == 1,
            ("opponent_history",),
            "there is no self-play of several rounds",
        ),
        (
            not args.dimension_order,
            ("dimension_weights", "dimension_options", "earlier_models"),
            "no dimension is named",
        ),
        (
            not args.uses_judge,
            ("completions_per_prompt", "judge", "judge_model", "judge_options"),
            "no completion is drawn and judged",
        ),
        (
            not args.degree_weight,
            ("degree_levels", "degree_heads", "degree_on", "degree_language"),
            "there is no degree loss without a degree_weight",
        ),
    ]
    for holds, options, reason in idle:
        for option in options if holds else ():
            if getattr(args, option) != getattr(type(args), option):  # its default
                logger.warning("%s=%r has no effect: %s", option, getattr(args, option), reason)


def member_name(method: str, alpha: float, beta: float) -> str:
    """The name of one model of a sweep: what distinguishes it from the others, `spo-alpha-0.5`."""
    return f"spo-alpha-{alpha:g}" if method == "spo" else f"{method}-beta-{beta:g}"
