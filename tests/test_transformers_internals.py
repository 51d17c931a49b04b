"""The private names of transformers: each is there and does what we use it for, and one module has them all.

When a test fails after an update of transformers, its message says which name is to be mended.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaForCausalLM, PreTrainedModel

from serve_app import transformers_internals as internals
from serve_app.chat import rendering

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "serve_app" / "transformers_internals.py"
OTHERS = sorted(path for path in (ROOT / "serve_app").rglob("*.py") if path != PLACE)
DOCUMENTED = {
    "transformers",
    "transformers.modeling_outputs",
    "transformers.pytorch_utils",
    "transformers.utils.import_utils",
}
"""Modules of transformers whose names other modules may import."""
ATTRIBUTES = ("_attn_implementation", "_supports_sdpa", "_supports_attention_backend", "_is_stateful")


def broken(what: str) -> str:
    return f"transformers {transformers.__version__} has broken {what}; mend {PLACE.relative_to(ROOT)}"


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_a_template_is_rendered() -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = internals.render_template(template, messages, {"bos_token": "<s>", "add_generation_prompt": True})
    except (ImportError, TypeError) as error:
        pytest.fail(broken(f"render_jinja_template: {error}"))
    assert text == "<s>a|b|", broken("render_jinja_template")


def test_a_response_template_is_compiled_and_its_regions_are_read() -> None:
    call = {"open_pattern": "<call (?P<name>[a-z]+)>", "close": "</call>", "content": "json", "repeats": True}
    call["transform"] = {"function": {"name": "{name}", "arguments": "{content}"}}
    template = {"start_anchor": "go:", "fields": {"tool_calls": call, "content": {"close": "<end>"}}}
    try:
        compiled = internals.compiled_response_template(template)
    except (ImportError, TypeError) as error:
        pytest.fail(broken(f"load_response_template: {error}"))
    field = compiled.fields["tool_calls"]
    assert (compiled.implicit, compiled.truncate_past_last_anchor("go:1go:2")) == ("content", "2")
    assert (field.close_literals, field.close_literal_can_extend, field.open_literals) == (["</call>"], False, None)
    assert (field.content, field.content_args, field.transform_each) == ("json", {}, False)
    assert field.open_re.search("<call f", 0, 7, partial=True).partial
    value = internals.response_field_value('{"a": 1}', field, {"name": "f"})
    assert value == {"function": {"name": "f", "arguments": {"a": 1}}}, broken("process_field")
    assert internals.response_field_value("no JSON", field, {"name": "f"}) is None


def test_a_templates_variables_are_told_from_the_functions_arguments() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    parameters = inspect.signature(render_jinja_template).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    assert named == rendering._OURS - {"messages"} | rendering._RENDERERS, broken("render_jinja_template's arguments")


def test_a_model_says_how_it_computes_attention() -> None:
    assert internals.attention_name(tiny_llama().config) == "eager", broken("config._attn_implementation")


def test_classes_say_what_they_support() -> None:
    for name in ("_supports_sdpa", "_supports_attention_backend", "_is_stateful"):
        assert hasattr(PreTrainedModel, name), broken(f"PreTrainedModel.{name}")
    assert internals.has_sdpa(LlamaForCausalLM), broken("_supports_sdpa")
    assert not internals.has_sdpa(None), "a model that brings its own class"
    assert internals.uses_attention_interface(LlamaForCausalLM), broken("_supports_attention_backend")
    assert internals.is_recurrent(MambaForCausalLM), broken("_is_stateful")
    assert not internals.is_recurrent(LlamaForCausalLM), broken("_is_stateful")


def test_the_settings_that_are_read_from_gguf_files() -> None:
    read = internals.gguf_settings_read("llama", "llama")
    assert {"context_length", "embedding_length", "rope.freq_base"} <= read, broken("GGUF_CONFIG_MAPPING")
    assert internals.gguf_settings_read("another type", "llama") == read
    assert internals.gguf_settings_read("no such type", "no such architecture") == set()


def test_the_names_of_tensors_in_gguf_files() -> None:
    names = internals.gguf_tensor_names(tiny_llama(), "llama")
    for name, parameter in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert names.get(name) == parameter, broken("get_gguf_hf_weights_map")


def test_an_unknown_architecture_has_no_newer_reader() -> None:
    assert not internals.reports_gguf_tensors("no such architecture"), broken("is_gguf_arch_supported")


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_a_private_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = [name for name in ATTRIBUTES if re.search(rf"\b{name}\b", text)]
    found += private_imports(ast.parse(text))
    assert not found, f"private names of transformers belong into {PLACE.relative_to(ROOT)}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from transformers.integrations.ggml import X", ["transformers.integrations.ggml.X"]),
        ("def f():\n    from transformers import A, _b", ["transformers._b"]),
        ("import transformers.models.llama", ["transformers.models.llama"]),
        ("import transformers\nfrom transformers import A\nfrom transformers.utils.import_utils import b", []),
    ],
)
def test_private_names_are_found(code: str, found: list[str]) -> None:
    assert list(private_imports(ast.parse(code))) == found


def private_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            for each in node.names:
                if node.module not in DOCUMENTED or each.name.startswith("_"):
                    yield f"{node.module}.{each.name}"
        elif isinstance(node, ast.Import):
            names = (each.name for each in node.names)
            yield from (name for name in names if name.startswith("transformers.") and name not in DOCUMENTED)
