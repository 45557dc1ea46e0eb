"""What frozen representations tell of known factors, by probes of rising capacity and falling numbers of labels.

The in-domain protocols of Marks et al., "A Closer Look at Benchmarking Self-Supervised Pre-training with Image
Classification" (arXiv 2407.12210): linear and k-NN probes of standardised features, and few labels. Their few-shot
protocol tunes the encoder too; here it stays frozen and the few-shot probe is linear.

Legend: N clips, D dimensions of a representation, K dimensions of a target, C classes.
"""

import warnings
from collections.abc import Callable, Mapping
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from worldmodel.evaluation.readout import RIDGE_STRENGTHS, choose_readout
from worldmodel.evaluation.scores import r_squared

# Few clips of many dimensions need more shrinkage than a readout of all clips.
PROBE_STRENGTHS = (*RIDGE_STRENGTHS, 1e4)
NEIGHBOURS = (1, 5, 20, 50)
FEW_SHOT_PERCENT = (1, 5, 10)
MLP_FIT_CLIPS = 4096
MLP_ITERATIONS = 30
NEIGHBOUR_CLIPS = 1024

# Of clips to fit on, clips to choose hyperparameters on, clips to score.
Splits = tuple[Tensor, Tensor, Tensor]


def probe_all(
    representations: Mapping[str, Splits], targets: Mapping[str, Splits]
) -> dict[str, dict[str, dict[str, float]]]:
    """`probe` of every target from every representation -> {representation: {target: {probe: score}}}.

    representations [N, D] and targets ([N] or [N, K]) are given for the fit, selection and test clips.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in representations}
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
) -> dict[str, float]:
    """Scores on test clips of linear, knn, mlp and few_shot_1, few_shot_5, few_shot_10 probes of inputs [N, D].

    Integer outputs [N] are classes, scored by accuracy and fitted by squared error to one-hot codes; outputs [N, K] of
    floats are scored by R^2, the mean over dimensions. few_shot_p is the linear probe of p % of the fit clips, drawn
    with a fixed seed from each class alike. The ridge strength and the number of neighbours are the best ones of the
    selection clips. The MLP, to stay cheap, is fitted on the first MLP_FIT_CLIPS for at most MLP_ITERATIONS epochs and
    stops early on a tenth of them: its score is a lower bound.
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
    return {
        "linear": linear(torch.arange(len(fit))),
        "knn": score(nearest(of_test, num_neighbours), test_y),
        "mlp": score(mlp(test), test_y),
        **{f"few_shot_{percent}": linear(few_clips(fit_outputs, percent)) for percent in FEW_SHOT_PERCENT},
    }


def few_clips(outputs: Tensor, percent: int) -> Tensor:
    """Rows of a random `percent` of clips: of each class alike and at least one, or at least two where K are floats."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(outputs), generator=generator)
    if outputs.is_floating_point():
        return order[: max(2, round(len(order) * percent / 100))]
    groups = [order[outputs[order] == label] for label in outputs.unique()]
    return torch.cat([group[: max(1, round(len(group) * percent / 100))] for group in groups])


def nearest_clips(inputs: Tensor, fit: Tensor, count: int) -> Tensor:
    """Rows of the fit clips nearest to each input, the nearest first: [N, D], [N', D] -> [N, min(count, N')]."""
    count = min(count, len(fit))
    return torch.cat(
        [torch.cdist(chunk, fit).topk(count, largest=False).indices for chunk in inputs.split(NEIGHBOUR_CLIPS)]
    )


def fit_mlp(inputs: Tensor, outputs: Tensor, max_iterations: int = 100) -> Callable[[Tensor], Tensor]:
    """A probe with one hidden layer of 256 units: [N, D], [N, K] -> a function [M, D] -> [M, K]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mlp = make_pipeline(
        StandardScaler(),
        MLPRegressor(hidden_layer_sizes=(256,), early_stopping=True, max_iter=max_iterations, random_state=0),
    )
    with warnings.catch_warnings():
        # Reaching `max_iterations` is a budget that was chosen, nothing to tell the user.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # sklearn takes one output as a vector.
        mlp.fit(inputs.numpy(), outputs.squeeze(1).numpy())
    return lambda values: torch.from_numpy(mlp.predict(values.numpy())).float().reshape(-1, outputs.shape[1])


def one_hot(labels: Splits) -> Splits:
    """Classes [N] of three splits -> [N, C] each, C the number of classes in any of them."""
    num_classes = 1 + max(int(part.max()) for part in labels)
    fit, selection, test = (F.one_hot(part.long(), num_classes).float() for part in labels)
    return fit, selection, test


def _accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Scores [N, C], one-hot [N, C] -> share of clips whose class has the highest score."""
    return float((predicted.argmax(dim=1) == truth.argmax(dim=1)).float().mean())
