"""The world model: encode a past, infer or sample r, edit the embedding into that of a future, roll it out.

A future is predicted from a state: the embedding of the past and, if the model has one, a scene code. The code is read
from the same features as the embedding, is not a target of prediction, and keeps its persistent part over a rollout.
With a history, the state also holds the embeddings of the segments before the past (worldmodel/nets/history.py).

A model may be conditioned on actions. An action is what an agent did from the last frame of one segment to that of the
next: the actions at the frames in between, one after another.

Absent parts are modules of width zero (NoLatent, NoScene, NoHistory, NoDistance), and absent inputs are tensors of
width zero.

Legend: B clips, L segments of a clip, T frames, C channels, H = W pixels, F features (0 if no code is read from them),
D embedding dimensions, Z numbers of a state after the embedding: the scene code and the history, P of the code's
persistent part (both 0 without them), J segments of a history (0 without one), X numbers of what the networks read of a
state, R latent dimensions (0 without a latent), A numbers of an action (0 without actions), K steps of prediction, S
samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from worldmodel.nets.distance import Distance
from worldmodel.nets.distributions import draw_and_choice
from worldmodel.nets.encoders import Embedder
from worldmodel.nets.history import History, NoHistory
from worldmodel.nets.latents import Inference, Latent
from worldmodel.nets.scene import Scene


@dataclass(frozen=True)
class Embedded:
    """Clips as K steps of prediction see them.

    before: [B, J, D], the embeddings of the segments before the context, which the history holds.
    real: [B, K + 1, D], the embeddings of the context and of the K targets.
    seen: [B, K, D], the embeddings that the posterior sees at each step; [B, K, 0] if it sees none.
    features: [B, F], the features of the segment that the scene code is read from.
    age: [B], how many steps that segment is before the context.
    costs: [B, K] each, the encoder's own losses by name.
    """

    before: Tensor
    real: Tensor
    seen: Tensor
    features: Tensor
    age: Tensor
    costs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictions:
    """K predicted steps of B clips, from which the losses of a batch are computed.

    real: [B, K + 1, D], the embeddings of the context and of the K targets.
    edited: [B, K, D], the predicted embeddings.
    costs: [B, K] each, those of r (`Inference.costs`) and of the encoder by name.
    actions: [B, K, A].
    """

    real: Tensor
    edited: Tensor
    costs: dict[str, Tensor]
    actions: Tensor

    @property
    def targets(self) -> Tensor:
        """The targets step by step, without gradient: [K * B, D]."""
        return flatten_steps(self.real[:, 1:].detach())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as `from_tensors` takes them."""
        return {"real": self.real, "edited": self.edited, **self.costs, "actions": self.actions}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "Predictions":
        """Return the predictions made of these tensors."""
        costs = {name: tensor for name, tensor in tensors.items() if name not in ("real", "edited", "actions")}
        return Predictions(tensors["real"], tensors["edited"], costs, tensors["actions"])


class WorldModel(nn.Module):
    """A joint-embedding predictor with any embedder, latent and editor (AdaSSL, arXiv 2602.02381).

    Args:
        embedder: clip [B, T, C, H, W] -> features [B, F] -> embedding [B, D].
        latent: infers r in training and has a prior to draw it from.
        editor: any module from embedding [B, D] and conditions to the next embedding [B, D]. The conditions are r, the
            scene code, the summary of the history and the action, one after another.
        scene: reads a scene code from the features.
        distance: a temporal distance between states.
        history: remembers the segments before the context; by default none.
        action_dim: A, the numbers of an action.
        seen_at: the segment that the posterior sees with a context at 0: 2 for x++, 1 for the target x+.

    worldmodel/build.py builds one from a config. The losses are in worldmodel/training/losses.py.
    """

    def __init__(
        self,
        embedder: Embedder,
        latent: Latent,
        editor: nn.Module,
        scene: Scene,
        distance: Distance,
        *,
        history: History | None = None,
        action_dim: int = 0,
        seen_at: int = 2,
    ) -> None:
        super().__init__()
        self.embedder = embedder
        self.scene = scene
        self.history = history or NoHistory()
        self.latent = latent
        self.editor = editor
        self.distance = distance
        self.embedding_dim = embedder.embedding_dim
        self.action_dim = action_dim
        self.seen_at = seen_at

    # ------------------------------------------------------------------------------------------------------ states

    def encode(self, video: Tensor) -> Tensor:
        """Embed video [B, T, C, H, W] in [0, 1]: [B, D]."""
        return self.embedder(video)

    def observe(self, video: Tensor) -> Tensor:
        """Return the state [B, D + Z] that a future of video [B, T, C, H, W] in [0, 1] is predicted from."""
        return self.state_of(self.embedder.features(video))

    def state_of(self, features: Tensor) -> Tensor:
        """Return the state [B, D + Z] of the encoder's features [B, F]: the embedding, then the scene code.

        Its history is empty.
        """
        code = self.scene(features, features.new_zeros(features.shape[0]))
        return concat(self.embedder.project(features), code, code.new_zeros(code.shape[0], self.history.num_values))

    def remember(self, state: Tensor, before: Tensor, actions: Tensor, is_present: Tensor | None = None) -> Tensor:
        """Return states [B, D + Z] with the history of the segments before them.

        Args:
            state: [B, D + Z].
            before: [B, L, D], the embeddings of the last L <= J segments before each state, the earliest first.
            actions: [B, L, A], the actions that led from each of them to the next segment.
            is_present: bool [B, L], False for segments that do not exist. None: all do.
        """
        return concat(self._parts(state)[0], self.history.of(before, actions, is_present))

    def remember_segments(self, state: Tensor, segments: Tensor, actions: Tensor) -> Tensor:
        """As `remember`, for segments [B, L, T, C, H, W] that are not embedded yet."""
        before = torch.stack([self.encode(video) for video in segments.unbind(1)], dim=1)
        return self.remember(state, before, actions)

    def follow(self, before: Tensor, action: Tensor | None, state: Tensor) -> Tensor:
        """Return a newly observed state [B, D + Z] with the history of the state before it, after action [B, A]."""
        return concat(self._parts(state)[0], self._advanced(before, action))

    def embedding_of(self, state: Tensor) -> Tensor:
        """Return the embeddings [..., D] of states [..., D + Z]."""
        return state[..., : self.embedding_dim]

    def persistent(self, state: Tensor) -> Tensor:
        """Return the part of states [..., D + Z] that outlasts a step: [..., D + P]."""
        embedding, code = self._parts(state)[0].tensor_split([self.embedding_dim], dim=-1)
        return concat(embedding, self.scene.persistent(code))

    def context(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """Return what prior and posterior read of a state [B, D + Z] and an action [B, A]: [B, X].

        That is the embedding, the scene code, the summary of the history and the action.
        """
        return concat(self._parts(state)[0], self._summary(state), action)

    def _parts(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding with the scene code, and the history, of states [..., D + Z]."""
        if not self.history.num_values:
            return state, state[..., :0]
        present, history = state.tensor_split([self.embedding_dim + self.scene.num_values], dim=-1)
        return present, history

    def _summary(self, state: Tensor) -> Tensor:
        """Return the summary of the history of states [B, D + Z]."""
        return self.history(self.embedding_of(state), self._parts(state)[1])

    def _advanced(self, state: Tensor, action: Tensor | None) -> Tensor:
        """Return the history of the state that follows a state [B, D + Z] after action [B, A]."""
        return self.history.advance(self._parts(state)[1], self.embedding_of(state), action)

    # --------------------------------------------------------------------------------------------------- one step

    def seen(self, segments: Tensor) -> Tensor:
        """Embed the segment that the posterior sees, of segments [B, L, T, C, H, W]: [B, D], or [B, 0] if none."""
        if not self.latent.sees_later:
            return segments.new_empty(len(segments), 0)
        return self.encode(segments[:, self.seen_at])

    def infer(
        self,
        state: Tensor,
        segments: Tensor,
        known_r: Tensor,
        generator: torch.Generator | None = None,
        *,
        action: Tensor | None = None,
    ) -> Inference:
        """Infer r [B, R] of one step as in training, from a state [B, D + Z] and segments [B, L, T, C, H, W].

        known_r [B, R] is the r of an oracle latent, [B, 0] for other latents; action [B, A].
        """
        return self.infer_from(state, self.seen(segments), known_r, generator, action=action)

    def infer_from(
        self,
        state: Tensor,
        seen: Tensor,
        known_r: Tensor,
        generator: torch.Generator | None = None,
        *,
        action: Tensor | None = None,
    ) -> Inference:
        """Infer as `infer` does, from the embedding that `seen` returns."""
        return self.latent.infer(self.context(state, action), seen, known_r, generator)

    def sample(
        self, state: Tensor, generator: torch.Generator | None = None, *, action: Tensor | None = None
    ) -> Tensor:
        """Draw r [B, R] from the prior once per state [B, D + Z] and action [B, A]."""
        return self.latent.prior(self.context(state, action)).draw(generator)

    def prior_mean(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """Return the mean r [B, R] of the prior for state [B, D + Z] and action [B, A]."""
        return self.latent.prior(self.context(state, action)).mean

    def edit(self, state: Tensor, r: Tensor, action: Tensor | None = None) -> Tensor:
        """Return the state of the next segment, float32 [B, D + Z], for state [B, D + Z], r [B, R] and action [B, A].

        Its embedding is normalised as the embedder's are. Its scene code is the same, one step older. Its history is
        that of `state`, with the embedding of `state` as the latest.
        """
        embedding, code = self._parts(state)[0].tensor_split([self.embedding_dim], dim=1)
        edited = self.editor(embedding, concat(r, code, self._summary(state), action)).float()
        return concat(self.embedder.normalise(edited), self.scene.advance(code), self._advanced(state, action))

    # -------------------------------------------------------------------------------------------------- many steps

    def steps(self, state: Tensor, actions: Tensor, choose_r: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        """Roll a state [B, D + Z] forward, one step per action of [B, K, A], and yield each state [B, D + Z].

        `choose_r` returns the r [B, R] of a step for its state [B, D + Z] and action [B, A].
        """
        for action in actions.unbind(1):
            state = self.edit(state, choose_r(state, action), action)
            yield state

    def rollout(
        self,
        video: Tensor,
        horizon: int,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
    ) -> Tensor:
        """Sample futures of video [B, T, C, H, W] in [0, 1]: embeddings [B, S, horizon, D].

        Arguments are those of `rollout_embedding`.
        """
        return self.rollout_embedding(self.observe(video), horizon, num_samples, generator, actions=actions)

    def rollout_embedding(
        self,
        state: Tensor,
        horizon: int,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        actions: Tensor | None = None,
        shuffle: bool = False,
    ) -> Tensor:
        """Sample futures of a state [B, D + Z], with a fresh draw of the prior per step: embeddings [B, S, horizon, D].

        actions [B, horizon, A] condition the model, if it takes any. `shuffle` gives each clip the r that was drawn
        for the clip half the batch away, as a control: in a video, the next clip may be nearly the same.
        """

        def choose_r(state: Tensor, action: Tensor) -> Tensor:
            r = self.sample(state, generator, action=action)
            return r.roll(shift, dims=0) if shuffle else r

        shift = num_samples * max(1, len(state) // 2)
        return self._sampled_futures(state, _taken(actions, state, horizon), num_samples, choose_r)

    def futures_with_choices(
        self, state: Tensor, actions: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample futures as `rollout_embedding` does, for training, with the log probabilities of choices.

        The choices are the components and the zeros of r that were drawn up to a step. No gradient passes them.
        Log probabilities are 0 for a prior without either.

        Returns: embeddings [B, S, K, D] and log probabilities [B, S, K].
        """
        of_steps: list[Tensor] = []

        def choose_r(state: Tensor, action: Tensor) -> Tensor:
            r, log_probability = draw_and_choice(self.latent.prior(self.context(state, action)), generator)
            of_steps.append(log_probability)
            return r

        futures = self._sampled_futures(state, actions, num_samples, choose_r)
        log_probabilities = torch.stack(of_steps, dim=1).cumsum(dim=1)
        return futures, rearrange(log_probabilities, "(b s) k -> b s k", s=num_samples)

    def _sampled_futures(
        self, state: Tensor, actions: Tensor, num_samples: int, choose_r: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Roll each of B states forward num_samples times, with arguments as for `steps`: [B, S, K, D]."""
        starts, taken = (each.repeat_interleave(num_samples, dim=0) for each in (state, actions))
        futures = torch.stack([self.embedding_of(each) for each in self.steps(starts, taken, choose_r)], dim=1)
        return rearrange(futures, "(b s) k d -> b s k d", s=num_samples)

    def prior_mean_rollout(self, state: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        """Roll a state [B, D + Z] forward at the mean of the prior: embeddings [B, horizon, D]."""
        states = self.steps(state, _taken(actions, state, horizon), self.prior_mean)
        return torch.stack([self.embedding_of(each) for each in states], dim=1)

    # ---------------------------------------------------------------------------------------------------- training

    def targets_of(self, segments: Tensor, num_steps: int) -> Tensor:
        """Return the targets of K steps, of segments [B, L, T, C, H, W], step by step: [K * B, T, C, H, W]."""
        context = self.history.num_segments
        return flatten_steps(segments[:, context + 1 : context + num_steps + 1])

    def embed(self, segments: Tensor, num_steps: int, teacher_targets: Tensor | None) -> Embedded:
        """Embed segments [B, L, T, C, H, W] for K steps of prediction from the context.

        The context is the first segment or, with a history, the one after its J segments. teacher_targets [K * B, D]
        are a teacher's embeddings of `targets_of(segments, K)`. Without them, the targets are embedded here, with
        gradient.
        """
        num_before = self.history.num_segments
        clips = {"context": segments[:, num_before]}
        if teacher_targets is None:
            clips["targets"] = self.targets_of(segments, num_steps)
        if self.latent.sees_later:
            clips["seen"] = flatten_steps(segments[:, num_before + self.seen_at :][:, :num_steps])
        if num_before:
            clips["before"] = flatten_steps(segments[:, :num_before])
        # One call for all: batch statistics over all segments, and one pass through the encoder.
        features, own_loss = self.embedder.features_and_loss(torch.cat(list(clips.values())))
        parts = self.embedder.project(features).split([len(clip) for clip in clips.values()])
        embeddings = dict(zip(clips, parts, strict=True))
        context = embeddings["context"]
        targets = embeddings.get("targets", teacher_targets)
        assert targets is not None
        nothing = context.new_empty(num_steps * len(context), 0)
        before = embeddings.get("before", context[:0])
        return Embedded(
            before=before.unflatten(0, (num_before, len(context))).transpose(0, 1),
            real=torch.stack([context, *targets.chunk(num_steps)], dim=1),
            seen=torch.stack(embeddings.get("seen", nothing).chunk(num_steps), dim=1),
            features=self.scene.select(features[: len(context)]),
            age=context.new_zeros(len(context)),
            costs={} if own_loss is None else {ENCODER_LOSS: _per_step(own_loss, num_steps, len(context))},
        )

    def predict(
        self, embedded: Embedded, known_r: Tensor, actions: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Predictions, Tensor]:
        """Predict K steps, each from the state predicted before it and the r that the posterior infers there.

        known_r [B, R] is the r of an oracle latent, [B, 0] for other latents. actions [B, J + K, A] are those between
        all segments, first those of the history. Some histories are shortened at random.

        Returns: the predictions, and the states [B, K + 1, D + Z] with the context's first.
        """
        seen = iter(embedded.seen.unbind(1))
        inferences: list[Inference] = []

        def choose_r(state: Tensor, action: Tensor) -> Tensor:
            inferences.append(self.infer_from(state, next(seen), known_r, generator, action=action))
            return inferences[-1].r

        earlier, actions = actions.tensor_split([self.history.num_segments], dim=1)
        history = self.history.shortened(self.history.of(embedded.before, earlier), generator)
        context = concat(embedded.real[:, 0], self.scene(embedded.features, embedded.age), history)
        states = torch.stack([context, *self.steps(context, actions, choose_r)], dim=1)
        costs = {name: torch.stack([each.costs[name] for each in inferences], dim=1) for name in inferences[0].costs}
        return Predictions(embedded.real, self.embedding_of(states[:, 1:]), embedded.costs | costs, actions), states


ENCODER_LOSS = "encoder_loss"
"""The name, among the costs of a step, of the loss of an encoder's own."""


def _per_step(own_loss: Tensor, num_steps: int, num_clips: int) -> Tensor:
    """Average losses [S * B], ordered by segment, over the segments of each clip: [B, K], the same at each step."""
    return own_loss.unflatten(0, (-1, num_clips)).mean(dim=0)[:, None].expand(-1, num_steps)


def flatten_steps(of_clips: Tensor) -> Tensor:
    """Order rows by step instead of by clip: [B, K, ...] -> [K * B, ...]."""
    return rearrange(of_clips, "b k ... -> (k b) ...")


def concat(first: Tensor, *others: Tensor | None) -> Tensor:
    """Concatenate [..., X] along the last dimension. Parts of width zero, and None for such, are skipped."""
    wide = [part for part in (first, *others) if part is not None and part.shape[-1]]
    if len(wide) < 2:
        return wide[0] if wide else first
    return torch.cat(wide, dim=-1)


def _taken(actions: Tensor | None, state: Tensor, horizon: int) -> Tensor:
    """Return the actions [B, horizon, A] of a rollout from a state [B, D + Z]; A is 0 without actions."""
    return state.new_empty(state.shape[0], horizon, 0) if actions is None else actions[:, :horizon]
