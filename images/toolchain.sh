#!/bin/sh
# Build agent-runner/toolchain:latest (TOOLCHAIN_IMAGE names another): the programs that real tasks use, to prove
# that they work under the seccomp profile and in a closed shell. For tests only; nothing in it is trusted, and no
# session needs it.
#
# Made with mmdebstrap and `docker import`, so it needs a Debian mirror but no image registry. The image
# carries the digest of this file as a label: unchanged file, nothing to do.
set -eu

image=${TOOLCHAIN_IMAGE:-agent-runner/toolchain:latest}
label=org.agent-runner.content
suite=bookworm
packages=ca-certificates,gcc,libc6-dev,make,git,python3,python3-venv,python3-pytest,cargo,nodejs,npm,busybox-static

content=$(sha256sum "$0" | cut -d' ' -f1)
present=$(docker image inspect --format "{{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null || true)
if [ "$present" = "$content" ]; then
    echo "$image is up to date"
    exit 0
fi

if ! command -v mmdebstrap >/dev/null; then
    echo "cannot build $image: mmdebstrap is absent; install it (apt-get install mmdebstrap)" >&2
    exit 1
fi

# A file between the two, not a pipe: sh has no pipefail, and a half-made tree must never become the image.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mmdebstrap --quiet --variant=minbase \
    --aptopt='Acquire::Languages "none"' \
    --dpkgopt='force-unsafe-io' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include="$packages" "$suite" "$tree/root.tar"
docker import --change "LABEL $label=$content" --change 'CMD ["/bin/sh"]' "$tree/root.tar" "$image"
