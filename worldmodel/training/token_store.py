"""Tokens of segments on disk, found by key.

    ROOT/KEY/about.json    what fixes the tokens of this folder; KEY is a hash of it
    ROOT/KEY/HASH.npy      a part: rows of a key and the tokens of a segment

A part is written under a temporary name and renamed, so that a kill leaves whole parts alone. It is never changed.
Nothing is unpickled.

Legend: M segments.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import check_regular, read_text, replacing
from data_pipelines.segments import Keys

PART_NAME = re.compile(r"[0-9a-f]{16}\.npy")
LEFTOVER_S = 3600.0
"""Age of an unfinished file that nobody writes any more: a part takes seconds."""
OPEN_PARTS = 256
"""Parts that stay open at a time: a process may have 1024 files."""


class TokenStore:
    """The tokens of segments, arrays of one shape and type, by key.

    Args:
        root: the folder of all stores.
        about: what fixes the tokens. Tokens are found again only by the same facts.
        shape: of a segment's tokens.
        dtype: of the tokens.
        max_bytes: limit of all stores in `root`.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(
        self, root: Path, about: Mapping[str, Any], shape: Sequence[int], dtype: np.dtype[Any], max_bytes: int
    ) -> None:
        text = json.dumps(dict(about) | {"shape": list(shape), "dtype": dtype.str}, indent=1, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._row = np.dtype([("key", "<u8"), ("tokens", dtype, tuple(shape))])
        self._max_bytes = max_bytes
        self._open = lru_cache(maxsize=OPEN_PARTS)(self._map)
        self._names: list[str] = []
        self._keys, self._places = np.empty(0, np.uint64), np.empty((0, 2), np.int64)
        described = self.folder / "about.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not described.exists():
                with replacing(described, is_shared=True) as file:
                    file.write(text.encode())
            if read_text(described) != text:
                raise UserError(f"{described} describes other tokens: delete the folder")
            self._remove_leftovers()
        except OSError as error:
            raise UserError(f"the folder {self.folder} cannot be used: {error.strerror or error}") from error
        self.refresh()

    @property
    def bytes_per_segment(self) -> int:
        """The size of a segment on disk."""
        return self._row.itemsize

    def refresh(self) -> None:
        """Find the parts that other processes have written.

        Raises:
            UserError: a part is damaged.
        """
        found = {path.name for path in self.folder.iterdir() if PART_NAME.fullmatch(path.name)}
        for name in sorted(found.difference(self._names)):
            self._enter(name, self._open(name)["key"])

    def has(self, keys: Keys) -> NDArray[np.bool_]:
        """Return whether the tokens with these keys are stored; both have the same shape."""
        if not len(self._keys):
            return np.zeros(keys.shape, dtype=bool)
        return self._keys[self._positions(keys)] == keys

    def check_room(self, count: int) -> None:
        """Raise UserError unless `count` more segments fit into the limit."""
        root = self.folder.parent
        stored = sum(path.stat().st_size for path in root.glob("*/*.npy"))
        if (needed := stored + count * self.bytes_per_segment) > self._max_bytes:
            raise UserError(
                f"{root} holds {stored / 1e9:.3g} GB of tokens and would grow to {needed / 1e9:.3g} GB, above "
                f"train.encoder_cache_gb={self._max_bytes / 1e9:g}: raise the limit, use fewer videos, or delete "
                "folders of other encoders in it"
            )

    def add(self, keys: Keys, tokens: NDArray[Any]) -> None:
        """Store the tokens [M, ...] of segments with keys [M].

        Raises:
            UserError: the part cannot be written.
        """
        rows = np.empty(len(keys), self._row)
        rows["key"], rows["tokens"] = keys, tokens
        name = f"{hashlib.sha256(np.ascontiguousarray(keys).tobytes()).hexdigest()[:16]}.npy"
        try:
            with replacing(self.folder / name, is_shared=True) as file:  # another run may compute the same tokens
                np.lib.format.write_array(file, rows, allow_pickle=False)
        except OSError as error:
            raise UserError(f"cannot write {self.folder / name}: {error.strerror or error}") from error
        self._enter(name, keys)

    def read(self, keys: Keys) -> NDArray[Any]:
        """Return the tokens [M, ...] of segments with keys [M], all of which are stored."""
        assert self.has(keys).all(), "tokens that are not stored"
        places = self._places[self._positions(keys)]
        tokens = np.empty((len(keys), *self._row["tokens"].shape), self._row["tokens"].base)
        for part in np.unique(places[:, 0]).tolist():
            of_part = places[:, 0] == part
            tokens[of_part] = self._open(self._names[part])["tokens"][places[of_part, 1]]
        return tokens

    def _remove_leftovers(self) -> None:
        """Remove the unfinished files of killed processes."""
        for path in self.folder.glob(".*.partial"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_S:
                    path.unlink()

    def _positions(self, keys: Keys) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)

    def _enter(self, name: str, keys: Keys) -> None:
        places = np.stack([np.full(len(keys), len(self._names)), np.arange(len(keys))], axis=1)
        self._names.append(name)
        all_keys = np.concatenate([self._keys, keys])
        order = np.argsort(all_keys, kind="stable")
        self._keys, self._places = all_keys[order], np.concatenate([self._places, places])[order]

    def _map(self, name: str) -> NDArray[Any]:
        path = self.folder / name
        try:
            check_regular(path)
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): delete it") from None
        if rows.ndim != 1 or rows.dtype != self._row:
            raise UserError(f"{path} holds rows of another type: delete it")
        return rows
