"""serve-app check and fetch, on a tiny model in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import serve_hub
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from serve_app.cli import check
from serve_app.cli.check import size, streams
from serve_app.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and 2 KV heads of width 8, context 64; its tokenizer is only there to be found."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    return folder


def write(tmp_path: Path, **args: object) -> str:
    path = tmp_path / "c.yaml"
    application = {"name": "a", "route_prefix": "/", "import_path": "serve_app.app:build", "args": args}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return str(path)


def test_each_application_is_named_with_its_own_address(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(write(tmp_path, model={"source": str(model)}))
    document = yaml.safe_load(config.read_text())
    document["applications"] += [document["applications"][0] | {"name": "b", "route_prefix": "/b"}]
    config.write_text(yaml.safe_dump(document))
    assert main(["check", str(config)]) == 0
    output = capsys.readouterr().out
    assert "a at http://127.0.0.1:8000\n" in output
    assert "b at http://127.0.0.1:8000/b\n" in output


def test_it_says_what_a_replica_needs(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, model={"source": str(model)}, engine={"kv_cache_memory": "1MiB", "max_running": 100})
    assert main(["check", config]) == 0
    output = capsys.readouterr().out
    assert f"{config} is valid." in output
    assert "a at http://127.0.0.1:8000" in output
    assert "model         tiny, in " in output
    assert "1 MB of KV cache" in output
    # 2 layers x 2 heads x 8 x 2 x 4 bytes = 256 a token: 4,096 tokens in a MiB
    assert "holds         64 streams of 64 tokens, or 100 of 40" in output
    assert "model server  1 x (1 CPU)" in output


SHA = "ab" * 32


@pytest.mark.parametrize(
    ("keys", "host", "said", "status"),
    [
        (f"keys: [{{name: a, sha256: {SHA}}}]", "0.0.0.0", "keys          1, in ", 0),
        ("keys: []", "127.0.0.1", "has no keys, so nobody can use the service", 0),
        (None, "127.0.0.1", "is missing; `serve-app keys create NAME --file ", 0),
        ("keys: 3", "127.0.0.1", "keys.yaml:1: keys: Input should be a valid list", 2),
        ("", "0.0.0.0", "warning: everybody who reaches 0.0.0.0 can use the service", 0),
        ("", "127.0.0.1", "keys          none are asked for\n", 0),
    ],
)
def test_it_says_who_may_use_the_service(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], keys: str | None, host: str, said: str, status: int
) -> None:
    path = tmp_path / "keys.yaml"
    args: dict[str, object] = {"model": {"source": str(model)}}
    if keys != "":
        args["auth"] = {"keys_file": str(path)}
    if keys:
        path.write_text(keys)
    config = Path(write(tmp_path, **args))
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"http_options": {"host": host}}))
    assert main(["check", str(config)]) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert ("everybody" in printed.out) == ("everybody" in said)


def test_on_a_gpu_it_says_what_a_gib_holds(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_gpus", lambda: 1)
    scaling = {"min_replicas": 2, "max_replicas": 5}
    config = write(
        tmp_path,
        model={"source": str(model), "dtype": "bfloat16"},
        model_server={"num_gpus": 1, "num_cpus": 0, "autoscaling": scaling, "resources": {"A100": 0.5}},
        ingress={"num_cpus": 0},
    )
    assert main(["check", config]) == 0
    output = capsys.readouterr().out
    assert "8,388,608 tokens in each GiB of KV cache; a stream has up to 64" in output
    assert "model server  2 to 5 x (0 CPU, 1 GPU, 0.5 A100)" in output
    assert "warning: GPUs needed: 2; this machine has 1" in output


def test_too_few_cpus_is_a_warning(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, model={"source": str(model)}, model_server={"num_cpus": 10_000})
    assert main(["check", config]) == 0
    assert "warning: CPUs needed: 10001; this machine has" in capsys.readouterr().out


def test_the_address_of_a_cluster_that_has_ended_is_a_warning(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    assert main(["check", write(tmp_path, model={"source": str(model)})]) == 0
    assert "ray_current_cluster names a Ray cluster that does not answer any more (127." in capsys.readouterr().out


def test_cpus_that_may_not_be_used_are_not_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "schedulable_cpus", lambda: 2)
    monkeypatch.setattr(check.os, "cpu_count", lambda: 64)
    config = write(tmp_path, model={"source": str(model)}, model_server={"num_cpus": 2})
    assert main(["check", config]) == 0
    assert "warning: CPUs needed: 3; of this machine's 64 2 may be used here" in capsys.readouterr().out


def test_a_cache_is_counted_as_far_as_requests_can_fill_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, model={"source": str(model)}, engine={"kv_cache_memory": "12GiB", "max_running": 1000})
    assert main(["check", config]) == 0
    assert "+ 16 MB of KV cache" in capsys.readouterr().out


@pytest.mark.parametrize(("free_gb", "short"), [(8.6, True), (8.7, False)])
def test_too_little_memory_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free_gb: float, short: bool
) -> None:
    monkeypatch.setattr(check, "available_memory_bytes", lambda: int(free_gb * 1e9))
    config = write(
        tmp_path,
        cache_dir=str(tmp_path / "cache"),
        engine={"kv_cache_memory": "2GB"},
        model_server={"num_cpus": 0, "autoscaling": {"min_replicas": 3}},
        ingress={"num_cpus": 0},
    )
    assert main(["check", config]) == 0
    said = "warning: memory needed: 8.66 GB, and some for Ray and the ingress; this machine has 8.60 GB free; lower"
    assert (said in capsys.readouterr().out) == short, "3 x (538 MB + 2 GB + 350 MB)"


@pytest.mark.parametrize(("server", "free"), [({"num_gpus": 1}, 1), ({}, None)])
def test_memory_is_not_missed_on_a_gpu_or_where_it_is_not_known(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    server: dict[str, int],
    free: int | None,
) -> None:
    monkeypatch.setattr(check, "available_memory_bytes", lambda: free)
    assert main(["check", write(tmp_path, model={"source": str(model)}, model_server=server)]) == 0
    assert "memory needed" not in capsys.readouterr().out


def test_a_missing_compiler_is_a_warning_where_it_would_be_used(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("serve_app.engine.cpu.compiler.shutil.which", lambda name: None)
    for settings, warned in (({}, True), ({"engine": {"cpu_kernels": False}}, False)):
        assert main(["check", write(tmp_path, model={"source": str(model)}, **settings)]) == 0
        assert ("warning: there is no C++ compiler" in capsys.readouterr().out) == warned


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this machine's Hugging Face cache or asks the real hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    use_hub(monkeypatch, "http://127.0.0.1:9")


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_that_is_not_here_is_planned_by_its_config(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path, model={"source": "team/model"}, engine={"kv_cache_memory": "1MiB", "max_running": 100})
    with serve_hub(model) as hub:
        use_hub(monkeypatch, hub.url)
        assert main(["check", config]) == 0
        assert "config.json" in hub.fetched
        assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    output = capsys.readouterr().out
    assert "model         team/model: not on this machine\n" in output
    numbers = sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(model).parameters())
    assert f"a replica     {size(4 * numbers)} of weights + 1 MB of KV cache" in output
    assert "holds         64 streams of 64 tokens, or 100 of 40" in output

    assert main(["check", config]) == 0
    assert capsys.readouterr().out == output, "what was fetched once needs no network"


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_the_size_of_a_hub_model_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", write(tmp_path, model={"source": "team/model"})]) == 0
    output = capsys.readouterr().out
    assert "team/model: not on this machine, and its size is unknown: The hub http://127.0.0.1:9 can't be re" in output
    assert "a replica" not in output
    assert "model server  1 x (1 CPU)" in output


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_that_can_not_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "config.json").write_text('{"model_type": "bloom"}')
    with serve_hub(repository) as hub:
        use_hub(monkeypatch, hub.url)
        assert main(["check", write(tmp_path, model={"source": "team/model"})]) == 2
    assert "application 'a': BloomForCausalLM" in capsys.readouterr().err


def test_the_demo_model_in_an_empty_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write(tmp_path, cache_dir=str(tmp_path / "cache"))]) == 0
    output = capsys.readouterr().out
    assert "model         demo: not on this machine\n" in output
    assert "a replica     538 MB of weights + 1.07 GB of KV cache" in output
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("source", "said"), [("./nowhere/x.gguf", "There is no file"), ("a b c", "is no folder on this machine")]
)
def test_a_source_that_is_none(tmp_path: Path, source: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write(tmp_path, model={"source": source})]) == 2
    assert said in capsys.readouterr().err


def test_a_context_longer_than_the_models_own(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write(tmp_path, model={"source": str(model), "max_model_len": 65})]) == 2
    assert "application 'a'" in capsys.readouterr().err


def test_fetch_a_folder(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(model)]) == 0
    assert capsys.readouterr().out == f"tiny: {model}\n"
    assert main(["fetch", write(tmp_path, model={"source": str(model)})]) == 0
    assert capsys.readouterr().out == f"tiny: {model}\n"


def test_fetch_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "./nowhere/x.gguf"]) == 1
    assert "There is no file" in capsys.readouterr().err


def test_fetch_a_revision_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", write(tmp_path), "--revision", "main"]) == 2
    assert "model.revision" in capsys.readouterr().err


def test_streams() -> None:
    assert streams(23_301, 8192, 16) == "2 streams of 8,192 tokens, or 16 of 1,456"
    assert streams(100_000, 1000, 4) == "4 streams of 1,000 tokens"
    assert streams(500, 1000, 4) == "1 stream of 500 tokens, or 4 of 125"


def test_sizes() -> None:
    assert size(2**30) == "1.07 GB"
    assert size(538_000_000) == "538 MB"
