#!/usr/bin/env bash
# Makes a stand-in for the images' base where no registry can be reached: Debian's own Python, from Debian's
# archive. Everything else of a build is as always. The container tests call this; needs root, Podman, debootstrap.
#
#   images/stand-in-base.sh          does nothing where the base is there or can be pulled
#
# Where containers do not start for limits or a runtime that this kernel does not have (seen in small virtual
# machines), it also writes Podman's settings for that, into a file of its own.
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
    # as small as the base it stands for: neither package lists, documents nor messages in other languages
    rm -rf "$folder"/base/var/cache/apt/* "$folder"/base/var/lib/apt/lists/* \
        "$folder"/base/usr/share/{doc,man,info,locale}/*
    tar -C "$folder/base" -c . |
        podman import --quiet --change 'CMD ["python3"]' \
            --change 'LABEL org.opencontainers.image.title="stand-in for '"$base"'"' - "localhost/$base" >/dev/null
fi

# --network=host, as the builds: what is tried is the runtime and the limits
starts() { podman run --rm --network=host "$base" true >/dev/null 2>&1; }
if ! starts; then
    mkdir -p "$(dirname "$settings")"
    cat >"$settings" <<'SETTINGS'
# Written by softpref's images/stand-in-base.sh, for containers did not start without; delete it at will.
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
