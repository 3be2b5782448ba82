"""CUDA graphs of a frozen network: its kernels are captured once for each kind of input, then replayed.

Python takes longer to launch the kernels of a deep network one by one than a GPU takes to run them. A graph launches
all of them at once.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MAX_GRAPHS = 4  # the whole and the last batch of training and of validation
WARM_UP_CALLS = 3

Network = Callable[[Tensor], Tensor]
Key = tuple[object, ...]


class Replay(Protocol):
    """A captured network: input of the captured kind to output, which is the caller's own."""

    def __call__(self, inputs: Tensor, /) -> Tensor: ...


class Graph:
    """A captured network on a CUDA device; it reads the weights where they are, so changes in place take effect.

    Calls must come one after the other, on one stream. `neighbour` is another graph of which that holds too: both use
    the same memory. Raises RuntimeError where the network cannot be captured or memory is short.
    """

    def __init__(self, network: Network, inputs: Tensor, neighbour: "Graph | None") -> None:
        network = partial(_run, network, autocast_dtype=_autocast_dtype(inputs.device))
        current = torch.cuda.current_stream(inputs.device)
        # Captured inside inference mode, the buffers could not be filled outside it. The stream is entered, though it
        # is the current one, because torch 2.11 leaves the capturing stream current when a capture fails.
        with torch.inference_mode(mode=False), torch.no_grad(), torch.cuda.stream(current):
            self._inputs = torch.empty_like(inputs).copy_(inputs)
            self._stream = neighbour._stream if neighbour else torch.cuda.Stream(inputs.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_CALLS):
                    network(self._inputs)
            current.wait_stream(self._stream)
            self._graph = torch.cuda.CUDAGraph()
            pool = neighbour._graph.pool() if neighbour else None
            # Other threads pin batches and query events meanwhile: only this one's calls may disturb the capture.
            with torch.cuda.graph(self._graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = network(self._inputs)

    def __call__(self, inputs: Tensor, /) -> Tensor:
        """What the network returns for `inputs`."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._outputs.clone()


class GraphCache:
    """The graphs of one frozen network, at most MAX_GRAPHS; copies and pickles of it are empty.

    A kind of input (shape, strides, type, device, autocast) is captured when it comes the second time. Graphs are
    dropped when a weight moves to other memory or another network comes. Where a capture fails, a warning says so,
    once, and what has no graph runs without one.
    """

    def __init__(self, capture: Callable[[Network, Tensor, Any], Replay] = Graph) -> None:
        self._capture = capture
        self._lock = Lock()
        self._calls: Counter[Key] = Counter()
        self._graphs: dict[Key, Replay] = {}
        self._network: nn.Module | None = None
        self._tensors: list[tuple[dict[str, Tensor], str]] = []
        self._locations: list[object] = []
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._capture,)

    def __len__(self) -> int:
        """The number of graphs."""
        return len(self._graphs)

    def __call__(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """`network(inputs)`, by a graph where there is one; gradients must be off, and the default stream current."""
        with self._lock:
            graph = self._find(network, inputs)
            if graph is not None:
                return graph(inputs)
        return network(inputs)

    def _find(self, network: nn.Module, inputs: Tensor) -> Replay | None:
        if self._graphs and (network is not self._network or _locations(self._tensors) != self._locations):
            self._graphs.clear()
            self._calls.clear()
        key = (inputs.shape, inputs.stride(), inputs.dtype, inputs.device, _autocast_dtype(inputs.device))
        self._calls[key] += 1
        is_wanted = self._calls[key] >= 2 and len(self._graphs) < MAX_GRAPHS and not self._failed
        if key not in self._graphs and is_wanted:
            self._add(key, network, inputs)
        return self._graphs.get(key)

    def _add(self, key: Key, network: nn.Module, inputs: Tensor) -> None:
        try:
            graph = self._capture(network, inputs, next(iter(self._graphs.values()), None))
        except RuntimeError as error:
            self._failed = True
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"the encoder runs without a CUDA graph, slower, for inputs of a new shape: {reason}", stacklevel=2
            )
            return
        if not self._graphs:
            self._network, self._tensors = network, _tensors(network)
            self._locations = _locations(self._tensors)
        self._graphs[key] = graph


def can_replay(inputs: Tensor) -> bool:
    """Whether a graph may stand in for a network here: on CUDA's default stream, while nothing traces the call."""
    if not inputs.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch.cuda.current_stream(inputs.device) == torch.cuda.default_stream(inputs.device)


def _run(network: Network, inputs: Tensor, *, autocast_dtype: torch.dtype | None) -> Tensor:
    """The network under this autocast, without its cache: what that holds is freed before a graph's next replay."""
    enabled = autocast_dtype is not None
    with torch.autocast(inputs.device.type, autocast_dtype, enabled=enabled, cache_enabled=False):
        return network(inputs)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _tensors(network: nn.Module) -> list[tuple[dict[str, Tensor], str]]:
    """Each weight and buffer, as the dictionary that holds it and its name there, since `.to()` may replace it."""
    holders: list[Any] = [held for module in network.modules() for held in (module._parameters, module._buffers)]
    return [(held, name) for held in holders for name, tensor in held.items() if tensor is not None]


def _locations(tensors: Sequence[tuple[dict[str, Tensor], str]]) -> list[object]:
    return [(tensor.data_ptr(), tensor.dtype) for tensor in (held[name] for held, name in tensors)]
