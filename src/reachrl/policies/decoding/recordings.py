"""Single-token steps recorded once per batch size (CUDA graphs) and replayed in one launch instead of thousands."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaModel

from reachrl.config.policy import recorded_rows
from reachrl.policies.decoding.cache import KVCache, Prompt

# From a prompt and noise f32[B A V] to one row of each tensor per row of the prompt.
Work = Callable[[Prompt, Tensor], tuple[Tensor, Tensor]]
# Runs work and returns what runs it again, on the same memory, with its results in the same place.
Recorder = Callable[[Callable[[], tuple[Tensor, Tensor]]], Callable[[], tuple[Tensor, Tensor]]]

_WARM_UPS = 2


class Recordings:
    """Recordings by batch size, with the KV cache that they read and write.

    All recordings share one cache of the largest batch so far. A larger batch reallocates it, which discards the
    recordings. Batches are padded to the next of a few sizes; the output of padding rows is discarded. The addresses of
    the weights must not change.

    Args:
        record: makes recordings, of CUDA graphs as a rule.
        rounded: the size that a batch is filled up to.
    """

    def __init__(self, record: Recorder, rounded: Callable[[int], int] = recorded_rows) -> None:
        self._record, self._rounded = record, rounded
        self._cache: KVCache | None = None
        self._recorded: dict[object, _Recorded] = {}

    def cache(self, model: LlamaModel, batch: int, length: int, like: Tensor) -> KVCache:
        """Return the cache for a prompt of `batch` rows and `length` positions, steps included."""
        rows, own = self._rounded(batch), self._cache
        if own is None or own.rows < rows or own.length < length:
            self._recorded.clear()
            self._cache = None  # given back before more is asked for
            rows, length = (rows, length) if own is None else (max(rows, own.rows), max(length, own.length))
            del own
            self._cache = KVCache.allocate(model, rows, length, like)
            for tensor in (*self._cache.keys, *self._cache.values):
                tensor.zero_()  # padding rows are computed, too
        assert self._cache is not None
        return self._cache.first(batch)

    def replay(
        self, work: Work, prompt: Prompt, noise: Float[Tensor, "B A V"], *, name: object
    ) -> tuple[Tensor, Tensor]:
        """What `work(prompt, noise)` returns, by recording it the first time.

        Args:
            work: the same for the same name.
            prompt: in the cache that `cache` gave.
            noise: for every token that is chosen.
            name: what else than shapes tells one work from another.
        """
        rows = self._rounded(len(prompt.hidden))
        key = (rows, prompt.length, noise.shape[1:], name)
        if key not in self._recorded:
            assert self._cache is not None
            self._recorded[key] = _Recorded(self._record, work, prompt, noise, self._cache.first(rows))
        return self._recorded[key].replay(prompt, noise)


class _Recorded:
    """One recording and its input buffers."""

    def __init__(self, record: Recorder, work: Work, prompt: Prompt, noise: Tensor, cache: KVCache) -> None:
        rows, steps = cache.rows, prompt.cos.shape[1]

        def room(like: Tensor, *shape: int) -> Tensor:
            return torch.zeros((rows, *shape), dtype=like.dtype, device=like.device)

        seen = torch.ones((rows, 1, 1, prompt.length + steps), dtype=torch.bool, device=noise.device)
        self._prompt = Prompt(
            cache=cache,
            length=prompt.length,
            hidden=room(prompt.hidden, *prompt.hidden.shape[1:]),
            cos=room(prompt.cos, *prompt.cos.shape[1:]),
            sin=room(prompt.sin, *prompt.sin.shape[1:]),
            seen=seen,
        )
        self._noise = room(noise, *noise.shape[1:])
        self._fill(prompt, noise)
        self._run = record(lambda: work(self._prompt, self._noise))

    def _fill(self, prompt: Prompt, noise: Tensor) -> None:
        own, batch = self._prompt, len(prompt.hidden)
        assert own.seen is not None
        own.hidden[:batch].copy_(prompt.hidden)
        own.cos[:batch].copy_(prompt.cos)  # one row for all goes to all
        own.sin[:batch].copy_(prompt.sin)
        own.seen[:batch].copy_(prompt.seen) if prompt.seen is not None else own.seen[:batch].fill_(True)
        self._noise[:batch].copy_(noise)

    def replay(self, prompt: Prompt, noise: Tensor) -> tuple[Tensor, Tensor]:
        self._fill(prompt, noise)
        first, second = self._run()
        batch = len(prompt.hidden)
        return first[:batch].clone(), second[:batch].clone()  # the next replay writes over them


class CudaGraphs:
    """Captures CUDA graphs.

    Each graph has its own memory pool (some tens of MB for the 7B model), so that graphs are freed independently. All
    are captured on one private stream, because libraries keep workspaces per stream.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
        """Run the work a few times, so that libraries initialise, then capture it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    work()
            here.wait_stream(self._stream)
            try:
                # Other threads (films, rewards) may use the GPU meanwhile.
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    results = work()
            finally:
                torch.cuda.set_stream(here)  # a recording that fails to begin would leave us on its stream

        def run() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return run
