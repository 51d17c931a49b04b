"""What `serve-app check` refuses, and how it says it: file, line, path, sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.cli.command_error import CommandError
from serve_app.cli.config_file import load, render_path

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

GOOD = """\
proxy_location: HeadOnly
http_options:
  host: 127.0.0.1
  port: 8123
applications:
  - name: a
    import_path: serve_app.app:build
    route_prefix: /
    args:
      engine:
        max_running: 4
"""


def problems(tmp_path: Path, text: str) -> list[str]:
    """What is said to be wrong with a config, one problem a string."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    try:
        load(path)
    except CommandError as error:
        first, *found = str(error).replace(str(path), "c.yaml").split("\n  ")
        assert first == "c.yaml can't be served as it is:"
        return found
    return []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_our_own_configs_are_valid(path: Path) -> None:
    file = load(path)
    assert len(file.apps) == 1
    assert file.port == 8000


def test_only_the_cluster_config_listens_to_other_machines() -> None:
    assert [path.name for path in CONFIGS if load(path).host != "127.0.0.1"] == ["serve.cluster.yaml"]


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    file = load(path)
    assert (file.host, file.port, file.https, file.foreign) == ("127.0.0.1", 8123, False, ())
    (app,) = file.apps
    assert (app.name, app.route_prefix, app.config.engine.max_running) == ("a", "/", 4)


def test_the_demos_application_takes_no_config(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD.replace(":build", ":demo")) == [
        "c.yaml:7: applications[0].import_path: serve_app.app:demo is for `serve run serve_app.app:demo`; in a config "
        "write serve_app.app:build"
    ]


def test_args_may_be_left_out(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD.partition("    args:")[0]) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "max_running",
            "max_runing",
            "c.yaml:11: applications[0].args.engine.max_runing: unknown field; did you mean `max_running`?",
        ),
        ("port: 8123", "prot: 8123", "c.yaml:4: http_options.prot: unknown field; did you mean `port`?"),
        ("http_options", "http_option", "c.yaml:2: http_option: unknown field; did you mean `http_options`?"),
        (
            "    route_prefix: /",
            "    qqq: a",
            "c.yaml:8: applications[0].qqq: unknown field; known here: name, route_prefix, import_path",
        ),
        (
            "max_running: 4",
            "max_running: 0",
            "c.yaml:11: applications[0].args.engine.max_running: Input should be greater than or equal to 1",
        ),
        (
            "max_running: 4",
            "kv_cache_memory: 2 bananas",
            "c.yaml:11: applications[0].args.engine.kv_cache_memory: '2 bananas' is not a size; write",
        ),
        (
            "max_running: 4",
            "max_running: {a: 1}",
            "c.yaml:11: applications[0].args.engine.max_running: Input should be a valid integer",
        ),
        (
            "      engine:\n        max_running: 4",
            "      model_server: {num_replicas: 2, autoscaling: {}}",
            "c.yaml:10: applications[0].args.model_server: give num_replicas or autoscaling, not both",
        ),
        (
            "      engine:\n        max_running: 4",
            "      model:\n        device_map: everywhere",
            "c.yaml:11: applications[0].args.model.device_map: Input should be 'auto', 'balanced'",
        ),
        (
            "      engine:\n        max_running: 4",
            "      api: {max_streams: 1024}",
            "c.yaml:9: applications[0].args: api.max_streams 1024 must be lower than ingress.max_ongoing_requests 1024",
        ),
        (
            "      engine:\n        max_running: 4",
            "      ingress: {max_ongoing_requests: 256}",
            "c.yaml:9: applications[0].args: api.max_streams 512 must be lower than ingress.max_ongoing_requests 256",
        ),
        ("      engine:\n        max_running: 4", "      3", "c.yaml:9: applications[0].args: "),
        (
            "serve_app.app:build",
            "serve_app.app.build",
            "c.yaml:7: applications[0].import_path: 'serve_app.app.build' does not exist; did you mean serve_app.app:",
        ),
        ("serve_app.app:build", "elsewhere:app", "c.yaml:5: applications: no application has `import_path: serve_app"),
        ("    import_path: serve_app.app:build\n", "", "c.yaml:6: applications[0].import_path: Field required"),
        ("port: 8123", "port: http", "c.yaml:4: http_options.port: Input should be a valid integer"),
        ("port: 8123", "port: 80000", "c.yaml:4: http_options.port: there is no port 80000"),
        (
            "port: 8123",
            "port: 9000\ngrpc_options:\n  grpc_servicer_functions: [a.b]",
            "c.yaml:5: grpc_options.port: HTTP has port 9000 too; choose another one for gRPC",
        ),
        ("route_prefix: /", "route_prefix: /a/", "c.yaml:8: applications[0].route_prefix: '/a/' must not end with"),
        ("HeadOnly", "Everywhere", "c.yaml:1: proxy_location: "),
        ("route_prefix: /", "route_prefix: chat", "c.yaml:8: applications[0].route_prefix: "),
    ],
)
def test_problems(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    found = problems(tmp_path, GOOD.replace(old, new, 1))
    assert any(problem.startswith(said) for problem in found), found


def test_every_problem_is_said_once(tmp_path: Path) -> None:
    text = GOOD.replace("max_running: 4", "max_running: 0\n        treads: 2\n      modle: {}")
    found = problems(tmp_path, text)
    assert len(found) == 3
    path = tmp_path / "c.yaml"
    with pytest.raises(CommandError) as raised:
        load(path)
    assert raised.value.status == 2
    assert str(raised.value).count("\n") == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "c.yaml:1: not YAML: while parsing a flow sequence"),
        ("a: 1\n b: 2", "c.yaml:2: not YAML:"),
        ("\ta: 1", "c.yaml:1: not YAML:"),
        ("a: \x07", "c.yaml: not YAML:"),
        ("a: 2024-13-45", "c.yaml: not YAML:"),
        ("[" * 5000, "c.yaml: not YAML:"),
        ("a: 1\nb: 2\na: 3", "c.yaml:3: `a` is given twice"),
        ("a: &x [*x]", "c.yaml:1: an anchor contains itself"),
        ("a: !!python/object:os.system x", "c.yaml:1: not YAML: could not determine a constructor"),
        ("", "c.yaml: a Serve config is a mapping with `applications:`"),
        ("- a", "c.yaml:1: a Serve config is a mapping"),
        ("x", "c.yaml:1: a Serve config is a mapping"),
        ("applications: 3", "c.yaml:1: applications: Input should be a valid list"),
        ("applications: [3]", "c.yaml:1: applications[0]: Input should be a valid dictionary"),
        ("applications: []", "c.yaml:1: applications: no application has"),
        ("proxy_location: HeadOnly", "c.yaml:1: applications: Field required"),
        ("1: 2\napplications: []", "c.yaml:1: 1: unknown field"),
        ("? [a]\n: 1", "c.yaml:1: not YAML:"),
    ],
)
def test_rubbish(tmp_path: Path, text: str, said: str) -> None:
    found = problems(tmp_path, text)
    assert any(problem.startswith(said) for problem in found), found


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"there is no file .*nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(CommandError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(CommandError, match="is not UTF-8 text"):
        load(tmp_path / "c.yaml")


def test_another_application_beside_ours_is_left_alone(tmp_path: Path) -> None:
    other = "  - {name: b, import_path: 'their:app', route_prefix: /b, args: {anything: 1}}\n"
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + other)
    assert load(path).foreign == ("b",)


def test_paths() -> None:
    assert render_path(("applications", 0, "args", "x")) == "applications[0].args.x"
    assert render_path(()) == ""
