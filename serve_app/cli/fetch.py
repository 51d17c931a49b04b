"""Fetch and convert a model ahead of the first start. Give what `model.source` would be (`demo`, a Hugging Face hub id,
a folder, a .gguf file), or a config file, whose models are then fetched.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from serve_app.cli.command_error import CommandError
from serve_app.cli.config_file import load
from serve_app.cli.progress import ProgressLine
from serve_app.config import AppConfig, ModelConfig
from serve_app.models.cache import cache_directory
from serve_app.models.model_error import ModelError
from serve_app.models.source import ModelFiles, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", nargs="?", default="demo", metavar="SOURCE|CONFIG", help="a model or a config (default: demo)"
    )
    parser.add_argument("--revision", help="a hub commit, tag or branch")
    parser.add_argument("--cache-dir", help="where converted models are kept; overrides the config's cache_dir")


def run(arguments: argparse.Namespace) -> int:
    """Fetch, and print the folder of each model."""
    if arguments.source.endswith((".yaml", ".yml")):
        if arguments.revision:
            raise CommandError("--revision goes with a model; in a config it is `model.revision`", status=2)
        configs = [app.config for app in load(Path(arguments.source)).apps]
    else:
        configs = [AppConfig(model=ModelConfig(source=arguments.source, revision=arguments.revision))]
    for config in configs:
        if arguments.cache_dir:
            config = config.model_copy(update={"cache_dir": arguments.cache_dir})
        files = fetch(config)
        print(f"{files.name}: {files.folder}")
    return 0


def fetch(config: AppConfig) -> ModelFiles:
    """Make sure that the model is on this machine, and show the progress. Raises CommandError."""
    with ProgressLine() as line:
        try:
            files = resolve(config.model, cache_directory(config.cache_dir), progress=line.show)
        except ModelError as error:
            raise CommandError(str(error)) from error
    for note in files.notes:
        print(f"note: {note}")
    return files
