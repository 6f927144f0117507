#!/usr/bin/env python3
"""Builds the container images with Podman or Docker, and prints their names and sizes.

    python3 images/build.py                                          # all four, for the CPU
    python3 images/build.py --accelerator cuda --prefix registry.example/team/softpref --push
    python3 images/build.py --torch-index URL                        # where pip's default torch brings CUDA

Needs only Python 3.9 and an engine. Packages come from the sources of this machine's pip: its configuration,
credentials and CA certificates reach the build as secrets, which no layer keeps. Local folders of packages
are served to the build on the loopback address.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import functools
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "components"))

from softpref import __version__  # noqa: E402
from softpref.images import PREFIX, STAGES, image_name  # noqa: E402

EPOCH = 315_532_800  # 1980, the date of all files of the images; SOURCE_DATE_EPOCH of the recipe

# pip's options that a build may need
_SOURCES = ("index-url", "extra-index-url", "find-links")
_OPTIONS = (*_SOURCES, "no-index", "trusted-host", "proxy", "timeout", "default-timeout", "retries")


def main(arguments: list[str]) -> int:
    """Build the images of the command line; returns the exit status."""
    options = _parse(arguments)
    engine = options.engine or next(filter(shutil.which, ("podman", "docker")), None)
    if engine is None or not shutil.which(engine):
        print(f"error: {engine or 'neither podman nor docker'} is not installed", file=sys.stderr)
        return 2
    tag = options.tag or (__version__ if options.accelerator == "cpu" else f"{__version__}-cuda")
    names = {stage: image_name(stage, options.prefix, tag) for stage in options.only}
    with tempfile.TemporaryDirectory() as folder, _reachable(pip_configuration()) as configuration:
        secrets = _write_secrets(configuration, Path(folder))
        for stage, name in names.items():
            began = time.monotonic()
            build = _command(engine, stage, secrets, _build_arguments(options))
            status, said = _build([*build, "--tag", name, *options.engine_options, "."])
            failed = f"{name} was not built"
            if status == 0:
                status, said = _write_bill(engine, name, secrets, options)
                failed = f"{name} is built, its bill of materials is not"
            if status:
                print(f"error: {failed} (exit status {status})", file=sys.stderr)
                if said:
                    print(said, file=sys.stderr)
                return 1
            print(f"built {name} in {time.monotonic() - began:.0f} s", flush=True)
    print()
    for name in names.values():
        print(f"{name:<60} {_size(engine, name) / 1e9:5.2f} GB")
    if options.push:
        for name in names.values():
            subprocess.run([engine, "push", name], check=True)
    return 0


def _command(engine: str, target: str, secrets: list[str], arguments: Mapping[str, str]) -> list[str]:
    """The engine's command that builds a target of the recipe, but for what becomes of it."""
    command = [engine, "build", "--file", "images/Dockerfile", "--target", target, "--network=host", *secrets]
    if engine == "podman":  # only Docker's format has health checks; every layer has one date
        command += ["--format=docker", f"--timestamp={EPOCH}"]
    for argument, value in arguments.items():
        command += ["--build-arg", f"{argument}={value}"]
    if engine == "docker":  # predefined arguments, kept out of the history; Podman passes them itself
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
            if variable in os.environ or variable.lower() in os.environ:
                command += ["--build-arg", variable]
    return command


def _write_bill(engine: str, name: str, secrets: list[str], options: argparse.Namespace) -> tuple[int, str]:
    """Write the bill of materials of a built image; returns what `_build` does."""
    arguments = {**_build_arguments(options), "DESCRIBED": name, "NAME": name}
    with tempfile.TemporaryDirectory() as folder:
        build = _command(engine, "sbom", secrets, arguments)
        status, said = _build([*build, "--output", f"type=local,dest={folder}", "."])
        if status == 0:
            options.sbom.mkdir(parents=True, exist_ok=True)
            file = re.sub(r"[^\w.-]", "-", name.rpartition("/")[2]) + ".cdx.json"
            shutil.copyfile(Path(folder, "sbom.json"), options.sbom / file)
    return status, said


def _build(command: list[str]) -> tuple[int, str]:
    """Run the engine; returns its exit status, and the recipe's last own error: more output follows it."""
    said = ""
    engine = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert engine.stdout is not None
    for line in engine.stdout:
        print(line, end="", flush=True)
        error = re.match(r"(?:#\d+ )?(?:\d+\.\d+ )?(error: .*)", line)
        said = error[1] if error else said
    return engine.wait(), said


def pip_configuration(environment: Mapping[str, str] = os.environ) -> dict[str, list[str]]:
    """The options of this machine's pip that a build may need.

    From pip's files in its own order, then PIP_… of the environment; later ones win. `cert` may also come
    from REQUESTS_CA_BUNDLE or SSL_CERT_FILE, or be the system's.
    """
    home = Path(environment.get("HOME", "~")).expanduser()
    user = Path(environment.get("XDG_CONFIG_HOME", home / ".config"))
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf"]
    files += [user / "pip/pip.conf"]
    if "VIRTUAL_ENV" in environment:
        files.append(Path(environment["VIRTUAL_ENV"], "pip.conf"))
    if environment.get("PIP_CONFIG_FILE"):
        files.append(Path(environment["PIP_CONFIG_FILE"]))
    found: dict[str, list[str]] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            parser.read(file, encoding="utf-8")
        for section in ("global", "install"):
            if parser.has_section(section):
                found.update((key.replace("_", "-"), value.split()) for key, value in parser[section].items())
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            found[name[len("PIP_") :].lower().replace("_", "-")] = value.split()
    chosen = {key: values for key, values in found.items() if key in _OPTIONS and values}
    certificates = [*found.get("cert", []), environment.get("REQUESTS_CA_BUNDLE")]
    certificates += [environment.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile]
    bundle = next((file for file in certificates if file and Path(file).is_file()), None)
    return {**chosen, **({"cert": [bundle]} if bundle else {})}


@contextlib.contextmanager
def _reachable(configuration: dict[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """The configuration, with local folders of packages served at addresses that a build can reach."""
    with contextlib.ExitStack() as stack:

        def address(source: str, is_index: bool) -> str:
            path = Path(unquote(urlsplit(source).path) if source.startswith("file:") else source)
            if "://" in source.replace("file://", "") or not path.exists():
                return source
            # an index's pages refer to files of a neighbouring folder
            root = path.parent if is_index or path.is_file() else path
            handler = functools.partial(_QuietHandler, directory=str(root))
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            rest = quote(str(path.relative_to(root)))
            return f"http://127.0.0.1:{server.server_port}/" + ("" if rest == "." else rest)

        replaced = {
            key: [address(source, key != "find-links") for source in configuration[key]]
            for key in _SOURCES
            if key in configuration
        }
        yield {**configuration, **replaced}


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None: ...


def _write_secrets(configuration: Mapping[str, list[str]], folder: Path) -> list[str]:
    """Write pip's configuration into `folder`; returns the engine's options for it and the certificates."""
    lines = ["[global]"]
    for key, values in configuration.items():
        lines.append(f"{key} = /run/secrets/ca" if key == "cert" else "\n    ".join([f"{key} =", *values]))
    (folder / "pip").write_text("\n".join(lines) + "\n", encoding="utf-8")
    secrets = ["--secret", f"id=pip,src={folder / 'pip'}"]
    if "cert" in configuration:
        secrets += ["--secret", f"id=ca,src={configuration['cert'][0]}"]
    return secrets


def _build_arguments(options: argparse.Namespace) -> dict[str, str]:
    arguments = {"ACCELERATOR": options.accelerator, "VERSION": __version__, "REVISION": revision()}
    arguments["SOURCE_DATE_EPOCH"] = str(EPOCH)
    if options.base:
        arguments["BASE_IMAGE"] = options.base
    if options.torch_index:
        arguments["TORCH_INDEX"] = options.torch_index
    if options.torch_hash:
        arguments["TORCH_HASH"] = options.torch_hash
    return arguments


def revision() -> str:
    """The present commit, with "-modified" if the working tree differs; "unknown" without git."""
    try:
        commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "components", "images")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-modified" if changed else "")


def _environment() -> dict[str, str]:
    """The engine's environment, which uses no proxy for the loopback address."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1"]))
    return environment


def _size(engine: str, name: str) -> int:
    """Bytes of an image on disk."""
    return int(_output(engine, "image", "inspect", "--format", "{{.Size}}", name))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build softpref's container images.")
    parser.add_argument("--prefix", default=PREFIX, help=f"names are PREFIX-STAGE:TAG (default: {PREFIX})")
    parser.add_argument("--tag", help=f"default: {__version__}, with -cuda for CUDA")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="of these")
    parser.add_argument(
        "--accelerator", choices=("cpu", "cuda"), default="cpu", help="what torch is built for"
    )
    parser.add_argument("--torch-index", metavar="URL", help="package index to take torch from")
    parser.add_argument(
        "--torch-hash", metavar="sha256:HASH", help="of another build of torch than images/locks holds"
    )
    parser.add_argument(
        "--sbom",
        type=Path,
        default=REPOSITORY / "images/sbom",
        metavar="FOLDER",
        help="for the bills of materials, a NAME.cdx.json of each image (default: images/sbom)",
    )
    parser.add_argument("--base", metavar="IMAGE", help="another base image, or the same one by its digest")
    parser.add_argument("--engine", choices=("podman", "docker"), help="default: the first that is installed")
    parser.add_argument("--push", action="store_true", help="push what was built")
    parser.add_argument(
        "engine_options",
        nargs="*",
        metavar="-- OPTION",
        help="for the engine's build command, such as --pull",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
