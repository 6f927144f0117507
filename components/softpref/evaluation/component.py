"""The KFP faces of stage 4. Hold no logic: they build a config and call the stage."""

from typing import List, NamedTuple  # noqa: UP035  (KFP reads List[...] of artifacts)

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from softpref.images import EVALUATE_IMAGE


@dsl.component(base_image=EVALUATE_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate_model(
    dataset: Input[Dataset],
    reference: Input[Model],
    policy: Input[Model],
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
    judge: str = "auto",
    judge_model: str = "",
    max_prompts: int = 100,
    samples_per_prompt: int = 32,
    max_new_tokens: int = 0,
    exact_prompts: int = 8,
    seed: int = 0,
    trust_remote_code: bool = False,
    experiment: str = "softpref",
    tracking_uri: str = "",
    overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
) -> None:
    """Measure one policy on held-out prompts, every figure with its confidence interval.

    Args:
        dataset: The dataset folder of the data stage.
        reference: The SFT model that the policy was trained from.
        policy: The trained model.
        evaluation: The evaluation folder: evaluation.json, samples.jsonl, report.html.
        report: The report as a page.
        metrics: Alpha, beta and the figures that tell models apart; all others are in the evaluation folder.
        judge: "expert" (known rewards), "bradley-terry" (trained on the split judge, or the training split),
            "reward-model" (a checkpoint, judge_model), "auto": the expert where the dataset has one; "llm" (a
            language model behind an endpoint, see judge_options); or the name of a judge that an installed
            package brings.
        judge_model: Of the judge reward-model its checkpoint, of llm the model's name at its endpoint.
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

    from softpref.artifacts import describe, say_outcome, strengths
    from softpref.config import build_config, parse_overrides
    from softpref.evaluation.compare import warning_lines
    from softpref.evaluation.config import EvaluationConfig
    from softpref.evaluation.stage import headline, run
    from softpref.records.evaluation import REPORT_FILE
    from softpref.tracking import deliver_missed, watch_termination

    watch_termination(experiment, tracking_uri or None)
    deliver_missed(reference.path, policy.path)
    config = build_config(
        EvaluationConfig,
        {
            "judge": judge,
            "judge_model": judge_model,
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
    model = result.name
    describe(
        evaluation,
        f"{model}: evaluation",
        name=model,
        evaluation_id=result.evaluation_id,
        method=result.method,
        **strengths(vars(result)),
        judge=result.judge.name,
        model_uri=result.model_uri,
    )
    describe(report, f"{model}: report", title=f"Evaluation of {model}")
    describe(metrics, f"{model}: evaluation", model=model)
    for name, value in headline(result).items():
        metrics.log_metric(name, value)
    say_outcome(warning_lines([result]))


@dsl.component(base_image=EVALUATE_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def compare_models(
    evaluations: Input[List[Artifact]],  # noqa: UP006
    comparison: Output[Artifact],
    chosen: Output[Artifact],
    report: Output[HTML],
    summary: Output[Markdown],
    selection_rule: str = "expected_reward",
    max_kl: float = 0.0,
    registered_model_name: str = "",
    min_win_rate: float = 0.5,
    registry_overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
    experiment: str = "softpref",
    tracking_uri: str = "",
    others: list = [],  # type: ignore[type-arg]  # noqa: B006
    record: Input[Artifact] = None,
) -> NamedTuple("Outputs", [("model_uri", str), ("name", str)]):  # type: ignore[valid-type]
    """Compare the members of a sweep and choose one by a stated rule.

    Args:
        evaluations: The members' evaluation folders.
        comparison: comparison.json, report.html, frontier.png.
        chosen: The chosen member's evaluation.json.
        report: The report as a page: table by softness, frontier, the choice and its reason.
        summary: A table by softness, the reason of the choice and the rule.
        selection_rule: Which figure ranks members, "expected_reward" or "win_rate".
        max_kl: Members farther than this from the reference, in nats per completion, cannot be chosen. 0: no
            limit.
        registered_model_name: Name that the chosen model will be registered under: it must pass the gate, and
            it is an error when none does. Empty: there is no gate, and no model need be chosen.
        min_win_rate: The gate: the low end of the win rate's interval must be above this.
        registry_overrides: Any other parameter of the registration stage; of the gate it is max_kl.
        experiment: MLflow experiment of the sweep's run, which receives report and figures.
        tracking_uri: MLflow server. Empty: MLFLOW_TRACKING_URI, or a local store.
        others: Further evaluations, done in the same way: runs:/ID, models:/NAME/VERSION,
            models:/NAME@ALIAS, or models:/NAME for all versions.
        record: What the plan logged to MLflow; delivered here if MLflow was unreachable then.

    Returns:
        Address and name of the chosen model; both empty when none is chosen.
    """
    import os
    import shutil
    from collections import namedtuple

    from softpref.artifacts import describe, plain, say_outcome
    from softpref.config import build_config, parse_overrides
    from softpref.errors import DataError
    from softpref.evaluation.compare import outcome_lines, run
    from softpref.evaluation.tables import format_table, markdown_table
    from softpref.records.comparison import CHOSEN_FOLDER
    from softpref.records.evaluation import REPORT_FILE
    from softpref.registry.config import RegistryConfig
    from softpref.tracking import deliver_missed, resolve_tracking_uri, watch_termination, where_to_look

    watch_termination(experiment, tracking_uri or None)
    deliver_missed(*([record.path] if record else []), *(evaluation.path for evaluation in evaluations))
    gate = None
    if registered_model_name:
        asked = {"registered_model_name": registered_model_name, "min_win_rate": min_win_rate}
        gate = build_config(RegistryConfig, asked, parse_overrides(registry_overrides))
    result = run(
        [*(evaluation.path for evaluation in evaluations), *others],
        comparison.path,
        selection_rule,
        max_kl or None,
        limits=gate.limits if gate else None,
        required=False,
        experiment=experiment,
        tracking_uri=tracking_uri or None,
    )
    shutil.copyfile(f"{comparison.path}/{REPORT_FILE}", report.path)
    with open(summary.path, "w", encoding="utf-8") as file:
        table = markdown_table(result.members, result.chosen)
        file.write(f"{table}\n\n**Chosen:** {plain(result.reason)}\n\n**Rule:** {result.rule}\n")
    os.makedirs(chosen.path, exist_ok=True)
    address, name = "", result.chosen or ""
    models = ", ".join(member.name for member in result.members)
    describe(comparison, "comparison of models", chosen=name, rule=selection_rule, models=models)
    describe(report, "comparison: report", title=f"Comparison of {models}")
    describe(summary, "comparison: summary", title=f"Chosen: {name or 'none'}")
    if member := result.chosen_member:
        shutil.copytree(f"{comparison.path}/{CHOSEN_FOLDER}", chosen.path, dirs_exist_ok=True)
        describe(chosen, f"{name}: chosen", name=name, evaluation_id=member.evaluation_id)
        address = member.model_uri
    looked_at = where_to_look(resolve_tracking_uri(tracking_uri or None), result.members[0].run_id)
    say_outcome(
        [
            *format_table(result.members).splitlines(),
            *outcome_lines(result),
            f"report:   {report.uri}",
            f"tracking: {looked_at}",
        ]
    )
    if gate and not name:
        raise DataError(result.reason)
    Outputs = namedtuple("Outputs", ["model_uri", "name"])
    return Outputs(address, name)
