"""JSON files that others have written: read, or named in one line."""

import json
import pathlib
from typing import Any


def read_object(path: pathlib.Path, error: type[ValueError]) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: of the file.
      error: what is raised where the file is not what it should be.

    Raises:
      ValueError: as ``error``; it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read ({cause}); fetch it again") from cause
    if not isinstance(found, dict):
        raise error(f"{path} holds no JSON object; fetch it again")
    return found
