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

wait_for_engine() {
    waited=0
    while ! answers; do
        if [ "$waited" -ge "$wait_seconds" ]; then
            return 1
        fi
        # Ours may have given way to one that the package's init script started a moment before.
        if [ -n "${engine_pid:-}" ] && ! kill -0 "$engine_pid" 2>/dev/null && ! is_starting; then
            return 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
}

if answers; then # the package's own service may have started by now
    :
elif [ -d /run/systemd/system ] && systemctl cat docker.service >/dev/null 2>&1; then
    systemctl start docker || true
    wait_for_engine || { echo "cannot start the Docker engine: docker.service does not answer; see journalctl -u docker" >&2; exit 1; }
else
    if ! is_starting; then
        rm -f "$pid_file" # of an engine that was killed: it would stop the next one from starting
        setsid dockerd >"$log" 2>&1 </dev/null &
        engine_pid=$!
    fi
    wait_for_engine || { tail -n 5 "$log" >&2; echo "cannot start the Docker engine: dockerd does not answer after ${wait_seconds}s; see $log" >&2; exit 1; }
fi
echo "engine   Docker $(docker version --format '{{.Server.Version}}') started"
