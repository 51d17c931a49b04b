from pathlib import Path

import pytest
import transformers as tf
from model_builders import ignore_progress, tiny_config
from transformers import LlamaForCausalLM

from serve_app.config import ModelConfig
from serve_app.models.errors import ModelError
from serve_app.models.planning import plan_replica
from serve_app.models.sizes import config_weights_bytes, kv_bytes_per_token, stored_weights_bytes
from serve_app.models.source import resolve


def test_weights_from_headers_and_from_the_config_agree_with_the_model(llama_folder: Path) -> None:
    numbers = sum(parameter.numel() for parameter in LlamaForCausalLM(tiny_config()).parameters())
    assert stored_weights_bytes(llama_folder, "float32") == numbers * 4
    assert stored_weights_bytes(llama_folder, "bfloat16") == numbers * 2
    assert config_weights_bytes(tiny_config(), "float32") == numbers * 4


def test_quantised_weights_keep_embeddings_and_norms(llama_folder: Path) -> None:
    kept = 2 * 300 * 32 + 5 * 32  # embeddings, head, norms
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    assert stored_weights_bytes(llama_folder, "bfloat16", "bnb-int8") == kept * 2 + linear
    assert stored_weights_bytes(llama_folder, "bfloat16", "bnb-nf4") == kept * 2 + linear * 9 // 16


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_config(), 2 * 2 * 8 * 2 * 4),
        (tiny_config(head_dim=16), 2 * 2 * 16 * 2 * 4),
        (tf.GPT2Config(n_layer=3, n_head=4, n_embd=32), 3 * 4 * 8 * 2 * 4),
        (tf.Gemma3TextConfig(num_hidden_layers=2, num_key_value_heads=1, head_dim=256), 2 * 256 * 2 * 4),
        (tf.GPTBigCodeConfig(n_layer=2, n_head=4, n_embd=32, multi_query=True), 2 * 8 * 2 * 4),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_kv_bytes_of_a_token(config: object, expected: int) -> None:
    assert kv_bytes_per_token(config, "float32") == expected
    assert kv_bytes_per_token(config, "float16") == expected // 2


def test_plan_of_a_replica(llama_folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(source=str(llama_folder), max_model_len=50)
    files = resolve(model, tmp_path, progress=ignore_progress)
    plan = plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000)
    assert plan.kv_bytes_per_token == 256
    assert plan.kv_capacity_tokens == 390
    assert (plan.context_tokens, plan.full_streams) == (50, 7)
    assert plan.total_bytes == stored_weights_bytes(llama_folder, "float32") + 100_000

    for path in llama_folder.glob("model*"):  # as an ingress, or `check` before anything is fetched, finds it
        path.unlink()
    assert plan_replica(files, model, has_gpu=False, kv_cache_bytes=100_000) == plan

    too_long = ModelConfig(source=str(llama_folder), max_model_len=65)
    with pytest.raises(ModelError, match="max_model_len is 65 and the model's own context is 64"):
        plan_replica(files, too_long, has_gpu=False, kv_cache_bytes=1)


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def _machine(tmp_path: Path, cgroup: str, available_kib: int = 8_000_000) -> Path:
    _write(tmp_path / "proc", meminfo=f"MemTotal: 9000000 kB\nMemAvailable: {available_kib} kB")
    _write(tmp_path / "proc" / "self", cgroup=cgroup)
    return tmp_path / "proc"


def test_memory_of_the_machine(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "0::/")
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 8_000_000 * 1024


def test_the_tightest_control_group_counts_v2(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "0::/pod/box")
    root = tmp_path / "cgroups"
    _write(root / "pod", memory__max=1_000_000, memory__current=700_000, memory__stat="anon 1\ninactive_file 50000")
    _write(root / "pod" / "box", memory__max="max", memory__current=1, memory__stat="anon 1")
    assert available_memory_bytes(proc, root) == 350_000


def test_control_group_v1_and_one_without_a_limit(tmp_path: Path) -> None:
    proc = _machine(tmp_path, "5:cpu:/x\n4:memory:/box")
    group = tmp_path / "cgroups" / "memory" / "box"
    stat = "total_inactive_file 10"
    _write(group, memory__limit_in_bytes=5000, memory__usage_in_bytes=1000, memory__stat=stat)
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 4010
    _write(group, memory__limit_in_bytes=2**63 - 4096)
    assert available_memory_bytes(proc, tmp_path / "cgroups") == 8_000_000 * 1024


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux")
def test_this_machine() -> None:
    available = available_memory_bytes()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
