"""Measure how well influence finds planted clips: duplicates of a query, corrupted clips and clips with a wrong future.

python benchmarks/influence.py --out runs/influence --seeds 0 1 2

For each seed, videos of moving digits are written with clips planted among those for training, a short training of the
demo's model on them follows, and the clips are ranked by influence and by simpler scores.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.files import write_text
from data_pipelines.splits import SPLITS, Split
from data_pipelines.worlds.digits import load_sprites, render
from data_pipelines.worlds.moving_mnist import SEGMENT_FRAMES, Trajectories, centre_path, sample_trajectories
from data_pipelines.worlds.written import encode_h264
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, find_config
from worldmodel.config import load_config
from worldmodel.runs.folder import RunFolder
from worldmodel.training.loop import train

NUM_CLEAN, NUM_QUERIES, NUM_BAD, NUM_HELD_OUT = 1800, 40, 60, 128


class Planted(NamedTuple):
    """Videos uint8 [N, T, 1, H, W], the kind of each, and the query that it belongs to; -1 for none."""

    videos: Tensor
    kinds: list[str]
    queries: list[int]


def plant(seed: int) -> tuple[Planted, Tensor]:
    """Return the training videos, and the queries uint8 [Q, T, 1, H, W], which are not among them."""
    generator = torch.Generator().manual_seed(seed)
    sprites = load_sprites("train")

    def draw(count: int) -> Tensor:
        drawn = sample_trajectories(sprites, count, "A", generator)
        return render(sprites.images[drawn.sprite], centre_path(drawn))

    clean, num_others = draw(NUM_CLEAN), NUM_BAD
    of_queries = sample_trajectories(sprites, NUM_QUERIES, "A", generator)
    images, queries = sprites.images[of_queries.sprite], None
    queries = render(images, centre_path(of_queries))
    noisy, shuffled, wrong = draw(num_others), draw(num_others), draw(num_others)
    noisy = (noisy + 0.15 * torch.randn(noisy.shape, generator=generator)).clamp(0, 1)
    for video in shuffled:
        video[:] = video[torch.randperm(len(video), generator=generator)]
    wrong[:, SEGMENT_FRAMES:] = wrong[:, SEGMENT_FRAMES:].roll(1, dims=0)
    altered = queries.roll((2, 1), dims=(3, 4)) * 0.7
    altered = (altered + 0.03 * torch.randn(altered.shape, generator=generator)).clamp(0, 1)
    parts = {
        "clean": clean,
        "copy": queries,
        "altered": altered,
        "other_future": other_futures(images, of_queries, generator),
        "noise": noisy,
        "shuffled": shuffled,
        "wrong_future": wrong,
    }
    kinds = [kind for kind, videos in parts.items() for _ in videos]
    of_query = {"copy", "altered", "other_future"}
    numbers = [row if kind in of_query else -1 for kind, videos in parts.items() for row in range(len(videos))]
    return Planted(as_bytes(torch.cat(list(parts.values()))), kinds, numbers), as_bytes(queries)


def other_futures(images: Tensor, drawn: Trajectories, generator: torch.Generator) -> Tensor:
    """Render trajectories with the opposite change of velocity."""
    opposite = 2 * drawn.velocity - drawn.velocity_after
    return render(
        images,
        centre_path(
            drawn._replace(velocity_after=opposite)
            if hasattr(drawn, "_replace")
            else Trajectories(drawn.sprite, drawn.digit, drawn.centre, drawn.velocity, opposite, drawn.axis)
        ),
    )


def as_bytes(videos: Tensor) -> Tensor:
    return (videos * 255).round().byte()


def write_planted(folder: Path, seed: int) -> None:
    planted, queries = plant(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = {"data/train": planted.videos, "queries": queries}
    for split in ("selection", "test"):
        sprites = load_sprites(split)
        drawn = sample_trajectories(sprites, NUM_HELD_OUT, "A", generator)
        parts[f"data/{split}"] = as_bytes(render(sprites.images[drawn.sprite], centre_path(drawn)))
    for name, videos in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, video in enumerate(tqdm(videos, desc=name)):
            encode_h264(folder / name / f"{number:06d}.mp4", video[:, 0].numpy())


def train_on(folder: Path, seed: int, steps: int) -> Path:
    o = [
        f"data.root={folder / 'data'}",
        f"run_dir={folder / 'run'}",
        f"seed={seed}",
        f"train.steps={steps}",
        "data.batch_size=64", "data.size_px=32", "model.hidden_dim=256", "model.embedding_dim=128",
        "objective.name=vicreg",
        "objective.beta=null",
        "train.num_threads=1",
        f"train.eval_every={steps}",
        "train.checkpoint_every=200",
        "evaluation.queries=128",
        "evaluation.selection_clips=128",
        "evaluation.fit_clips=256",
        "data.num_workers=0",
        "tracking.wandb=disabled",
    ]
    return train(load_config(find_config("demo"), o), resume=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from worldmodel.commands.process import keep_freed_memory

    keep_freed_memory()
    for seed in map(int, sys.argv[2:]):
        f = Path(sys.argv[1]) / f"seed_{seed}"
        if not (f / "queries").exists():
            write_planted(f, seed)
        train_on(f, seed, 800)
