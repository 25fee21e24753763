"""Provide a config tree whose errors say what is wrong with a file or override, and what to do."""

import difflib
import logging
from collections.abc import Iterator
from typing import Any

import yaml
from fvcore.common.config import CfgNode as _CfgNode

from refbn_d2.utils.errors import ConfigError

logger = logging.getLogger(__name__)

OTHER_ENGINE = "run it on Detectron2 (--engine detectron2)"


class CfgNode(_CfgNode):
    """fvcore's CfgNode (`_BASE_`, KEY VALUE overrides, freeze) with helpful errors.

    Differences from fvcore's:

    - One error lists everything that is wrong in a file or a list of overrides, with the closest
      known key or the expected type.
    - An integer is accepted for a float.
    - Code in a YAML file is never executed.
    """

    # What to do about an unknown key, and about code.
    UNKNOWN_KEY = (
        "If it belongs to an architecture or project of Detectron2 that is not supported here, "
        + OTHER_ENGINE
    )
    CODE = f"Write the value out, or {OTHER_ENGINE}"

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and its `_BASE_` files.

        Raises:
            FileNotFoundError: the file or one of its bases does not exist.
            ConfigError: a file is unreadable, is not YAML or contains code, or a key is unknown or
                its value is of the wrong type.
        """
        if allow_unsafe:
            raise ConfigError(
                f"{cfg_filename}: code in YAML is never run here; leave allow_unsafe out"
            )
        loaded = self.load_yaml_with_base(str(cfg_filename))
        self._merge(leaves(loaded), source=str(cfg_filename))

    def merge_from_other_cfg(self, cfg_other: dict) -> None:
        """Merge another config tree or nested dict.

        Raises:
            ConfigError: a key is unknown, or its value is of the wrong type.
        """
        self._merge(leaves(cfg_other), source="config")

    def merge_from_list(self, cfg_list: list) -> None:
        """Merge overrides [KEY, VALUE, KEY, VALUE, ...], with values as Python literals.

        Raises:
            ConfigError: a value is missing, a key is unknown, or a value is of the wrong type.
        """
        if len(cfg_list) % 2:
            raise ConfigError(
                f"overrides are KEY VALUE pairs, but the last, {cfg_list[-1]!r}, has no VALUE "
                f"in: {' '.join(map(str, cfg_list))}"
            )
        self._merge(zip(cfg_list[0::2], cfg_list[1::2], strict=True), source="overrides")

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Load a YAML file as fvcore does, which calls this for each `_BASE_`.

        Raises:
            FileNotFoundError: the file or one of its bases does not exist.
            ConfigError: a file is unreadable, is not YAML or contains code. Errors name the file.
        """
        cls._check_file(filename)
        try:
            return super().load_yaml_with_base(filename, allow_unsafe=False)
        except AssertionError as e:  # fvcore: a plain value in the base, a section here
            raise ConfigError(f"config file {filename}: {e}") from e
        except RecursionError:
            raise ConfigError(f"config file {filename}: its _BASE_ files form a cycle") from None

    @classmethod
    def _check_file(cls, filename: str) -> None:
        try:
            with cls._open_cfg(filename) as f:
                content = yaml.load(f, Loader=_LoaderWithoutCode)
        except FileNotFoundError as e:
            raise FileNotFoundError(
                f"config file {filename} does not exist: check the path (`_BASE_` is relative "
                "to the file that names it)"
            ) from e
        except UnicodeDecodeError as e:
            raise ConfigError(f"config file {filename} is not a text file: {e}") from e
        except OSError as e:
            raise ConfigError(f"config file {filename} cannot be read: {e}") from e
        except yaml.YAMLError as e:
            raise ConfigError(f"config file {filename} is not valid YAML: {e}") from e
        if not isinstance(content, dict):
            holds = "nothing" if content is None else f"a {type(content).__name__}"
            raise ConfigError(f"config file {filename} contains {holds}, not `KEY: value` lines")
        code = [f"{key}: {value}" for key, value in leaves(content) if _is_code(value)]
        if code:
            raise ConfigError(f"{_code_message(filename, code, content)}. {cls.CODE}")

    def _merge(self, pairs, source: str) -> None:
        """Set all (full key, raw value) pairs, or set none and raise one ConfigError."""
        checked, problems = [], []
        for key, raw in pairs:
            try:
                checked.append((key, self._checked(str(key), raw)))
            except ConfigError as e:
                problems.append(str(e))
        if problems:
            raise ConfigError("\n  ".join([f"{source}:", *problems]))
        for key, value in checked:
            node, name = self._parent(key)
            setattr(node, name, value)

    def _parent(self, key: str) -> "tuple[CfgNode, str] | tuple[None, str]":
        *path, name = key.split(".")
        node = self
        for part in path:
            node = node.get(part)
            if not isinstance(node, CfgNode):
                return None, name
        return (node, name) if name in node else (None, name)

    def _checked(self, key: str, raw: Any) -> Any:
        node, name = self._parent(key)
        if node is None:
            raise ConfigError(self._unknown(key))
        old = node[name]
        if isinstance(old, CfgNode):
            if raw == {}:
                return old
            inner = ", ".join(f"{key}.{k}" for k in list(old)[:3])
            raise ConfigError(f"{key} = {raw!r}: {key} is a section; set its keys ({inner}, ...)")
        value = self._decode_cfg_value(raw)
        if old is None or type(value) is type(old):
            return value
        if isinstance(old, str) and isinstance(raw, str):
            return raw  # a name or path that parses as a number
        if isinstance(old, float) and type(value) is int:
            return float(value)
        if isinstance(old, tuple | list) and isinstance(value, tuple | list):
            return type(old)(value)
        expected = "tuple or list" if isinstance(old, tuple | list) else type(old).__name__
        raise ConfigError(
            f"{key} = {value!r} is of type {type(value).__name__}; expected: {expected} "
            f"(such as {old!r})"
        )

    def _unknown(self, key: str) -> str:
        close = difflib.get_close_matches(key, [k for k, _ in leaves(self)], n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{key}: no such key; {hint}{self.UNKNOWN_KEY}"


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) for every leaf of a nested dict; an empty dict is a leaf."""
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{full}.")
        else:
            yield full, value


class _LoaderWithoutCode(yaml.SafeLoader):
    """Read a `!!python/...` tag as its own name, so that the error can name the key."""


class _Code(str):
    pass


_LoaderWithoutCode.add_multi_constructor(
    "tag:yaml.org,2002:python/", lambda loader, suffix, node: _Code(f"!!python/{suffix}")
)


def _is_code(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_code, value))
    return isinstance(value, _Code)


def _code_message(filename: str, code: list[str], content: dict) -> str:
    model = content.get("MODEL")
    architecture = model.get("META_ARCHITECTURE") if isinstance(model, dict) else None
    for_whom = f" (MODEL.META_ARCHITECTURE = {architecture!r})" if architecture else ""
    return (
        f"config file {filename}{for_whom}: {'; '.join(code)}: code in YAML is not run here; only "
        "plain values are allowed"
    )
