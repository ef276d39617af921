#!/bin/sh
# Install Debian packages when this is Debian (or Ubuntu) and we are root; else say in one line what to install.
# usage: debian.sh PURPOSE PACKAGE...
set -eu

purpose=$1
shift

if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "cannot install $purpose: not root on Debian or Ubuntu; install it yourself (there: sudo apt-get install $*)" >&2
    exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive

# A package may be installed although a service of it could not be started (no systemd, policy-rc.d):
# what counts is whether dpkg has configured it.
if { apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1 || dpkg --configure -a >>"$log" 2>&1; then
    if dpkg-query -W -f '${db:Status-Status}\n' "$@" 2>>"$log" | grep -qv '^installed$'; then
        tail -n 20 "$log" >&2
        echo "cannot install $purpose: apt-get left a package unconfigured; see above" >&2
        exit 1
    fi
    dpkg-query -W "$@" >/dev/null 2>>"$log" && exit 0
fi
tail -n 20 "$log" >&2
echo "cannot install $purpose: apt-get install $* failed; see above" >&2
exit 1
