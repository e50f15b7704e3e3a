#!/usr/bin/env bash
# serve_web.sh [PORT]: builds the web page and serves it on this machine alone, until Ctrl-C. Without PORT, 8080; 0 takes any free one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

port=${1:-8080}
if ! [[ $port =~ ^[0-9]{1,5}$ ]] || ((10#$port > 65535)); then
  echo "serve_web.sh: PORT is a number below 65536, not $port" >&2
  exit 1
fi
command -v python3 >/dev/null || { echo "serve_web.sh: this needs python3" >&2; exit 1; }

scripts/build_web.sh
# An address of this machine itself counts as secure: elsewhere browsers give WebGPU to https alone.
exec python3 - "$port" target/page <<'PYTHON'
import http.server
import sys

port, folder = int(sys.argv[1]), sys.argv[2]


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def __init__(self, *arguments):
        super().__init__(*arguments, directory=folder)

    def end_headers(self):
        # After a new build the browser must not show the old one.
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments):
        pass


try:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
except OSError as error:
    sys.exit(f"serve_web.sh: port {port} cannot be opened: {error.strerror}")
print(f"http://127.0.0.1:{server.server_port}/", flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    pass
PYTHON
