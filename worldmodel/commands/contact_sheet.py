"""A contact sheet: frames of some videos of a data set, one row per video. Several cameras are side by side."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.containers import video_url
from data_pipelines.decoders import DecodeError, open_video, resolve_decoder
from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes
from data_pipelines.index import VideoIndex

MAX_VIDEOS, NUM_FRAMES = 12, 8
FRAME_PX, TEXT_PX, GAP_PX = 96, 14, 4


def write_sheet(out: Path, indexes: Sequence[VideoIndex]) -> Path:
    """Write a contact sheet of videos that are evenly spread over the indexes, as PNG, and return its path.

    Raises:
        UserError: there is no video, or the file cannot be written.
    """
    rows = [(index, row) for index in indexes for row in range(len(index.videos))]
    if not rows:
        raise UserError(f"--sheet {out}: there is no video to show")
    chosen = [rows[number] for number in spread(len(rows), MAX_VIDEOS)]
    height = FRAME_PX + TEXT_PX + GAP_PX
    width = max(index.num_cameras for index, _ in chosen) * FRAME_PX + GAP_PX
    sheet = Image.new("RGB", (NUM_FRAMES * width, len(chosen) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (index, row) in enumerate(chosen):
        video, (start, stop) = index.videos[row], index.frame_ranges[row]
        numbers = [start + number for number in spread(stop - start, NUM_FRAMES)]
        top = line * height
        try:
            frames = read(index, row, numbers)
        except DecodeError as error:
            frames = []
            draw.text((0, top + TEXT_PX), str(error).encode("ascii", "replace").decode(), fill="red")
        name = f"{video.path}  frames {start} to {stop - 1}"
        draw.text((0, top), name.encode("ascii", "backslashreplace").decode(), fill="black")
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (column * width, top + TEXT_PX))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    try:
        write_bytes(out, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return out


def read(index: VideoIndex, row: int, numbers: Sequence[int]) -> list[np.ndarray]:
    """Decode frames of one row of an index: uint8 [FRAME_PX, cameras * FRAME_PX, 3] each. Raises DecodeError."""
    of_cameras = []
    for number, shift in index.cameras_of(row):
        video = index.video(number)
        reader = open_video(
            video_url(index.root, video), video, channels=3, size_px=FRAME_PX, decoder=resolve_decoder("auto")
        )
        try:
            of_cameras.append([np.moveaxis(np.asarray(reader.read(frame + shift)), 0, -1) for frame in numbers])
        finally:
            reader.close()
    return [np.concatenate(frames, axis=1) for frames in zip(*of_cameras, strict=True)]


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` numbers from 0 to count - 1, evenly spaced, first and last included."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})
