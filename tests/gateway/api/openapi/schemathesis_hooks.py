"""What Schemathesis takes for wrong and HTTP cannot carry, so that no server could refuse it."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Not a form whose only fault is a file that is null or a number: on the wire it is the bytes of that word."""
    body = case.body
    if case.media_type != "multipart/form-data" or not isinstance(body, dict) or set(body) != {"file"}:
        return True
    files = body["file"] if isinstance(body["file"], list) else [body["file"]]
    return all(isinstance(file, bytes | str) or hasattr(file, "data") for file in files)
