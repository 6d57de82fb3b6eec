"""What is compared: methods by name, each a config with some fields of its own."""

import ast
import copy
import dataclasses
import difflib
import functools
import re
from typing import Any

from boot_jax.config import ConfigError, field_names, unknown
from boot_jax.evaluation.comparison import UNITS
from boot_jax.objectives.base import KINDS

#: Sections that all methods share: they decide the teacher and how it is scored.
SHARED = (
    *("compare", "data", "evaluation", "mesh", "network", "prompts", "run", "sample"),
    *("schedule", "seed", "teacher", "title"),
)
#: What the budget decides.
NUM_STEPS = "distill.num_steps"

# A name is also a folder's, and stands among others on the command line.
_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to distil.

    Attributes:
      name: of a variant of the config, or an ``objective.kind``.
      settings: fields that differ from the config's, as ``field=value``.
    """

    name: str
    settings: tuple[str, ...]

    def config(self, config: Any) -> Any:
        """A copy of a config, with the settings.

        Raises:
          ConfigError: a field is not known, is shared by all methods, or cannot have
            the value.
        """
        changed = copy.deepcopy(config)
        for setting in self.settings:
            try:
                _set(changed, setting)
            except ConfigError as error:
                raise ConfigError(f"compare.variants, {self.name}: {error}") from error
        return changed


def check_section(config: Any) -> None:
    """Refuses a ``compare`` section that makes no sense.

    Raises:
      ConfigError: in one line.
    """
    section = config.compare
    if section.budget not in UNITS:
        raise ConfigError(unknown("compare.budget", section.budget, UNITS))
    amounts, seeds = tuple(section.amounts), tuple(section.seeds)
    if not amounts or any(_is_no_number(amount) or amount <= 0 for amount in amounts):
        raise ConfigError(
            f"compare.amounts is {amounts}, but must be positive numbers, at least one"
        )
    if not seeds or any(not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise ConfigError(
            f"compare.seeds is {seeds}, but must be whole numbers from 0, at least one"
        )
    for name, given in (("amounts", amounts), ("seeds", seeds)):
        if len(set(given)) < len(given):
            raise ConfigError(f"compare.{name} is {given}, but must have each once")


def methods_of(config: Any) -> list[Method]:
    """The methods that ``compare.kinds`` names; all variants if it names none.

    Raises:
      ConfigError: a name is not known, or there is none.
    """
    variants = config.compare.variants.to_dict()
    for name in variants:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"compare.variants has {name!r}, but names are letters, digits and _, "
                "a letter first"
            )
    # A command line gives ``boot,direct`` as one string.
    given = ",".join(config.compare.kinds).replace(" ", "").split(",")
    names = list(dict.fromkeys(name for name in given if name)) or list(variants)
    if not names:
        raise ConfigError(
            "compare.kinds is empty; name what to compare, such as "
            f"--config.compare.kinds={','.join(KINDS[:2])}"
        )
    found = []
    for name in names:
        if name not in (*variants, *KINDS):
            raise ConfigError(unknown("compare.kinds", name, {*variants, *KINDS}))
        settings = variants.get(name, (f"objective.kind={name}",))
        found.append(
            Method(name, (settings,) if isinstance(settings, str) else settings)
        )
    return found


def _is_no_number(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def _set(config: Any, setting: str) -> None:
    path, equals, text = (part.strip() for part in setting.partition("="))
    if not equals:
        raise ConfigError(f"{setting!r} must be field=value")
    if path == NUM_STEPS or path.split(".")[0] in SHARED:
        raise ConfigError(
            f"{path} is the same for all methods, which share the teacher, the scoring "
            "and the budget; set it in the config itself"
        )
    fields = _fields(config)
    if path not in fields:
        near = difflib.get_close_matches(path, fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no field {path!r}{hint}")
    *sections, field = path.split(".")
    section = functools.reduce(lambda tree, name: tree[name], sections, config)
    try:
        section[field] = _parsed(text)
    except TypeError as error:
        has = type(section[field]).__name__
        raise ConfigError(f"{path} is {text!r}, but must be of type {has}") from error


def _fields(config: Any) -> list[str]:
    """The fields that a method may set."""
    return [path for path in field_names(config) if path.split(".")[0] not in SHARED]


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
