#!/bin/sh
# Have the local engine know gVisor's runsc, with the arguments agent-runner insists on (sandbox/container/gvisor.py).
# What cannot be had here is said in one line and is no failure: only `runtime: runsc` needs it.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
config=${ENGINE_CONFIG:-/etc/docker/daemon.json}
pid_file=${ENGINE_PID_FILE:-/var/run/docker.pid}

registered() { timeout 20 docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}' 2>/dev/null | grep -qw runsc; }
without() {
    echo "gvisor   runtime: runsc is not available: $1"
    exit 0
}

# How somebody registered it is theirs to decide; a policy that asks for runsc tells what is wrong with it.
registered && exit 0
[ -z "${DOCKER_HOST:-}" ] || without "the engine at DOCKER_HOST is not ours to configure"
[ "$(id -u)" -eq 0 ] || without "root registers it (sudo sh images/gvisor.sh)"
[ -f "$pid_file" ] && grep -qs dockerd "/proc/$(cat "$pid_file")/comm" || without "no dockerd runs by $pid_file"
command -v runsc >/dev/null || sh "$here/debian.sh" gVisor runsc || without "Debian's package runsc cannot be installed"

# Added to what is there, and written as a whole or not at all.
mkdir -p "$(dirname "$config")"
python3 - "$config" "$(command -v runsc)" <<'PYTHON' || without "$config cannot be changed"
import json, os, sys

path, runsc = sys.argv[1:]
try:
    with open(path) as file:
        config = json.loads(file.read() or "{}")
except FileNotFoundError:
    config = {}
arguments = ["--platform=ptrace", "--network=none", "--host-uds=open", "--oci-seccomp"]
config.setdefault("runtimes", {}).setdefault("runsc", {"path": runsc, "runtimeArgs": arguments})
with open(path + ".new", "w") as file:
    json.dump(config, file, indent=2)
    file.write("\n")
os.replace(path + ".new", path)
PYTHON

# dockerd reads its runtimes anew on SIGHUP; nothing that runs is touched.
kill -HUP "$(cat "$pid_file")"
waited=0
until registered; do
    [ "$waited" -lt 10 ] || without "the engine did not take it from $config"
    sleep 1
    waited=$((waited + 1))
done
echo "gvisor   $(runsc --version | head -n 1) registered"
