"""Stands in for `serve run CONFIG`: reads the config's address, serves /ready there, and ends as it is told.

The environment says how: FAKE_SERVE_RUN is `ready`, `fails` (the model can't be loaded), `dies` (before it listens),
`asks` (for a key that nobody has) or `stubborn` (SIGINT does not end it).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

MODE = os.environ.get("FAKE_SERVE_RUN", "ready")
CARD = {
    "name": "fake-1",
    "fingerprint": "f",
    "context_tokens": 2048,
    "kv_capacity_tokens": 5000,
    "vocab_size": 9,
    "weights_bytes": 538_000_000,
    "kv_cache_bytes": 1_073_741_824,
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "sdpa",
    "notes": ["a note"],
}


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        Handler.asked += 1
        if Handler.asked == 1:  # Serve's proxy has no route to the application yet
            return self.answer(503, json.dumps({"error": {"message": "Starting.", "code": "not_ready"}}).encode())
        secret = os.environ.get("SERVE_APP_PROBE_SECRET")
        if MODE == "asks" or (secret and self.headers.get("Authorization") != f"Bearer {secret}"):
            return self.answer(401, json.dumps({"error": {"message": "No key.", "code": "invalid_api_key"}}).encode())
        if Handler.asked == 2:
            return self.answer(
                503, json.dumps({"status": "loading", "stage": "loading weights", "error": None}).encode()
            )
        if MODE == "fails":
            body = {"status": "failed", "stage": "failed", "error": "There is no folder /x."}
            return self.answer(503, json.dumps(body).encode())
        access = {"keys_required": bool(secret)}
        return self.answer(200, json.dumps({"status": "ready", "model": CARD, "access": access}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


def main() -> None:
    if MODE == "dies":
        sys.exit(3)
    with open(sys.argv[-1]) as file:
        options = yaml.safe_load(file)["http_options"]
    ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in options["host"] else socket.AF_INET
    server = ThreadingHTTPServer((options["host"], options["port"]), Handler)
    ended = threading.Event()

    def stop(number: int, _: object) -> None:
        print(f"fake serve run got {signal.Signals(number).name}", flush=True)
        if not (MODE == "stubborn" and number == signal.SIGINT):
            ended.set()

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as Python itself does
        signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"fake serve run: {' '.join(sys.argv[1:])}, RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}", flush=True)
    print(f"resources {os.environ.get('RAY_OVERRIDE_RESOURCES')}", flush=True)
    for name in ("HOME", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY"):
        print(f"{name}={os.environ.get(name)},", flush=True)
    ended.wait()


if __name__ == "__main__":
    main()
