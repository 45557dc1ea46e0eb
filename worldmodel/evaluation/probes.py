"""Probes of frozen representations for known factors, of rising capacity and with falling numbers of labels.

The in-domain protocols of Marks et al., "A Closer Look at Benchmarking Self-Supervised Pre-training with Image
Classification" (arXiv 2407.12210): linear and k-NN probes of standardised features, and few labels. Their few-shot
protocol fine-tunes the encoder too. Here the encoder stays frozen, and the few-shot probe is linear.

Legend: N clips, M clips to compare with, D dimensions of a representation, K dimensions of a target. The number of
classes is written out.
"""

import warnings
from collections.abc import Callable, Mapping
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.errors import one_line_logger
from data_pipelines.worlds.law import Law
from worldmodel.evaluation.embed import EmbeddedSplit
from worldmodel.evaluation.readout import RIDGE_STRENGTHS, choose_readout
from worldmodel.evaluation.scores import r_squared
from worldmodel.runs.metrics import ProbeScores, Targets
from worldmodel.runs.record_types import MAX_NAMES

log = one_line_logger(__name__)

# Few clips of many dimensions need more shrinkage than a readout of all clips.
PROBE_STRENGTHS = (*RIDGE_STRENGTHS, 1e4)
NEIGHBOURS = (1, 5, 20, 50)
MLP_FIT_CLIPS = 4096
MLP_ITERATIONS = 30
MIN_STOPPED_EARLY = 10  # with as few clips, the tenth that would stop the fit has no two
NEIGHBOUR_CLIPS = 1024
MAX_CLASSES = 1024  # of a label that is probed for

Splits = tuple[Tensor, Tensor, Tensor]
"""Values of the clips to fit on, of those to choose hyperparameters on, and of those to score."""


def probe_clips(
    law: Law | None, fit: EmbeddedSplit, selection: EmbeddedSplit, queries: EmbeddedSplit
) -> dict[str, Targets]:
    """Probe the representations of held-out clips for their labels -> {representation: {target: {probe: score}}}."""
    parts = (fit, selection, queries)

    def of_all(measure: Callable[[EmbeddedSplit], Tensor]) -> Splits:
        return measure(fit), measure(selection), measure(queries)

    representations = {
        "backbone": of_all(lambda clips: clips.backbone),
        "embedding": of_all(lambda clips: clips.embedding),
    }
    if fit.r.shape[1]:
        representations |= {
            "r": of_all(lambda clips: clips.r),
            "embedding_and_r": of_all(lambda clips: torch.cat([clips.embedding, clips.r], dim=1)),
        }
    labels = [law.probe_targets(part.labels) if law else label_targets(part.labels) for part in parts]
    common = [name for name in labels[0] if name in labels[1] and name in labels[2]]
    if len(common) > MAX_NAMES:
        log.warning("probes are fitted for the first %d of %d labels", MAX_NAMES, len(common))
        common = common[:MAX_NAMES]
    targets: dict[str, Splits] = {name: (labels[0][name], labels[1][name], labels[2][name]) for name in common}
    return probe_all(representations, targets)


def label_targets(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the labels to probe for, among those that vary over videos.

    Whole numbers below MAX_CLASSES are classes [N]. Larger ones, such as the seeds of a recording, are left out. Other
    labels are measures [N, K].
    """
    targets = {}
    for name, values in labels.items():
        if values.ndim >= 3 or len(values.unique()) < 2:
            continue
        if values.is_floating_point() or values.ndim == 2:
            targets[name] = values.float().reshape(len(values), -1)
        elif values.min() >= 0 and values.max() < MAX_CLASSES:
            targets[name] = values
    return targets


def probe_all(representations: Mapping[str, Splits], targets: Mapping[str, Splits]) -> dict[str, Targets]:
    """`probe` every target from every representation -> {representation: {target: {probe: score}}}.

    representations [N, D] and targets ([N] or [N, K]) are given for the fit, selection and test clips.
    """
    scores: dict[str, Targets] = {name: {} for name in representations}
    pairs = tqdm(list(product(representations, targets)), desc="probes", unit="target")
    for representation, target in pairs:
        fit, selection, test = zip(representations[representation], targets[target], strict=True)
        scores[representation][target] = probe(*fit, *selection, *test)
    return scores


def probe(
    fit_inputs: Tensor,
    fit_outputs: Tensor,
    selection_inputs: Tensor,
    selection_outputs: Tensor,
    test_inputs: Tensor,
    test_outputs: Tensor,
) -> ProbeScores:
    """Score linear, knn, mlp and few_shot_1, few_shot_5, few_shot_10 probes of inputs [N, D] on test clips.

    - Integer outputs [N] are classes. They are fitted by squared error to one-hot codes and scored by accuracy.
    - Float outputs [N, K] are scored by R^2, averaged over dimensions.
    - few_shot_p is the linear probe fitted on p % of the fit clips, drawn with a fixed seed and stratified by class.
    - The ridge strength and the number of neighbours are chosen on the selection clips.
    - The MLP is kept cheap: it is fitted on the first MLP_FIT_CLIPS for at most MLP_ITERATIONS epochs and stops early
      on a tenth of them. Its score is a lower bound.
    """
    centre, scale = fit_inputs.mean(dim=0), fit_inputs.std(dim=0).clamp(min=1e-6)
    fit, selection, test = ((x - centre) / scale for x in (fit_inputs, selection_inputs, test_inputs))
    labels = (fit_outputs, selection_outputs, test_outputs)
    is_class = not fit_outputs.is_floating_point()
    fit_y, selection_y, test_y = one_hot(labels) if is_class else labels
    score = _accuracy if is_class else r_squared

    def linear(rows: Tensor) -> float:
        readout = choose_readout(fit[rows], fit_y[rows], selection, selection_y, PROBE_STRENGTHS)
        return score(readout(test), test_y)

    def nearest(inputs: Tensor, num_neighbours: int) -> Tensor:
        return fit_y[inputs[:, :num_neighbours]].mean(dim=1)

    of_selection, of_test = (nearest_clips(inputs, fit, max(NEIGHBOURS)) for inputs in (selection, test))
    num_neighbours = max(NEIGHBOURS, key=lambda k: score(nearest(of_selection, k), selection_y))
    mlp = fit_mlp(fit[:MLP_FIT_CLIPS], fit_y[:MLP_FIT_CLIPS], MLP_ITERATIONS)
    return ProbeScores(
        linear=linear(torch.arange(len(fit))),
        knn=score(nearest(of_test, num_neighbours), test_y),
        mlp=score(mlp(test), test_y),
        few_shot_1=linear(few_clips(fit_outputs, 1)),
        few_shot_5=linear(few_clips(fit_outputs, 5)),
        few_shot_10=linear(few_clips(fit_outputs, 10)),
    )


def few_clips(outputs: Tensor, percent: int) -> Tensor:
    """Return rows of a random `percent` of clips: at least one per class, or at least two with float outputs."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(outputs), generator=generator)
    if outputs.is_floating_point():
        return order[: max(2, round(len(order) * percent / 100))]
    groups = [order[outputs[order] == label] for label in outputs.unique()]
    return torch.cat([group[: max(1, round(len(group) * percent / 100))] for group in groups])


def nearest_clips(inputs: Tensor, fit: Tensor, count: int) -> Tensor:
    """Return the rows of the fit clips [M, D] nearest to each input [N, D], nearest first: [N, min(count, M)]."""
    count = min(count, len(fit))
    return torch.cat(
        [torch.cdist(chunk, fit).topk(count, largest=False).indices for chunk in inputs.split(NEIGHBOUR_CLIPS)]
    )


def fit_mlp(inputs: Tensor, outputs: Tensor, max_iterations: int = 100) -> Callable[[Tensor], Tensor]:
    """Fit a probe with one hidden layer of 256 units to [N, D], [N, K]; return it as a function [M, D] -> [M, K]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    stops_early = len(inputs) > MIN_STOPPED_EARLY
    mlp = make_pipeline(
        StandardScaler(),
        MLPRegressor(hidden_layer_sizes=(256,), early_stopping=stops_early, max_iter=max_iterations, random_state=0),
    )
    with warnings.catch_warnings():
        # Reaching `max_iterations` is a chosen budget, not a problem to report.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # sklearn takes one output as a vector.
        mlp.fit(inputs.numpy(), outputs.squeeze(1).numpy())
    return lambda values: torch.from_numpy(mlp.predict(values.numpy())).float().reshape(-1, outputs.shape[1])


def one_hot(labels: Splits) -> Splits:
    """Encode the classes [N] of three splits as [N, number of classes in any of them]."""
    num_classes = 1 + max(int(part.max()) for part in labels)
    fit, selection, test = (F.one_hot(part.long(), num_classes).float() for part in labels)
    return fit, selection, test


def _accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Return the share of clips whose class has the highest score: scores and one-hot codes [N, classes]."""
    return float((predicted.argmax(dim=1) == truth.argmax(dim=1)).float().mean())
