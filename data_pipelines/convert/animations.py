"""Animated pictures: each GIF or WebP file is a clip, with its own times."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from data_pipelines.convert.episodes import Clip, Frame, Keys, checked_name, source_files
from data_pipelines.convert.pictures import frame_of, open_picture, picture_errors
from data_pipelines.errors import UserError, one_line
from data_pipelines.facts import MAX_FRAMES
from data_pipelines.files import check_regular

SUFFIXES = (".gif", ".webp")
FORMATS = ("GIF", "WEBP")
UNSTATED_MS = 100  # as browsers show frames without a duration


class Animations:
    """GIF and WebP files, in a folder and its subfolders."""

    name = "a folder of GIF or WebP files"
    keys: frozenset[str] = frozenset()

    def detect(self, source: Path) -> bool:
        return bool(source_files(source, SUFFIXES))

    def episodes(self, source: Path, keys: Keys, siblings: Sequence[Path]) -> "list[AnimationEpisode]":
        files = source_files(source, SUFFIXES)
        return [
            AnimationEpisode(name, checked_name(name.rpartition(".")[0], name), path, (path,)) for name, path in files
        ]


@dataclass(frozen=True)
class AnimationEpisode:
    """A GIF or WebP file."""

    place: str
    name: str
    path: Path
    files: tuple[Path, ...]
    split: None = None

    @contextmanager
    def open(self) -> Iterator[Clip]:
        durations = _durations_ms(self.path)
        rate = Fraction(1000, durations[0]) if len(set(durations)) == 1 else None
        yield Clip(
            len(durations), partial(_frames, self.path), fps=rate, frame_ms=() if rate is not None else durations[:-1]
        )


def _durations_ms(path: Path) -> list[int]:
    """Return the duration of each frame. Raises UserError."""
    durations = []
    try:
        check_regular(path)
        with open_picture(path, FORMATS) as picture:
            for number in range(min(getattr(picture, "n_frames", 1), MAX_FRAMES)):
                picture.seek(number)
                picture.load()  # a WebP states the duration when it is decoded
                durations.append(max(0, round(picture.info.get("duration") or 0)) or UNSTATED_MS)
    except picture_errors() as error:
        raise UserError(f"cannot be decoded: {one_line(error)}") from None
    return durations


def _frames(path: Path) -> Iterator[Frame]:
    """Yield the frames in colour. Raises UserError."""
    try:
        with open_picture(path, FORMATS) as picture:
            for number in range(min(getattr(picture, "n_frames", 1), MAX_FRAMES)):
                picture.seek(number)
                yield frame_of(picture.convert("RGB"))
    except picture_errors() as error:
        raise UserError(f"cannot be decoded: {one_line(error)}") from None
