"""Submits a pipeline to Kubeflow Pipelines: a version of it, a run in an experiment.

Secrets come from the environment: `KFP_TOKEN` a bearer token, `KFP_COOKIES` the cookies of a session (such as
Dex's `authservice_session=…`), `KFP_OTHER_CLIENT_SECRET` the secret that belongs to --other-client-id.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from clusters import Profile
from softpref.errors import ConfigError


def add_client_options(group: Any) -> None:
    """The options by which `kfp.Client` finds a cluster and is let in."""
    group.add_argument("--endpoint", help="URL of the Kubeflow Pipelines API")
    group.add_argument(
        "--namespace", default="", help="namespace of the run; needed where Kubeflow serves several users"
    )
    group.add_argument("--token-file", help="file with a bearer token, such as a service account's")
    group.add_argument("--client-id", help="client id of the Identity-Aware Proxy")
    group.add_argument("--other-client-id", help="client id by which the tokens for it are obtained")
    group.add_argument("--proxy", help="HTTP proxy to the API")
    group.add_argument("--ssl-ca-cert", help="certificate of the authority that signed the API's")
    group.add_argument("--no-verify-ssl", action="store_true", help="take the API's certificate as it is")
    group.add_argument("--ui-host", help="URL of the UI, where it is not the endpoint's")
    group.add_argument("--wait", action="store_true", help="until the run ends; the exit status says how")


def submit(
    pipeline_name: str,
    package: Path,
    parameters: dict[str, Any],
    profile: Profile,
    options: argparse.Namespace,
) -> int:
    """Upload the package unless the cluster has this very version, and start a run; returns the exit status.

    Raises:
        ConfigError: the API is not to be reached, refuses, or needs what was not given.
    """
    import kfp_server_api
    import urllib3

    if not options.endpoint:
        raise ConfigError("--runner cluster needs --endpoint, the URL of the Kubeflow Pipelines API")
    try:
        client = _client(options)
        namespace = _namespace(client, options)
        pipeline_id, version_id = _version(client, pipeline_name, package, namespace, options)
        experiment = client.create_experiment(parameters["experiment"], namespace=namespace)
        run = client.run_pipeline(
            experiment_id=experiment.experiment_id,
            job_name=f"{pipeline_name}-{Path(options.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}",
            pipeline_id=pipeline_id,
            version_id=version_id,
            params=parameters,
            service_account=profile.service_account or None,
        )
        print(f"submitted run {run.run_id} to {options.endpoint}")
        return _wait(client, run.run_id) if options.wait else 0
    except kfp_server_api.ApiException as error:
        raise ConfigError(_explained(error, options)) from error
    except urllib3.exceptions.HTTPError as error:
        raise ConfigError(f"Kubeflow Pipelines at {options.endpoint} cannot be reached: {error}") from error


def _client(options: argparse.Namespace) -> Any:
    import kfp
    from kfp.client import ServiceAccountTokenVolumeCredentials

    class Client(kfp.Client):
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            """Asks once: kfp's own asks five times, with pauses, and keeps the refusal to itself."""
            return self._healthz_api.healthz_service_get_healthz()

    if options.token_file and not Path(options.token_file).is_file():
        raise ConfigError(f"--token-file {options.token_file} does not exist")
    credentials = ServiceAccountTokenVolumeCredentials(options.token_file) if options.token_file else None
    return Client(
        host=options.endpoint,
        existing_token=os.environ.get("KFP_TOKEN"),
        cookies=os.environ.get("KFP_COOKIES"),
        credentials=credentials,
        client_id=options.client_id,
        other_client_id=options.other_client_id,
        other_client_secret=os.environ.get("KFP_OTHER_CLIENT_SECRET"),
        proxy=options.proxy,
        ssl_ca_cert=options.ssl_ca_cert,
        verify_ssl=False if options.no_verify_ssl else None,
        ui_host=options.ui_host,
    )


def _namespace(client: Any, options: argparse.Namespace) -> str | None:
    """The run's namespace where Kubeflow serves several users; elsewhere the API refuses to be given one."""
    several = client.get_kfp_healthz().multi_user
    if several and not options.namespace:
        raise ConfigError(
            "this Kubeflow serves several users; name the namespace of the run with --namespace"
        )
    return options.namespace if several else None


def _version(
    client: Any, name: str, package: Path, namespace: str | None, options: argparse.Namespace
) -> tuple[str, str]:
    """Ids of the pipeline and of the version with this package's content; uploaded unless it is there."""
    digest = hashlib.sha256(package.read_bytes()).hexdigest()[:12]
    version_name = f"{Path(options.recipe).stem}-{digest}"
    # kfp's own get_pipeline_id names no namespace, and so finds no team's pipeline
    named = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    found = client.list_pipelines(filter=json.dumps({"predicates": [named]}), namespace=namespace).pipelines
    pipeline_id = found[0].pipeline_id if found else None
    if pipeline_id is None:
        pipeline_id = client.upload_pipeline(
            str(package), pipeline_name=name, namespace=namespace
        ).pipeline_id
    token = ""
    while True:
        page = client.list_pipeline_versions(pipeline_id, page_token=token, page_size=100)
        for version in page.pipeline_versions or ():
            if version.display_name == version_name:
                return pipeline_id, version.pipeline_version_id
        token = page.next_page_token
        if not token:
            break
    version = client.upload_pipeline_version(str(package), version_name, pipeline_id=pipeline_id)
    return pipeline_id, version.pipeline_version_id


def _wait(client: Any, run_id: str) -> int:
    """Until the run has ended; its state as it changes."""
    import kfp_server_api
    import urllib3

    state, failures = "", 0
    while True:
        try:
            run = client.get_run(run_id)
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            failures += 1
            if failures > _FAILED_LOOKS or 400 <= getattr(error, "status", 500) < 500:
                raise
            print(f"{time.strftime('%H:%M:%S')}  the API does not answer; the run goes on", flush=True)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            continue
        failures = 0
        if run.state != state:
            state = run.state
            print(f"{time.strftime('%H:%M:%S')}  {(state or 'unknown').lower()}", flush=True)
        if state in ("SUCCEEDED", "SKIPPED"):
            return 0
        if state in ("FAILED", "CANCELED"):
            message = run.error.message if run.error else ""
            failed = [task.display_name for task in _tasks(run) if task.state == "FAILED"]
            print(f"error: the run {state.lower()}: {message} {', '.join(failed)}".rstrip(" :"))
            return 1
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _tasks(run: Any) -> list[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


_SECONDS_BETWEEN_LOOKS = 10.0
_FAILED_LOOKS = 60  # one after the other, until waiting is given up


def _explained(error: Any, options: argparse.Namespace) -> str:
    remedy = {
        401: "; set KFP_TOKEN, KFP_COOKIES or --token-file",
        403: "; the token's user may not do this in that namespace",
        404: "; the endpoint is the API's URL, often ending in /pipeline",
    }.get(error.status, "")
    body = " ".join(str(error.body or error.reason).split())[:300]
    return f"Kubeflow Pipelines at {options.endpoint} answered {error.status} {error.reason}: {body}{remedy}"
