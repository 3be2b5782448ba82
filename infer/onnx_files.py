"""A model as two ONNX files, each compared with PyTorch, in float32.

Shapes: B images, N captions, P sides of a view in pixels, E embedding width, H hidden width, V vocabulary.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from captioner.errors import UserError
from captioner.images.views import ViewSpec, normalise
from captioner.model.bundle import Bundle
from captioner.model.network import CaptionModel
from captioner.vocabulary import END, GLUED_TOKENS, PAD, START, UNK

Inputs = dict[str, Tensor]

MAX_DIFFERENCE = 1e-3
PILLOW_RESIZES = {
    "squash": "image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)",
    "keep-ratio": "ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)",
    "center-crop": "ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)",
    "none": "image",
}


def export(bundle: Bundle, folder: Path) -> list[tuple[str, float, str]]:
    """Write `folder`, which appears only when it is complete and its files agree with PyTorch.

    Returns each ONNX file's name, megabytes and largest difference on random input. Raises UserError if that is more
    than rounding explains.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows = _write_parts(bundle, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return rows


def _write_parts(bundle: Bundle, folder: Path) -> list[tuple[str, float, str]]:
    encoder, decoder = EncoderPart(bundle.model, bundle.view), DecoderPart(bundle.model)
    rows = [
        _export_part(encoder, folder / "encoder.onnx", outputs=("image", "hidden", "cell"), batches=(1, 3)),
        _export_part(
            decoder, folder / "decoder.onnx", outputs=("logits", "hidden_next", "cell_next"), batches=(1, 3, 64)
        ),
    ]
    (folder / "vocabulary.json").write_text(bundle.vocabulary.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(readme(bundle), encoding="utf-8")
    return rows


class EncoderPart(nn.Module):
    """Views (B, P, P, 3), uint8, to image embeddings (B, E) and the LSTM's first hidden and cell state, each (B, H).

    Both parts export to few plain operations: `nn.LSTM` would become a loop.
    """

    def __init__(self, model: CaptionModel, view: ViewSpec) -> None:
        super().__init__()
        self.model = model.eval()
        self.view = view
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (view.mean, view.std))

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first state is zeros if the image is an input at every step."""
        image_BE = self.model.encode((views.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        zeros_BH = image_BE.new_zeros(len(image_BE), self.model.config.hidden_size)
        if self.model.config.image_input == "every-step":
            return image_BE, zeros_BH, zeros_BH.clone()
        return image_BE, *_recur(self.model.lstm, image_BE, (zeros_BH, zeros_BH))

    def reference(self, views: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the model's own code, without a first state of zeros."""
        image_BE = self.model.encode(normalise(views, self.view))
        state = self.model.start(image_BE, rows_N=torch.arange(len(image_BE)))
        return (image_BE,) if state is None else (image_BE, state[0][0], state[1][0])

    def random_inputs(self, num_images: int) -> Inputs:
        """Noise as views."""
        shape = (num_images, self.view.crop, self.view.crop, 3)
        return {"views": torch.randint(0, 256, shape, dtype=torch.uint8)}


class DecoderPart(nn.Module):
    """One step: the last tokens (N), image embeddings (N, E) and the state to logits (N, V) and the next state."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, tokens: Tensor, image: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The image is always an input, even if it is unused, so that one loop fits all models."""
        words_NE = self.model.embed(tokens)
        if self.model.config.image_input == "every-step":
            words_NE = torch.cat((words_NE, image), dim=1)
        hidden, cell = _recur(self.model.lstm, words_NE, (hidden, cell))
        return self.model.predict(hidden), hidden, cell

    def reference(self, tokens: Tensor, image: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the model's own code."""
        logits_NV, (hidden_1NH, cell_1NH) = self.model.advance(tokens, (hidden[None], cell[None]), image)
        return logits_NV, hidden_1NH[0], cell_1NH[0]

    def random_inputs(self, num_captions: int) -> Inputs:
        """Random tokens, and states and embeddings in a trained model's range."""
        config = self.model.config
        return {
            "tokens": torch.randint(0, config.vocabulary_size, (num_captions,)),
            "image": torch.randn(num_captions, config.embedding_size),
            "hidden": torch.rand(num_captions, config.hidden_size) * 2 - 1,
            "cell": torch.randn(num_captions, config.hidden_size),
        }


def _recur(lstm: nn.LSTM, inputs_NE: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step of an LSTM of one layer: the next hidden and cell state, each (N, H)."""
    return torch.lstm_cell(inputs_NE, state, *lstm.all_weights[0])


def _export_part(
    part: EncoderPart | DecoderPart, path: Path, *, outputs: tuple[str, ...], batches: tuple[int, ...]
) -> tuple[str, float, str]:
    """Write one file, check it, and compare it with PyTorch at these batch sizes. Returns a row of `export`'s table."""
    import onnx

    _write(part, path, inputs=part.random_inputs(batches[-1]), outputs=outputs)
    onnx.checker.check_model(path, full_check=True)
    difference = np.max([_difference(part, path, inputs=part.random_inputs(size)) for size in batches])
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"{path.name} differs from PyTorch by {difference:.1e}, so nothing was exported: "
            "install other versions of torch, onnx, onnxscript and onnxruntime"
        )
    num_bytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))  # two files above 2 GB
    return path.name, num_bytes / 1e6, f"{difference:.1e}"


def _write(part: nn.Module, path: Path, *, inputs: Inputs, outputs: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            part,
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={name: {0: "batch"} for name in inputs},
        )
    assert program is not None
    program.save(path)


@torch.no_grad()
def _difference(part: EncoderPart | DecoderPart, path: Path, *, inputs: Inputs) -> float:
    """The largest difference of any output between the model in PyTorch and the file in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    pairs = zip(found, part.reference(**inputs), strict=False)  # the reference has no first state of zeros
    return float(np.max([np.abs(array - tensor.numpy()).max() for array, tensor in pairs]))  # NaN stays NaN


# ---- README.md --------------------------------------------------------------------------------------------


def readme(bundle: Bundle) -> str:
    """The README.md of an ONNX folder: inputs and outputs, and greedy search in numpy."""
    config, view, decoding = bundle.model.config, bundle.view, bundle.decoding
    return f"""# An image captioning model for ONNX

`encoder.onnx`, for B images: `views` (B, {view.crop}, {view.crop}, 3), uint8, RGB, not normalised, to `image`
(B, {config.embedding_size}), and `hidden` and `cell` (B, {config.hidden_size}), from which the decoder starts.

`decoder.onnx`, for the next word of N captions: `tokens` (N,), int64, `image`, `hidden` and `cell` to `logits`
(N, {config.vocabulary_size}) of the next word, `hidden_next` and `cell_next`. The first token is {START}, the
last one {END}. Token t is `words[t]` of `vocabulary.json`.

With numpy, onnxruntime and Pillow, and this as `caption.py` in this folder: `python caption.py photo.jpg`

```python
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).parent
SIZE, CROP = {view.size}, {view.crop}
MAX_TOKENS, NO_REPEAT_TRIGRAM = {decoding.max_tokens}, {decoding.no_repeat_trigram}
START, END, NEVER_SAID = {START}, {END}, {[PAD, START, UNK]}  # never: padding, start, unknown word
GLUED = {sorted(GLUED_TOKENS)}
WORDS = json.loads((HERE / "vocabulary.json").read_text(encoding="utf-8"))["words"]
encoder = onnxruntime.InferenceSession(HERE / "encoder.onnx")
decoder = onnxruntime.InferenceSession(HERE / "decoder.onnx")


def read_view(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image = {PILLOW_RESIZES[view.resize]}
    left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
    return np.asarray(image.crop((left, top, left + CROP, top + CROP)))


def greedy(views):
    image, hidden, cell = encoder.run(None, dict(views=views))
    captions = [[] for _ in views]
    tokens = np.full(len(views), START)
    for step in range(MAX_TOKENS):
        logits, hidden, cell = decoder.run(None, dict(tokens=tokens, image=image, hidden=hidden, cell=cell))
        logits[:, NEVER_SAID + [END] * (step == 0)] = -np.inf
        for row, said in enumerate(captions if NO_REPEAT_TRIGRAM else []):
            repeats = [third for *two, third in zip(said, said[1:], said[2:]) if two == said[-2:]]
            logits[row, repeats] = -np.inf
        tokens = logits.argmax(axis=1)
        for said, token in zip(captions, tokens.tolist()):
            said.append(token)
        if all(END in said for said in captions):
            break
    return [said[: said.index(END)] if END in said else said for said in captions]


def to_text(tokens):
    words = [WORDS[token] for token in tokens]
    return "".join(word if word in GLUED else f" {{word}}" for word in words).strip()


for path in sys.argv[1:]:
    print(path, to_text(greedy(read_view(path)[None])[0]))
```

Captions of the same view equal those of `infer/main.py --beam-size 1` up to rounding. Pillow's pixels differ a little
from those that infer/main.py makes, so a few captions of photos differ too.
"""
