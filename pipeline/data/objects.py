"""A folder of images in an object store: class folders with or without splits, listed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import DataError
from ..params import DataParams, is_url
from .folder import scan_tree
from .labels import described
from .source import Samples, Stamp
from .stores import Objects, name_of
from .walk import ListedTree


class ObjectSource:
    """The images below a URL; the layouts are those of a folder."""

    def __init__(self, url: str, data: DataParams) -> None:
        self._url, self._data, self._store = url, data, Objects(url)
        self.name = name_of(url)

    @classmethod
    def at(cls, data: DataParams, _cache_dir: Path) -> ObjectSource | None:
        """The folder ``data.root``, if it is a URL."""
        return cls(str(data.root), data) if is_url(data.root) else None

    def list_samples(self) -> Samples:
        """As `scan_folder`; nothing is read.

        Raises:
            DataError: the store does not answer, or there is no image.
        """
        try:
            found = self._store.find(self._url)
        except OSError as error:
            raise DataError(
                "The store cannot be listed.",
                where=described(self._url),
                why=str(error.strerror or error),
                remedy="check data.root, the connection, and the store's own settings for who may read it",
            ) from error
        walker, probe = (ListedTree(found, self._data.extensions) for _ in range(2))
        samples = scan_tree(walker, probe, self._url, self._data.layout)
        return replace(samples, reads_at_once=self._store.reads_at_once)

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The object at ``path``."""
        return self._store.read(f"{self._url}/{path}")
