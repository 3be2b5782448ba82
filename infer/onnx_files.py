"""A model as two ONNX files, each compared with PyTorch, in float32.

Shapes: B images, N captions, P sides of a view in pixels, V vocabulary.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from captioner.calibration import CALIBRATION, CALIBRATION_ARRAYS, to_files
from captioner.errors import UserError
from captioner.model.bundle import Bundle
from captioner.model.network import DecoderState, pooled
from captioner.model.onnx import CONFIG, DECODER, ENCODER, make_config
from captioner.vocabulary import END, GLUED_TOKENS, PAD, START, UNK
from infer.int8 import quantize

Inputs = dict[str, Tensor]

MAX_DIFFERENCE = 1e-3
PILLOW_RESIZES = {
    "squash": "image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)",
    "keep-ratio": "ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)",
    "center-crop": "ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)",
    "none": "image",
}


def export(bundle: Bundle, folder: Path, *, photos_BPP3: np.ndarray | None = None) -> list[tuple[str, float, str]]:
    """Write `folder`, which appears only when it is complete and its files agree with PyTorch.

    With views of photos the files are int8: see `infer.int8`. Returns each ONNX file's name, megabytes and largest
    difference on random input, before that. Raises UserError if that is more than rounding explains.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows = _write_parts(bundle, partial, photos_BPP3)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return rows


def _write_parts(bundle: Bundle, folder: Path, photos_BPP3: np.ndarray | None) -> list[tuple[str, float, str]]:
    name = bundle.name
    rows = [
        _export_part(EncoderPart(bundle), folder / ENCODER, batches=(1, 3)),
        _export_part(DecoderPart(bundle), folder / DECODER, batches=(1, 3, 64)),
    ]
    if photos_BPP3 is not None:
        quantize(folder, photos_BPP3)
        rows = [(file, _megabytes(folder / file), difference) for file, _, difference in rows]
        name = f"{bundle.name}-int8"
    config = make_config(
        view=bundle.view,
        decoding=bundle.decoding,
        vocabulary=bundle.vocabulary,
        name=name,
        grid=bundle.grid,
        files={file: (folder / file).read_bytes() for file in (ENCODER, DECODER)},
    )
    (folder / CONFIG).write_text(config, encoding="utf-8")
    if bundle.calibration is not None:
        content, arrays = to_files(bundle.calibration, model=name)
        (folder / CALIBRATION).write_bytes(content)
        (folder / CALIBRATION_ARRAYS).write_bytes(arrays)
    (folder / "vocabulary.json").write_text(bundle.vocabulary.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(readme(bundle), encoding="utf-8")
    return rows


class EncoderPart(nn.Module):
    """Views (B, P, P, 3), uint8, to what the decoder reads of the images, its first state, and features, of B rows."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model, self.view = bundle.model.eval(), bundle.view
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.view.mean, self.view.std))
        self.outputs = ["image", "hidden", "cell", "features"]

    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        """The tensors, named `outputs`."""
        features = self.model.features((views.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        images = self.model.encode(features)
        state = self.model.start(images, torch.arange(len(images)), 1)
        return state.images, *state.lstm, pooled(features)

    def random_inputs(self, num_images: int) -> Inputs:
        """Noise as views."""
        shape = (num_images, self.view.crop, self.view.crop, 3)
        return {"views": torch.randint(0, 256, shape, dtype=torch.uint8)}


class DecoderPart(nn.Module):
    """One step of N captions of N images: tokens (N) and the encoder's outputs to logits and the next state."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model, self.encoder = bundle.model.eval(), EncoderPart(bundle)
        self.outputs = ["logits", "hidden_next", "cell_next"] + ["attention"] * (bundle.grid is not None)

    def forward(self, tokens: Tensor, images: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """The tensors, named `outputs`. The encoded images are always an input, so that one loop fits all decoders."""
        state = DecoderState(lstm=(hidden, cell), images=images, cells_N=torch.arange(len(tokens)), columns=1)
        logits_NV, state, attention_NR = self.model.advance(tokens, state)
        return logits_NV, *state.lstm, *(() if attention_NR is None else (attention_NR,))

    @torch.no_grad()
    def random_inputs(self, num_captions: int) -> Inputs:
        """Random tokens, and what the encoder makes of noise."""
        tokens = torch.randint(0, self.model.config.vocabulary_size, (num_captions,))
        tensors = self.encoder(**self.encoder.random_inputs(num_captions))
        return {"tokens": tokens, **dict(zip(self.encoder.outputs[:3], tensors[:3], strict=True))}


def _export_part(part: EncoderPart | DecoderPart, path: Path, *, batches: tuple[int, ...]) -> tuple[str, float, str]:
    """Write one file, check it, and compare it with PyTorch at these batch sizes. Returns a row of `export`'s table."""
    import onnx

    _write(part, path, inputs=part.random_inputs(batches[-1]))
    onnx.checker.check_model(path, full_check=True)
    difference = np.max([_difference(part, path, inputs=part.random_inputs(size)) for size in batches])
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"{path.name} differs from PyTorch by {difference:.1e}, so nothing was exported: "
            "install other versions of torch, onnx, onnxscript and onnxruntime"
        )
    return path.name, _megabytes(path), f"{difference:.1e}"


def _megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6  # two files above 2 GB


def _write(part: EncoderPart | DecoderPart, path: Path, *, inputs: Inputs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            part,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=part.outputs,
            dynamic_shapes=tuple({0: "batch"} for _ in inputs),
        )
    assert program is not None
    program.save(path)


@torch.no_grad()
def _difference(part: EncoderPart | DecoderPart, path: Path, *, inputs: Inputs) -> float:
    """The largest difference of any output between the model in PyTorch and the file in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    pairs = zip(found, part(*inputs.values()), strict=True)
    return float(np.max([np.abs(array - tensor.numpy()).max() for array, tensor in pairs]))  # NaN stays NaN


# ---- README.md --------------------------------------------------------------------------------------------


def readme(bundle: Bundle) -> str:
    """The README.md of an ONNX folder: inputs and outputs, and greedy search in numpy."""
    config, view, decoding = bundle.model.config, bundle.view, bundle.decoding
    attention = ", and to `attention`, how much each looked at each position of its image" if bundle.grid else ""
    return f"""# An image captioning model for ONNX

`encoder.onnx`, for B images: `views` (B, {view.crop}, {view.crop}, 3), uint8, RGB, not normalised, to what the decoder
reads of them (`image`), its first state (`hidden`, `cell`), and the encoder's `features`, each of B rows.

`decoder.onnx`, for the next word of N captions: `tokens` (N,), int64, and the same tensors to `logits`
(N, {config.vocabulary_size}) of the next word and the next state (`hidden_next`, `cell_next`){attention}. The
first token is {START}, the last one {END}. Token t is `words[t]` of `vocabulary.json`.

`infer/main.py --model THIS_FOLDER` captions whole folders with it, without PyTorch.

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
    image, hidden, cell = encoder.run(["image", "hidden", "cell"], dict(views=views))
    captions = [[] for _ in views]
    tokens = np.full(len(views), START)
    for step in range(MAX_TOKENS):
        feeds = dict(tokens=tokens, image=image, hidden=hidden, cell=cell)
        logits, hidden, cell = decoder.run(["logits", "hidden_next", "cell_next"], feeds)
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
