"""The KFP faces of stage 4. Hold no logic: they build a config and call the stage."""

from typing import List, NamedTuple  # noqa: UP035  (KFP reads List[...] of artifacts)

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from softpref.images import EVALUATE_IMAGE


@dsl.component(base_image=EVALUATE_IMAGE, install_kfp_package=False)
def evaluate_model(
    dataset: Input[Dataset],
    reference: Input[Model],
    policy: Input[Model],
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
    judge: str = "auto",
    max_prompts: int = 100,
    samples_per_prompt: int = 32,
    max_new_tokens: int = 0,
    exact_prompts: int = 8,
    seed: int = 0,
    trust_remote_code: bool = False,
    experiment: str = "softpref",
    tracking_uri: str = "",
    overrides: dict = {},  # noqa: B006
):
    """Measure one policy on held-out prompts, every figure with its confidence interval.

    Args:
        dataset: The dataset folder of the data stage.
        reference: The SFT model that the policy was trained from.
        policy: The trained model.
        evaluation: The evaluation folder: evaluation.json, samples.jsonl, report.html.
        report: The report as a page.
        metrics: Alpha, beta and the figures that tell models apart; every other is in the evaluation folder.
        judge: "expert" (known rewards), "bradley-terry" (trained on the training split), or "auto": the
            expert where the dataset has one.
        max_prompts: Distinct held-out prompts to measure on. 0: all.
        samples_per_prompt: Completions drawn for each prompt from policy and reference.
        max_new_tokens: Longest completion in tokens. 0: as in training.
        exact_prompts: Prompts whose every outcome is compared with the exact optimum, where the dataset
            enumerates them.
        seed: Seed of sampling, judge and intervals.
        trust_remote_code: Run model code that comes with the models.
        experiment: MLflow experiment, when the policy names no run.
        tracking_uri: MLflow server. Empty: MLFLOW_TRACKING_URI, or a local store.
        overrides: Any other parameter of EvaluationConfig, such as {"confidence": 0.9}.
    """
    import shutil

    from softpref.artifacts import describe, strengths
    from softpref.config import build_config, parse_overrides
    from softpref.evaluation.config import EvaluationConfig
    from softpref.evaluation.stage import REPORT_FILE, headline, run
    from softpref.tracking import deliver_missed, watch_termination

    watch_termination(experiment, tracking_uri or None)
    deliver_missed(reference.path, policy.path)
    config = build_config(
        EvaluationConfig,
        {
            "judge": judge,
            "max_prompts": max_prompts,
            "samples_per_prompt": samples_per_prompt,
            "max_new_tokens": max_new_tokens,
            "exact_prompts": exact_prompts,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
            "experiment": experiment,
            "tracking_uri": tracking_uri,
        },
        parse_overrides(overrides),
    )
    result = run(
        config,
        dataset_dir=dataset.path,
        reference_dir=reference.path,
        policy_dir=policy.path,
        output_dir=evaluation.path,
        policy_uri=policy.uri,
        reference_uri=reference.uri,
    )
    shutil.copyfile(f"{evaluation.path}/{REPORT_FILE}", report.path)
    model = result["name"]
    describe(
        evaluation,
        f"{model}: evaluation",
        name=model,
        evaluation_id=result["evaluation_id"],
        method=result["method"],
        **strengths(result),
        judge=result["judge"]["name"],
        model_uri=result["model_uri"],
    )
    describe(report, f"{model}: report", title=f"Evaluation of {model}")
    describe(metrics, f"{model}: evaluation", model=model)
    for name, value in headline(result).items():
        metrics.log_metric(name, value)


@dsl.component(base_image=EVALUATE_IMAGE, install_kfp_package=False)
def compare_models(
    evaluations: Input[List[Artifact]],  # noqa: UP006
    comparison: Output[Artifact],
    chosen: Output[Artifact],
    report: Output[HTML],
    summary: Output[Markdown],
    rule: str = "expected_reward",
    max_kl: float = 0.0,
    experiment: str = "softpref",
    tracking_uri: str = "",
    record: Input[Artifact] = None,
) -> NamedTuple("Outputs", [("model_uri", str), ("name", str)]):  # type: ignore[valid-type]
    """Compare the members of a sweep and choose one by a stated rule.

    Args:
        evaluations: The members' evaluation folders.
        comparison: comparison.json, report.html, frontier.png.
        chosen: The chosen member's evaluation.json.
        report: The report as a page: table by softness, frontier, the choice and its reason.
        summary: A table by softness, the reason of the choice and the rule.
        rule: Which figure ranks members, "expected_reward" or "win_rate".
        max_kl: Members farther than this from the reference, in nats per completion, cannot be chosen. 0: no
            limit.
        experiment: MLflow experiment of the sweep's run, which receives report and figures.
        tracking_uri: MLflow server. Empty: MLFLOW_TRACKING_URI, or a local store.
        record: What the plan told MLflow; delivered here if MLflow was away then.

    Returns:
        Address and name of the chosen model.
    """
    import shutil
    from collections import namedtuple

    from softpref.artifacts import describe, plain
    from softpref.evaluation.compare import markdown_table, run
    from softpref.evaluation.stage import REPORT_FILE
    from softpref.tracking import deliver_missed, watch_termination

    watch_termination(experiment, tracking_uri or None)
    deliver_missed(*([record.path] if record else []), *(evaluation.path for evaluation in evaluations))
    result = run(
        [evaluation.path for evaluation in evaluations],
        comparison.path,
        rule,
        max_kl or None,
        experiment=experiment,
        tracking_uri=tracking_uri or None,
    )
    shutil.copyfile(f"{comparison.path}/{REPORT_FILE}", report.path)
    with open(summary.path, "w", encoding="utf-8") as file:
        table = markdown_table(result["members"], result["chosen"])
        file.write(f"{table}\n\n**Chosen:** {plain(result['reason'])}\n\n**Rule:** {result['rule']}\n")
    shutil.copytree(f"{comparison.path}/chosen", chosen.path, dirs_exist_ok=True)
    best = next(member for member in result["members"] if member["name"] == result["chosen"])
    models = ", ".join(member["name"] for member in result["members"])
    describe(comparison, "comparison of models", chosen=best["name"], rule=rule, models=models)
    describe(chosen, f"{best['name']}: chosen", name=best["name"], evaluation_id=best["evaluation_id"])
    describe(report, "comparison: report", title=f"Comparison of {models}")
    describe(summary, "comparison: summary", title=f"Chosen: {best['name']}")
    Outputs = namedtuple("Outputs", ["model_uri", "name"])
    return Outputs(best["model_uri"], best["name"])
