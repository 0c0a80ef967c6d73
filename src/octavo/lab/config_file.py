"""Reading a configuration: YAML in either shape, overrides, and errors of one line that name the key, what it got and the fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from octavo.lab.config import Config
from octavo.lab.trainer_file import TrainerFile
from octavo.names import nearest

__all__ = ["ConfigError", "dump", "read", "read_text"]


class ConfigError(ValueError):
    """A configuration that cannot be used as it is."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key may stand once, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise ConfigError(f"line {key.start_mark.line + 1}: keys are words, got {name!r}; put it in quotes")
            if name in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: {name!r} stands twice; remove one")
            seen.add(name)
        return dict(super().construct_mapping(node, deep))


_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+|[-+]?\.\d[\d_]*[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read(path: str | Path, overrides: Sequence[str] = (), **settings: Any) -> Config:
    """The configuration in a file, with overrides.

    overrides: `section.key`, `value`, `section.key`, `value` ... or `section.key=value`, values as YAML has them, keys of the file's own
    shape.
    settings: `runconfig` keys from the command line, None for none.
    Raises ConfigError for a file that is missing, no YAML, or at odds with the schema.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, (other.name for other in path.parent.glob("*.y*ml")))
        raise ConfigError(f"{path}: no such file{near or '; check the path'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file") from None
    return read_text(text, str(path), overrides, **settings)


def read_text(text: str, source: str, overrides: Sequence[str] = (), **settings: Any) -> Config:
    """`read` of what a file says; source: what errors call it."""
    try:
        tree = _parse(text)
        if tree is None:
            tree = {}
        if not isinstance(tree, dict):
            raise ConfigError(f"sections of key: value pairs are needed, got {type(tree).__name__}; see params.yaml")
        for key, value in _pairs(overrides):
            _put(tree, key.split("."), value, key)
        newer = "trainer" in tree
        for key, value in settings.items():
            if value is not None:
                _put(tree, list(_place(newer, key)), value, key)
        if newer:
            tree = TrainerFile.model_validate(tree).sections()
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_line(error, newer)}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}not YAML ({problem}); correct the line") from None


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Overrides as (key, value)."""
    words, found = list(overrides), []
    while words:
        key = words.pop(0)
        if "=" in key:
            key, _, value = key.partition("=")
        elif words:
            value = words.pop(0)
        else:
            raise ConfigError(f"override {key!r} has no value; write {key} VALUE, or --set {key}=VALUE")
        if not all(key.split(".")):
            raise ConfigError(f"override {key!r} is no section.key; write for example optimizer.learning_rate 0.01")
        found.append((key, _parse(value)))
    return found


def _put(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for number, part in enumerate(path[:-1], 1):
        inner = tree.setdefault(part, {})
        if inner is None:
            inner = tree[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {key!r}: {'.'.join(path[:number])} is a value, not a section; override it whole"
            )
        tree = inner
    tree[path[-1]] = value


def _place(newer: bool, key: str) -> tuple[str, ...]:
    """Where a setting of the command line stands in the file."""
    if not newer:
        return "runconfig", key
    return (
        ("trainer", "init", key) if key in ("model_dir", "seed", "num_replicas") else ("trainer", "init", "loop", key)
    )


_NEWER = {
    "model": "trainer.init.model",
    "optimizer": "trainer.init.optimizer",
    "train_input": "trainer.fit.train_dataloader",
    "eval_input": "trainer.fit.val_dataloader",
}
"""Where the newer shape has a section."""


def _line(error: ValidationError, newer: bool) -> str:
    """The first of pydantic's findings as a line; the key of a wrong name before what follows from it."""
    found = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    first, path = found[0], [str(part) for part in found[0]["loc"]]
    model: type[BaseModel] = TrainerFile if error.title == TrainerFile.__name__ else Config
    place = [*path[:1], *_words(path[1:])]
    if newer and model is Config and place:
        place[0] = _NEWER.get(place[0], place[0])
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        fields = _fields(model, path[:-1])
        known = f"; known here: {', '.join(fields)}" if fields else "; remove it"
        return f"unknown key {key}{nearest(path[-1], fields) or known}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message if not key or message.startswith(key) else f"{key}: {message}"
    got = first["input"]
    kind = (
        message.removeprefix("Input ")
        .replace("a valid", "a")
        .replace("valid ", "")
        .replace(" a integer", " an integer")
    )
    return f"{key} {kind[0].lower()}{kind[1:]}, got {got!r} ({type(got).__name__}); correct the value"


def _words(path: list[str]) -> list[str]:
    """The parts of a location that stand in the file: pydantic adds the names of a union's types."""
    return [part for part in path if not re.search(r"[\[\(]|^(float|int|str|bool|none)$", part)]


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that a section knows."""
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        candidates = [inner, *getattr(inner, "__args__", ())]
        found = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not found:
            return []
        model = found[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def dump(config: Config) -> str:
    """The configuration, every key with its value, as YAML that `read_text` takes."""
    text: str = yaml.safe_dump(config.resolved(), sort_keys=False, default_flow_style=None, width=100)
    return text
