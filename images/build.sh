#!/bin/sh
# Build the default sandbox image, unless the one that is present was built from these very files.
# A registry gives the base when one answers; else mmdebstrap makes the same image from Debian's packages.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
image=${IMAGE:-agent-runner/base:latest}
suite=bookworm
base=debian:$suite-slim
label=agent-runner.content

content=$(cat "$here/Dockerfile" "$here/build.sh" | sha256sum | cut -c1-64)
present=$(docker image inspect -f "{{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null || true)
if [ "$present" = "$content" ]; then
    exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log
fail() {
    tail -n 20 "$log" >&2
    echo "cannot build image $image: $1" >&2
    exit 1
}

if docker image inspect "$base" >/dev/null 2>&1 || timeout "${PULL_SECONDS:-60}" docker pull "$base" >"$log" 2>&1; then
    how="from $base"
    # The Dockerfile comes on stdin: no context, so nothing of this checkout can end up in the image.
    docker build --build-arg "BASE=$base" --label "$label=$content" -t "$image" - <"$here/Dockerfile" >"$log" 2>&1 ||
        fail "docker build failed; see above"
else
    how="from Debian packages, no registry answers"
    if ! command -v mmdebstrap >/dev/null; then
        sh "$here/debian.sh" "mmdebstrap (no image registry answers)" mmdebstrap
    fi
    packages=$(sed -n 's/^ARG PACKAGES="\(.*\)"$/\1/p' "$here/Dockerfile" | tr ' ' ',')
    # shellcheck disable=SC2016  # $1 is mmdebstrap's: the root of the new system
    mmdebstrap --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
        --customize-hook='find "$1" -xdev -type f -perm /6000 -exec chmod a-s {} +' \
        "$suite" "$scratch/base.tar" >"$log" 2>&1 ||
        fail "mmdebstrap failed; see above"
    docker import \
        --change "LABEL $label=$content" \
        --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' \
        --change 'WORKDIR /workspace' \
        "$scratch/base.tar" "$image" >"$log" 2>&1 ||
        fail "docker import failed; see above"
fi
echo "image    $image built $how"
