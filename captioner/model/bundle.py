"""The model folder: weights, configuration, vocabulary, metrics and card; all that inference reads.

`model.safetensors` · `config.json` · `vocabulary.json` · `metrics.json` · `README.md`, and if it was calibrated
`calibration.json` · `calibration.safetensors`
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from captioner import __version__
from captioner.calibration import CALIBRATION, CALIBRATION_ARRAYS, Calibration, Reliability, read_calibration, to_files
from captioner.errors import DeviceMemoryError, UserError
from captioner.files import storage
from captioner.images.views import ViewSpec, normalise
from captioner.model.decoding import diverse
from captioner.model.encoders import timm_models
from captioner.model.generated import DecodingDefaults, GeneratedCaption
from captioner.model.network import CaptionModel, ModelConfig, build_model, pooled
from captioner.vocabulary import Vocabulary, read_vocabulary

FORMAT_VERSION = 1
LIBRARIES = ("torch", "torchvision", "nltk")
COPY_AGAIN = "copy the whole model folder again, or train it again with train/main.py"
CALIBRATE_AGAIN = "copy the whole model folder again, or delete calibration.json and calibrate with train/evaluate.py"
NAME_LETTERS = 12  # of the weights' sha256
CPU_BATCH_SIZE = 4  # of the encoder: activations of more do not fit a core's cache


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model ready to caption; `name` identifies its weights (the beginning of their sha256).

    `calibration` is None if the model folder has none.
    """

    model: CaptionModel
    view: ViewSpec
    vocabulary: Vocabulary
    decoding: DecodingDefaults
    name: str
    calibration: Calibration | None = None
    uses_torch: bool = True

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def is_on_cpu(self) -> bool:
        """Whether the model's device is the CPU."""
        return self.device.type == "cpu"

    @property
    def grid(self) -> tuple[int, int] | None:
        """The rows and columns of the encoder's feature map; None for a decoder without attention."""
        return self.model.encoder.grid_shape(self.view.crop) if self.model.config.decoder == "attention" else None

    @torch.inference_mode()
    def encode(self, views_BPP3: np.ndarray, *, precision: str) -> tuple[Tensor, Tensor]:
        """What the decoder reads of B evaluation views, uint8, and their pooled features (B, F), in float32."""
        with _memory_errors():
            views = torch.from_numpy(views_BPP3)
            parts = views.split(CPU_BATCH_SIZE if self.is_on_cpu else len(views))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                parts = [self.model.encoder(normalise(part.to(self.device), self.view)) for part in parts]
            features = torch.cat(parts).float()
            return self.model.encode(features), pooled(features)

    @torch.inference_mode()
    def search(self, encoded: Sequence[Tensor], **options: Any) -> list[list[GeneratedCaption]]:
        """The captions of each encoded image, in order; `options` are those of `captioner.model.decoding.diverse`."""
        with _memory_errors():
            return diverse(self.model, torch.cat(list(encoded)), **options)


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError from error


def save_bundle(
    folder: Path,
    *,
    model: CaptionModel,
    view: ViewSpec,
    vocabulary: Vocabulary,
    decoding: DecodingDefaults,
    metrics: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> None:
    """Write a model folder, under a temporary name until it is complete."""
    weights = save_tensors({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()})
    digest = hashlib.sha256(weights).hexdigest()
    libraries = (*LIBRARIES, "timm") if model.config.encoder.startswith(timm_models.PREFIX) else LIBRARIES
    config = {
        "format_version": FORMAT_VERSION,
        "model": asdict(model.config),
        "view": asdict(view),
        "decoding": asdict(decoding),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "weights_sha256": digest,
        "libraries": {"captioner": __version__, **{library: version(library) for library in libraries}},
    }
    files = {
        "model.safetensors": weights,
        "config.json": json.dumps(config, indent=1, allow_nan=False),
        "vocabulary.json": vocabulary.to_json(),
        "metrics.json": json.dumps(metrics, indent=1, allow_nan=False),
        "README.md": model_card(config, metrics, calibration),
    }
    if calibration is not None:
        files[CALIBRATION], files[CALIBRATION_ARRAYS] = to_files(calibration, model=digest[:NAME_LETTERS])
    folder = folder.resolve()  # a symbolic link stays
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files.items():
        storage.write_atomic(str(partial / name), content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def save_calibration(folder: Path, calibration: Calibration, *, model: str) -> None:
    """Add the calibration of a model, or a new one, to its folder; a kill meanwhile leaves none. `model` is its name.

    Raises OSError, and UserError where the folder's own files cannot be read; the old calibration is there still.
    """
    content, arrays = to_files(calibration, model=model)
    config = storage.read_json_object(str(folder / "config.json"), remedy=COPY_AGAIN)
    metrics = storage.read_json_object(str(folder / "metrics.json"), remedy=COPY_AGAIN)
    card = model_card(config, metrics, calibration).encode()
    files = {CALIBRATION_ARRAYS: arrays, "README.md": card, CALIBRATION: content}
    with TemporaryDirectory(prefix=".calibration-", dir=folder) as new:  # a full disk is noticed there
        for name, data in files.items():
            storage.write_atomic(str(Path(new, name)), data)
        (folder / CALIBRATION).unlink(missing_ok=True)  # the old one does not fit the new arrays
        for name in files:
            Path(new, name).replace(folder / name)


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any], calibration: Calibration | None) -> str:
    """The folder's README: what the model is, how good it was, how to use it."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items() if isinstance(value, float))
    model, view = config["model"], config["view"]
    return f"""# An image captioning model

Encoder `{model["encoder"]}`, LSTM decoder of width {model["hidden_size"]} over {model["vocabulary_size"]} words.
Images are resized to {view["size"]} ({view["resize"]}) and cropped to {view["crop"]} pixels.

    from captioner import load_captioner
    print(load_captioner("THIS_FOLDER")(["photo.jpg"])[0].alt)

Whole folders are captioned by `infer/main.py`.
It describes images like those it was trained on, and errs, sometimes confidently: have a person read what matters.

| metric on the validation split | value |
|---|---|
{rows or "| (none was measured) | |"}
{_reliability_table(calibration.reliability) if calibration and calibration.reliability else ""}"""


def _reliability_table(found: Reliability) -> str:
    rows = "\n".join(
        f"| {each['confidence']:.2f} | {each['good']:.2f} | {each['num_captions']:,} |" for each in found.bins
    )
    return f"""
A caption's confidence is the probability that its CIDEr-D is at least that of half of people's own captions. On
{found.num_captions:,} validation images, cross-validated with five folds: expected calibration
error {found.calibration_error:.3f}, Brier score {found.brier_score:.3f}, AUROC {found.auroc:.3f}.

| confidence | fraction that was good | captions |
|---|---|---|
{rows}
"""


def load_bundle(folder: str | Path, *, device: torch.device | str = "cpu") -> Bundle:
    """The model in `folder`, a path or a URL, in eval mode on `device`.

    Raises UserError if files are damaged or do not belong together.
    """
    folder = str(folder)
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file: give the model folder that holds it")
    config_file = storage.join(folder, "config.json")
    config = storage.read_json(config_file, remedy=_other_folder(folder))
    found = config.get("format_version") if isinstance(config, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{folder} has model format {found}, this version reads {FORMAT_VERSION}: train it again")
    try:
        return _assemble(folder, config, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{config_file} is not as it was written ({error!r}): {COPY_AGAIN}") from error


def _other_folder(folder: str) -> str:
    """What to do where a model folder has no readable config.json."""
    if not storage.is_remote(folder) and not Path(folder).exists():
        return "check the path: there is no such folder"
    if not storage.is_remote(folder) and Path(folder, "model", "config.json").exists():
        return f"give the model folder {Path(folder, 'model')}"
    return f"give a model folder, which train/main.py writes; or {COPY_AGAIN}"


def _assemble(folder: str, config: dict[str, Any], device: torch.device | str) -> Bundle:
    origin = storage.join(folder, "vocabulary.json")
    vocabulary = read_vocabulary(origin, remedy=COPY_AGAIN)
    if vocabulary.fingerprint != config["vocabulary_fingerprint"]:
        raise UserError(f"{origin} is not the vocabulary that this model was trained with: {COPY_AGAIN}")
    weights_file = storage.join(folder, "model.safetensors")
    weights = storage.read_required(weights_file, remedy=COPY_AGAIN)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != config["weights_sha256"]:
        raise UserError(f"{weights_file} is cut or changed (its sha256 differs): {COPY_AGAIN}")
    view_fields: dict[str, Any] = config["view"] | {name: tuple(config["view"][name]) for name in ("mean", "std")}
    view, decoding = ViewSpec(**view_fields), DecodingDefaults(**config["decoding"])
    if not 1 <= view.crop <= view.size:
        raise ValueError(f"impossible {view}")
    model = build_model(ModelConfig(**config["model"]))
    try:
        model.load_state_dict(load_tensors(weights))
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights_file} does not fit its config.json ({reason}): {COPY_AGAIN}") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{weights_file} holds weights that are no finite numbers: train the model again")
    name = digest[:NAME_LETTERS]
    return Bundle(
        model=model.eval().to(device),
        view=view,
        vocabulary=vocabulary,
        decoding=decoding,
        name=name,
        calibration=read_calibration(folder, model=name, device=device, remedy=CALIBRATE_AGAIN),
    )
