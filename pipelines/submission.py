"""Submits a pipeline to Kubeflow Pipelines."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from softpref.errors import ConfigError


def submit(pipeline: Any, parameters: dict[str, Any], options: argparse.Namespace) -> int:
    import kfp

    if not options.endpoint:
        raise ConfigError("--runner cluster needs --endpoint, the URL of the Kubeflow Pipelines API")
    client = kfp.Client(
        host=options.endpoint,
        namespace=options.namespace,
        existing_token=os.environ.get("KFP_TOKEN"),
    )
    run = client.create_run_from_pipeline_func(
        pipeline,
        arguments=parameters,
        run_name=f"{pipeline.name}-{Path(options.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}",
        experiment_name=parameters["experiment"],
        namespace=options.namespace,
    )
    print(f"submitted run {run.run_id} to {options.endpoint}")
    return 0
