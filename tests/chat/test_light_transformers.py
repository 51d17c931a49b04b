"""A process of its own that renders a chat without torch, to the same ids, and may still import torch afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serve_app.chat.light_transformers import import_without_torch
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ChatConfig

CHAT = [{"role": "system", "content": "Be brief. 你好"}, {"role": "user", "content": "What is a prime number? 12"}]
PROGRAM = """
import json, pathlib, sys
import serve_app.deployments.ingress, serve_app.deployments.journal_actor
assert "transformers" not in sys.modules, "Ray imports these before an ingress can choose to have no torch"
from serve_app.chat.light_transformers import import_without_torch
import_without_torch()
from serve_app.chat.prompts import PromptFormatter
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.config import ChatConfig
tokenizer = ChatTokenizer.load(pathlib.Path(sys.argv[1]))
print(json.dumps(PromptFormatter(tokenizer, ChatConfig()).render_chat(json.loads(sys.argv[2]))))
import serve_app.api.app, serve_app.generation.service, serve_app.models.defaults
assert "torch" not in sys.modules, "something of an ingress imports it all the same"
import torch
torch.zeros(1)
"""


def test_a_tokenizer_needs_no_torch(demo_folder: Path, demo_tokenizer: ChatTokenizer) -> None:
    command = [sys.executable, "-c", PROGRAM, str(demo_folder), json.dumps(CHAT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == PromptFormatter(demo_tokenizer, ChatConfig()).render_chat(CHAT)
    assert "PyTorch" not in done.stderr, "no advice to install it"


def test_nothing_is_changed_where_transformers_is_at_work() -> None:
    before = dict(sys.modules)
    import_without_torch()
    assert sys.modules["transformers"] is before["transformers"]
    assert sys.modules.get("torch") is before.get("torch")
