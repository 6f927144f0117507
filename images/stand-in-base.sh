#!/usr/bin/env bash
# Builds a substitute for the images' base where no registry is reachable: Debian's own Python, from Debian's archive.
# The rest of a build is unchanged. For the container tests; needs root, Podman, debootstrap.
#
#   images/stand-in-base.sh          does nothing if the base exists or can be pulled
#
# If containers do not start because this kernel lacks their limits or runtime (as in some small virtual machines), it
# also writes a separate file of Podman settings.
set -euo pipefail

base=python:3.11-slim-bookworm
settings=/etc/containers/containers.conf.d/softpref-stand-in.conf

command -v podman >/dev/null || { echo "error: podman is not installed" >&2; exit 1; }
if ! podman image exists "$base" && ! podman pull --quiet "$base" 2>/dev/null; then
    command -v debootstrap >/dev/null || {
        echo "error: $base cannot be pulled, and debootstrap is not installed: apt-get install debootstrap" >&2
        exit 1
    }
    [ "$(id -u)" = 0 ] || { echo "error: $base cannot be pulled, and debootstrap needs root" >&2; exit 1; }
    echo "$base cannot be pulled: making a stand-in from Debian's archive"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base" \
        >"$folder/log" 2>&1 || { tail -n 20 "$folder/log" >&2; exit 1; }
    # as small as the real base: no package lists, documents, or messages in other languages
    rm -rf "$folder"/base/var/cache/apt/* "$folder"/base/var/lib/apt/lists/* \
        "$folder"/base/usr/share/{doc,man,info,locale}/*
    tar -C "$folder/base" -c . |
        podman import --quiet --change 'CMD ["python3"]' \
            --change 'LABEL org.opencontainers.image.title="stand-in for '"$base"'"' - "localhost/$base" >/dev/null
fi

# --network=host, like the builds: this tests only the runtime and the limits
starts() { podman run --rm --network=host "$base" true >/dev/null 2>&1; }
if ! starts; then
    mkdir -p "$(dirname "$settings")"
    cat >"$settings" <<'SETTINGS'
# Written by softpref's images/stand-in-base.sh, because containers did not start without it; may be deleted.
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
SETTINGS
    starts || {
        rm -f "$settings"
        echo "error: containers do not start on this machine, with and without other limits:" >&2
        podman run --rm --network=host "$base" true >&2 || exit 1
    }
    echo "containers start with the settings in $settings"
fi
podman image inspect --format "$base: {{.Id}}" "$base"
