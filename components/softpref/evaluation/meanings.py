"""What each figure is called and means, and which figures of the reference and of theory stand beside it."""

from __future__ import annotations

from typing import NamedTuple

from softpref.records.figures import Figure, Figures

LABELS = {
    "win_rate": ("Win rate", "probability that the judge prefers its sample to the reference's"),
    "sure_win_rate": ("Sure win rate", "the win rate that nine of ten heads of the judge exceed"),
    "position_consistency": ("Position consistency", "pairs judged the same in both orders"),
    "length_controlled_win_rate": ("Win rate at equal length", "what it would be without longer answers"),
    "expected_reward": ("Expected reward", "mean score under the judge"),
    "best_of_8": ("Best of eight", "expected score of the best of eight samples"),
    "kl_sequence": ("KL to the reference", "per completion, from its own samples"),
    "entropy_sequence": ("Entropy", "per completion: how varied its answers are"),
    "preference_accuracy": ("Preference accuracy", "held-out pairs ranked as people did, by log π"),
    "relative_accuracy": ("Relative accuracy", "the same, by log π − log π_ref"),
    "preference_margin": ("Preference margin", "log-probability of preferred minus other"),
    "relative_margin": ("Relative margin", "the same difference, less the reference's"),
    "implied_accuracy": ("Accuracy of implied preferences", "majorities that the model is with"),
    "implied_log_loss": ("Log-loss of implied preferences", "against shares of votes"),
    "vote_entropy": ("Entropy of the votes", "the log-loss of a perfect model"),
    "vote_divergence": ("Divergence from the votes", "Jensen-Shannon; 0: the voters' own distribution"),
    "overconfidence": ("Overconfidence", "mean confidence less the share of votes; below 0: too cautious"),
    "calibration_error": ("Calibration error", "mean distance of confidence from share, by bins"),
    "calibration_floor": ("Calibration error by chance", "what a calibrated model would show here"),
    "perplexity": ("Perplexity", "per token, on the best held-out completions"),
    "good_diversity": ("Variety among good answers", "unlikeness of two, 0 unless both are good"),
    "vendi_score": ("Vendi score", "effective number of different answers"),
    "distinct_answers": ("Distinct answers", "answers that are not nearly another one"),
    "mode_share": ("Share of the commonest answer", "1: the model has collapsed on one"),
    "compression_ratio": ("Compression ratio", "higher: samples repeat each other"),
    "distinct_1": ("Distinct-1", "distinct words among all words of a prompt's samples"),
    "distinct_2": ("Distinct-2", "distinct word pairs among all"),
    "self_bleu": ("Self-BLEU", "likeness of a prompt's samples to each other; 1 = all equal"),
    "completion_length": ("Completion length", "tokens, end included"),
    "kl_token": ("KL per token", "to the reference, by the tokens"),
    "truncated_fraction": ("Truncated", "samples that reached the length limit"),
    "repetition": ("Repetition", "share of 4-grams of tokens that repeat within a sample"),
    "cross_entropy": ("Cross-entropy under the reference", "how much its samples surprise the reference"),
    "kl_optimum_to_policy": ("KL(optimum ‖ policy)", "how far the policy is from theory; 0 is perfect"),
    "entropy": ("Entropy on the set", "exact"),
    "kl": ("KL to the reference", "per completion"),
    "effective_sample_size": ("Effective share of the samples", "how many of them carry the optimum"),
    "mass_on_set": ("Mass on the set", "probability of the texts that the experts know"),
    "least_mass_on_set": ("Least mass on the set", "of the prompt that leaks most"),
}
_OF_THE_REFERENCE = {"preference_accuracy": "reference_accuracy"}


class Row(NamedTuple):
    """A figure of a model, and the same of theory's optimum and of the reference."""

    title: str
    meaning: str
    figure: Figure
    optimum: Figure | None
    reference: Figure | None


def title(name: str) -> str:
    """What a figure is called; one that has no label, such as a benchmark's, keeps its name.

    A figure of one dimension of preference is called `NAME/DIMENSION`.
    """
    base, slash, dimension = name.partition("/")
    if base not in LABELS:
        return name
    return f"{LABELS[base][0]}, {dimension}" if slash else LABELS[base][0]


def of_reference(name: str) -> str:
    """The name of the same figure of the reference."""
    base, slash, dimension = name.partition("/")
    return _OF_THE_REFERENCE.get(base, f"reference_{base}") + slash + dimension


def rows(figures: Figures) -> list[Row]:
    """Every figure of a group beside the reference's and theory's, in the order of their labels."""
    beside = {other for name in figures for other in (of_reference(name), f"optimum_{name}")}
    names = [name for name in LABELS if name in figures]
    names += [name for name in figures if name not in LABELS and name not in beside]
    return [
        Row(
            title(name),
            LABELS[base][1] if (base := name.partition("/")[0]) in LABELS else "",
            figures[name],
            figures.get(f"optimum_{name}"),
            figures.get(of_reference(name)),
        )
        for name in names
    ]
