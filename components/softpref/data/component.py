"""The KFP face of stage 1. Holds no logic: it builds a DataConfig and calls `softpref.data.stage.run`."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Output

from softpref.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def prepare_data(
    dataset: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    source: str = "story",
    columns: dict = {},  # type: ignore[type-arg]  # noqa: B006
    prompt_template: str = "",
    rows: int = 0,
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
    experiment: str = "softpref",
    tracking_uri: str = "",
    source_version: str = "",
    code_version: str = "",
    artifact: Input[Dataset] = None,
) -> None:
    """Turn preferences of any source into a checked dataset with splits by prompt.

    Args:
        dataset: The dataset folder: train, validation and test splits, statistics, refused rows.
        page: What the dataset holds: lengths, label confidence, splits, refused rows, examples.
        metrics: Rows by split, refused and left out, and the share of soft labels.
        source: "story" or "storyteller" (embedded, no download), a Hugging Face Hub dataset id, or the path
            of a JSONL, JSON, CSV or Parquet file, of a folder of them, or of a saved dataset.
        columns: From role to column of the source, such as {"prompt": "question", "chosen": "better",
            "rejected": "worse"}. Empty: columns named like the roles are used.
        prompt_template: Builds the prompt from columns, such as "Debate: {debate}\\nArgument:". Empty: none.
        rows: Rows to draw from an embedded source, or to sample from another source. 0: 4000, or all.
        seed: Seed of draws, samples and splits.
        validation_fraction: Share of the distinct prompts held out for validation.
        test_fraction: Share of the distinct prompts held out for evaluation.
        overrides: Any other parameter of DataConfig, such as {"votes": 5}.
        experiment: MLflow experiment of the pipeline's run, which a terminated step marks as killed.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        source_version: The source's version: the commit to read of a Hub dataset, or else a fingerprint, so
            that a changed source is read again instead of being taken from the cache.
        code_version: Version of the code, for the same purpose.
        artifact: Dataset of another step or pipeline, in place of the source: a file or folder of
            preferences, or a dataset folder that this stage wrote.
    """
    from softpref.artifacts import describe
    from softpref.config import build_config, hub_revision, parse_overrides
    from softpref.data.config import DataConfig
    from softpref.data.stage import headline, run
    from softpref.tracking import watch_termination

    watch_termination(experiment, tracking_uri or None)
    config = build_config(
        DataConfig,
        {
            "source": artifact.path if artifact else source,
            "columns": columns,
            "prompt_template": prompt_template,
            "rows": rows or None,
            "seed": seed,
            "validation_fraction": validation_fraction,
            "test_fraction": test_fraction,
        },
        parse_overrides(overrides),
        hub_revision(source_version),
    )
    stats = run(config, dataset.path, page.path)
    source = artifact.uri if artifact else stats["source"]  # without what a URL holds in secret
    source = " + ".join([source, *(one["name"] for one in stats.get("mixture", ())[1:])])
    describe(
        dataset,
        f"preferences of {source}",
        source=source,
        revision=stats["config"]["revision"],
        **{f"{split}_rows": count for split, count in stats["rows"].items()},
        prompts=sum(stats["prompts"].values()),
        kinds=", ".join(f"{count} {kind}" for kind, count in stats["kinds"].items()),
        dataset_hash=stats["dataset_hash"],
        test_hash=stats["test_hash"],
    )
    describe(page, f"page of {source}", title=f"What the preferences of {source} hold")
    describe(metrics, f"rows of {source}")
    for name, value in headline(stats).items():
        metrics.log_metric(name, value)
