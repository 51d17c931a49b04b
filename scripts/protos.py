"""Writes the Python modules of proto/*.proto: `python scripts/protos.py`.

`tests/api/grpc/test_proto.py` fails when the modules in the repository are others.
"""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
SOURCES, TARGET = ROOT / "proto", ROOT / "serve_app" / "proto"


def generate(target: Path) -> None:
    """Write the modules and their type stubs into `target`. Raises `RuntimeError` as protoc does."""
    names = sorted(path.name for path in SOURCES.glob("*.proto"))
    outputs = [f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main(["protoc", f"--proto_path={SOURCES}", *outputs, *names]) != 0:
        raise RuntimeError("protoc has failed")


if __name__ == "__main__":
    generate(TARGET)
