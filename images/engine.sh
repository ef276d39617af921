#!/bin/sh
# Make sure that a Docker engine answers: use the one that runs, else install and start Debian's.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
wait_seconds=${ENGINE_WAIT_SECONDS:-60}
log=${ENGINE_LOG:-/var/log/agent-runner-dockerd.log}
pid_file=${ENGINE_PID_FILE:-/var/run/docker.pid}

answers() { timeout 20 docker info >/dev/null 2>&1; }
is_starting() { [ -f "$pid_file" ] && grep -qs dockerd "/proc/$(cat "$pid_file")/comm"; }

if command -v docker >/dev/null && answers; then
    exit 0
fi

# An engine that somebody chose is not ours to replace.
if [ -n "${DOCKER_HOST:-}" ]; then
    echo "no Docker engine answers at DOCKER_HOST=$DOCKER_HOST: start it, or unset DOCKER_HOST" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "no Docker engine answers: start it (sudo systemctl start docker) or install docker.io, and put this user in group docker" >&2
    exit 1
fi

# A docker command alone is no engine, and an engine without iptables does not start.
missing=
command -v dockerd >/dev/null || missing="docker.io"
command -v docker >/dev/null || missing="docker.io"
command -v iptables >/dev/null || missing="$missing iptables"
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # a list of package names
    sh "$here/debian.sh" "a Docker engine" $missing
fi

fail() {
    echo "cannot start the Docker engine: $1" >&2
    exit 1
}

# Wait until the engine answers; call "$@" whenever nothing is there to wait for, and give up when it fails.
wait_for_engine() {
    waited=0
    until answers; do
        "$@" || return 1
        [ "$waited" -lt "$wait_seconds" ] || return 1
        sleep 1
        waited=$((waited + 1))
    done
}

# An engine may be starting (the package's init script) or stopping: ours is started when none is there,
# once. A pid file that a killed engine left would stop it.
start_unless_running() {
    is_starting && return 0
    if [ -n "${engine_pid:-}" ]; then
        kill -0 "$engine_pid" 2>/dev/null
        return
    fi
    rm -f "$pid_file"
    setsid dockerd >"$log" 2>&1 </dev/null &
    engine_pid=$!
}

if [ -d /run/systemd/system ] && systemctl cat docker.service >/dev/null 2>&1; then
    systemctl start docker || true
    wait_for_engine true || fail "docker.service does not answer; see journalctl -u docker"
else
    wait_for_engine start_unless_running || {
        tail -n 5 "$log" >&2
        fail "dockerd does not answer after ${waited}s; see $log"
    }
fi
echo "engine   Docker $(docker version --format '{{.Server.Version}}') started"
