"""What the commands that start or check a service have to know of its API keys."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.access.key_file import KeyFileError
from serve_app.access.keys import ApiKeys
from serve_app.api.http.guard import PROBE_SECRET, new_probe_secret
from serve_app.api.http.pages import is_loopback
from serve_app.cli.command_error import CommandError
from serve_app.cli.config_file import ConfigFile, ServedApp
from serve_app.home import expanded


def probe_environment(file: ConfigFile, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable with which this program may ask /ready of a service that it starts; none if that needs no key.

    Raises CommandError where the keys can't be read.
    """
    required = [_keys(app, environment).required for app in file.apps]
    return {PROBE_SECRET: new_probe_secret()} if any(required) else {}


def describe_keys(app: ServedApp, host: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """What `serve-app check` says of an application's keys, and a warning or "". Raises CommandError for a broken file.

    A file that is missing here is only worth a warning: the config may be for another machine.
    """
    path = app.config.auth.keys_file
    if path is not None and not expanded(path).exists():
        return f"keys          in {path}", f"{path} is missing; `serve-app keys create NAME --file {path}` makes it"
    keys = _keys(app, environment)
    if keys.required:
        warning = "" if keys else f"{path} has no keys, so nobody can use the service"
        return f"keys          {len(keys)}" + ("" if path is None else f", in {path} and the environment"), warning
    open_to_all = f"everybody who reaches {host} can use the service; set auth.keys_file to ask for API keys"
    return "keys          none are asked for", "" if is_loopback(host) else open_to_all


def _keys(app: ServedApp, environment: Mapping[str, str]) -> ApiKeys:
    path = app.config.auth.keys_file
    try:
        return ApiKeys(None if path is None else expanded(path), environment)
    except KeyFileError as error:
        raise CommandError(str(error), status=2) from error
