"""A program that streams chats as an OpenAI server does: `fake_openai_server.py PORT`. Standard library only.

It starts a child that computes for a moment and stays, so that a test can see a process tree; and it answers
`/health` after it has begun to listen. A message `fail` is refused, `short` is one token short, `break` breaks off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHILD = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass\ntime.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wish = body["messages"][-1]["content"]
        if wish == "fail":
            self.send_error(503, "overloaded")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        tokens = body["max_tokens"] - (wish == "short")
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
        for token in range(tokens):
            self._event({"choices": [{"index": 0, "delta": {"content": f"<{token}>"}}], "usage": None})
            if wish == "break":
                return
        usage = {"prompt_tokens": len(body["messages"]), "completion_tokens": tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, object]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


if __name__ == "__main__":
    child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
