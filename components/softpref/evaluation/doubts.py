"""What a reader should know before trusting an evaluation's figures. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from softpref.evaluation.config import EvaluationConfig
from softpref.fitness import MUCH_SATURATED, distrust, number, saturation_remedy, saturation_warning
from softpref.judges.bradley_terry import BradleyTerryJudge
from softpref.judges.expert import ExpertJudge
from softpref.judges.protocol import Judge
from softpref.judges.reward_model import RewardModelJudge
from softpref.records.dataset import read_stats
from softpref.records.evaluation import JudgedBy, PromptRecord
from softpref.records.figures import LEAST_PROMPTS, Figures
from softpref.records.model import ModelMetadata

_FEW_PROMPTS = 20


def outside_the_set(judge: Judge, records: Sequence[PromptRecord]) -> list[str]:
    """A warning when policy samples left the set that an expert knows."""
    if not isinstance(judge, ExpertJudge):
        return []
    left = [judge.outside([r.prompt] * len(r.policy), [s.text for s in r.policy]).mean() for r in records]
    share = sum(left) / len(left)
    if not share:
        return []
    return [
        f"{share:.1%} of the policy's samples lie outside the set that the experts know; each scores 1 nat "
        "below the worst within."
    ]


def shared_pairs(judge: Judge, dataset_hash: str | None) -> list[str]:
    """A warning when a judge learned from the very pairs that the policy learned from."""
    if isinstance(judge, RewardModelJudge):
        shared = judge.metadata.get("split") == "train" and judge.metadata.get("dataset_hash") == dataset_hash
    else:
        shared = isinstance(judge, BradleyTerryJudge) and judge.split == "train"
    if not shared:
        return []
    return [
        "The judge learned from the very pairs that the policy learned from: what is wrong in these, both "
        "have learned, and the judge cannot notice it. judge_fraction of the data stage gives it prompts of "
        "its own."
    ]


def doubts(
    config: EvaluationConfig,
    figures: Figures,
    judged: JudgedBy,
    metadata: ModelMetadata,
    dataset_dir: str,
    prompts: int,
) -> list[str]:
    """What a reader should know before trusting the figures."""
    from softpref.lm.tokenization import findings_text

    found = []
    if prompts < LEAST_PROMPTS:
        count = "one held-out prompt" if prompts == 1 else f"{prompts} held-out prompts"
        found.append(
            f"Only {count}: intervals take {LEAST_PROMPTS}, so none is given, and no model is surely better "
            "than another."
        )
    elif prompts < _FEW_PROMPTS:
        found.append(f"Only {prompts} held-out prompts: intervals are wide and rough.")
    truncated = number(figures, "truncated_fraction") or 0.0
    if truncated > 0.1:
        found.append(
            f"{truncated:.0%} of the policy's samples reached the length limit: they are judged unfinished, "
            "and KL and entropy count up to the cut."
        )
    counts = (metadata.get("row_counts") or {}).get("train", {})
    left_out = ["identical", *(["cut_completion"] if metadata.get("cut_rows") == "leave_out" else [])]
    found += findings_text(counts, "training rows", left_out)
    saturated = metadata.get("saturated") or 0.0
    if metadata.get("method") == "spo" and saturated > MUCH_SATURATED:
        remedy = saturation_remedy(metadata.get("anchor") or 0.0)
        found.append(f"In training {saturation_warning(saturated)}; {remedy}.")
    if config.samples_per_prompt < 2:
        found.append("One sample per prompt: self-BLEU needs two.")
    if doubt := distrust(judged):
        found.append(f"Do not rely on win rate and expected reward, which rank nobody: {doubt}.")
    ours, theirs = metadata.get("dataset_hash"), read_stats(dataset_dir).get("dataset_hash")
    if ours and theirs and ours != theirs:
        found.append("The policy was trained on another dataset, which may hold these prompts.")
    return found
