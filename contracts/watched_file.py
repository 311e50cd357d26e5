"""Re-read a file when it changes, and keep the last good content while it is broken or missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Content = TypeVar("Content")


class WatchedFile(Generic[Content]):
    """The content of a file as `load` reads it.

    Attributes:
        content: what was read last without an error; None if nothing ever was.
        error: why the file as it is now cannot be used; None when it can.

    Args:
        path: the file.
        load: returns the content; raises ValueError with a sentence for a file that cannot be used, or OSError.
        missing: the sentence for a file that is not there.
    """

    def __init__(self, path: Path, load: Callable[[Path], Content], *, missing: str) -> None:
        self.content: Content | None = None
        self.error: str | None = None
        self._path = path
        self._load = load
        self._missing = missing
        self._seen: tuple[int, int, int] | None = None

    def refresh(self) -> bool:
        """Read the file if it is another than the one read last; return True if `content` or `error` has changed.

        A file that could not be read is tried again each time: what was wrong may be its mode. One whose content cannot
        be used is tried again once it changes.
        """
        before = self.error
        try:
            facts = self._path.stat()
            seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            if seen == self._seen:
                return False
            self._seen = None
            content = self._load(self._path)
        except FileNotFoundError:
            self._seen, self.error = None, self._missing
        except OSError as error:
            self._seen, self.error = (
                None,
                f"{self._path.name} cannot be read ({error.strerror or type(error).__name__})",
            )
        except ValueError as error:
            self._seen, self.error = seen, str(error)
        else:
            self._seen, self.content, self.error = seen, content, None
            return True
        return self.error != before
