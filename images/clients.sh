#!/bin/sh
# Build agent-runner/clients:latest: the programs that reach the network in real work, to prove that each of
# them gets through the egress gateway. For tests only; nothing in it is trusted, and no session needs it.
#
# It is the toolchain image and a few more of Debian's packages: most of what it holds is there already.
# Node 20 comes from npm, since Debian 12 has 18; without it Debian's is what the tests run.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
image=agent-runner/clients:latest
base=agent-runner/toolchain:latest
label=org.agent-runner.content
packages="curl openssl python3-pip openjdk-17-jdk-headless golang-go"
node=20.20.2

sh "$here/toolchain.sh" >/dev/null
base_id=$(docker image inspect --format '{{.Id}}' "$base")
content=$( (cat "$0" && echo "$base_id") | sha256sum | cut -d' ' -f1)
present=$(docker image inspect --format "{{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null || true)
if [ "$present" = "$content" ]; then
    echo "$image is up to date"
    exit 0
fi

# npm's origin is trusted as this host trusts it: some networks open TLS with an authority of their own. That
# file is the whole context, and stays out of the image. The JDK's scripts link manual pages, whose directory
# the toolchain image leaves out.
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cat "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" >"$context/roots.pem" 2>/dev/null || true
cat >"$context/Dockerfile" <<EOF
FROM $base AS node
COPY roots.pem /tmp/roots.pem
RUN package=node-\$(node -p 'process.platform + "-" + process.arch') && mkdir -p /opt/node/bin /tmp/node \\
 && if NODE_EXTRA_CA_CERTS=/tmp/roots.pem npm install --no-audit --no-fund --prefix /tmp/node "\$package@$node"; \\
    then cp "/tmp/node/node_modules/\$package/bin/node" /opt/node/bin/node; \\
    else echo "no node $node from npm: Debian's it is"; fi
FROM $base
RUN mkdir -p /usr/share/man/man1 \\
 && apt-get update -qq \\
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages \\
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=node /opt/node /opt/node
EOF
docker build --quiet --label "$label=$content" --tag "$image" "$context"
