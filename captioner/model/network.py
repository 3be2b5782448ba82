"""The captioning model: a torchvision CNN encoder and an LSTM decoder over packed captions.

Shapes: B images, N captions (all captions of all B images), M target tokens of the N captions together,
T tokens of the longest caption, F pooled features, E embedding width, H hidden width, V vocabulary.
A suffix says a tensor's shape: `logits_MV`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioner.model.encoders import Encoder
from captioner.vocabulary import END, START

ImageInput = Literal["first", "every-step"]
LSTMState = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The arguments of a CaptionModel, as `config.json` holds them."""

    encoder: str
    vocabulary_size: int
    embedding_size: int = 256
    hidden_size: int = 512
    image_input: ImageInput = "first"
    input_dropout: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class PackedCaptions:
    """N captions, the longest first, packed time-major: all first tokens, then all second ones, and so on.

    `inputs_M` starts with `<start>` and ends before `<end>`; `targets_M` is one token ahead, so `<start>` is no
    target. `batch_sizes_T` (on the CPU, as PyTorch wants it) counts the captions that reach each step, and
    `image_of_caption_N` names each caption's row among the B images.
    """

    inputs_M: Tensor
    targets_M: Tensor
    batch_sizes_T: Tensor
    image_of_caption_N: Tensor

    @classmethod
    def pack(
        cls, tokens: Sequence[int], lengths: Sequence[int], num_captions: Sequence[int], *, max_tokens: int
    ) -> "PackedCaptions":
        """Pack captions given as the `tokens` of all (without `<start>` and `<end>`) and the `lengths` of each.

        `num_captions` counts those of each image; there is at least one caption. A caption of more than `max_tokens` is
        cut there, and `<end>` is not among its targets.
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
        return cls(
            inputs_M=torch.from_numpy(inputs_TN[alive_TN]),
            targets_M=torch.from_numpy(targets_TN[alive_TN]),
            batch_sizes_T=torch.from_numpy(alive_TN.sum(axis=1)),
            image_of_caption_N=torch.from_numpy(image_of_caption_N[longest_first_N]),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as plain arrays: for so few bytes that is faster than tensors' shared memory."""
        tensors = (self.inputs_M, self.targets_M, self.batch_sizes_T, self.image_of_caption_N)
        return _from_arrays, tuple(tensor.numpy() for tensor in tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PackedCaptions":
        """The same captions with `change` applied to all but `batch_sizes_T`."""
        return PackedCaptions(
            change(self.inputs_M), change(self.targets_M), self.batch_sizes_T, change(self.image_of_caption_N)
        )


def _from_arrays(*arrays: np.ndarray) -> PackedCaptions:
    return PackedCaptions(*map(torch.from_numpy, arrays))


class CaptionModel(nn.Module):
    """Encoder, Linear and BatchNorm to an image embedding, and an LSTM over it and the words.

    With `image_input="first"` the image embedding is the LSTM's first input, whose output is no prediction; with
    `"every-step"` it is concatenated to each word's embedding instead. `input_dropout` is the dropout of the words'
    embeddings, `dropout` that of the LSTM's outputs.
    """

    def __init__(self, config: ModelConfig, *, encoder_trainable: bool = False) -> None:
        super().__init__()
        every_step = config.image_input == "every-step"
        self.config = config
        self.encoder = Encoder(config.encoder, trainable=encoder_trainable)
        self.project = nn.Linear(self.encoder.num_features, config.embedding_size)
        self.norm = nn.BatchNorm1d(config.embedding_size, momentum=0.01)
        self.embed = nn.Embedding(config.vocabulary_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size * (1 + every_step), config.hidden_size)
        self.predict = nn.Linear(config.hidden_size, config.vocabulary_size)
        self.drop_input = nn.Dropout(config.input_dropout)
        self.drop = nn.Dropout(config.dropout)
        init_forget_bias(self.lstm)

    def encode(self, inputs: Tensor) -> Tensor:
        """Image embeddings (B, E) of normalised images (B, 3, height, width), or of the encoder's features (B, F)."""
        features_BF = inputs if inputs.dim() == 2 else self.encoder(inputs)
        return self.norm(self.project(features_BF)).to(self.embed.weight.dtype)

    def hidden(self, image_BE: Tensor, captions: PackedCaptions) -> Tensor:
        """The LSTM's outputs (M, H), which `predict` turns into logits for `captions.targets_M`."""
        state = self.start(image_BE, rows_N=captions.image_of_caption_N)
        words_ME = self.drop_input(self.embed(captions.inputs_M))
        if state is None:
            words_ME = torch.cat((words_ME, image_BE[captions.image_of_caption_N][_caption_of_token(captions)]), dim=1)
        hidden_MH, _ = self._recur(PackedSequence(words_ME, captions.batch_sizes_T), state)
        return self.drop(hidden_MH.data)

    def start(self, image_BE: Tensor, *, rows_N: Tensor) -> LSTMState | None:
        """The LSTM state (1, N, H) after it has seen the images; None when it sees them at every step.

        The LSTM runs over the B images once, and each of the N captions takes its image's row.
        """
        if self.config.image_input == "every-step":
            return None
        _, (hidden_1BH, cell_1BH) = self._recur(image_BE[None], None)
        return hidden_1BH[:, rows_N], cell_1BH[:, rows_N]

    def advance(self, tokens_N: Tensor, state: LSTMState | None, image_NE: Tensor) -> tuple[Tensor, LSTMState]:
        """One decoding step: logits (N, V) of the next token, and the new state."""
        words_NE = self.embed(tokens_N)
        if self.config.image_input == "every-step":
            words_NE = torch.cat((words_NE, image_NE), dim=1)
        hidden_1NH, state = self._recur(words_NE[None], state)
        return self.predict(hidden_1NH[0]), state

    def _recur(self, inputs: Any, state: LSTMState | None) -> tuple[Any, LSTMState]:
        """The LSTM, in float32 under any autocast: on the CPU autocast mixes types that the LSTM refuses."""
        with torch.autocast(self.embed.weight.device.type, enabled=False):
            return self.lstm(inputs, state)


def init_forget_bias(lstm: nn.LSTM) -> None:
    """Set the forget gates' bias to 1, half in each of LSTM's two biases, so that the state starts out persistent."""
    with torch.no_grad():
        gate_size = lstm.hidden_size
        for name in ("bias_ih_l0", "bias_hh_l0"):
            lstm.get_parameter(name)[gate_size : 2 * gate_size].fill_(0.5)


def _caption_of_token(captions: PackedCaptions) -> Tensor:
    """The index, among the N captions, of each of the M packed tokens' caption."""
    device = captions.inputs_M.device
    return torch.cat([torch.arange(size, device=device) for size in captions.batch_sizes_T.tolist()])
