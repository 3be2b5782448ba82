"""The README.md of an ONNX folder: inputs and outputs, and greedy search in numpy."""

from captioner.model.bundle import Bundle
from captioner.vocabulary import END, GLUED_TOKENS, PAD, START, UNK

PILLOW_RESIZES = {
    "squash": "image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)",
    "keep-ratio": "ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)",
    "center-crop": "ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)",
    "none": "image",
}


def readme(bundle: Bundle) -> str:
    """The text of the README."""
    config, view, decoding = bundle.model.config, bundle.view, bundle.decoding
    return f"""# An image captioning model for ONNX

`encoder.onnx`, for B pictures: `views` (B, {view.crop}, {view.crop}, 3), uint8, RGB, not normalised, to `image`
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
