"""The model folder: weights, configuration, vocabulary, metrics and card; all that inference reads.

`model.safetensors` · `config.json` · `vocabulary.json` · `metrics.json` · `README.md`
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from captioner.cli import UserError
from captioner.decoding import Caption, decode
from captioner.model import CaptionModel, ModelConfig
from captioner.storage import read_json
from captioner.views import ViewSpec, normalise, read_eval_view
from captioner.vocabulary import Vocabulary

FORMAT_VERSION = 1
LIBRARIES = ("captioner", "torch", "torchvision", "nltk")
MAKE_AGAIN = "copy the whole model folder again, or write it anew with train/main.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingDefaults:
    """How captions are generated unless the user says otherwise."""

    beam_size: int = 3
    max_tokens: int = 20
    length_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model ready to caption; `name` identifies its weights (the beginning of their sha256)."""

    model: CaptionModel
    view: ViewSpec
    vocabulary: Vocabulary
    decoding: DecodingDefaults
    name: str

    @property
    def device(self) -> torch.device:
        """Where the model is, and its input is brought."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def caption_views(self, views_BPP3: np.ndarray, *, beam_size: int | None = None) -> list[Caption]:
        """A caption for each evaluation view (B, P, P, 3), uint8; `beam_size` None takes the folder's default."""
        images_B3PP = normalise(torch.from_numpy(views_BPP3).to(self.device), self.view)
        beams = self.decoding.beam_size if beam_size is None else beam_size
        decoding = replace(self.decoding, beam_size=beams)
        return decode(self.model, self.model.encode(images_B3PP), **asdict(decoding))

    def caption(self, data: bytes) -> str:
        """The caption of one picture file's bytes. Raises captioner.images.ImageError."""
        view_PP3, _ = read_eval_view(data, self.view)
        return self.vocabulary.decode(self.caption_views(np.stack([view_PP3]))[0].tokens)


def save_bundle(
    folder: Path,
    *,
    model: CaptionModel,
    view: ViewSpec,
    vocabulary: Vocabulary,
    decoding: DecodingDefaults,
    metrics: Mapping[str, Any],
) -> None:
    """Write a model folder; it stands under its name only when it is whole."""
    weights = save_tensors({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()})
    config = {
        "format_version": FORMAT_VERSION,
        "model": asdict(model.config),
        "view": asdict(view),
        "decoding": asdict(decoding),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "libraries": {library: version(library) for library in LIBRARIES},
    }
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(weights)
    (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (partial / "vocabulary.json").write_text(vocabulary.to_json(), encoding="utf-8")
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    (partial / "README.md").write_text(model_card(config, metrics), encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The folder's README: what the model is, how good it was, how to use it."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items() if isinstance(value, float))
    model, view = config["model"], config["view"]
    return f"""# An image captioning model

Encoder `{model["encoder"]}`, LSTM decoder of width {model["hidden_size"]} over {model["vocabulary_size"]} words.
Pictures are resized to {view["size"]} ({view["resize"]}) and cropped to {view["crop"]} pixels.

    python infer/main.py --model THIS_FOLDER --images PHOTOS --output captions.jsonl

It describes pictures like those it was trained on, and errs, sometimes confidently: have a person read what matters.

| metric on the validation split | value |
|---|---|
{rows or "| (none was measured) | |"}
"""


def load_bundle(folder: str | Path, *, device: torch.device | str = "cpu") -> Bundle:
    """The model in `folder`, in eval mode on `device`. Raises UserError when parts are cut or do not match."""
    folder = Path(folder)
    remedy = f"give --model a folder that train/main.py wrote; or {MAKE_AGAIN}"
    config = read_json(str(folder / "config.json"), remedy=remedy)
    found = config.get("format_version") if isinstance(config, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{folder} has model format {found}, this version reads {FORMAT_VERSION}: train it again")
    try:
        bundle = _assemble(folder, config)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is incomplete, there is no {error.filename}: {MAKE_AGAIN}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / 'config.json'} is not as it was written ({error!r}): {MAKE_AGAIN}") from error
    bundle.model.to(device)
    return bundle


def _assemble(folder: Path, config: dict[str, Any]) -> Bundle:
    origin = folder / "vocabulary.json"
    vocabulary = Vocabulary.from_json(origin.read_text(encoding="utf-8", errors="replace"), origin=str(origin))
    if vocabulary.fingerprint != config["vocabulary_fingerprint"]:
        raise UserError(f"{origin} is not the vocabulary that this model was trained with: {MAKE_AGAIN}")
    weights = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config["weights_sha256"]:
        raise UserError(f"{folder / 'model.safetensors'} is cut or changed (its sha256 differs): {MAKE_AGAIN}")
    view_fields: dict[str, Any] = config["view"] | {name: tuple(config["view"][name]) for name in ("mean", "std")}
    view, decoding = ViewSpec(**view_fields), DecodingDefaults(**config["decoding"])
    possible = min(decoding.beam_size, decoding.max_tokens) >= 1 and math.isfinite(decoding.length_penalty)
    if not 1 <= view.crop <= view.size or not possible:
        raise ValueError(f"impossible {view} or {decoding}")
    model = CaptionModel(ModelConfig(**config["model"]))
    try:
        model.load_state_dict(load_tensors(weights))
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder / 'model.safetensors'} does not fit its config.json ({reason}): {MAKE_AGAIN}"
        ) from error
    return Bundle(
        model=model.eval(),
        view=view,
        vocabulary=vocabulary,
        decoding=decoding,
        name=digest[:12],
    )
