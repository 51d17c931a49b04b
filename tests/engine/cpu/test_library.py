"""Where the compiled CPU kernels come from: a private place, tried before they are trusted, and said when they fail."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_model

from serve_app.engine.cpu.compiler import Compiler, compiler_command, processor_key
from serve_app.engine.cpu.library import Kernels, load_kernels
from serve_app.engine.engine import Engine
from serve_app.engine.engine_error import EngineError

COPY = 'cp "$LIBRARY" "$out"'
"""In place of compiling, which takes seconds."""
ILLEGAL = """echo '__attribute__((constructor)) void run() { __builtin_trap(); }' |
    g++ -x c++ -shared -fPIC -o "$out" -"""
KILLED = ILLEGAL.replace("__builtin_trap()", "raise(SIGKILL)").replace("echo '", "echo '#include <csignal>\n")


@pytest.fixture
def use_compiler(
    kernels: Kernels, kernel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Have $CXX, of two words, answer as g++ does, but make libraries by a line of shell. Returns its list of calls."""
    (library,) = kernel_folder.rglob("*.so")
    monkeypatch.setenv("LIBRARY", str(library))
    calls = tmp_path / "calls"
    calls.touch()

    def use(make: str) -> Path:
        script = tmp_path / "compiler.sh"
        script.write_text(f"""\
case " $* " in *" -shared "*) ;; *) exec g++ "$@" ;; esac
echo compiled >> {calls}
while [ "$1" != -o ]; do shift; done
out=$2
{make}
""")
        monkeypatch.setenv("CXX", f"/bin/sh {script}")
        return calls

    return use


def compilations(calls: Path) -> int:
    return calls.read_text().count("compiled")


def test_it_is_kept_in_a_folder_that_is_this_users_alone(use_compiler: Callable[[str], Path], tmp_path: Path) -> None:
    calls, cache = use_compiler(COPY), tmp_path / "cache"
    before = os.umask(0)
    try:
        load_kernels(cache)
    finally:
        os.umask(before)
    (made,) = cache.rglob("*.so")
    assert made.parent == cache / str(os.geteuid())
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made.parent, made)] == [0o700, 0o700]
    load_kernels(cache)
    assert compilations(calls) == 1, "the second time it was there"


def test_its_name_says_for_which_processor_whatever_the_compiler_says(
    use_compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, cache = use_compiler(COPY), tmp_path / "cache"
    load_kernels(cache)
    monkeypatch.setattr("serve_app.engine.cpu.library.processor_key", lambda: "another processor")
    load_kernels(cache)
    assert compilations(calls) == 2
    assert len(list(cache.rglob("*.so"))) == 2


@pytest.mark.parametrize("damage", ["others may write", "not whole", "another user's", "a link"])
def test_what_can_not_be_trusted_is_compiled_again(
    damage: str, use_compiler: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls, cache = use_compiler(COPY), tmp_path / "cache"
    load_kernels(cache)
    (made,) = cache.rglob("*.so")
    if damage == "others may write":
        made.chmod(0o777)
    elif damage == "not whole":
        cut = tmp_path / "cut.so"  # a file of its own: this process has the other one mapped, and would end by SIGBUS
        cut.write_bytes(made.read_bytes()[:100])
        cut.chmod(0o700)
        cut.replace(made)
    elif damage == "a link":
        made.rename(tmp_path / "elsewhere.so")
        made.symlink_to(tmp_path / "elsewhere.so")
    elif os.geteuid() == 0:
        os.chown(made, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    load_kernels(cache)
    assert compilations(calls) == 2
    assert "is compiled again" in caplog.text
    load_kernels(cache)
    assert compilations(calls) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(
    use_compiler: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_compiler(COPY)
    folder = tmp_path / "cache" / str(os.geteuid())
    folder.mkdir(parents=True)
    os.chown(folder, 12345, -1)
    load_kernels(tmp_path / "cache")
    assert not list(folder.iterdir())
    assert "belongs to another user" in caplog.text


def test_where_nothing_can_be_kept_each_start_compiles(
    use_compiler: Callable[[str], Path], make_engine: Callable[..., Engine], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    use_compiler(COPY)
    (tmp_path / "file").touch()
    engine = make_engine(model=tiny_model("llama"), kernel_cache=tmp_path / "file" / "kernels")
    assert engine.capacity.attention_backend == "cpu"
    assert "each start compiles them" in caplog.text


def test_an_instruction_that_this_processor_lacks_ends_another_process(
    use_compiler: Callable[[str], Path], make_engine: Callable[..., Engine], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    use_compiler(ILLEGAL)
    engine = make_engine(model=tiny_model("llama"), kernel_cache=tmp_path / "cache")
    assert engine.capacity.attention_backend == "sdpa"
    (note,) = engine.capacity.notes
    assert "SIGILL" in note
    assert "torch's kernels are used" in note
    assert (note, logging.WARNING) in [(record.getMessage(), record.levelno) for record in caplog.records]
    assert not list((tmp_path / "cache").rglob("*.so")), "nor is it kept for the next start"


def test_a_trial_that_is_killed_says_nothing_of_the_processor(
    use_compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    use_compiler(KILLED)
    with pytest.raises(EngineError, match=r"^a trial of the CPU kernels was ended by SIGKILL$"):
        load_kernels(tmp_path / "cache")


def test_a_trial_that_fails_is_told(use_compiler: Callable[[str], Path], tmp_path: Path) -> None:
    use_compiler('echo "void nothing() {}" | g++ -x c++ -shared -fPIC -o "$out" -')
    with pytest.raises(EngineError, match=r"a trial of the CPU kernels failed: .*undefined symbol: serve_app_pack"):
        load_kernels(tmp_path / "cache")


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("/nowhere/g++ -v", r"/nowhere/g\+\+ -v can't be run to compile the CPU kernels: No such file"),
        ("'g++", r"CXX='g\+\+ is no command"),
        ("g++ -fno-such-flag", "failed on the CPU kernels: .*-fno-such-flag"),
    ],
)
def test_a_compiler_that_is_none_is_named(
    compiler: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(EngineError, match=said):
        load_kernels(tmp_path)


def test_no_compiler_is_blamed_where_the_system_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(EngineError, match="the fast CPU kernels are for Linux only"):
        compiler_command()
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match="apt install g"):
        compiler_command()


@pytest.mark.usefixtures("kernels")
def test_a_compilers_key_changes_with_what_it_makes_of_native() -> None:
    assert Compiler(["g++"]).key == Compiler(["g++"]).key
    assert Compiler(["g++"]).key != Compiler(["g++", "-mno-fma"]).key


def test_a_processors_key_is_what_it_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine.cpu.compiler._CPUINFO", tmp_path / "cpuinfo")
    entry = "processor\t: {}\nmodel name\t: X\ncpu MHz\t\t: {}\nflags\t\t: fpu sse2 {}\n\n"

    def key(*entries: str) -> str:
        (tmp_path / "cpuinfo").write_text("".join(entries))
        return processor_key()

    assert key(entry.format(0, 2100, "avx2")) == key(entry.format(0, 3400, "avx2"), entry.format(1, 800, "avx2"))
    assert key(entry.format(0, 2100, "avx2")) != key(entry.format(0, 2100, "avx2 avx512f"))
    (tmp_path / "cpuinfo").unlink()
    assert processor_key(), "some systems don't tell"
