"""A batch of clips, and the base class of streams that deliver batches without end."""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data_pipelines.errors import UserError


class Batch(TypedDict):
    """A batch of B clips.

    video: uint8 [B, T, C, H, W], or float32 of generated worlds.
    clip_id: int64 [B], the number of each clip in its data set.
    row: int64 [B], the place of each clip in the global batch. It is the same for any number of ranks and workers. A
        clip that does not decode leaves a gap.
    labels: tensors [B, ...] by name. Labels of frames are [B, T, ...].
    """

    video: Tensor
    clip_id: Tensor
    row: Tensor
    labels: dict[str, Tensor]


class BatchStream(IterableDataset[Batch]):
    """Batches without end. Batch number n is a pure function of the stream's arguments and n.

    Iterating continues with the batch after the last one delivered. So a state resumes a stream exactly:

        for batch in stream:
            ...
            torch.save({"stream": stream.state_dict()}, path)

    A DataLoader takes a stream as DataLoader(stream, batch_size=None, num_workers=0). Its own workers would all
    deliver the same batches; iterating in one of them raises UserError.

    fingerprint: hash of everything that fixes the order of clips. Streams of equal fingerprints number batches alike.
    batches_per_epoch: batches in one pass over the clips.
    """

    fingerprint: str
    batches_per_epoch: int
    _next_batch = 0

    def batches(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from number `start_batch` on, without end. Closing the generator releases its resources."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UserError(
                "a stream of clips cannot run in the workers of a DataLoader: use DataLoader(stream, batch_size=None, "
                "num_workers=0), and set num_workers of the stream"
            )
        with closing(self.batches(self._next_batch)) as batches:
            for batch in batches:
                self._next_batch += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next batch, and the fingerprint of the stream."""
        return {"next_batch": self._next_batch, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that the stream with this state delivered; takes effect with the next iterator.

        Raises:
            UserError: this is not the state of a stream, or that of a stream of other videos or another order of clips.
        """
        if set(state) != {"next_batch", "fingerprint"}:
            raise UserError(f"{state!r:.80} is not the state of a stream: give what its state_dict() returned")
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the state is of another stream (fingerprint {state['fingerprint']}, here {self.fingerprint}): open "
                "the same videos with the same clips, batch size, lanes, pool and seed"
            )
        self._next_batch = state["next_batch"]
