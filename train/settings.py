"""The training command's flags."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from captioner.errors import UserError
from captioner.flags import (
    AnyNumber,
    Count,
    CountOrZero,
    FractionBelow1,
    LocalPath,
    Location,
    NotNegative,
    Pixels,
    Positive,
    Seed,
    WorkersOrZero,
)
from captioner.model.bundle import DecodingDefaults
from captioner.model.network import DecoderKind, ImageInput, ModelConfig
from captioner.streaming.order import SHUFFLE_SHARDS, num_steps
from train.data.folders import check_batch_size

Schedule = Literal["cosine", "constant"]
# settings that may differ between the ranks of a run
OF_A_MACHINE = ("shards", "output", "resume", "init", "weights", "cache", "cache_gigabytes", "workers", "wandb")
# settings that may differ when a run is resumed; the content of shards, model and weights is compared by fingerprints
CHANGEABLE = (*OF_A_MACHINE, "checkpoint_steps", "keep_checkpoints", "tolerate_bad_samples", "patience_epochs")
# defaults of the flags that describe a new model; the model of --init stays as it is
NEW_MODEL: dict[str, Any] = {
    "encoder": "resnet152",
    "weights": "default",
    "decoder": "attention",
    "image_input": "first",
    "embedding_size": 256,
    "hidden_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on, which model, and for how long. Mixed precision and GPUs are `accelerate launch`'s flags."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs) that sharding/make_shards.py wrote, read as one; their `val` is for evaluation."""
    output: LocalPath = "runs/coco"
    """Run folder: checkpoints, curves, report.html, and the model in `model/`."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the run folder; start where there is none."""
    init: Location | None = None
    """Start from this trained model folder: its encoder, decoder and words; the shards' new words are added."""

    # ---- the model ------------------------------------------------------------------------------------------
    encoder: str | None = None
    """Any classification model of torchvision by name, or of timm (pip install 'captioner[timm]') as timm/NAME.
    On a laptop's CPU take squeezenet1_1 or timm/tf_efficientnet_lite0; on one GPU resnet101 or timm/convnext_tiny;
    on several a CLIP ViT, timm/vit_base_patch16_clip_quickgelu_224.openai. Without it resnet152, or that of --init."""
    weights: LocalPath | None = None
    """Encoder weights: `default` (torchvision's best or timm's, downloaded once), `none`, or the path of a state dict.
    Without it `default`, or those of --init."""
    finetune_encoder_from_step: CountOrZero | None = None
    """Train the encoder too, from this optimizer step on (0: from the first). None: it stays frozen, batch norm too."""
    decoder: DecoderKind | None = None
    """`attention`: at each word the decoder looks at the positions of the encoder's feature map; `vector`: it reads one
    vector of an image, as in the book. Without it `attention`, or that of --init."""
    image_input: ImageInput | None = None
    """How the vector decoder reads the image: as the LSTM's first input, or beside each word. Without it `first`, or as
    in --init."""
    embedding_size: Count | None = None
    """Width of word and image embeddings. Without it 256, or that of --init."""
    hidden_size: Count | None = None
    """Width of the LSTM. Without it 512, or that of --init."""
    input_dropout: FractionBelow1 = 0.2
    """Dropout probability of the word embeddings."""
    dropout: FractionBelow1 = 0.5
    """Dropout probability of the LSTM's outputs."""
    crop: Pixels | None = None
    """Side in pixels of the square cut from a stored image, at random in training. Without it the encoder's own, or
    that of --init."""
    max_tokens: Count = 20
    """Longer captions are cut to this (and counted); generated ones are never longer."""

    # ---- the optimizer --------------------------------------------------------------------------------------
    epochs: CountOrZero = 18
    """Passes over the training split; each image comes once an epoch with all its captions. With 0 and --init only
    `self-critical-epochs` are trained."""
    patience_epochs: Count | None = None
    """Stop after this many epochs without a better CIDEr."""
    batch_size: Count = 32
    """Images of a *global* batch, over all processes and micro-batches; each comes with all its captions."""
    accumulation_steps: Count = 1
    """Micro-batches into which each process divides its part of a global batch, to save memory."""
    learning_rate: Positive = 1.5e-3
    """Adam's peak learning rate."""
    encoder_learning_rate: NotNegative = 1e-4
    """The encoder's peak learning rate, when it is trained."""
    schedule: Schedule = "cosine"
    """After a linear warm-up: a cosine down to zero, or a constant rate."""
    label_smoothing: FractionBelow1 = 0.0
    """Probability mass of each target that is spread over all words."""
    self_critical_epochs: CountOrZero = 0
    """Further epochs, after `epochs`, in which captions that the model draws are made likelier the better they score:
    CIDEr-D against the training captions."""
    self_critical_learning_rate: Positive = 5e-6
    """Adam's learning rate at the beginning of these epochs, from which it falls to zero; the encoder's is lowered as
    much."""
    scheduled_sampling: FractionBelow1 = 0.0
    """Fraction of input words, rising from 0 to this over the run, that are replaced by the model's own predictions."""
    cache_features: bool = False
    """Encode each image once, keep the features beside the shards, and train from them: without crops and flips."""
    mirrored_features: bool = False
    """With --cache-features also encode the mirror image of each training image, and train from one of both, at random:
    twice the disk, better captions where images are few."""
    compile_encoder: bool = False
    """Compile the encoder with torch.compile: minutes at the start, faster steps after."""
    seed: Seed = 0
    """Seed of initial weights, dropout, the order of samples, crops and flips."""

    # ---- evaluation, every epoch ------------------------------------------------------------------------------
    beam_size: Count = 3
    """Beams of the evaluation, and the model folder's default; 1 is greedy."""
    length_penalty: AnyNumber = 1.0
    """A beam's score is its log-probability over its length to this power: 0 favours short captions."""

    # ---- data and machine -----------------------------------------------------------------------------------
    shuffle_shards: Count = SHUFFLE_SHARDS
    """Shuffle window: shards that all processes together read from at once; give at least the number of processes, so
    that none reads another's shards."""
    tolerate_bad_samples: CountOrZero = 0
    """Missing or damaged samples that each process may skip in an epoch; they are counted and listed."""
    cache: LocalPath = "~/.cache/captioner/shards"
    """Folder where shards behind URLs are kept, for all processes of a machine."""
    cache_gigabytes: Positive = 50.0
    """Size limit of that folder, downloads in progress included; the least recently used shards are evicted."""
    workers: WorkersOrZero = 2
    """Loader processes for each training process; with 0 it loads itself."""
    checkpoint_steps: Count = 1000
    """Optimizer steps between checkpoints; one is also written after each epoch."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep, besides that of the best CIDEr."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (pip install wandb)."""

    @property
    def all_epochs(self) -> int:
        """Epochs of cross-entropy, and self-critical ones."""
        return self.epochs + self.self_critical_epochs

    def model_config(self, num_words: int) -> ModelConfig:
        """The model's configuration; no flag that describes it may be None."""
        names = [field.name for field in fields(ModelConfig) if field.name != "vocabulary_size"]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ModelConfig(vocabulary_size=num_words, **values)

    def decoding(self) -> DecodingDefaults:
        """How captions are generated."""
        return DecodingDefaults(
            beam_size=self.beam_size, max_tokens=self.max_tokens, length_penalty=self.length_penalty
        )


def check_settings(settings: TrainSettings, *, world_size: int = 1) -> None:
    """Raise UserError for settings that contradict each other or the number of processes."""
    if settings.cache_features and settings.finetune_encoder_from_step is not None:
        raise UserError(
            "--cache-features keeps the features of a frozen encoder, and --finetune-encoder-from-step trains it: "
            "leave out one of them"
        )
    if settings.mirrored_features and not settings.cache_features:
        raise UserError("--mirrored-features needs --cache-features: give both (without it images are flipped anyway)")
    if not settings.epochs and not (settings.init and settings.self_critical_epochs):
        raise UserError("--epochs 0 needs --init and --self-critical-epochs: give them, or at least 1 epoch")
    check_batch_size(settings.batch_size, world_size=world_size, accumulation_steps=settings.accumulation_steps)


def count_steps(settings: TrainSettings, num_samples: int, *, has_val: bool) -> int:
    """The run's optimizer steps. Raises UserError where there are none, and for settings without effect."""
    total_steps = settings.all_epochs * num_steps(num_samples, global_batch=settings.batch_size)
    if not total_steps:
        raise UserError(f"the training split in {settings.shards[0]} holds no samples: see its train.failures.jsonl")
    if (settings.finetune_encoder_from_step or 0) >= total_steps:
        raise UserError(
            f"--finetune-encoder-from-step {settings.finetune_encoder_from_step} is beyond the run's {total_steps:,} "
            "steps: give fewer, or more --epochs"
        )
    if settings.patience_epochs and settings.self_critical_epochs:
        raise UserError("--patience-epochs would end the run before --self-critical-epochs: leave out one of them")
    if settings.patience_epochs and not has_val:
        raise UserError("--patience-epochs looks at the val split, and there is none: pack one, or leave it out")
    return total_steps
