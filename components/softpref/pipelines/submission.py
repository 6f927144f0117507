"""Submits a pipeline to Kubeflow Pipelines: uploads a version and starts a run in an experiment.

Secrets come from the environment: `KFP_TOKEN` (bearer token), `KFP_COOKIES` (of a session, such as Dex's
`authservice_session=…`), `KFP_OTHER_CLIENT_SECRET` (for --other-client-id).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.disk import what_is_at
from softpref.errors import ConfigError
from softpref.pipelines.packages import read_package
from softpref.pipelines.profiles import Profile
from softpref.pipelines.waiting import TERMINATED, display_names, wait_for
from softpref.remote import public_url

if TYPE_CHECKING:
    import kfp
    from kfp_server_api import ApiException

_REQUEST_SECONDS = 60


def add_client_options(group: argparse._ArgumentGroup) -> None:
    """The options with which `kfp.Client` finds a cluster and logs in."""
    group.add_argument("--endpoint", help="URL of the Kubeflow Pipelines API")
    group.add_argument(
        "--namespace", default="", help="namespace of the run; required where Kubeflow serves several users"
    )
    group.add_argument("--token-file", help="file with a bearer token, such as a service account's")
    group.add_argument("--client-id", help="client id of the Identity-Aware Proxy")
    group.add_argument("--other-client-id", help="client id that obtains the tokens for it")
    group.add_argument("--proxy", help="HTTP proxy to the API")
    group.add_argument("--ssl-ca-cert", help="certificate of the authority that signed the API's")
    group.add_argument("--no-verify-ssl", action="store_true", help="do not verify the API's certificate")
    group.add_argument("--ui-host", help="URL of the UI, if it differs from the endpoint")
    group.add_argument(
        "--wait",
        action="store_true",
        help="wait for the run and report its steps; exit status 0: it succeeded, 1: it failed, 130: it was "
        "terminated, or waiting was interrupted",
    )


def submit(
    pipeline_name: str,
    package: Path,
    parameters: dict[str, Any],
    profile: Profile,
    options: argparse.Namespace,
    models: Sequence[str] = (),
) -> int:
    """Upload the package unless the cluster has this very version, and start a run; returns the exit status.

    Args:
        models: names of the models in the order of the pipeline's loop, for messages while waiting.

    Raises:
        ConfigError: the API cannot be reached, refuses, or needs an option that was not given.
    """
    import kfp_server_api
    import urllib3

    if not options.endpoint:
        raise ConfigError("--runner cluster needs --endpoint, the URL of the Kubeflow Pipelines API")
    submitted, specification = "", read_package(package)
    with _quiet_retries():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # kfp prints a link for each thing it makes
                client = _client(options)
                namespace = _namespace(client, options)
                digest = hashlib.sha256(package.read_bytes()).hexdigest()[:12]
                version = f"{Path(options.recipe).stem}-{digest}"
                # KFP's UI shows only the description of the upload, not the package's
                text = str(specification["pipelineInfo"].get("description", ""))
                pipeline_id, version_id = _version(client, pipeline_name, package, namespace, version, text)
                experiment = client.create_experiment(parameters["experiment"], namespace=namespace)
                run = client.run_pipeline(
                    experiment_id=experiment.experiment_id,
                    job_name=f"{pipeline_name}-{Path(options.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}",
                    pipeline_id=pipeline_id,
                    version_id=version_id,
                    params=parameters,
                    service_account=profile.service_account or None,
                )
            address = f"{ui_address(options.ui_host or options.endpoint)}/#/runs/details/{run.run_id}"
            print(f"submitted run {run.display_name} ({run.run_id}): {address}", flush=True)
            submitted = f"; the run goes on: {address}"
            if options.wait:
                return wait_for(client, run.run_id, address, display_names(specification), models)
            return 0
        except kfp_server_api.ApiException as error:
            raise ConfigError(_explained(error, options) + submitted) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConfigError(
                f"Kubeflow Pipelines at {options.endpoint} cannot be reached: "
                f"{getattr(error, 'reason', None) or error}{submitted}"
            ) from error
        except KeyboardInterrupt:
            if not submitted:
                raise
            print(f"\nerror: waiting was interrupted{submitted}", file=sys.stderr)
            return TERMINATED


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """Within it urllib3 does not warn of each retried request; the last failure is an error anyway."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def ui_address(host: str) -> str:
    """The UI's address for messages: with a scheme, and without a password."""
    return public_url(host if "://" in host else f"http://{host}").rstrip("/")


def _client(options: argparse.Namespace) -> kfp.Client:
    import kfp
    from kfp.client import ServiceAccountTokenVolumeCredentials

    class Client(kfp.Client):  # type: ignore[misc]  # kfp has no types
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            """Asks once: kfp's own asks five times, with pauses, and hides the refusal."""
            return self._healthz_api.healthz_service_get_healthz()

        def get_run(self, run_id: str) -> Any:
            """Waits at most a minute for an answer: kfp's own has no limit."""
            return self._run_api.run_service_get_run(run_id, _request_timeout=_REQUEST_SECONDS)

        def get_text(self, path: str, query: Sequence[tuple[str, str]] = (), host: str | None = None) -> str:
            """The answer of the endpoint, or of `host`, to a GET that the generated client lacks.

            Raises:
                ApiException: the status is not 200.
            """
            answer = self._run_api.api_client.call_api(
                path,
                "GET",
                query_params=list(query),
                auth_settings=["Bearer"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=_REQUEST_SECONDS,
                _host=host,
            )
            return str(answer.data, errors="replace")

    if options.token_file and not os.path.isfile(options.token_file):
        raise ConfigError(f"--token-file {options.token_file} {what_is_at(options.token_file)}; give a file")
    credentials = ServiceAccountTokenVolumeCredentials(options.token_file) if options.token_file else None
    with warnings.catch_warnings():
        # kfp warns at each start that it needs Kubeflow Pipelines 2
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"kfp\.client")
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


def _namespace(client: kfp.Client, options: argparse.Namespace) -> str | None:
    """The run's namespace where Kubeflow serves several users; elsewhere the API accepts none."""
    several = client.get_kfp_healthz().multi_user
    if several and not options.namespace:
        raise ConfigError("this Kubeflow serves several users; give the run's namespace with --namespace")
    return options.namespace if several else None


def _version(
    client: kfp.Client, name: str, package: Path, namespace: str | None, version_name: str, text: str
) -> tuple[str, str]:
    """Ids of the pipeline and of its version, which are uploaded, with a description, if absent."""
    import kfp_server_api

    # kfp's own get_pipeline_id names no namespace, and so finds no team's pipeline
    named = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    found = client.list_pipelines(filter=json.dumps({"predicates": [named]}), namespace=namespace).pipelines
    pipeline_id = found[0].pipeline_id if found else None
    if pipeline_id is None:  # kfp's upload_pipeline would also make a version of the pipeline's name
        made = kfp_server_api.V2beta1Pipeline(display_name=name, description=text, namespace=namespace)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(made).pipeline_id
    token = ""
    while True:
        page = client.list_pipeline_versions(pipeline_id, page_token=token, page_size=100)
        for version in page.pipeline_versions or ():
            if version.display_name == version_name:
                return pipeline_id, version.pipeline_version_id
        token = page.next_page_token
        if not token:
            break
    version = client.upload_pipeline_version(
        str(package), version_name, pipeline_id=pipeline_id, description=text
    )
    return pipeline_id, version.pipeline_version_id


def _explained(error: ApiException, options: argparse.Namespace) -> str:
    remedy = {
        401: "; set KFP_TOKEN, KFP_COOKIES or --token-file",
        403: "; the token's user may not do this in that namespace",
        404: "; --endpoint must be the API's URL, which often ends in /pipeline",
    }.get(error.status, "")
    body = " ".join(str(error.body or error.reason).split())[:300]
    return f"Kubeflow Pipelines at {options.endpoint} answered {error.status} {error.reason}: {body}{remedy}"
