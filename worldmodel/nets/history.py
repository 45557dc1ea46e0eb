"""The history: embeddings of the segments before the context, and a transformer that reads them.

One segment may not show the whole state of a world: a single frame shows no velocity. A model with a history remembers
the last J segments before the context. For each it holds the embedding, the action that followed and whether there is
one: a history is shorter at the start of a video or of an episode. A prediction takes its place in the history of the
next step, so that a rollout remembers its own predictions.

Legend: B clips, J segments of a full history, L of a shorter one, D embedding dimensions, A numbers of an action (0
without actions), Y = J (D + A + 1) numbers of a history, X numbers of its summary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.nets.parallel import rand_rows
from worldmodel.nets.vit import Block

SUMMARY_DIM = 128
NUM_HEADS = 4
NUM_BLOCKS = 2
PLACE_STD = 0.02
FULL_SHARE = 0.75
"""Share of training clips with their whole history. Of the others, some of the earliest segments are left out, so that
the model also learns from short histories."""


class NoHistory(nn.Module):
    """The history of a model without one, which predicts from the context alone."""

    num_segments = num_values = summary_dim = 0

    def forward(self, embedding: Tensor, history: Tensor) -> Tensor:
        """Return an empty summary: [B, 0]."""
        return history

    def of(self, embeddings: Tensor, actions: Tensor, is_present: Tensor | None = None) -> Tensor:
        """Return an empty history for embeddings [B, 0, D] and actions [B, 0, A]: [B, 0]."""
        return embeddings.new_zeros(embeddings.shape[0], 0)

    def shortened(self, history: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return history [B, 0] unchanged. No random number is drawn."""
        return history

    def advance(self, history: Tensor, embedding: Tensor, action: Tensor | None) -> Tensor:
        """Return history [B, 0] unchanged."""
        return history


class SegmentHistory(nn.Module):
    """A history of J segments, and its summary by a transformer over them and the context.

    A token is the difference of a segment's embedding from that of the context, with the action that followed it. The
    token of the context is its embedding. Only segments that are present are attended to, and the last token of the
    context is the summary. The transformer is that of ViT (arXiv 2010.11929) with learned places in time.
    """

    def __init__(self, embedding_dim: int, action_dim: int, num_segments: int) -> None:
        super().__init__()
        self.num_segments, self.summary_dim = num_segments, SUMMARY_DIM
        self.num_values = num_segments * (embedding_dim + action_dim + 1)
        self.earlier = nn.Linear(embedding_dim + action_dim, SUMMARY_DIM)
        self.context = nn.Linear(embedding_dim, SUMMARY_DIM)
        self.places = nn.Parameter(PLACE_STD * torch.randn(num_segments + 1, SUMMARY_DIM))
        self.blocks = nn.ModuleList(Block(SUMMARY_DIM, NUM_HEADS) for _ in range(NUM_BLOCKS))
        self.norm = nn.LayerNorm(SUMMARY_DIM)

    def forward(self, embedding: Tensor, history: Tensor) -> Tensor:
        """Summarise history [B, Y] as seen from the context with this embedding [B, D]: [B, X]."""
        segments = self._segments(history)
        entries, is_present = segments[..., :-1], segments[..., -1] > 0
        width = embedding.shape[-1]
        earlier = torch.cat([entries[..., :width] - embedding[:, None], entries[..., width:]], dim=-1)
        tokens = torch.cat([self.earlier(earlier), self.context(embedding)[:, None]], dim=1) + self.places
        attended = F.pad(is_present, (0, 1), value=True)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, attended)
        return self.norm(tokens[:, -1])

    def of(self, embeddings: Tensor, actions: Tensor, is_present: Tensor | None = None) -> Tensor:
        """Return the history [B, Y] of at most J segments before a context, the earliest first.

        embeddings [B, L, D]; actions [B, L, A], each after its segment. Segments for which is_present, bool [B, L], is
        False do not count.
        """
        present = embeddings.new_ones(embeddings.shape[:2]) if is_present is None else is_present.to(embeddings)
        entries = torch.cat([embeddings, actions.to(embeddings), present[..., None]], dim=-1) * present[..., None]
        return F.pad(entries, (0, 0, self.num_segments - entries.shape[1], 0)).flatten(1)

    def shortened(self, history: Tensor, generator: torch.Generator | None) -> Tensor:
        """Leave out a random number of the earliest segments of histories [B, Y], except of a share FULL_SHARE.

        Depends on the ambient `global_batch`.
        """
        segments = self._segments(history)
        drawn = rand_rows(segments[:, :1, -1].float(), generator)
        left_out = self.num_segments * (drawn - FULL_SHARE) / (1 - FULL_SHARE)
        is_kept = torch.arange(self.num_segments, device=history.device) >= left_out
        return (segments * is_kept[..., None]).flatten(1)

    def advance(self, history: Tensor, embedding: Tensor, action: Tensor | None) -> Tensor:
        """Return the history [B, Y] of the step after a context with this embedding [B, D] and action [B, A]."""
        parts = [embedding, embedding.new_ones(embedding.shape[0], 1)]
        if action is not None:
            parts.insert(1, action.to(embedding))
        newest = torch.cat(parts, dim=-1)
        return torch.cat([self._segments(history)[:, 1:], newest[:, None]], dim=1).flatten(1)

    def _segments(self, history: Tensor) -> Tensor:
        """Return history [B, Y] by segments, [B, J, D + A + 1]."""
        return history.unflatten(-1, (self.num_segments, -1))


History = NoHistory | SegmentHistory
