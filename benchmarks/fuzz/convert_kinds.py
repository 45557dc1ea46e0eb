"""Data sets of other programs that are converted: HDF5, npz, animations."""

import random
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.fuzz.kinds import Case, Kind, require
from benchmarks.fuzz.mutate import damage_bytes
from data_pipelines.convert.run import Conversion, convert
from data_pipelines.formats.registry import load_videos

LENGTHS = (5, 7)
SIZE = (32, 40)


def prepare_sources(seeds: Path) -> None:
    """Write a small source of each kind of file."""
    import h5py
    from PIL import Image

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (sum(LENGTHS), *SIZE, 3), dtype=np.uint8)
    action = rng.normal(size=(sum(LENGTHS), 2)).astype(np.float32)
    arrays = {"pixels": frames, "action": action, "ep_len": np.array(LENGTHS), "ep_offset": np.array([0, LENGTHS[0]])}
    with h5py.File(seeds / "columns.h5", "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip" if name == "pixels" else None)
    with h5py.File(seeds / "demos.hdf5", "w") as file:
        file["data/demo_0/obs/agentview_image"], file["data/demo_0/actions"] = frames, action
        file["data/link"] = h5py.SoftLink("/data/demo_0")
    np.savez_compressed(seeds / "columns.npz", **arrays)  # type: ignore[arg-type]
    np.savez(seeds / "plain.npz", **arrays)  # type: ignore[arg-type]
    first, *others = map(Image.fromarray, frames)
    for kind in ("gif", "webp"):
        first.save(seeds / f"clip.{kind}", save_all=True, append_images=others, duration=[40] * 5 + [90] * 7)


def build_source(rng: random.Random, seeds: Path, folder: Path) -> Case:
    """Build the case of one damaged source."""
    files = sorted(seeds.iterdir())
    path = rng.choice(files)
    is_good = rng.random() < 0.05
    content = path.read_bytes()
    (folder / path.name).write_bytes(content if is_good else damage_bytes(rng, content, rng.choice(files).read_bytes()))
    return Case(partial(_convert, folder / path.name, rng.choice((None, None, 30))), is_good)


def _convert(source: Path, crf: int | None) -> str:
    """Convert a source, and check that what was written can be read."""
    out = source.with_name("out")
    result = convert(source, out, Conversion(crf=crf, skip_bad=True))
    index = load_videos(out, num_workers=0, progress=False)
    require(len(index.videos) == result.num_videos and not index.bad, f"{index.bad} of {result.num_videos} videos")
    again = convert(source, out, Conversion(crf=crf, skip_bad=True))
    require(again.num_kept == result.num_videos, f"{again.num_kept} of {result.num_videos} videos are kept")
    return ""


KINDS = (Kind("convert", prepare_sources, build_source),)
