"""Tracking that cannot stop training: first a JSONL mirror on disk, then MLflow.

Every call appends one line to `<output_dir>/tracking.jsonl` and returns; a background thread sends the
lines to MLflow in order and notes its progress in `tracking.sent`. While the server is away the lines wait;
a restart of the stage, or `sync(output_dir)`, sends the rest.

Sending twice is harmless: MLflow drops a metric whose run, key, step, time and value it already has; a
parameter may be sent again with the same value; tags and files replace themselves; and the tag
`softpref.tracking_key` finds a run whose creation was never acknowledged. Where such a creation comes
late there are two; the tag `softpref.in_use` says which one is the run, and the other goes when it ends.

MLflow cannot forget. So a resumed run (`resume`) records no point that an earlier process has recorded, and
one whose records were lost with its pod sends none up to the last step that MLflow has.
"""

from softpref.tracking.mlflow_store import (
    find_experiment,
    in_short,
    mlflow_ready,
    open_client,
    resolve_tracking_uri,
    short_requests,
    source_tags,
    where_to_look,
)
from softpref.tracking.pipeline_run import (
    KFP_UI,
    RUN_ID,
    RUN_NAME,
    check_server,
    current_pipeline_run,
    finish_pipeline_run,
)
from softpref.tracking.syncing import (
    SyncResult,
    deliver_missed,
    finish,
    is_finished,
    run_tracked_in,
    sync,
    sync_below,
)
from softpref.tracking.termination import watch_termination
from softpref.tracking.tracker import Tracker

__all__ = [
    "KFP_UI",
    "RUN_ID",
    "RUN_NAME",
    "SyncResult",
    "Tracker",
    "check_server",
    "current_pipeline_run",
    "deliver_missed",
    "find_experiment",
    "finish",
    "finish_pipeline_run",
    "in_short",
    "is_finished",
    "mlflow_ready",
    "open_client",
    "resolve_tracking_uri",
    "run_tracked_in",
    "short_requests",
    "source_tags",
    "sync",
    "sync_below",
    "watch_termination",
    "where_to_look",
]
