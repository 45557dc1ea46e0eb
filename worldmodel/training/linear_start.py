"""Start a forecast at the linear-Gaussian one, so that refinement only has to learn what is missing there.

Legend: N pairs of segments, D embedding dimensions, Z numbers of a scene code, A numbers of an action.
"""

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn

from worldmodel.nets.editors import LinearEditor
from worldmodel.nets.latents import GaussianLatent, LinearPrior
from worldmodel.nets.world_model import WorldModel

STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Ridge strengths to choose from."""
SPREADS = (1.0, 1.4, 2.0)
"""Standard deviations of r to choose from. That of residuals on training clips is 1; on held-out clips they are larger,
if the embedding or the fit has learned the training clips by heart."""
KEPT = 0.6
"""Share of what refinement has changed that is kept, weight by weight. Most of the gain stays, and forecasts
of a time that differs from that of training and selection are safer (Wortsman et al., arXiv 2109.01903)."""
CONSTANT = 1e-6
"""Standard deviation of an input that counts as constant."""
LEAST_VARIANCE = 1e-5
"""Added to the variance of residuals, in units of the embedding's."""


STARTED = ("editor.", "latent.prior.")
"""The beginnings of the names of the weights that have a linear start."""


def starts_linear(model: WorldModel) -> bool:
    """Return True for a model whose editor and prior are linear."""
    latent = model.latent
    return (
        isinstance(model.editor, LinearEditor)
        and isinstance(latent, GaussianLatent)
        and isinstance(latent.prior, LinearPrior)
    )


@torch.no_grad()
def start_linear(
    model: WorldModel, contexts: Tensor, targets: Tensor, actions: Tensor, score: Callable[[], float]
) -> None:
    """Make a model of `starts_linear` the best linear-Gaussian forecast of targets from contexts [N, D].

    y = f(x, a) + e for actions a [N, A]: f is a ridge, and e is normal with the shape L L' of the residuals'
    covariance, shrunk (Ledoit and Wolf 2004). Then r = L^-1 (y - x) has equal and uncorrelated residuals, and the
    editor is z + L r. If r has fewer than D dimensions, it holds the principal components of y - x; if more, the others
    are not used. Strength and size have the lowest `score` of the model. Of a scene code, nothing is used.
    """
    from sklearn.covariance import ledoit_wolf

    editor, prior = model.editor, model.latent.prior
    assert isinstance(editor, LinearEditor) and isinstance(prior, LinearPrior)
    dim = contexts.shape[1]
    code = contexts.new_zeros(len(contexts), len(prior.centre) - dim - actions.shape[1])
    inputs = torch.cat([contexts, code, actions], dim=1).double()
    centre, spread = inputs.mean(dim=0), inputs.std(dim=0) + CONSTANT
    spread[spread <= 2 * CONSTANT] = 1.0  # the scene code, and actions that were never taken
    x, y = (inputs - centre) / spread, (targets - centre[:dim]).double() / spread[:dim]
    bias = y.mean(dim=0)
    gram, moment, eye = x.T @ x, x.T @ (y - bias), torch.eye(x.shape[1]).to(x)
    rank = min(dim, prior.latent_dim)
    directions = eye[:dim, :dim] if rank == dim else torch.linalg.svd(y - x[:, :dim], full_matrices=False).Vh[:rank].T
    rank = directions.shape[1]  # fewer than `rank` pairs have fewer components

    @cache
    def fitted(strength: float) -> tuple[Tensor, Tensor]:
        """Return the map from inputs and 1 to the mean of r, [R, X + 1], and the editor's first columns [D, `rank`]."""
        weight = torch.linalg.solve(gram + strength * eye, moment)
        residuals = y - bias - x @ weight
        covariance = torch.from_numpy(ledoit_wolf(residuals.cpu().numpy(), assume_centered=True)[0]).to(x)
        covariance = directions.T @ covariance @ directions
        root = torch.linalg.cholesky(covariance + LEAST_VARIANCE * eye[:rank, :rank])
        change = torch.cat([weight - eye[:, :dim], bias[None]]) @ directions
        in_r = torch.zeros(prior.latent_dim, len(change)).to(x)
        in_r[:rank] = torch.linalg.solve_triangular(root, change.T, upper=False)
        return in_r, spread[:dim, None] * (directions @ root)

    def become(strength: float, size: float) -> None:
        in_r, columns = fitted(strength)
        prior.start(centre, spread, in_r[:, :-1], in_r[:, -1], size)
        editor.weight.zero_()[:, :rank] = columns

    scores = {}
    for choice in product(STRENGTHS, SPREADS):
        become(*choice)
        scores[choice] = score()
    become(*min(scores, key=lambda choice: scores[choice]))


@torch.no_grad()
def keep_share(training: nn.Module, start: dict[str, Tensor]) -> None:
    """Move the weights of a forecast back towards those of its start, so that the share KEPT of their change remains.

    Those of other networks had no such start: a temporal distance a random one, and the posterior one for an r with
    other coordinates.
    """
    for name, value in training.state_dict().items():
        if name.startswith(STARTED) and value.is_floating_point():
            value.copy_(start[name].lerp(value, KEPT))
