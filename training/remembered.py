"""What was found out about given inputs, kept in the cache, so that it is found out once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def remembered(cache: Path, kind: str, key: Any, find: Callable[[], Any]) -> Any:
    """What `find` gives, from a file in the cache if it was found before. `key` and what is found must be JSON.

    `kind` names the folder in the cache. A cache that cannot be written is left as it is.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = cache / kind / f"{digest[:32]}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = find()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}-{os.getpid()}")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(file)
    return found
