"""The fields of a network out of a diffusers ``config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def read_fields(
    cls: type[Any], config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``cls`` is to be called with: the config's entries, then ``overrides``.

    Keys that begin with ``_`` are ignored, and lists become tuples, which hash.

    Raises:
      ValueError: a key that is no field of ``cls``; it names the key and the fields.
    """
    given = {k: v for k, v in config.items() if not k.startswith("_")} | {**overrides}
    known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    unknown = ", ".join(f"{k}={v!r}" for k, v in given.items() if k not in known)
    if unknown:
        name = cls.__name__
        raise ValueError(f"{name}: {unknown} is not supported; use {sorted(known)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
