"""The configuration of SPO training: every option of `transformers.TrainingArguments`, and SPO's own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from softpref.config import check_names, convert, parse_overrides
from softpref.errors import ConfigError
from softpref.lm.arguments import StageArguments
from softpref.lm.ranges import check_ranges
from softpref.spo.checks import Derived, check_options, warn_of_idle_options


@dataclass
class SPOConfig(Derived, StageArguments, TrainingArguments):
    """Arguments of `SPOTrainer`.

    Args:
        method: `spo`, or a baseline on the same rows in the same loop: `dpo`, `rdpo` (robust DPO), `ipo`,
            `slic` (its hinge), `ropo` (robust preference optimization; with geometric soft labels GROPO),
            `apo_zero` and `apo_down` (anchored preference optimization), `tdpo` and `tdpo1` (token-level DPO,
            its second and its first loss), `simpo`, `cpo` and `orpo` (which need no reference), `kto` (of
            single completions, desirable or not; rows may be `prompt`, `completion` and `label`), `sppo`
            (self-play preference optimization). Where rows hold more than two completions, methods of pairs
            take every pair that the order decides.
        alpha: softness α ≥ 0. The preference loss is minimal at softmax(reward / α): 1 gives the experts'
            own distribution, values near 0 their favourite alone, large values spread out. With an `anchor`
            it is softness relative to the reference.
        anchor: a ≥ 0 of `spo`'s base measure π_ref^a; the preference loss is then minimal at
            π_ref^a · exp(reward / α). 0 is the method as published. Natural text needs 1: there
            log-probabilities of two answers differ by tens of nats, and without an anchor α has no effect.
        beta: for `spo` the strength of the KL regulariser over the policy's whole output distribution
            (0 switches it and all sampling off); for a baseline its own β, see `softpref.objectives` (of
            `orpo` the weight of its odds ratio).
        kl_beta: strength of the same regulariser beside a baseline's loss, which as published has none.
        kl_on: completions on which the regulariser is taken: `samples` of the policy, so that it is
            KL(policy ‖ reference) wherever the policy goes; or `data`, those of the batch's own rows (the
            paper's ablation): Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) over the whole vocabulary along each,
            averaged over a row's completions and over rows, whatever their weights. Nothing is sampled then,
            and nothing restrains the policy elsewhere. `none`: no KL term, as with strength 0.
        preference_kind: what the order of a row's completions means. `auto` follows the data's `kind` column.
        soft_labels: how a label probability enters the loss: `linear` keeps SPO's optimum, `geometric`
            gives uncertain pairs less weight.
        weight_exponent: γ of `spo`'s symmetric row weight; 0 weighs all rows alike, as evaluation does.
        weight_scores: scores in that weight: `sequence` log-probabilities, or their means per `token`.
        label_smoothing: share of flipped labels that `dpo` and `rdpo` assume.
        tdpo_alpha: weight of `tdpo`'s divergences.
        ropo_alpha: weight of `ropo`'s bounded term beside DPO's.
        simpo_gamma: the margin, in nats, that `simpo` wants a better completion to win by.
        nll_weight: weight of the better completion's negative log-likelihood per token beside a loss of pairs
            (with `dpo` it is RPO). By default as published: 1 for `cpo` and `orpo`, 0 for the others.
        desirable_weight, undesirable_weight: what `kto` weighs a desirable and an undesirable completion by.
            Of rows that compare, a completion is desirable to the share of its decided pairs that it wins.
        sppo_completions: what `sppo` learns from of a row of K completions: `all` of them, each with its
            chance to beat another; or the `extremes`, as its authors do: the best and the worst alone, with
            their chances against all K, themselves included.
        reference_cache: folder that keeps the reference's log-probabilities of all rows, under a hash of
            model, precision and rows. They are computed once, and runs that share the folder share them;
            without a KL term the reference then takes no memory in training. With earlier rounds it keeps
            those of their models, too. Empty: computed with each batch.
        kl_gradient: estimator of the regulariser's gradient on samples. `token` is cheaper and has less
            variance: Σ_t ∇KL_t with the sampled prefixes held fixed. `full` adds the effect of a token on
            later divergences, and is exact in expectation. A number λ from 0 (`token`) to 1 (`full`) lies
            between: Σ_t ∇log π(y_t) · Σ_{s>t} λ^{s−t} KL_s is added, less a baseline. Where a step is split
            into micro-batches or processes, all but `token` run their samples once more beforehand, for a
            baseline over all of them (as `weight_exponent` does with its rows).
        kl_prompts: prompts that the KL term's samples answer: those of the training rows (`preferences`),
            each as often as it occurs there, those of the separate set (`separate`), or `both`: half of the
            samples answer each, and `beta` weighs the mean over each, so that the rows' prompts have the same
            optimum as without the separate set. `auto` is `both` where there is a separate set.
        samples_per_refresh: completions drawn from the policy at each refresh, all processes together.
        sampling_interval: optimizer steps between refreshes; each consumes an equal slice of the samples.
        refresh: `fixed`, or `adaptive`: samples are drawn anew before the interval is over as soon as those
            of a step have an effective sample size below `min_ess`.
        min_ess: that threshold, a fraction in (0, 1).
        max_importance_ratio: weigh stale samples by the ratio of the present policy to the one that drew
            them, clipped to this value (≥ 1; inf clips nothing). None applies no weights: less variance, but
            biased by what changed since the refresh.
        reverse_kl_limit: nats (above 0) that KL(reference ‖ policy) may reach at a token of a sample; what is
            above is added to that sample's KL. KL(policy ‖ reference) has no gradient left where the policy
            has become sure of a token that the reference never gives: the model then stays there for good.
            This brings it back, and leaves the optimum where it is if no token's divergence exceeds the limit
            there. None: no limit.
        rounds: how often training rows are drawn anew from the present policy; each round makes
            `num_train_epochs` passes over as many rows as the training data have (`max_steps` ends rounds
            early, or extends the last). With `train_on=preferences` the first round takes the data as they
            are, and each later one judged samples.
        train_on: `preferences`: the data's own completions; `samples`: completions of the policy, judged, on
            the data's prompts (online training; what `sppo` is made for); `self_play`: the data's best
            completion (or demonstration) against one of the policy's own.
        completions_per_prompt: completions drawn and judged for each row. `sppo` learns from all of them,
            the others from the pair that the judge thinks farthest apart.
        round_reference: the reference of the loss (a baseline's, an anchor's) in each round: the `initial`
            model, or the policy at the beginning of the round (`previous`). `auto` is what the method's
            authors do: previous for `sppo`, initial otherwise.
        initial_share: share a of the initial model in a previous reference: their geometric mixture,
            a · log π_initial + (1 − a) · log π_previous. With `dpo` and self-play it is α-SPIN, as 0 is SPIN.
        opponent_history: self-play is against a completion of one of so many of the latest policies, those
            that the rounds began with, chosen for each row by chance: fictitious play, which damps the back
            and forth of two policies. 1 plays against the newest alone.
        judge: who judges drawn completions in the training stage: `expert` (the data's known reward),
            `bradley-terry` (learned from the preferences of the split `judge`, or of the training split where
            there is none), `reward-model`, `auto`, the expert if there is one, else `bradley-terry`; `llm`, a
            language model behind an OpenAI-compatible endpoint; or the name of a judge that an installed
            package brings (entry points `softpref.judges`). As a library, give `SPOTrainer` a judge.
        judge_model: of `reward-model` what `softpref judge` wrote, or another checkpoint with one label: a
            folder, the URL of one, a model of the MLflow registry, or a Hub id. Of `llm` the model's name at
            its endpoint.
        judge_options: of `llm` its address, rubric and budget, see `softpref.judges.llm`, such as
            `{"url": "http://HOST:8000/v1"}`; of a judge of your own what it takes.
        dimensions: the dimension of preference to train on, of those in the data's column `dimension`; or
            several, a list or `helpful>harmless`, in the order in which they are trained one after another:
            each round begins with the model of the round before, which is its reference, and keeps what the
            rounds before have learned (sequential preference optimization). Earlier rounds are kept as models
            in `round-1` and so on of the folder. A model trained so can itself be the reference of a further
            round. Empty: rows of all dimensions alike.
        dimension_options: options of single rounds, such as `{"harmless": {"beta": 0.2}}`.
        dimension_weights: λ ≥ 0, how many nats of this dimension a nat of an earlier one is worth: one number
            for all earlier rounds, or one for each, comma-separated in their order. The optimum of the loss
            is π_ref · exp((R + Σ λ_i R_i) / β), for `spo` without an anchor softmax((R + Σ λ_i R_i) / α);
            0 lets the round forget.
        earlier_models: models that the earlier rounds began with, comma-separated in their order, where they
            are no longer what the reference's `softpref.json` says.
        extrapolation: weights w, comma-separated, for each of which the training stage also writes
            `aligned + w · (aligned − reference)` as a model of its own (ExPO, arXiv 2404.16792).
        degree_weight: γ ≥ 0 of the preference-degree loss, which is added to any method's (Li et al. 2024,
            arXiv 2409.17791). Of each row's preferred (first) and dispreferred (last) completion some key
            content, phrases found by RAKE, is removed; a small head reads from the policy's state at the end
            of what is left how much that was, and its cross-entropy trains both. The head is thrown away. 0
            switches it off; 0.1 is a value to begin with. Longer texts lack less, so compare
            `degree/accuracy` with `degree/length_baseline`.
        degree_levels: K ≥ 2: level k lacks k/(K − 1) of the phrases, the highest first, and each row is given
            one level by chance in each epoch. A completion of fewer than K − 1 phrases takes no part.
        degree_heads: 2 heads, for the preferred and the dispreferred completions, or 1 for both.
        degree_on: completions that take part: `both`, or those `preferred` or `dispreferred` alone.
        degree_language: whose stop words divide a text into phrases; `en` is the only list there is.
        sampling_engine: what draws samples: `transformers`, the trained model itself, or `vllm`, which loads
            its weights at each refresh (`sampling/logps_difference` says how well both agree). In this
            process vLLM needs memory for a second copy of the weights, and for the keys and values of
            `sampling_batch_size` completions, until the process ends.
        vllm_server: URL of a server (`python -m softpref.spo.vllm_server`) that runs vLLM; empty runs it in
            the training process, beside the trainer's own weights.
        sampling_batch_size: completions sampled at once on a device.
        temperature, top_p, top_k, repetition_penalty: fixed. Samples of the KL term must come from the
            distribution that is scored; these options exist to refuse other values with a reason.
        max_prompt_length: tokens kept of a prompt: of a chat the system message and its last turns, of plain
            text its end.
        max_completion_length: tokens kept of a completion, its end token included; also the limit of sampled
            ones.
        cut_rows: what happens to rows, given or drawn, with a completion over that limit: `leave_out` keeps
            them out of the preference loss (a cut completion has no end, and teaches not to stop),
            `keep` keeps them.
        dataset_num_proc: processes that tokenize rows. By default this one alone for some thousands of rows,
            else one for each CPU, four at most (each takes some 100 MB).
        model_init_kwargs: further arguments of `from_pretrained`, such as
            `{"attn_implementation": "sdpa", "dtype": "bfloat16"}`, for a model that is given by its name.
        use_peft: train a LoRA adapter; the reference is then the model with the adapter off.
        lora_r, lora_alpha, lora_target_modules: the adapter's rank, scale, and layers (comma-separated, or
            `all-linear`).
        merge_adapter: whether the training stage saves the merged model rather than the adapter alone.
        plain_forward: pad every completion, each with a prompt of its own, and compute full logits. By
            default a row's completions share their prompt's work, nothing is padded, and logits exist for a
            few hundred tokens at a time. The same numbers up to rounding, slower and larger: for a model
            whose fast path you doubt.
        gpus: GPUs the job asked for; training refuses to start with fewer. 0 asks for none.
        trust_remote_code: run model code that comes with a checkpoint.
    """

    output_dir: str | None = None
    method: Literal[
        "spo",
        "dpo",
        "rdpo",
        "ipo",
        "slic",
        "ropo",
        "apo_zero",
        "apo_down",
        "tdpo",
        "tdpo1",
        "simpo",
        "cpo",
        "orpo",
        "kto",
        "sppo",
    ] = "spo"
    alpha: float = 1.0
    anchor: float = 0.0
    beta: float = 0.05
    kl_beta: float = 0.0
    kl_on: Literal["samples", "data", "none"] = "samples"
    preference_kind: Literal["auto", "pairwise", "best_of_n", "ranking"] = "auto"
    soft_labels: Literal["linear", "geometric"] = "linear"
    weight_exponent: float = 0.0
    weight_scores: Literal["sequence", "token"] = "sequence"
    label_smoothing: float = 0.0
    tdpo_alpha: float = 0.5
    ropo_alpha: float = 14.0
    simpo_gamma: float = 0.5
    nll_weight: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    sppo_completions: Literal["all", "extremes"] = "all"
    reference_cache: str = ""
    # one option, whose names are the ends of λ; None is there for HfArgumentParser
    kl_gradient: float | str | None = "token"
    kl_prompts: Literal["auto", "preferences", "separate", "both"] = "auto"
    samples_per_refresh: int = 64
    sampling_interval: int = 8
    refresh: Literal["fixed", "adaptive"] = "fixed"
    min_ess: float = 0.5
    max_importance_ratio: float | None = None
    reverse_kl_limit: float | None = None
    sampling_engine: Literal["transformers", "vllm"] = "transformers"
    vllm_server: str = ""
    sampling_batch_size: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_prompt_length: int = 512
    max_completion_length: int = 512
    cut_rows: Literal["leave_out", "keep"] = "leave_out"
    dataset_num_proc: int | None = None
    rounds: int = 1
    train_on: Literal["preferences", "samples", "self_play"] = "preferences"
    completions_per_prompt: int = 2
    round_reference: Literal["auto", "initial", "previous"] = "auto"
    initial_share: float = 0.0
    opponent_history: int = 1
    judge: str = "auto"
    judge_model: str = ""
    judge_options: dict[str, Any] | str | None = None
    dimensions: list[str] | str | None = None
    dimension_options: dict[str, Any] | str | None = None
    dimension_weights: float | str = 1.0
    earlier_models: str = ""
    extrapolation: str = ""
    degree_weight: float = 0.0
    degree_levels: int = 4
    degree_heads: int = 2
    degree_on: Literal["both", "preferred", "dispreferred"] = "both"
    degree_language: str = "en"
    model_init_kwargs: dict[str, Any] | str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: str = "all-linear"
    merge_adapter: bool = True
    plain_forward: bool = False
    gpus: int = 0
    trust_remote_code: bool = False

    # Defaults of TrainingArguments that do not suit preference training.
    learning_rate: float = 1e-6
    logging_steps: float = 10
    remove_unused_columns: bool = False
    bf16: bool | None = field(default=None)  # type: ignore[assignment]
    save_total_limit: int | None = 2

    def __new__(cls, *arguments: Any, **options: Any) -> SPOConfig:
        check_names(cls, options)
        return super().__new__(cls)

    def _check_own(self) -> None:
        self.model_init_kwargs = (
            parse_overrides(self.model_init_kwargs, "SPOConfig.model_init_kwargs") or None
        )
        self.judge_options = parse_overrides(self.judge_options, "SPOConfig.judge_options") or None
        self.dimension_options = (
            parse_overrides(self.dimension_options, "SPOConfig.dimension_options") or None
        )
        for name, hint in get_type_hints(SPOConfig).items():
            closed = name in SPOConfig.__annotations__ and get_origin(hint) is Literal
            if closed and getattr(self, name) not in get_args(hint):
                choices = " or ".join(get_args(hint))
                raise ConfigError(f"SPOConfig.{name} must be {choices}, got {getattr(self, name)!r}")
        check_options(self)
        warn_of_idle_options(self)

    def of_round(self, dimension: str) -> SPOConfig:
        """The configuration of the round on one of `dimensions`.

        Raises:
            ConfigError: its `dimension_options` are wrong.
        """
        options = self.dimension_options if isinstance(self.dimension_options, dict) else {}
        own = options.get(dimension, {})
        if not isinstance(own, dict):
            raise ConfigError(
                f"SPOConfig.dimension_options[{dimension!r}] must be an object of options, got {own!r}"
            )
        where = f"SPOConfig.dimension_options[{dimension!r}]."
        check_names(type(self), own)
        made = copy.copy(self)  # a new instance would settle once more what transformers has settled
        for name, value in convert(where, own, get_type_hints(type(self))).items():
            setattr(made, name, value)
        made.dimensions, made.dimension_options = [dimension], None
        check_ranges(made)
        check_options(made)
        return made

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs` as they are handed on."""
        return self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
