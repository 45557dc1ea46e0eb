"""Measure how well influence finds planted training clips: duplicates of a query, corrupted clips, wrong futures.

python benchmarks/influence.py --out runs/influence --seeds 0 1 2

For each seed, videos of a moving digit are written, with clips planted among those for training, and a model like that
of configs/objectives.yaml is trained on them, of 32 px and half as wide, by VICReg. Planted clips:

    copy            a query, which itself is not in the training videos
    altered         the query, moved by 2 and 1 px, darker and noisy
    other_future    the past of the query with the opposite change of motion
    noise           noise on all frames
    shuffled        frames in a random order
    wrong_future    the past of one video, the future of another

"duplicates": the first three are to be found for their query, by influence and by similarity. Scores are the AUROC of
the planted clip among the clean ones, a mean over queries, and "first", the share of queries whose copy is the first of
all clips. "bad": the last three are to be found without a query, by the influence of a clip on itself and by simpler
scores, again as AUROC among the clean clips. "effect": editor and latent are trained again on random halves of the
embedded training clips, and a test clip's loss after each is compared with the sum of the scores of the clips in the
half: the rank correlation over halves, a mean over test clips (linear datamodeling score, TRAK, arXiv 2303.14186).

Each seed's scores are written to OUT/seed_N/influence.json. The same command continues after an interruption. Videos of
other numbers of clips need another folder: OUT/seed_N/planted.json states those of its videos.

Legend: Q queries, N training clips, T frames, H = W pixels.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError, one_line
from data_pipelines.files import write_text
from data_pipelines.labels import METADATA_NAME
from data_pipelines.worlds.digits import load_sprites, render
from data_pipelines.worlds.moving_mnist import SEGMENT_FRAMES, centre_path, sample_trajectories
from data_pipelines.worlds.written import encode_h264
from worldmodel import TrainedRun, load
from worldmodel.build import build_training_model
from worldmodel.commands.exits import report_errors
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import check_counts, make_out_folder, write_result
from worldmodel.config import load_config
from worldmodel.evaluation.influence import (
    EmbeddedTransitions,
    TransitionGradients,
    TransitionLoss,
    embed_transitions,
    influences,
    precondition,
    read_clip,
    stored_gradients,
    training_clips,
)
from worldmodel.evaluation.scores import auroc
from worldmodel.evaluation.surprise import measure
from worldmodel.runs.folder import RunFolder
from worldmodel.training.loop import train
from worldmodel.training.losses import TrainingModel
from worldmodel.training.optimisation import set_lr

PLANTED_NAME = "planted.json"
KERNEL, NEIGHBOURS, TEST_CLIPS = 0.3, 5, 128
HEAD_STEPS, HEAD_BATCH, HEAD_LR = 200, 128, 1e-3
OF_QUERY, BAD = ("copy", "altered", "other_future"), ("noise", "shuffled", "wrong_future")
SETTINGS = (
    "data.size_px=32",
    "data.batch_size=64",
    "data.num_workers=0",
    "model.hidden_dim=256",
    "model.embedding_dim=128",
    "objective.name=vicreg",
    "objective.beta=null",
    "evaluation.queries=128",
    "evaluation.selection_clips=128",
    "evaluation.fit_clips=256",
)


class Sizes(NamedTuple):
    """Numbers of clean training clips, queries, bad clips of each kind, held-out videos of each split, and halves."""

    clean: int = 1800
    queries: int = 40
    bad: int = 60
    held_out: int = 512
    halves: int = 16


class Planted(NamedTuple):
    """Training videos by kind, and the queries: uint8 [N, T, H, W] each; the digit in the past of each video, [N]."""

    videos: dict[str, Tensor]
    queries: Tensor
    digits: Tensor


def plant(sizes: Sizes, seed: int) -> Planted:
    """Draw the training videos and the queries. Those of OF_QUERY belong to the queries in order."""
    generator = torch.Generator().manual_seed(seed)
    sprites = load_sprites("train")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        drawn = sample_trajectories(sprites, count, "A", generator)
        return render(sprites.images[drawn.sprite], centre_path(drawn)), drawn.digit

    def noisy(videos: Tensor, spread: float) -> Tensor:
        return (videos + spread * torch.randn(videos.shape, generator=generator)).clamp(0, 1)

    clean, clean_digits = draw(sizes.clean)
    drawn = sample_trajectories(sprites, sizes.queries, "A", generator)
    images = sprites.images[drawn.sprite]
    queries = render(images, centre_path(drawn))
    opposite = dataclasses.replace(drawn, velocity_after=2 * drawn.velocity - drawn.velocity_after)
    (noise, shuffled, wrong), bad_digits = zip(*(draw(sizes.bad) for _ in BAD), strict=True)
    noise = noisy(noise, 0.15)
    for video in shuffled:
        video[:] = video[torch.randperm(len(video), generator=generator)]
    wrong[:, SEGMENT_FRAMES:] = wrong[:, SEGMENT_FRAMES:].roll(1, dims=0)
    videos = {
        "clean": clean,
        "copy": queries,
        "altered": noisy(0.7 * queries.roll((2, 1), dims=(3, 4)), 0.03),
        "other_future": render(images, centre_path(opposite)),
        "noise": noise,
        "shuffled": shuffled,
        "wrong_future": wrong,
    }
    digits = torch.cat([clean_digits, *[drawn.digit] * len(OF_QUERY), *bad_digits])
    return Planted({kind: _bytes(each) for kind, each in videos.items()}, _bytes(queries), digits)


def _bytes(videos: Tensor) -> Tensor:
    return (videos[:, :, 0] * 255).round().byte()


def facts_of_videos(sizes: Sizes, seed: int) -> dict[str, int]:
    """Return the content of planted.json: the seed and the sizes that videos are drawn from."""
    return {"seed": seed} | {name: size for name, size in sizes._asdict().items() if name != "halves"}


def check_videos(folder: Path, sizes: Sizes, seed: int) -> None:
    """Check that videos of an earlier call in the folder, if there are any, are those of these sizes and this seed.

    Raises:
        UserError: they are others, or nothing states what they are.
    """
    path = folder / PLANTED_NAME
    if not path.exists():
        if (folder / "data").exists():
            raise UserError(f"{folder} has videos, and no {PLANTED_NAME} that states their sizes: choose another --out")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}: choose another --out") from error
    if found != facts_of_videos(sizes, seed):
        raise UserError(f"{folder} has videos of other sizes, {json.dumps(found)}: choose another --out")


def write_videos(folder: Path, planted: Planted, sizes: Sizes, seed: int) -> None:
    """Write training videos, queries, and videos of other digits for the other splits. Those that exist are kept.

    `check_videos` has found them to be of the same sizes. The digits are labels, for benchmarks/few_labels.py.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PLANTED_NAME, json.dumps(facts_of_videos(sizes, seed)) + "\n")
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = {"data/train": (torch.cat(list(planted.videos.values())), planted.digits)}
    for split in ("selection", "test"):
        sprites = load_sprites(split)
        drawn = sample_trajectories(sprites, sizes.held_out, "A", generator)
        parts[f"data/{split}"] = _bytes(render(sprites.images[drawn.sprite], centre_path(drawn))), drawn.digit
    of_queries = planted.digits[sizes.clean : sizes.clean + sizes.queries]
    parts["queries"] = planted.queries, of_queries
    for name, (videos, digits) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        names = [f"{number:06d}.mp4" for number in range(len(videos))]
        rows = [{"file_name": file, "digit": digit} for file, digit in zip(names, digits.tolist(), strict=True)]
        write_text(folder / name / METADATA_NAME, "".join(f"{json.dumps(row)}\n" for row in rows))
        for file, video in zip(tqdm(names, desc=name, unit="video"), videos.numpy(), strict=True):
            path, aside = folder / name / file, folder / "unfinished.mp4"
            if not path.exists():
                encode_h264(aside, video)
                aside.replace(path)


def train_run(folder: Path, seed: int, steps: int) -> TrainedRun:
    """Train a run on the written videos, or continue it."""
    places = (f"data.root={folder / 'data'}", f"run_dir={folder / 'run'}", f"seed={seed}")
    numbers = (f"train.steps={steps}", f"train.eval_every={steps}", "train.checkpoint_every=200", "train.num_threads=1")
    config = load_config("objectives", [*SETTINGS, *places, *numbers, "tracking.wandb=disabled"])
    return load(train(config, resume=True))


# ----------------------------------------------------------------------------------------------------------- scores


class Scores(NamedTuple):
    """Scores of training clips by method: for each query [Q, N], without a query [N], and for each test clip [Q, N]."""

    of_queries: dict[str, Tensor]
    of_clips: dict[str, Tensor]
    of_tests: dict[str, Tensor]


class Embedded(NamedTuple):
    """The training clips, the queries and the test clips after the encoders."""

    clips: EmbeddedTransitions
    queries: EmbeddedTransitions
    tests: EmbeddedTransitions


def embed(run: TrainedRun, folder: Path, sizes: Sizes) -> Embedded:
    """Embed the training clips, the queries, and the first clips of the test split."""
    clip_set, source = training_clips(run.networks, run.config.data), run.source
    videos = [read_clip(clip_set, folder / "queries" / f"{number:06d}.mp4", 0) for number in range(sizes.queries)]
    numbers = torch.arange(sizes.queries)
    batch = Batch(video=torch.from_numpy(np.stack(videos)), clip_id=numbers, row=numbers, labels={})
    training = source.evaluation_batches("train", clip_set.table.num_clips)
    parts = (training, [batch], source.evaluation_batches("test", TEST_CLIPS))
    return Embedded(*(_joined(list(embed_transitions(run.networks, batches))) for batches in parts))


def score_clips(run: TrainedRun, embedded: Embedded) -> Scores:
    """Score all training clips by influence, by similarity and by their losses."""
    clips = embedded.clips
    place = run.networks, run.config.data, RunFolder(run.folder), run.num_updates
    gradients = torch.from_numpy(stored_gradients(*place, len(clips.state), progress=True).gradients)

    def of_queries(queries: EmbeddedTransitions) -> dict[str, Tensor]:
        own, apart = TransitionGradients(run.training)(queries), torch.cdist(_whole(queries), _whole(clips))
        return {
            "similar_context": F.normalize(queries.state, dim=1) @ F.normalize(clips.state, dim=1).T,
            "similar_clip": torch.softmax(-apart / (KERNEL * apart.std()), dim=1),
            "gradient": own @ gradients.T,
            "influence": influences(gradients, own),
        }

    with torch.no_grad():
        kl, error = measure(run.training, clips.state, clips.target, clips.seen)
    apart = torch.cdist(_whole(clips), _whole(clips)).fill_diagonal_(torch.inf)
    of_clips = {
        "loss": error + run.training.beta * kl,
        "isolation": apart.topk(NEIGHBOURS, largest=False).values.mean(dim=1),
        "gradient": gradients.norm(dim=1),
        "influence": (precondition(gradients, gradients) * gradients).sum(dim=1),
    }
    return Scores(of_queries(embedded.queries), of_clips, of_queries(embedded.tests))


def _joined(parts: Sequence[EmbeddedTransitions]) -> EmbeddedTransitions:
    return EmbeddedTransitions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _whole(clips: EmbeddedTransitions) -> Tensor:
    """Return the embeddings of all segments of clips side by side, [N, 3 * D]."""
    return torch.cat([clips.state, clips.target, clips.seen], dim=1)


def found(scores: Scores, kinds: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the AUROC of each method for each kind of planted clips, and "first", the share of copies that come first.

    kinds [N]: of the training clips. The n-th clip of a kind of OF_QUERY belongs to query n.
    """
    is_kind = {kind: torch.tensor([each == kind for each in kinds]) for kind in dict.fromkeys(kinds)}
    clean = is_kind["clean"]
    duplicates: dict[str, dict[str, float]] = {}
    for method, values in scores.of_queries.items():
        duplicates[method] = {
            kind: mean(
                auroc(torch.cat([own[None], row[clean]]), torch.arange(1 + int(clean.sum())) == 0)
                for own, row in zip(values[:, is_kind[kind]].diagonal(), values, strict=True)
            )
            for kind in OF_QUERY
        }
        copies = values[:, is_kind["copy"]].diagonal()
        duplicates[method]["first"] = float((copies >= values.max(dim=1).values).float().mean())
    bad = {
        method: {
            kind: auroc(
                torch.cat([values[is_kind[kind]], values[clean]]),
                torch.arange(int((is_kind[kind] | clean).sum())) < int(is_kind[kind].sum()),
            )
            for kind in BAD
        }
        for method, values in scores.of_clips.items()
    }
    return {"duplicates": duplicates, "bad": bad}


def effect(run: TrainedRun, embedded: Embedded, scores: Scores, sizes: Sizes, seed: int) -> dict[str, dict[str, float]]:
    """Return the linear datamodeling score of each method."""
    generator = torch.Generator().manual_seed(seed)
    num_clips = len(embedded.clips.state)
    is_in = torch.zeros(sizes.halves, num_clips)
    losses = []
    for half in tqdm(is_in, desc="halves", unit="training"):
        rows = torch.randperm(num_clips, generator=generator)[: num_clips // 2]
        half[rows] = 1
        losses.append(losses_after(run, rows_of(embedded.clips, rows), embedded.tests))
    return {
        method: {"lds": rank_correlation(is_in @ values.T, -torch.stack(losses))}
        for method, values in scores.of_tests.items()
    }


def losses_after(run: TrainedRun, clips: EmbeddedTransitions, tests: EmbeddedTransitions) -> Tensor:
    """Train editor and latent again on embedded clips, and return the losses of test clips [Q]."""
    torch.manual_seed(0)  # the same weights and places in all trainings
    training = build_training_model(run.config).train()
    optimizer = torch.optim.AdamW(TransitionLoss(training).parameters(), HEAD_LR)
    for step in range(HEAD_STEPS):
        set_lr(optimizer, HEAD_LR * (1 - step / HEAD_STEPS))
        rows = torch.randint(len(clips.state), (HEAD_BATCH,))
        kl, error = one_draw(training, rows_of(clips, rows))
        (error + training.beta * kl).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        kl, error = measure(training.eval(), tests.state, tests.target, tests.seen)
    return error + training.beta * kl


def one_draw(training: TrainingModel, clips: EmbeddedTransitions) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) and the prediction error at one draw of q, [B] each."""
    model = training.model
    inference = model.infer_from(clips.state, clips.seen, clips.state[:, :0])
    assert inference.penalty is not None
    edited = model.embedding_of(model.edit(clips.state, inference.r))
    return inference.penalty, training.objective.prediction_error(edited, clips.target, clips.state)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of the columns of two tensors [M, Q], a mean over columns."""
    from scipy.stats import spearmanr

    return mean(float(spearmanr(a, b).statistic) for a, b in zip(first.T.numpy(), second.T.numpy(), strict=True))


def rows_of(clips: EmbeddedTransitions, rows: Tensor) -> EmbeddedTransitions:
    return EmbeddedTransitions(*(values[rows] for values in clips))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=800, help="updates of each training (default: 800)")
    for name, count in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count, help=f"default: {count}")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "steps", *Sizes._fields)
        keep_freed_memory()
        make_out_folder(args.out)
        sizes = Sizes(*(getattr(args, name) for name in Sizes._fields))
        for seed in args.seeds:
            check_videos(args.out / f"seed_{seed}", sizes, seed)
        results = []
        for seed in args.seeds:
            folder = args.out / f"seed_{seed}"
            planted = plant(sizes, seed)
            write_videos(folder, planted, sizes, seed)
            run = train_run(folder, seed, args.steps)
            kinds = [kind for kind, videos in planted.videos.items() for _ in videos]
            embedded = embed(run, folder, sizes)
            scores = score_clips(run, embedded)
            results.append(found(scores, kinds) | {"effect": effect(run, embedded, scores, sizes, seed)})
            facts = {"seed": seed, "steps": args.steps, "sizes": sizes._asdict()}
            write_result(folder / "influence.json", facts | results[-1])
        print(f"\n{table(results)}")
    return 0


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return mean ± SD over seeds of all scores."""
    lines = []
    for part, of_methods in results[0].items():
        lines += [
            "",
            f"{part:<18}" + "".join(f"{kind.replace('_', ' '):>16}" for kind in next(iter(of_methods.values()))),
        ]
        for method, kinds in of_methods.items():
            cells = []
            for kind in kinds:
                values = [result[part][method][kind] for result in results]
                cells.append(f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}")
            lines.append(f"{method.replace('_', ' '):<18}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
