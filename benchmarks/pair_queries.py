"""Learn from pairs that an oracle is asked about, within a budget: pairs chosen actively, against pairs at random.

python benchmarks/pair_queries.py --out runs/pair_queries

After Positive Active Learning (PAL; Cabannes et al., arXiv 2303.15256). The oracle answers whether two images are of
the same class, and never states a class. Answers are edges of a similarity graph; what follows from them is known, too:
related images of related images are related. The representation is linear in the pixels, in the closed form of VICReg
with that graph (Laplacian eigenmaps): the directions with the most variance, relative to that within related images.

A round asks about a batch of pairs, and fits the representation again:

    random   pairs of images at random
    active   of random candidates, half the nearest pairs, and half those that the representation is most unsure of, by
             a logistic regression of the answers so far on the distance

The score is the accuracy of a linear probe of the representation, fitted on all training labels: what the graph has
taught. The images are the digits of scikit-learn, or those of MNIST. A strategy stops when the answers to all pairs are
known, which may be before a budget is spent: the number of pairs that it asked about is stored as well.

Prints a table, and writes pair_queries.json and pair_queries.png into the folder.

Legend: N images, P pixels, K dimensions of the representation, E edges, Q queries.
"""

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from data_pipelines.clips import Ints
from data_pipelines.errors import UserError
from data_pipelines.files import write_bytes
from data_pipelines.worlds.digits import load_sprites
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, make_out_folder, write_result
from worldmodel.evaluation.readout import choose_readout

Floats = NDArray[np.float64]
STRATEGIES = ("random", "active")
BUDGETS = (0, 100, 200, 400, 800, 1600, 3200)
PER_ROUND = 50
CANDIDATES = 4000
PROBE_STRENGTHS = (1e-2, 1.0, 100.0)


@dataclass
class Graph:
    """The known similarities of N images.

    groups: int64 [N], the number of each image's group of related images.
    apart: pairs of groups that are of different classes, as the numbers of two of their images [., 2].
    """

    groups: Ints
    apart: list[tuple[int, int]] = field(default_factory=list)
    together: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def empty(cls, num_images: int) -> "Graph":
        return cls(np.arange(num_images))

    def add(self, pairs: Ints, answers: NDArray[np.bool_]) -> None:
        """Add the answers [Q] about pairs [Q, 2]: True for related images."""
        self.together += [(int(a), int(b)) for a, b in pairs[answers]]
        self.apart += [(int(a), int(b)) for a, b in pairs[~answers]]
        size = len(self.groups)
        edges = np.array(self.together, dtype=np.int64).reshape(-1, 2)
        matrix = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(size, size))
        self.groups = connected_components(matrix, directed=False)[1].astype(np.int64)

    def unknown(self, pairs: Ints) -> NDArray[np.bool_]:
        """Return which of pairs [Q, 2] are of two groups that are not known to be of different classes."""
        groups, size = self.groups[pairs], len(self.groups)
        apart = np.sort(self.groups[np.array(self.apart, dtype=np.int64).reshape(-1, 2)], axis=1)
        groups.sort(axis=1)
        known = np.isin(groups[:, 0] * size + groups[:, 1], apart[:, 0] * size + apart[:, 1])
        return (groups[:, 0] != groups[:, 1]) & ~known

    def unknown_groups(self) -> Ints:
        """Return a pair of images for each two groups that are not known to be of different classes, [., 2]."""
        first = np.unique(self.groups, return_index=True)[1]
        pairs = first[np.stack(np.triu_indices(len(first), 1), axis=1)]
        return pairs[self.unknown(pairs)]


def spectral_representation(pixels: Floats, groups: Ints, dim: int) -> Floats:
    """Return the representation of images [N, P], linear in the pixels: [N, K].

    It is the closed-form minimum of the variance within groups at unit variance over all images (Balestriero and LeCun,
    arXiv 2205.11508, section 3): generalised eigenvectors. The covariance within groups of M images is shrunk towards a
    multiple of the identity, as if P further images had the mean variance of a pixel in every direction. Without
    related images, the directions are therefore the first principal components.
    """
    centred = pixels - pixels.mean(axis=0)
    total = centred.T @ centred / len(pixels)
    counts = np.bincount(groups)
    means = np.stack([np.bincount(groups, weights=column) for column in centred.T], axis=1) / counts[:, None]
    apart = (centred - means[groups])[counts[groups] > 1]
    num_pixels = len(total)
    prior = np.trace(total) * np.eye(num_pixels)  # P times the mean variance
    within = (apart.T @ apart + prior) / (len(apart) + num_pixels)
    _, vectors = eigh(total, within, subset_by_index=[num_pixels - dim, num_pixels - 1])
    values = centred @ vectors[:, ::-1]
    return values / values.std(axis=0)


def random_pairs(num_images: int, count: int, rng: np.random.Generator) -> Ints:
    """Draw pairs [Q, 2] of two different images."""
    first = rng.integers(num_images, size=count)
    return np.stack([first, (first + rng.integers(1, num_images, size=count)) % num_images], axis=1)


def most_unsure(representation: Floats, graph: Graph, candidates: Ints, count: int) -> Ints:
    """Return `count` of the candidate pairs [C, 2]: half the nearest, half those with odds nearest to one: [Q, 2].

    Before both answers have been given, all are the nearest.
    """
    distances = _distances(representation, candidates)
    order = np.argsort(distances, kind="stable")
    if not (graph.together and graph.apart):
        return candidates[order[:count]]
    known = _distances(representation, np.array([*graph.together, *graph.apart]))
    answers = np.arange(len(known)) < len(graph.together)
    unsure = np.argsort(np.abs(distances - _even_odds(known, answers)), kind="stable")
    nearest = order[: count // 2]
    rest = unsure[~np.isin(unsure, nearest)][: count - len(nearest)]
    return candidates[np.concatenate([nearest, rest])]


def _distances(representation: Floats, pairs: Ints) -> Floats:
    return np.linalg.norm(representation[pairs[:, 0]] - representation[pairs[:, 1]], axis=1)


def _even_odds(distances: Floats, answers: NDArray[np.bool_]) -> float:
    """Return the distance at which both answers are as likely, by logistic regression on distances [Q]."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(class_weight=None).fit(distances[:, None], answers)
    slope = float(model.coef_[0, 0])
    return -float(model.intercept_[0]) / slope if slope else float(np.median(distances))


@dataclass(frozen=True)
class Images:
    """Pixels [N, P] and classes [N] of training images, of those to choose the probe on, and of those to score."""

    pixels: tuple[Floats, Floats, Floats]
    classes: tuple[Ints, Ints, Ints]


def load_images(num_images: int, mnist_dir: Path | None, rng: np.random.Generator) -> Images:
    """Load digits, with `num_images` of the training split chosen at random, or all of them if there are fewer."""
    splits = [load_sprites(split, mnist_dir) for split in ("train", "selection", "test")]
    chosen = [np.sort(rng.permutation(len(split))[:num_images]) for split in splits[:1]]
    chosen += [np.arange(len(split)) for split in splits[1:]]
    pixels = [split.images[rows].flatten(1).double().numpy() for split, rows in zip(splits, chosen, strict=True)]
    classes = [split.digits[rows].numpy() for split, rows in zip(splits, chosen, strict=True)]
    return Images((pixels[0], pixels[1], pixels[2]), (classes[0], classes[1], classes[2]))


def probe_accuracy(images: Images, groups: Ints, dim: int) -> float:
    """Return the accuracy on test images of a linear probe of the representation that the groups give."""
    sizes = [len(pixels) for pixels in images.pixels]
    # The representation is linear: it is fitted on training images, and all are mapped alike.
    values = spectral_representation(images.pixels[0], groups, dim)
    centre = images.pixels[0].mean(axis=0)
    weights = np.linalg.lstsq(images.pixels[0] - centre, values, rcond=None)[0]
    fit, selection, test = (torch.from_numpy((pixels - centre) @ weights).float() for pixels in images.pixels)
    codes = [F.one_hot(torch.from_numpy(classes), 10).float() for classes in images.classes]
    readout = choose_readout(fit, codes[0], selection, codes[1], PROBE_STRENGTHS)
    assert len(test) == sizes[2]
    return float((readout(test).argmax(dim=1) == codes[2].argmax(dim=1)).float().mean())


def next_pairs(strategy: str, images: Images, graph: Graph, count: int, dim: int, rng: np.random.Generator) -> Ints:
    """Return the pairs to ask about next, at most `count`: [Q, 2]. There are none if no pair is unknown."""
    candidates = np.unique(np.sort(random_pairs(len(graph.groups), CANDIDATES, rng), axis=1), axis=0)
    candidates = rng.permutation(candidates[graph.unknown(candidates)])
    if not len(candidates):
        candidates = rng.permutation(graph.unknown_groups())[:CANDIDATES]
    if strategy == "random" or not len(candidates):
        return candidates[:count]
    representation = spectral_representation(images.pixels[0], graph.groups, dim)
    return most_unsure(representation, graph, candidates, count)


def accuracies(strategy: str, images: Images, budgets: Sequence[int], dim: int, seed: int) -> dict[int, dict[str, Any]]:
    """Ask up to each budget, in ascending order, or until no pair is unknown.

    Return the number of pairs asked about, accuracy, related pairs and largest group at each budget.
    """
    rng, graph = np.random.default_rng(seed), Graph.empty(len(images.classes[0]))
    found, asked = {}, 0
    for budget in budgets:
        while asked < budget:
            pairs = next_pairs(strategy, images, graph, min(PER_ROUND, budget - asked), dim, rng)
            if not len(pairs):
                break
            classes = images.classes[0][pairs]
            graph.add(pairs, classes[:, 0] == classes[:, 1])
            asked += len(pairs)
        found[budget] = {
            "asked": asked,
            "accuracy": probe_accuracy(images, graph.groups, dim),
            "related": len(graph.together),
            "largest_group": int(np.bincount(graph.groups).max()),
        }
    return found


def compare(images_of: Callable[[int], Images], budgets: Sequence[int], dim: int, seeds: int) -> list[dict[str, Any]]:
    """Return a row per budget with the mean and the standard deviation over seeds of each strategy."""
    jobs = tqdm([(strategy, seed) for seed in range(seeds) for strategy in STRATEGIES], desc="asking", unit="run")
    runs: dict[str, list[dict[int, dict[str, Any]]]] = {strategy: [] for strategy in STRATEGIES}
    for strategy, seed in jobs:
        runs[strategy].append(accuracies(strategy, images_of(seed), budgets, dim, seed))
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        row: dict[str, Any] = {"queries": budget}
        for strategy, of_seeds in runs.items():
            values = [run[budget]["accuracy"] for run in of_seeds]
            row[strategy] = fmean(values)
            row[f"{strategy}_std"] = stdev(values) if seeds > 1 else 0.0
            row[f"{strategy}_asked"] = fmean(run[budget]["asked"] for run in of_seeds)
            row[f"{strategy}_related"] = fmean(run[budget]["related"] for run in of_seeds)
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], ceiling: float) -> str:
    """Return the rows as text. asked: pairs asked about, random / active, a mean over seeds."""
    lines = [f"{'queries':>8}{'random':>18}{'active':>18}{'asked':>18}{'related pairs found':>24}"]
    for row in rows:
        cells = [f"{row[strategy]:.3f} ± {row[f'{strategy}_std']:.3f}" for strategy in STRATEGIES]
        asked, related = (
            " / ".join(f"{row[f'{strategy}_{what}']:,.0f}" for strategy in STRATEGIES) for what in ("asked", "related")
        )
        lines.append(f"{row['queries']:>8,}{cells[0]:>18}{cells[1]:>18}{asked:>18}{related:>24}")
    return "\n".join([*lines, f"{'all':>8}{ceiling:>18.3f}"])


def draw_figure(rows: Sequence[Mapping[str, Any]], ceiling: float) -> bytes:
    """Draw accuracy against queries, with one standard deviation on either side, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    queries = [row["queries"] for row in rows]
    for strategy, colour in zip(STRATEGIES, ("#9aa1ab", "#1f5fd6"), strict=True):
        mean = np.array([row[strategy] for row in rows])
        spread = np.array([row[f"{strategy}_std"] for row in rows])
        asked = [row[f"{strategy}_asked"] for row in rows]
        axes.plot(asked, mean, marker="o", markersize=3, color=colour, label=strategy)
        axes.fill_between(asked, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(ceiling, color="#d9480f", linewidth=0.8, label="all pairs known")
    axes.set_xscale("symlog", linthresh=100, linscale=0.3)
    axes.set_xticks(queries, [f"{count:,}" for count in queries])
    axes.minorticks_off()
    axes.set_xlim(queries[0], queries[-1])
    axes.set_xlabel("queries")
    axes.set_ylabel("accuracy of a linear probe")
    axes.legend(frameon=False, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--mnist-dir", type=Path, help="MNIST's IDX files (default: the digits of scikit-learn)")
    parser.add_argument("--images", type=int, default=1297, help="training images (default: 1297)")
    parser.add_argument("--dim", type=int, default=8, help="dimensions of the representation (default: 8)")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions (default: 5)")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "images", "dim", "seeds")
        num_pairs = args.images * (args.images - 1) // 2
        if num_pairs < max(BUDGETS):
            raise UserError(f"--images {args.images} have {num_pairs:,} pairs, fewer than {max(BUDGETS):,} queries")
        num_pixels = load_images(args.images, args.mnist_dir, np.random.default_rng(0)).pixels[0].shape[1]
        if args.dim > num_pixels:
            raise UserError(f"--dim {args.dim} must be at most {num_pixels}, the number of pixels")
        make_out_folder(args.out)

        def images_of(seed: int) -> Images:
            return load_images(args.images, args.mnist_dir, np.random.default_rng(1000 + seed))

        rows = compare(images_of, BUDGETS, args.dim, args.seeds)
        of_all = [images_of(seed) for seed in range(args.seeds)]
        ceiling = fmean(probe_accuracy(images, images.classes[0], args.dim) for images in of_all)
        num_images = len(of_all[0].classes[0])  # there may be fewer than asked for
        facts = {"seeds": args.seeds, "images": num_images, "dim": args.dim, "all_pairs": ceiling, "rows": rows}
        write_result(args.out / "pair_queries.json", facts)
        write_bytes(args.out / "pair_queries.png", draw_figure(rows, ceiling))
        print(f"\n{table(rows, ceiling)}\n\n{args.out / 'pair_queries.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
