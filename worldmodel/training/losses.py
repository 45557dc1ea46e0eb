"""The losses of a world model: of each predicted step, of the whole sequence, and of refinement.

`TrainingModel` joins a world model with its objective and computes all losses in one forward call, as
DistributedDataParallel requires. A gradient that is already known (worldmodel/training/gradients.py) can be replayed
through the same call.

Legend: B clips of this process, N clips of the global batch, L segments of a clip, T frames, C channels, H = W pixels,
J segments of a history, K steps of prediction, D embedding dimensions, Z numbers of scene code and history, F
features, R latent dimensions, A numbers of an action, I pairs of segments.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.data import TrainingInputs
from worldmodel.nets.distance import STEP_WEIGHT, excess_steps, nearness
from worldmodel.nets.encoders import mlp
from worldmodel.nets.latents import PRIOR_NLL
from worldmodel.nets.parallel import all_gather, is_shared
from worldmodel.nets.world_model import ENCODER_LOSS, Embedded, Predictions, WorldModel, concat
from worldmodel.training.objectives import Objective, variance_hinge


class SequenceTerms(nn.Module):
    """Weighted terms that shape distances between the embeddings of one clip, so that they suit planning.

    smoothness: the mean squared difference of successive embeddings. If the variance is kept up, states that are few
    steps apart come to be near, and walls count (slow features: Wiskott and Sejnowski 2002).
    inverse_dynamics: the mean squared error of the action, which an MLP reads from the embeddings before and after it.
    It keeps in the embedding what an agent controls.
    time_variance: the variance hinge on embeddings less their clip's mean. It prevents embeddings that only hold the
    constants of a clip.
    """

    def __init__(self, weights: Mapping[str, float], embedding_dim: int, hidden_dim: int, action_dim: int) -> None:
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if "inverse_dynamics" in self.weights:
            self.action_net = mlp([2 * embedding_dim, hidden_dim, action_dim])

    @property
    def needs_batch_statistics(self) -> bool:
        """As `Objective.needs_batch_statistics`. The network that reads the action has batch norm."""
        return "time_variance" in self.weights or "inverse_dynamics" in self.weights

    def forward(self, embeddings: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms for embeddings [B, K + 1, D] of successive segments and actions [B, K, A]."""
        terms: dict[str, Tensor] = {}
        if "smoothness" in self.weights:
            terms["smoothness"] = F.mse_loss(embeddings[:, 1:], embeddings[:, :-1])
        if "time_variance" in self.weights:
            terms["time_variance"] = variance_hinge((embeddings - embeddings.mean(dim=1, keepdim=True)).flatten(0, 1))
        if "inverse_dynamics" in self.weights:
            pairs = torch.cat([embeddings[:, :-1], embeddings[:, 1:]], dim=-1).flatten(0, 1)
            terms["inverse_dynamics"] = F.mse_loss(self.action_net(pairs).float(), actions.flatten(0, 1))
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor | float:
        """Return the weighted sum of the terms."""
        return sum(self.weights[name] * value for name, value in terms.items())


@dataclass(frozen=True)
class CachedGradient:
    """The gradient of a global batch's loss by the predictions of some of its clips.

    predictions: by the names of `Predictions.tensors`, those that the loss depends on.
    parameters: pairs of a parameter of the loss itself and its gradient.
    """

    predictions: Mapping[str, Tensor]
    parameters: Sequence[tuple[Tensor, Tensor]] = ()

    def surrogate(self, predictions: Predictions) -> Tensor:
        """Return a scalar whose gradient is this one."""
        tensors = predictions.tensors()
        pairs = [*((tensors[name], slope) for name, slope in self.predictions.items()), *self.parameters]
        return torch.stack([(value * slope).sum() for value, slope in pairs]).sum()


@dataclass(frozen=True)
class DistanceExamples:
    """Segments that a temporal distance is learned from, besides the predicted steps of B clips.

    other_features: [B, F], the features of any segment of each clip.
    embeddings, features: [2, I, D] and [2, I, F], pairs of segments from similar clips that should be far apart.
    """

    other_features: Tensor
    embeddings: Tensor
    features: Tensor


class TrainingModel(nn.Module):
    """A world model with the losses that it is trained by.

    L = L_ssl(t(f(x), r), f(x+)) + beta * L_reg(r) (AdaSSL, arXiv 2602.02381). A Gaussian latent with the BYOL objective
    is AdaSSL-V as in that paper's appendix D.5. The same without a latent is BYOL (arXiv 2006.07733).

    The parts of `model` are registered here under their own names, so that checkpoints hold plain names such as
    "embedder.encoder.layers.0.weight". `model` itself is not a submodule, but follows `train` and `eval`.

    Args:
        step_weights: the relative weights of the K predicted steps in the loss.
        beta: the weight of the latent's penalty after its warm-up. None: the objective's default.
        distance_error_weight: in refinement, the weight of prediction errors as a temporal distance measures them.
        energy_weight: in refinement, the weight of the `relative_scores` of its `step_energy_scores`.
        energy_by_dimension: score each dimension by itself.
        energy_samples: sampled futures per clip for this score.
    """

    model: WorldModel

    def __init__(
        self,
        model: WorldModel,
        objective: Objective,
        sequence_terms: SequenceTerms,
        *,
        step_weights: Sequence[float] = (1.0,),
        beta: float | None = None,
        distance_error_weight: float = 0.0,
        energy_weight: float = 0.0,
        energy_by_dimension: bool = False,
        energy_samples: int = 2,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        self.embedder = model.embedder
        self.scene = model.scene
        self.history = model.history
        self.latent = model.latent
        self.objective = objective
        self.sequence_terms = sequence_terms
        self.editor = model.editor
        self.distance = model.distance
        self.beta = objective.default_beta if beta is None else beta
        self.step_weights = [weight / sum(step_weights) for weight in step_weights]
        self.distance_error_weight = distance_error_weight
        self.energy_weight, self.energy_samples = energy_weight, energy_samples
        self.energy_by_dimension = energy_by_dimension

    def train(self, mode: bool = True) -> "TrainingModel":
        """Set training or evaluation mode, also of `model`."""
        super().train(mode)
        self.model.train(mode)
        return self

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.step_weights)

    @property
    def compares_clips(self) -> bool:
        """True if the loss of a batch is not the mean of the losses of its micro-batches."""
        of_objective = self.objective.needs_negatives or self.objective.needs_batch_statistics
        return of_objective or self.sequence_terms.needs_batch_statistics

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the loss, which predictions do not depend on."""
        return [*self.objective.parameters(), *self.sequence_terms.parameters()]

    def targets_of(self, segments: Tensor) -> Tensor:
        """Return the targets of the K steps, of segments [B, L, T, C, H, W], step by step: [K * B, T, C, H, W]."""
        return self.model.targets_of(segments, self.num_steps)

    def forward(
        self,
        inputs: TrainingInputs,
        teacher_targets: Tensor | None,
        beta: float,
        generator: torch.Generator | None = None,
        *,
        cached: CachedGradient | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses of the ambient `global_batch`, of which the B clips of `inputs` are this process's share.

        K steps are predicted, each from the prediction before it and the r that the posterior infers there. Losses are
        means over steps by their weights. The encoder also learns through the posterior; without that gradient,
        forecasts are far worse (docs/experiments.md).

        Args:
            teacher_targets: [K * B, D], the teacher's embeddings of `targets_of(segments)`. None: the encoder embeds
                the targets itself.
            beta: the weight of the latent's penalty.
            cached: replay this gradient. Nothing else is computed.

        Returns: scalars by name, of which "loss" is the one to minimise, and the targets [K * N, D]. With `cached`, the
        only scalar is "surrogate", whose gradient is the cached one, and the targets are those of this process.
        """
        predictions = self.predict(inputs, teacher_targets, generator)
        if cached is not None:
            return {"surrogate": cached.surrogate(predictions)}, predictions.targets
        predictions = gather_predictions(predictions)
        return self.batch_losses(predictions, beta, generator), predictions.targets

    def predict(
        self, inputs: TrainingInputs, teacher_targets: Tensor | None, generator: torch.Generator | None = None
    ) -> Predictions:
        """Predict K steps of clips, with arguments as in `forward`."""
        embedded = self.model.embed(inputs.segments, self.num_steps, teacher_targets)
        predictions, _ = self.model.predict(embedded, inputs.known_r, inputs.actions, generator)
        return predictions

    def batch_losses(
        self, predictions: Predictions, beta: float, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of `forward` from the predictions for all clips of a batch."""
        real, edited = predictions.real, predictions.edited
        with torch.autocast(real.device.type, enabled=False):
            steps = [
                step_losses(
                    self.objective,
                    edited[:, k],
                    real[:, k + 1],
                    real[:, k],
                    {name: cost[:, k] for name, cost in predictions.costs.items()},
                    beta,
                    generator,
                )
                for k in range(self.num_steps)
            ]
            of_sequence = self.sequence_terms(real, predictions.actions)
        weighted = {name: self._over_steps([terms[name] for terms in steps]) for name in steps[0]}
        loss = weighted.pop("loss") + self.sequence_terms.total(of_sequence)
        logged = {name: value.detach() for name, value in (weighted | of_sequence).items()}
        if self.num_steps > 1:
            logged |= {f"alignment_{k}": terms["alignment"].detach() for k, terms in enumerate(steps, start=1)}
        return {"loss": loss} | logged

    def refinement_losses(
        self,
        embedded: Embedded,
        known_r: Tensor,
        actions: Tensor,
        examples: DistanceExamples | None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of B clips that are already embedded, with known_r [B, R] and actions [B, J + K, A].

        The first J actions are those of the history. With `examples`, they include those of the temporal distance.
        """
        with self.fixed_forecast() if self.energy_weight else nullcontext():
            predictions, states = self.model.predict(embedded, known_r, actions, generator)
        losses = self.batch_losses(predictions, self.beta, generator)
        if self.energy_weight:
            futures, log_probabilities = self.model.futures_with_choices(
                states[:, 0], predictions.actions, self.energy_samples, generator
            )
            with torch.autocast(states.device.type, enabled=False):
                targets = predictions.real[:, 1:].float()
                scores = step_energy_scores(
                    futures.float(), targets, log_probabilities.float(), by_dimension=self.energy_by_dimension
                )
            losses["loss"] = losses["loss"] + self.energy_weight * relative_scores(scores).mean()
            losses["energy_score"] = scores.detach().mean()
        if examples is not None:
            with torch.autocast(states.device.type, enabled=False):
                terms = distance_losses(self.model, embedded, states, examples, self.distance_error_weight)
            losses["loss"] = losses["loss"] + sum(terms.values())
            losses |= {name: value.detach() for name, value in terms.items()}
        return losses

    @contextmanager
    def fixed_forecast(self) -> Iterator[None]:
        """Let no gradient reach the editor, the history and the prior, so that only the posterior is trained."""
        parameters = [*self.editor.parameters(), *self.history.parameters(), *self.prior_parameters()]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def prior_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the prior, if it is a network."""
        return self.latent.prior.parameters() if isinstance(self.latent.prior, nn.Module) else iter(())

    def _over_steps(self, of_steps: Sequence[Tensor]) -> Tensor:
        """Return the mean of K scalars by the weights of steps."""
        if self.num_steps == 1:
            return of_steps[0]  # on a GPU, each operation on scalars is a kernel launch
        parts = [weight * value for weight, value in zip(self.step_weights, of_steps, strict=True)]
        return torch.stack(parts).sum()


def step_losses(
    objective: Objective,
    edited: Tensor,
    target: Tensor,
    context: Tensor,
    costs: Mapping[str, Tensor],
    beta: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Compute the "loss" of one step and its terms.

    Args:
        edited, target, context: [B, D], where context is the embedding of the segment that the step starts from.
        costs: [B] each, those of r (`Inference.costs`) and of the encoder by name.
    """
    terms = objective(edited, target, context, generator)
    loss = terms["prediction_loss"]
    terms["alignment"] = F.cosine_similarity(edited, target, dim=-1).mean()
    for name, cost in costs.items():
        terms[name] = cost.mean()
        loss = loss + (terms[name] if name in (PRIOR_NLL, ENCODER_LOSS) else beta * terms[name])
    if "information_nats" in terms and "kl_nats" in terms:
        # I(f(x); f(x+)) = I(f(x), r; f(x+)) - I(r; f(x+) | f(x)), and the KL bounds the second term from above.
        terms["information_nats"] = terms["information_nats"] - terms["kl_nats"]
    return {"loss": loss} | terms


def step_energy_scores(
    futures: Tensor, targets: Tensor, log_probabilities: Tensor | None = None, *, by_dimension: bool = False
) -> Tensor:
    """Return the Energy Score of futures [B, S, K, D] for targets [B, K, D], a mean over clips, by sqrt(D): [K].

    ES = mean |X - y| - (1/2) mean_{s != s'} |X_s - X_s'|, the unbiased estimate (Gneiting and Raftery 2007, eq. 22). As
    a training loss it fits the spread of the samples along with their mean (arXiv 2606.12997).

    Args:
        log_probabilities: [B, S, K], of choices that no gradient passes, as `futures_with_choices` returns them. They
            add no value, but the gradient of the expected score by these probabilities.
        by_dimension: the mean of the score of each dimension, instead of that of the whole embedding by sqrt(D).
    """
    num_samples = futures.shape[1]
    by_step = futures.transpose(1, 2)  # [B, K, S, D]
    length = _mean_lengths if by_dimension else _lengths
    to_truth = length(by_step - targets[:, :, None])  # [B, K, S]
    between = length(by_step[:, :, :, None] - by_step[:, :, None])  # [B, K, S, S]
    scores = to_truth.mean(dim=(0, 2)) - between.sum(dim=(2, 3)).mean(dim=0) / (2 * num_samples * (num_samples - 1))
    if log_probabilities is not None and log_probabilities.requires_grad:
        gain = (log_probabilities.transpose(1, 2) * _choice_costs(to_truth.detach(), between.detach())).mean(dim=(0, 2))
        scores = scores + gain - gain.detach()
    return scores / math.sqrt(futures.shape[-1])


def _choice_costs(to_truth: Tensor, between: Tensor) -> Tensor:
    """Return what each of S samples adds to the expected Energy Score, less a baseline from the others: [..., S].

    The gradient of the expected score is the mean of these costs times that of the samples' log probabilities (score
    function: Williams 1992, with the baseline of Mnih and Rezende 2016). A sample costs its distance to the truth less
    its mean distance to the others. The baseline is the mean cost of the others without that sample.

    to_truth: [..., S] distances to the truth; between: [..., S, S] distances between samples.
    """
    others = to_truth.shape[-1] - 1
    cost = to_truth - between.sum(dim=-1) / others
    among_others = (between.sum(dim=(-2, -1)).unsqueeze(-1) - 2 * between.sum(dim=-1)) / (others * max(1, others - 1))
    baseline = (to_truth.sum(dim=-1, keepdim=True) - to_truth) / others - among_others
    return cost - baseline


def relative_scores(scores: Tensor) -> Tensor:
    """Divide scores [K] by their size, so that the gradient is that of their logarithm: [K], each 1 or -1.

    Far steps, whose scores are larger, then count no more than near ones. An estimate from few samples may be negative.
    """
    return scores / scores.detach().abs().clamp(min=1e-3)


def _lengths(differences: Tensor) -> Tensor:
    """Return the Euclidean lengths [...] of differences [..., D], with a finite gradient at zero."""
    return differences.square().sum(dim=-1).add(1e-12).sqrt()


def _mean_lengths(differences: Tensor) -> Tensor:
    """Return the mean absolute values [...] of differences [..., D], by the length of a vector of ones."""
    return differences.abs().mean(dim=-1) * math.sqrt(differences.shape[-1])


def distance_losses(
    model: WorldModel, embedded: Embedded, states: Tensor, examples: DistanceExamples, error_weight: float
) -> dict[str, Tensor]:
    """Compute the weighted losses of the temporal distance, and the editor's error that it measures.

    The persistent part of the scene code is read from one segment for the state before a step and from another for the
    state after it, so that its noise cancels.

    Args:
        embedded: the real segments of the steps.
        states: [B, K + 1, D + Z], the context's state and the predicted ones.
    """
    first, predicted = states[:, 0], states[:, 1:]
    with torch.no_grad():
        codes = (
            model.persistent(first)[:, model.embedding_dim :],
            model.scene.persistent_from(examples.other_features),
        )
        one, other = (concat(embedded.real, code[:, None].expand(-1, embedded.real.shape[1], -1)) for code in codes)
        far = concat(examples.embeddings, model.scene.persistent_from(examples.features))
    phi, other_phi = model.distance(one), model.distance(other)
    # Freeze the distance here, so that it cannot hide the editor's errors.
    fixed = {name: value.detach() for name, value in model.distance.named_parameters()}
    reached = torch.func.functional_call(model.distance, fixed, model.persistent(predicted))
    error = (reached - phi[:, 1:].detach()).square().mean()
    apart = excess_steps(phi[:, :-1], other_phi[:, 1:]) + excess_steps(other_phi[:, :-1], phi[:, 1:])
    return {
        "distance_nearness": nearness(*model.distance(far)),
        "distance_excess": STEP_WEIGHT * apart / 2,
        "distance_error": error_weight * error,
    }


def gather_predictions(own: Predictions) -> Predictions:
    """Collect the predictions of all processes of the ambient `global_batch`, in one exchange."""
    if not is_shared():
        return own
    tensors = own.tensors()
    together = all_gather(torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1))
    columns = together.split([tensor[0].numel() for tensor in tensors.values()], dim=1)
    shaped = zip(tensors.items(), columns, strict=True)
    return Predictions.from_tensors({name: column.unflatten(1, tensor.shape[1:]) for (name, tensor), column in shaped})
