"""Real programs and how each is asked for one thing over https; used with and without inspection.

``{host}`` stands for the host. Nothing here names a certificate or a proxy: that is the session's to set.
"""

from __future__ import annotations

from dataclasses import dataclass

DIRECT = "docs.internal.net"
"""An exact name: it is reached without proxy variables, too."""

JAVA = """
import java.net.URI;
import java.net.http.*;

public class Get {
    public static void main(String[] urls) throws Exception {
        var client = HttpClient.newHttpClient();
        int failed = 0;
        for (var url : urls) {
            long begun = System.nanoTime();
            try {
                var request = HttpRequest.newBuilder(URI.create(url)).build();
                System.out.print(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
            } catch (java.io.IOException problem) {
                Throwable cause = problem;
                while (cause.getCause() != null) cause = cause.getCause();
                System.err.println(url + " " + cause + " " + (System.nanoTime() - begun) / 1000000 + " ms");
                failed = 1;
            }
        }
        System.exit(failed);
    }
}
"""
NODE = """
const dns = require('dns');
const get = url => url.startsWith('dns:')
    ? dns.promises.resolve(url.slice(4))
    : fetch(url).then(answer => answer.text()).then(text => { process.stdout.write(text); });
(async () => {
    for (const url of process.argv.slice(2)) {
        const begun = Date.now();
        await get(url).catch(problem => {
            console.error(url, (problem.cause || problem).code, Date.now() - begun, 'ms');
            process.exitCode = 1;
        });
    }
})();
"""
URLLIB = "import sys, urllib.request as u; sys.stdout.write(u.urlopen(sys.argv[1]).read().decode())"
REQUESTS = "import sys; from pip._vendor import requests as r; sys.stdout.write(r.get(sys.argv[1]).text)"
SOCKET = """
import socket, ssl, sys, time

code = 0
for target in sys.argv[1:]:
    name, _, port = target.partition(":")
    begun = time.monotonic()
    try:
        plain = socket.socket()
        plain.connect((name, int(port or 443)))
        s = ssl.create_default_context().wrap_socket(plain, server_hostname=name)
        s.sendall(f"GET / HTTP/1.1\\r\\nHost: {name}\\r\\nConnection: close\\r\\n\\r\\n".encode())
        while piece := s.recv(65536):
            sys.stdout.write(piece.decode())
    except OSError as problem:
        print(target, repr(problem), round((time.monotonic() - begun) * 1000), "ms", file=sys.stderr)
        code = 1
sys.exit(code)
"""
FILES = {
    "Get.java": JAVA,
    "get.js": NODE,
    "get.py": URLLIB,
    "requests_get.py": REQUESTS,
    "socket_get.py": SOCKET,
    "crate/Cargo.toml": '[package]\nname = "a"\nversion = "0.1.0"\nedition = "2021"\n'
    '[dependencies]\nleftover = "1"\n',
    "crate/src/lib.rs": "",
    "crate/.cargo/config.toml": '[source.crates-io]\nreplace-with = "local"\n'
    '[source.local]\nregistry = "sparse+https://cargo.packages.test/crates/"\n',
    "module/go.mod": "module a.test/a\n\ngo 1.19\n\nrequire b.test/b v1.0.0\n",
}
JAVA_GET = "java -XX:TieredStopAtLevel=1 Get"
"""``Get.class`` lies in the workspace, compiled once for all."""
S_CLIENT = (
    "printf 'GET / HTTP/1.0\\r\\nHost: {host}\\r\\n\\r\\n' | openssl s_client -quiet -verify_return_error "
    "-connect {host}:443 -servername {host}"
)


@dataclass(frozen=True)
class Client:
    """One program."""

    name: str
    host: str
    line: str
    """A shell command line with ``{host}`` in it."""
    says: str
    """Part of its output when it got what it asked for."""
    refuses: str
    """A regular expression for what it says of a certificate that it does not trust."""

    @property
    def command(self) -> str:
        return self.line.replace("{host}", self.host)


def _by_proxy(name: str, line: str, says: str, refuses: str) -> Client:
    """A name that only a wildcard allows: no address leads to it, so whoever gets there used the proxy."""
    return Client(name, f"{name}.packages.test", line, says, refuses)


PYTHON = "CERTIFICATE_VERIFY_FAILED"
JAVA_SAYS = "unable to find valid certification path"
NODE_SAYS = "SELF_SIGNED_CERT_IN_CHAIN|UNABLE_TO_(VERIFY_LEAF_SIGNATURE|GET_ISSUER_CERT_LOCALLY)"

PROXY_CLIENTS = (
    _by_proxy("curl", "curl -sSf https://{host}/", "hello", "SSL certificate problem"),
    _by_proxy("curl10", "curl -sSf --http1.0 https://{host}/", "hello", "SSL certificate problem"),
    _by_proxy(
        "git",
        "git ls-remote https://{host}/repository.git",
        "refs/heads/main",
        "certificate verification failed|SSL certificate problem",
    ),
    _by_proxy("urllib", "python3 get.py https://{host}/", "hello", PYTHON),
    _by_proxy("requests", "python3 requests_get.py https://{host}/", "hello", PYTHON),
    _by_proxy(
        "pip",
        "PIP_INDEX_URL=https://{host}/simple PIP_RETRIES=0 pip download "
        "--no-cache-dir --no-deps -d /tmp/pip sample",
        "Successfully downloaded sample",
        PYTHON,
    ),
    _by_proxy(
        "npm",
        "npm_config_registry=https://{host}/npm/ npm_config_fetch_retries=0 npm view left-pad version",
        "1.0.0",
        NODE_SAYS,
    ),
    _by_proxy(
        "cargo",
        # This cargo calls the sparse protocol unstable; later ones have it on by default.
        "cd crate && CARGO_NET_RETRY=0 RUSTC_BOOTSTRAP=1 cargo -Z sparse-registry fetch 2>&1",
        "Downloaded leftover v1.0.0",
        "SSL certificate problem|certificate verification failed",
    ),
    _by_proxy(
        "go",
        "cd module && GOPROXY=https://{host}/modules GONOSUMDB='*' GOFLAGS=-mod=mod go mod download -json",
        '"Version": "v1.0.0"',
        "certificate signed by unknown authority",
    ),
    _by_proxy("java", JAVA_GET + " https://{host}/", "hello", JAVA_SAYS),
    _by_proxy("openssl", f"{S_CLIENT} -proxy 127.0.0.1:3128", "hello", "verify error"),
)
"""They read the proxy variables (openssl is told)."""

DIRECT_CLIENTS = (
    Client(
        "node-fetch",
        DIRECT,
        "PATH=/opt/node/bin:$PATH node get.js https://{host}/",
        "hello",
        NODE_SAYS,
    ),
    Client(
        "java-without-options",
        DIRECT,
        "unset JAVA_TOOL_OPTIONS; " + JAVA_GET + " https://{host}/",
        "hello",
        JAVA_SAYS,
    ),
    Client("socket", DIRECT, "python3 socket_get.py {host}", "hello", PYTHON),
    Client("curl-noproxy", DIRECT, "curl -sSf --noproxy '*' https://{host}/", "hello", "certificate problem"),
    Client("s_client-direct", DIRECT, S_CLIENT, "hello", "verify error"),
)
"""They read no proxy variable, or are kept from it."""

CLIENTS = (*PROXY_CLIENTS, *DIRECT_CLIENTS)
