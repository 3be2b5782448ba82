"""Captions packed for a recurrent decoder, as PyTorch packs sequences: time-major, without padding.

Shapes: B images, N captions (all captions of all B images), M target tokens of the N captions together, T tokens of the
longest caption. A suffix says a tensor's shape: `inputs_M`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.vocabulary import END, START


@dataclass(frozen=True, slots=True)
class PackedCaptions:
    """N captions, the longest first, packed time-major: all first tokens, then all second ones, and so on.

    `inputs_M` starts with `<start>` and ends before `<end>`; `targets_M` is one token ahead, so `<start>` is no
    target. `batch_sizes_T` (on the CPU, as PyTorch wants it) counts the captions that reach each step, and
    `image_of_caption_N` is each caption's row among the B images.

    For attention, the tokens of an image are side by side in a table of B rows and `columns` columns: `cells_M` is each
    token's cell, counted row by row. `weights_M` are the tokens' weights in the loss, None if all are 1.
    """

    inputs_M: Tensor
    targets_M: Tensor
    batch_sizes_T: Tensor
    image_of_caption_N: Tensor
    cells_M: Tensor
    columns: int
    weights_M: Tensor | None = None

    @classmethod
    def pack(
        cls,
        tokens: Sequence[int] | np.ndarray,
        lengths: Sequence[int],
        num_captions: Sequence[int],
        *,
        max_tokens: int,
        weights: np.ndarray | None = None,
    ) -> "PackedCaptions":
        """Pack captions given as the `tokens` of all (without `<start>` and `<end>`) and the `lengths` of each.

        `num_captions` counts those of each image; there is at least one caption. A caption of more than `max_tokens` is
        cut there, and `<end>` is not among its targets. `weights` are those of the captions.
        """
        full_N = np.array(lengths)
        tokens_NW = np.full((len(lengths), full_N.max() + 1), END)
        tokens_NW[np.arange(full_N.max() + 1) < full_N[:, None]] = tokens
        lengths_N = np.where(full_N <= max_tokens, full_N + 1, max_tokens)
        longest_first_N = np.argsort(-lengths_N, kind="stable")
        targets_TN = tokens_NW[longest_first_N, : lengths_N.max()].T
        alive_TN = np.arange(len(targets_TN))[:, None] < lengths_N[longest_first_N]
        inputs_TN = np.concatenate((np.full_like(targets_TN[:1], START), targets_TN[:-1]))
        image_of_caption_N = np.repeat(np.arange(len(num_captions)), num_captions)
        # The captions of an image follow each other in its row of the table.
        tokens_B = np.bincount(image_of_caption_N, weights=lengths_N, minlength=len(num_captions)).astype(int)
        columns = int(tokens_B.max())
        first_of_image_B = np.arange(len(tokens_B)) * columns - (np.cumsum(tokens_B) - tokens_B)
        first_cell_N = first_of_image_B[image_of_caption_N] + np.cumsum(lengths_N) - lengths_N
        cells_TN = first_cell_N[longest_first_N] + np.arange(len(targets_TN))[:, None]
        return cls(
            inputs_M=torch.from_numpy(inputs_TN[alive_TN]),
            targets_M=torch.from_numpy(targets_TN[alive_TN]),
            batch_sizes_T=torch.from_numpy(alive_TN.sum(axis=1)),
            image_of_caption_N=torch.from_numpy(image_of_caption_N[longest_first_N]),
            cells_M=torch.from_numpy(cells_TN[alive_TN]),
            columns=columns,
            weights_M=None if weights is None else torch.from_numpy((alive_TN * weights[longest_first_N])[alive_TN]),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as plain arrays, without weights: for so few bytes that is faster than tensors' shared memory."""
        tensors = (self.inputs_M, self.targets_M, self.batch_sizes_T, self.image_of_caption_N, self.cells_M)
        return _from_arrays, (self.columns, *(tensor.numpy() for tensor in tensors))

    def map(self, change: Callable[[Tensor], Tensor]) -> "PackedCaptions":
        """The same captions with `change` applied to all tensors but `batch_sizes_T`."""
        return PackedCaptions(
            inputs_M=change(self.inputs_M),
            targets_M=change(self.targets_M),
            batch_sizes_T=self.batch_sizes_T,
            image_of_caption_N=change(self.image_of_caption_N),
            cells_M=change(self.cells_M),
            columns=self.columns,
            weights_M=None if self.weights_M is None else change(self.weights_M),
        )

    def caption_of_token(self) -> Tensor:
        """The index (M), among the N captions, of each token's caption."""
        device = self.inputs_M.device
        return torch.cat([torch.arange(size, device=device) for size in self.batch_sizes_T.tolist()])


def _from_arrays(columns: int, *arrays: np.ndarray) -> PackedCaptions:
    inputs_M, targets_M, batch_sizes_T, image_of_caption_N, cells_M = map(torch.from_numpy, arrays)
    return PackedCaptions(inputs_M, targets_M, batch_sizes_T, image_of_caption_N, cells_M, columns)
