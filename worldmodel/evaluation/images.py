"""Scores of frozen representations of single images: probes of classes and attributes, and DCI of the attributes.

Legend: N images, S images of a clip, D embedding dimensions, K numbers of an attribute, V attributes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from worldmodel.evaluation.embed import EmbeddedSplit
from worldmodel.evaluation.factors import dci_by_forests
from worldmodel.evaluation.probes import probe_clips
from worldmodel.runs.metrics import Metrics


def score_images(fit: EmbeddedSplit, selection: EmbeddedSplit, queries: EmbeddedSplit) -> Metrics:
    """Probe the contexts of image pairs for their own labels: accuracy of classes, R^2 of attributes; and DCI.

    DCI is that of the embedding of `fit`, by random forests. It needs at least two dimensions, and two attributes of
    one number each.
    """
    fit, selection, queries = (replace(part, labels=context_labels(part.labels)) for part in (fit, selection, queries))
    scores = Metrics(probes=probe_clips(None, fit, selection, queries))
    if (attributes := attributes_of(fit.labels)).shape[1] > 1 and fit.embedding.shape[1] > 1:
        scores["dci"] = dci_by_forests(fit.embedding, attributes)
    return scores


def context_labels(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the labels of the contexts of pairs: classes [N] as they are, [N, K] of measures [N, S, K]."""
    return {name: values[:, 0] if values.ndim == 3 else values for name, values in labels.items()}


def attributes_of(labels: dict[str, Tensor]) -> Tensor:
    """Return the measures of one number that vary, [N, V], of the labels of contexts."""
    numbers = [values for values in labels.values() if values.ndim == 2 and values.shape[1] == 1]
    varying = [values for values in numbers if len(values.unique()) > 1]
    return torch.cat(varying, dim=1) if varying else torch.empty(len(next(iter(labels.values()), ())), 0)
