"""The captioning models: an image encoder and an LSTM decoder over packed captions, with or without attention.

Shapes: B images, N captions (all captions of all B images), M target tokens of the N captions together, F features of
an image or of a position, R positions of the encoder's feature map, E embedding width, H hidden width, K columns of a
table of captions, V vocabulary. A suffix says a tensor's shape: `logits_MV`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioner.model.captions import PackedCaptions
from captioner.model.encoders import Encoder

DecoderKind = Literal["vector", "attention"]
ImageInput = Literal["first", "every-step"]

MAX_HEADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The arguments of a model, as `config.json` holds them; `image_input` is of the vector decoder."""

    encoder: str
    vocabulary_size: int
    decoder: DecoderKind = "vector"
    embedding_size: int = 256
    hidden_size: int = 512
    image_input: ImageInput = "first"
    input_dropout: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class DecoderState:
    """What the next decoding step of N captions depends on, besides their last tokens.

    `lstm` are the hidden and cell state, each (N, H), `images` the B encoded images. The captions of an image are in
    its row of a table of B rows and `columns` columns: `cells_N` is each caption's cell, counted row by row.
    """

    lstm: tuple[Tensor, ...]
    images: Tensor
    cells_N: Tensor
    columns: int

    @classmethod
    def after_images(
        cls, lstm_of_images: tuple[Tensor, ...], images: Tensor, cells_N: Tensor, columns: int
    ) -> "DecoderState":
        """The state in which each caption has its image's LSTM state, each (B, H)."""
        image_of_caption_N = cells_N // columns
        return cls(tuple(tensor[image_of_caption_N] for tensor in lstm_of_images), images, cells_N, columns)

    def take(self, rows_N: Tensor, cells_N: Tensor) -> "DecoderState":
        """The state of the captions in these rows, which may repeat, in new cells."""
        return DecoderState(tuple(tensor[rows_N] for tensor in self.lstm), self.images, cells_N, self.columns)


class CaptionModel(nn.Module, ABC):
    """An encoder, and a decoder that reads embedded words and predicts the next ones from its last hidden state.

    `input_dropout` is the dropout of the words' embeddings, `dropout` that of the last hidden states.
    """

    project: nn.Linear
    norm: nn.BatchNorm1d | nn.LayerNorm
    lstm: nn.LSTM

    def __init__(self, config: ModelConfig, *, encoder_trainable: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, trainable=encoder_trainable, grid=config.decoder == "attention")
        self.embed = nn.Embedding(config.vocabulary_size, config.embedding_size)
        self.predict = nn.Linear(config.hidden_size, config.vocabulary_size)
        self.drop_input = nn.Dropout(config.input_dropout)
        self.drop = nn.Dropout(config.dropout)

    def features(self, inputs: Tensor) -> Tensor:
        """The encoder's features of normalised images (B, 3, height, width); cached features are returned as they are.

        They are (B, F), or (B, R, F) with attention.
        """
        return self.encoder(inputs) if inputs.dim() == 4 else inputs

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """What the decoder reads of B images or of their features: (B, E), or (B, R, H) with attention."""

    @abstractmethod
    def hidden(self, images: Tensor, captions: PackedCaptions) -> Tensor:
        """The last hidden states (M, H), which `predict` turns into logits for `captions.targets_M`."""

    @abstractmethod
    def start(self, images: Tensor, cells_N: Tensor, columns: int) -> DecoderState:
        """The state before `<start>` of N captions of encoded images."""

    @abstractmethod
    def advance(self, tokens_N: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor | None]:
        """One decoding step: logits (N, V) of the next token, the new state, and attention (N, R) to the positions."""


def pooled(features: Tensor) -> Tensor:
    """The mean (B, F) of features (B, R, F) over an image's positions; features (B, F) are returned as they are."""
    return features.mean(dim=1) if features.dim() == 3 else features


class VectorModel(CaptionModel):
    """Linear and BatchNorm to one vector of an image, and an LSTM over it and the words.

    With `image_input="first"` the vector is the LSTM's first input, whose output is no prediction; with `"every-step"`
    it is concatenated to each word's embedding instead.
    """

    def __init__(self, config: ModelConfig, *, encoder_trainable: bool = False) -> None:
        super().__init__(config, encoder_trainable=encoder_trainable)
        self._image_first = config.image_input == "first"
        self.project = nn.Linear(self.encoder.num_features, config.embedding_size)
        self.norm = nn.BatchNorm1d(config.embedding_size, momentum=0.01)
        self.lstm = _lstm(config.embedding_size * (1 if self._image_first else 2), config.hidden_size)

    def encode(self, inputs: Tensor) -> Tensor:
        """Vectors (B, E) of normalised images (B, 3, height, width), or of the encoder's features (B, F)."""
        return self.norm(self.project(self.features(inputs))).to(self.embed.weight.dtype)

    def hidden(self, images: Tensor, captions: PackedCaptions) -> Tensor:
        """The LSTM's outputs (M, H)."""
        words_ME = self.drop_input(self.embed(captions.inputs_M))
        state = None
        if self._image_first:  # the LSTM runs over the B images once, and each caption takes its image's row
            state = tuple(tensor[:, captions.image_of_caption_N] for tensor in _recur(self.lstm, images[None])[1])
        else:
            words_ME = torch.cat((words_ME, images[captions.image_of_caption_N][captions.caption_of_token()]), dim=1)
        return self.drop(_recur(self.lstm, PackedSequence(words_ME, captions.batch_sizes_T), state)[0].data)

    def start(self, images: Tensor, cells_N: Tensor, columns: int) -> DecoderState:
        """The LSTM has seen the images, unless it sees them at every step."""
        lstm = _zero_state(self.lstm, len(images), like=images)
        if self._image_first:
            lstm = _step(self.lstm, images, lstm)
        return DecoderState.after_images(lstm, images, cells_N, columns)

    def advance(self, tokens_N: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Without attention."""
        words_NE = self.embed(tokens_N)
        if not self._image_first:
            words_NE = torch.cat((words_NE, state.images[state.cells_N // state.columns]), dim=1)
        lstm = _step(self.lstm, words_NE, state.lstm)
        return self.predict(lstm[0]), replace(state, lstm=lstm), None


class AttentionModel(CaptionModel):
    """An LSTM over the words whose output, at each step, looks at the positions of the encoder's feature map.

    What it sees joins the output after the LSTM (Luong et al., EMNLP 2015), not before it: so the LSTM runs over all
    steps of packed captions at once, and attention over all their tokens. The mean of the positions is the LSTM's first
    input, whose output is no prediction.
    """

    def __init__(self, config: ModelConfig, *, encoder_trainable: bool = False) -> None:
        super().__init__(config, encoder_trainable=encoder_trainable)
        embedding, hidden = config.embedding_size, config.hidden_size
        self.norm_features = nn.LayerNorm(self.encoder.num_features)  # they differ in scale from encoder to encoder
        self.project = nn.Linear(self.encoder.num_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.summarise = nn.Linear(hidden, embedding)
        self.lstm = _lstm(embedding, hidden)
        self.attention = Attention(hidden)
        self.combine = nn.Linear(2 * hidden, hidden)

    def encode(self, inputs: Tensor) -> Tensor:
        """Positions (B, R, H) of normalised images (B, 3, height, width), or of the encoder's features (B, R, F)."""
        features_BRF = self.norm_features(self.features(inputs))
        return self.norm(self.project(features_BRF)).to(self.embed.weight.dtype)

    def hidden(self, images: Tensor, captions: PackedCaptions) -> Tensor:
        """The LSTM's outputs joined with what they see (M, H), in float32 under any autocast."""
        with torch.autocast(images.device.type, enabled=False):
            summary_1BE = self.summarise(images.mean(dim=1))[None]
            state = tuple(tensor[:, captions.image_of_caption_N] for tensor in _recur(self.lstm, summary_1BE)[1])
            words_ME = self.drop_input(self.embed(captions.inputs_M))
            output_MH = _recur(self.lstm, PackedSequence(words_ME, captions.batch_sizes_T), state)[0].data
            seen_MH = self.attention(output_MH, images, captions.cells_M, captions.columns)
            return self.drop(self._join(output_MH, seen_MH))

    def start(self, images: Tensor, cells_N: Tensor, columns: int) -> DecoderState:
        """The LSTM has seen the mean of the images' positions."""
        zeros = _zero_state(self.lstm, len(images), like=images)
        lstm = _step(self.lstm, self.summarise(images.mean(dim=1)), zeros)
        return DecoderState.after_images(lstm, images, cells_N, columns)

    def advance(self, tokens_N: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor | None]:
        """With the mean attention of the heads."""
        lstm = _step(self.lstm, self.embed(tokens_N), state.lstm)
        seen_NH, attention_NR = self.attention.step(lstm[0], state.images, state.cells_N, state.columns)
        return self.predict(self._join(lstm[0], seen_NH)), replace(state, lstm=lstm), attention_NR

    def _join(self, output_NH: Tensor, seen_NH: Tensor) -> Tensor:
        return self.combine(torch.cat((output_NH, seen_NH), dim=1)).tanh()


class Attention(nn.Module):
    """Scaled dot-product attention with several heads, of captions to the positions of their images.

    No position is copied for a caption: the queries of an image are side by side in a row of a table of B rows and K
    columns.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = math.gcd(width, MAX_HEADS)
        self.query, self.value = (nn.Linear(width, width) for _ in range(2))
        self.key = nn.Linear(width, width, bias=False)  # a bias of keys would change nothing

    def forward(self, inputs_MH: Tensor, images: Tensor, cells_M: Tensor, columns: int) -> Tensor:
        """What each token of packed captions sees (M, H)."""
        keys, values = self._split(self.key(images)), self._split(self.value(images))
        queries = self._split(_table(self.query(inputs_MH), cells_M, shape=(len(images), columns)))
        weights = (queries @ keys.transpose(2, 3) / math.sqrt(keys.shape[3])).softmax(dim=3)
        return (weights @ values).transpose(1, 2).flatten(2).flatten(0, 1)[cells_M]

    def step(self, inputs_NH: Tensor, images: Tensor, cells_N: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """What each caption sees (N, H) at one step, and the mean attention of its heads to the R positions (N, R).

        Keys and values of all positions would cost more than all steps of a caption. So the queries are multiplied by
        the weights of the keys instead, and what they see by those of the values.
        """
        per_head = (self.num_heads, -1)
        queries = self.query(inputs_NH).unflatten(1, per_head).transpose(0, 1)
        projected = (queries @ self.key.weight.unflatten(0, per_head)).transpose(0, 1).flatten(1)
        table = _table(projected, cells_N, shape=(len(images), columns)).unflatten(2, per_head).flatten(1, 2)
        weights = (table @ images.transpose(1, 2) / math.sqrt(queries.shape[2])).softmax(dim=2)
        seen, attention = (
            tensor.unflatten(1, (columns, self.num_heads)).flatten(0, 1)[cells_N]
            for tensor in (weights @ images, weights)
        )
        values = seen.transpose(0, 1) @ self.value.weight.unflatten(0, per_head).transpose(1, 2)
        return values.transpose(0, 1).flatten(1) + self.value.bias, attention.mean(dim=1)

    def _split(self, tensor_BRH: Tensor) -> Tensor:
        """One matrix for each head: (B, heads, R, H / heads)."""
        return tensor_BRH.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _table(rows_NX: Tensor, cells_N: Tensor, *, shape: tuple[int, int]) -> Tensor:
    """A table of this shape (B, K, X) with the rows in their cells, zeros elsewhere."""
    table = rows_NX.new_zeros((math.prod(shape), rows_NX.shape[1]))
    return table.index_copy(0, cells_N, rows_NX).unflatten(0, shape)


def build_model(config: ModelConfig, *, encoder_trainable: bool = False) -> CaptionModel:
    """The model of this configuration, with random weights."""
    kind = AttentionModel if config.decoder == "attention" else VectorModel
    return kind(config, encoder_trainable=encoder_trainable)


def _lstm(input_size: int, hidden_size: int) -> nn.LSTM:
    """An LSTM whose state starts out persistent: its forget gates' bias is 1, half in each of its two biases."""
    lstm = nn.LSTM(input_size, hidden_size)
    with torch.no_grad():
        for name in ("bias_ih_l0", "bias_hh_l0"):
            lstm.get_parameter(name)[hidden_size : 2 * hidden_size] = 0.5
    return lstm


def _zero_state(lstm: nn.LSTM, num_rows: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    zeros = like.new_zeros((num_rows, lstm.hidden_size))
    return zeros, zeros


def _recur(lstm: nn.LSTM, inputs: Any, state: tuple[Tensor, ...] | None = None) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The LSTM over sequences, in float32 under any autocast: on the CPU autocast mixes types that it refuses."""
    with torch.autocast(lstm.get_parameter("weight_ih_l0").device.type, enabled=False):
        return lstm(inputs, state)


def _step(lstm: nn.LSTM, inputs_NE: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: the next hidden and cell state, each (N, H)."""
    return torch.lstm_cell(inputs_NE, state, *lstm.all_weights[0])
