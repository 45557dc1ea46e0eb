"""Compare ways to classify clips from few labels, on the frozen encoder of a run or close to it.

python benchmarks/few_labels.py --run runs/demo --label digit --labels 1 10 100 --draws 5
python benchmarks/few_labels.py --run runs/freeway --label position --bins 10 --shift-px 0

    pixels         logistic regression on the pixels of the last frame, 16 px a side: without a model
    embedding      logistic regression on the embedding
    features       logistic regression on the encoder's features
    lora           features, whose fit is the start of a head that is trained on augmented labelled clips along with
                   low-rank updates of the encoder's weights (Hu et al., arXiv 2106.09685)
    pseudo_labels  features, also fitted to the classes that its first fit gives the unlabelled clips
    ensemble       the same, with classes by the mean probabilities of embedding, features and lora (arXiv 2503.09707)
    consistency    a linear head on features, whose confident class of an unlabelled clip must also hold for an
                   augmented view of the clip (FixMatch, arXiv 2001.07685)

Labelled clips are drawn from the training clips, so many of each class, and all others are unlabelled. Accuracy is that
on test clips, as mean and standard deviation over draws. Prints a table and writes few_labels.json into the run folder.

Legend: N clips, B clips of a batch, T frames, C channels, H = W pixels, F features, D embedding dimensions.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from data_pipelines.errors import UserError
from data_pipelines.splits import Split
from worldmodel import TrainedRun, load
from worldmodel.commands.exits import report_errors
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import check_counts, check_seed, write_result
from worldmodel.data import segments_of
from worldmodel.evaluation.embed import counted, frozen
from worldmodel.evaluation.quantity import FrameLabel
from worldmodel.runs.folder import RunFolder

AT_ONCE = 256
PIXELS_PX = 16
LBFGS_STEPS = 200
RANK, LORA_STEPS, LORA_BATCH, LORA_LR = 4, 200, 32, 1e-3
HEAD_STEPS, HEAD_LR, WEIGHT_DECAY = 300, 1e-2, 1e-2
CONFIDENCE = 0.95
NOISE = 0.03

Probabilities = Callable[["Clips"], Tensor]


@dataclass(frozen=True)
class Clips:
    """N contexts with their classes.

    video [N, T, C, H, W] in [0, 1]; features [N, F] and embedding [N, D] of the frozen encoder; augmented [N, F], the
    features of an augmented view; classes int64 [N], of a label of numbers first its values, float [N].
    """

    video: Tensor
    features: Tensor
    augmented: Tensor
    embedding: Tensor
    classes: Tensor

    def with_classes(self, classes: Tensor) -> "Clips":
        return dataclasses.replace(self, classes=classes)

    def rows(self, rows: Tensor) -> "Clips":
        return Clips(*(values[rows] for values in vars(self).values()))


@dataclass(frozen=True)
class Label:
    """The label to classify: a class of each video or, with a dimension, a number of each frame."""

    name: str
    dimension: int | None

    def of(self, labels: Mapping[str, Tensor], num_frames: int) -> Tensor:
        """Return the classes of contexts, int64 [B], or the numbers in the last of their num_frames frames, float [B].

        Raises:
            UserError: the videos have no such label.
        """
        values = labels.get(self.name)
        has = ", ".join(sorted(labels)) or "none"
        if self.dimension is None:
            if values is None or values.ndim != 1 or values.is_floating_point():
                raise UserError(f"--label {self.name} is not a class of each video: these videos have {has}")
            return values
        if values is None or values.ndim != 3:
            raise UserError(f"--bins: --label {self.name} is not numbers of each frame: these videos have {has}")
        if not 0 <= self.dimension < values.shape[2]:
            raise UserError(f"--dimension {self.dimension} must be 0 to {values.shape[2] - 1}")
        return FrameLabel(self.name, num_frames).origin(dict(labels))[:, self.dimension]


def in_bins(training: Clips, test: Clips, num_bins: int) -> tuple[Clips, Clips]:
    """Return clips whose classes are num_bins intervals of a number, each with about as many training clips."""
    edges = training.classes.quantile(torch.arange(1, num_bins) / num_bins).unique()
    training, test = (clips.with_classes(torch.bucketize(clips.classes, edges)) for clips in (training, test))
    return training, test


def read(run: TrainedRun, split: Split, label: Label, count: int, shift_px: int, generator: torch.Generator) -> Clips:
    """Embed the contexts of clips of a split.

    Raises:
        UserError: the videos have no such label.
    """
    networks = run.networks
    parts = []
    with frozen(networks.model):
        for batch in counted(networks.source.evaluation_batches(split, count), count, f"encoding {split}"):
            classes = label.of(batch["labels"], networks.layout.num_frames)
            video = segments_of(batch, networks.layout.segments_for(1), networks.device)[:, 0]
            embedder = networks.model.embedder
            features = embedder.features(video)
            augmented = embedder.features(augment(video, shift_px, generator))
            parts.append((video, features, augmented, embedder.project(features), classes))
    return Clips(*(torch.cat(column) for column in zip(*parts, strict=True)))


def augment(video: Tensor, shift_px: int, generator: torch.Generator) -> Tensor:
    """Shift each clip [B, T, C, H, W] by up to shift_px, change its contrast, and add noise."""
    shifts = torch.randint(-shift_px, shift_px + 1, (len(video), 2), generator=generator).tolist()
    moved = torch.stack([clip.roll(shift, dims=(-2, -1)) for clip, shift in zip(video, shifts, strict=True)])
    contrast = 0.6 + 0.8 * torch.rand(len(video), 1, 1, 1, 1, generator=generator)
    noise = NOISE * torch.randn(video.shape, generator=generator)
    return (contrast * moved + noise).clamp(0, 1)


def draw_labelled(classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the rows of `count` clips of each class, drawn without replacement.

    Raises:
        UserError: a class has fewer.
    """
    order = torch.randperm(len(classes), generator=generator)
    groups = [order[classes[order] == number] for number in classes.unique()]
    if (least := min(map(len, groups))) < count:
        raise UserError(f"--labels {count}: a class has only {least} training clips")
    return torch.cat([group[:count] for group in groups])


def check_labels(classes: Tensor, counts: Sequence[int]) -> None:
    """Check that labels can be drawn from training clips of these classes, and leave clips without one.

    Raises:
        UserError: a class has fewer clips, or none is left.
    """
    for count in counts:
        if len(draw_labelled(classes, count, torch.Generator())) == len(classes):
            raise UserError(f"--labels {count}: all {len(classes)} training clips would have one, and none is left")


# ---------------------------------------------------------------------------------------------------------- methods


class Head(nn.Module):
    """A linear layer on standardised representations [N, D]: logits [N, classes]."""

    def __init__(self, inputs: Tensor, num_classes: int) -> None:
        super().__init__()
        self.centre, self.scale = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
        self.scale[self.scale < 1e-6] = 1  # constant inputs
        self.linear = nn.Linear(inputs.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear((inputs - self.centre) / self.scale)


def fit_head(inputs: Tensor, classes: Tensor, num_classes: int) -> Head:
    """Fit a logistic regression to inputs [N, D] by L-BFGS, with the penalty |weights|^2 / 2 on the sum of losses."""
    head = Head(inputs, num_classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = head.linear.weight.square().sum() / 2
        value = (F.cross_entropy(head(inputs), classes, reduction="sum") + penalty) / len(inputs)
        value.backward()
        return value

    optimizer.step(loss)
    return head


def probe(of_clips: Callable[[Clips], Tensor], clips: Clips, classes: Tensor, num_classes: int) -> Probabilities:
    """Fit a head to representations [N, D] of clips; return its probabilities [N, classes]."""
    head = fit_head(of_clips(clips), classes, num_classes)
    return lambda other: head(of_clips(other)).softmax(dim=1).detach()


def pixels(clips: Clips) -> Tensor:
    return F.adaptive_avg_pool2d(clips.video[:, -1], PIXELS_PX).flatten(1)


class LowRank(nn.Module):
    """A weight plus a product of two matrices of RANK columns and rows, which starts at zero (arXiv 2106.09685)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        fan_out, fan_in = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(RANK, fan_in) / fan_in**0.5)
        self.up = nn.Parameter(torch.zeros(fan_out, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def with_low_rank(encoder: nn.Module) -> nn.Module:
    """Copy an encoder in evaluation mode, and add a `LowRank` update, all that is trainable, to each weight matrix."""
    encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
    for module in list(encoder.modules()):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim > 1:
            parametrize.register_parametrization(module, "weight", LowRank(weight))
    return encoder


def fine_tune(
    encoder: nn.Module, clips: Clips, num_classes: int, shift_px: int, generator: torch.Generator
) -> Probabilities:
    """Fit a head to labelled clips, and train it on augmented ones, along with low-rank updates of the encoder."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    tuned, head = with_low_rank(encoder), fit_head(clips.features, clips.classes, num_classes)
    weights = [weight for weight in (*tuned.parameters(), *head.parameters()) if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LORA_LR, weight_decay=WEIGHT_DECAY)
    for _ in range(LORA_STEPS):
        rows = torch.randint(len(clips.classes), (min(LORA_BATCH, len(clips.classes)),), generator=generator)
        logits = head(tuned(augment(clips.video[rows], shift_px, generator)))
        F.cross_entropy(logits, clips.classes[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def probabilities(other: Clips) -> Tensor:
        return torch.cat([head(tuned(video)).softmax(dim=1) for video in other.video.split(AT_ONCE)])

    return probabilities


def self_train(members: list[Probabilities], labelled: Clips, unlabelled: Clips, num_classes: int) -> Probabilities:
    """Fit a probe of the features to labelled clips, and to unlabelled ones with classes by the members' mean."""
    guessed = torch.stack([member(unlabelled) for member in members]).mean(dim=0).argmax(dim=1)
    both = Clips(*(torch.cat(pair) for pair in zip(vars(labelled).values(), vars(unlabelled).values(), strict=True)))
    return probe(lambda clips: clips.features, both, torch.cat([labelled.classes, guessed]), num_classes)


def agree(labelled: Clips, unlabelled: Clips, num_classes: int) -> Probabilities:
    """Fit a linear head to labelled clips, and its confident classes of unlabelled clips to their augmented views."""
    head = Head(torch.cat([labelled.features, unlabelled.features]), num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), HEAD_LR, weight_decay=WEIGHT_DECAY)
    for _ in range(HEAD_STEPS):
        with torch.no_grad():
            confidence, guessed = head(unlabelled.features).softmax(dim=1).max(dim=1)
        of_views = F.cross_entropy(head(unlabelled.augmented), guessed, reduction="none") * (confidence > CONFIDENCE)
        (F.cross_entropy(head(labelled.features), labelled.classes) + of_views.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lambda clips: head(clips.features).softmax(dim=1).detach()


def accuracies(
    encoder: nn.Module, training: Clips, test: Clips, count: int, shift_px: int, generator: torch.Generator
) -> Iterator[tuple[str, float]]:
    """Yield the name of each method and its accuracy on test clips, with `count` labels of each class."""
    num_classes = int(training.classes.max()) + 1
    chosen = draw_labelled(training.classes, count, generator)
    is_other = torch.ones(len(training.classes), dtype=torch.bool)
    is_other[chosen] = False
    labelled, unlabelled = training.rows(chosen), training.rows(is_other)

    def score(probabilities: Probabilities) -> float:
        return float((probabilities(test).argmax(dim=1) == test.classes).float().mean())

    of_pixels = probe(pixels, labelled, labelled.classes, num_classes)
    of_embedding = probe(lambda clips: clips.embedding, labelled, labelled.classes, num_classes)
    of_features = probe(lambda clips: clips.features, labelled, labelled.classes, num_classes)
    yield from (("pixels", score(of_pixels)), ("embedding", score(of_embedding)), ("features", score(of_features)))
    tuned = fine_tune(encoder, labelled, num_classes, shift_px, generator)
    yield "lora", score(tuned)
    yield "pseudo_labels", score(self_train([of_features], labelled, unlabelled, num_classes))
    yield "ensemble", score(self_train([of_embedding, of_features, tuned], labelled, unlabelled, num_classes))
    yield "consistency", score(agree(labelled, unlabelled, num_classes))


def compare(
    run: TrainedRun, training: Clips, test: Clips, counts: list[int], draws: int, shift_px: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies of each method for each number of labels per class, one for each draw of labels."""
    found: dict[str, dict[str, list[float]]] = {}
    encoder = run.model.embedder.encoder
    with tqdm(total=len(counts) * draws, desc="few labels", unit="draw") as bar:
        for count in counts:
            for draw in range(draws):
                generator = torch.Generator().manual_seed(seed + draw)
                for name, accuracy in accuracies(encoder, training, test, count, shift_px, generator):
                    found.setdefault(name, {}).setdefault(str(count), []).append(accuracy)
                bar.update()
    return found


def summary(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and standard deviation of the accuracies over draws."""
    return {
        name: {
            count: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}
            for count, values in of_counts.items()
        }
        for name, of_counts in found.items()
    }


def table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return mean ± SD of each method for each number of labels."""
    counts = list(next(iter(scores.values())))
    lines = [f"{'labels per class':<18}" + "".join(f"{count:>18}" for count in counts)]
    for name, of_counts in scores.items():
        cells = [f"{of_counts[count]['mean']:.3f} ± {of_counts[count]['sd']:.3f}" for count in counts]
        lines.append(f"{name.replace('_', ' '):<18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run on labelled videos")
    parser.add_argument("--label", default="digit", help="label of the videos to classify (default: digit)")
    parser.add_argument(
        "--bins", type=int, metavar="N", help="classes of a label of numbers: N intervals, each with as many clips"
    )
    parser.add_argument("--dimension", type=int, help="which number of the label, with --bins (default: 0)")
    parser.add_argument(
        "--shift-px", type=int, default=3, metavar="PX", help="largest shift of augmented clips (default: 3)"
    )
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 10, 100], metavar="N", help="labels of each class")
    parser.add_argument("--draws", type=int, default=5, help="draws of the labelled clips (default: 5)")
    parser.add_argument(
        "--clips", type=int, default=4096, help="training clips, with and without label (default: 4096)"
    )
    parser.add_argument("--test-clips", type=int, default=1024, help="test clips (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "draws", "clips", "test_clips")
        check_seed(args)
        keep_freed_memory()
        if min(args.labels) < 1:
            raise UserError(f"--labels {min(args.labels)} must be at least 1")
        if args.bins is not None and args.bins < 2:
            raise UserError(f"--bins {args.bins} must be at least 2")
        if args.bins is None and args.dimension is not None:
            raise UserError("--dimension needs --bins")
        if args.shift_px < 0:
            raise UserError(f"--shift-px {args.shift_px} must be at least 0")
        run = load(args.run)
        folder = RunFolder(args.run)
        folder.check_writable()
        generator = torch.Generator().manual_seed(args.seed)
        label = Label(args.label, None if args.bins is None else args.dimension or 0)
        training = read(run, "train", label, args.clips, args.shift_px, generator)
        test = read(run, "test", label, args.test_clips, args.shift_px, generator)
        if args.bins is not None:
            training, test = in_bins(training, test, args.bins)
        known = training.classes.unique()
        if not torch.isin(test.classes, known).all():
            raise UserError(f"--label {args.label}: test clips have classes that training clips have not")
        training, test = (clips.with_classes(torch.searchsorted(known, clips.classes)) for clips in (training, test))
        check_labels(training.classes, args.labels)
        scores = summary(compare(run, training, test, args.labels, args.draws, args.shift_px, args.seed))
        named = ("label", "bins", "shift_px", "draws", "seed")
        facts = {name: getattr(args, name) for name in named} | {"dimension": label.dimension}
        facts |= {"clips": len(training.classes), "test_clips": len(test.classes)}  # there may be fewer than asked for
        write_result(folder.few_labels, facts | {"step": run.num_updates, "accuracy": scores})
        print(f"\n{table(scores)}\n\n{folder.few_labels}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
