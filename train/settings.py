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
from captioner.model.network import ImageInput, ModelConfig
from captioner.streaming.order import SHUFFLE_SHARDS

Schedule = Literal["cosine", "constant"]
# settings that may differ when a run is resumed; what the names of shards, model and weights lead to is compared itself
CHANGEABLE = (
    "shards",
    "output",
    "init",
    "weights",
    "resume",
    "workers",
    "checkpoint_steps",
    "keep_checkpoints",
    "cache",
    "cache_gigabytes",
    "tolerate_bad_samples",
    "patience_epochs",
    "wandb",
)
# what a new model is like unless a flag says otherwise; a model that --init brings stays as it is
NEW_MODEL: dict[str, Any] = {
    "encoder": "resnet152",
    "weights": "default",
    "image_input": "first",
    "embedding_size": 256,
    "hidden_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on, which model, and for how long. Mixed precision and GPUs are `accelerate launch`'s flags."""

    shards: tuple[Location, ...] = ("data/shards",)
    """Dataset folders (or URLs) that sharding/make_shards.py wrote, mixed into one; `val` in them is for evaluation."""
    output: LocalPath = "runs/coco"
    """Run folder: checkpoints, curves, report.html, and the model in `model/`."""
    resume: bool = False
    """Go on from the newest complete checkpoint in the run folder; where there is none, start."""
    init: Location | None = None
    """Start from this trained model folder: encoder, decoder and words, to which the shards' new words are added."""

    # ---- the model ------------------------------------------------------------------------------------------
    encoder: str | None = None
    """Any torchvision classification model by name; its pooled features are what the decoder sees. Without it
    resnet152, or that of --init."""
    weights: LocalPath | None = None
    """Encoder weights: `default` (torchvision's best, downloaded once), `none`, or the path of a state dict. Without it
    `default`, or those of --init."""
    finetune_encoder_from_step: CountOrZero | None = None
    """Train the encoder too, from this optimizer step on (0: from the first). None: it stays frozen, batch norm too."""
    image_input: ImageInput | None = None
    """Feed the image embedding as the LSTM's first input, or beside each word. Without it `first`, or as in --init."""
    embedding_size: Count | None = None
    """Width of word and image embeddings. Without it 256, or that of --init."""
    hidden_size: Count | None = None
    """Width of the LSTM. Without it 512, or that of --init."""
    input_dropout: FractionBelow1 = 0.2
    """Share of the words' embeddings that is dropped in training."""
    dropout: FractionBelow1 = 0.5
    """Share of the LSTM's outputs that is dropped in training."""
    crop: Pixels | None = None
    """Sides in pixels of the square cut from a stored picture, at random in training. Without it the encoder's own, or
    that of --init."""
    max_tokens: Count = 20
    """Longer captions are cut here (and counted); generated ones are never longer."""

    # ---- the optimizer --------------------------------------------------------------------------------------
    epochs: Count = 18
    """Passes over the training split; each picture comes once an epoch with all its captions."""
    patience_epochs: Count | None = None
    """Stop after this many epochs without a better CIDEr."""
    batch_size: Count = 32
    """Images of a *global* batch, over all processes and accumulated parts; each brings all its captions."""
    accumulation_steps: Count = 1
    """Parts that each process's share of a global batch is computed in, one after the other, to save memory."""
    learning_rate: Positive = 1.5e-3
    """Adam's peak learning rate."""
    encoder_learning_rate: NotNegative = 1e-4
    """The encoder's peak learning rate, where it is trained."""
    schedule: Schedule = "cosine"
    """After a rise over the first steps: a cosine down to zero, or the same rate to the end."""
    label_smoothing: FractionBelow1 = 0.0
    """Share of each target's probability that is spread over all words."""
    scheduled_sampling: FractionBelow1 = 0.0
    """Share of input words, rising from 0 to this over the run, that are replaced by the model's own guesses."""
    cache_features: bool = False
    """Encode each picture once, keep the features beside the shards, and train from them: without crops and flips."""
    compile_encoder: bool = False
    """Compile the encoder with torch.compile: minutes at the start, faster steps after."""
    seed: Seed = 0
    """Decides initial weights, dropout, the order of samples, crops and flips."""

    # ---- evaluation, every epoch ------------------------------------------------------------------------------
    beam_size: Count = 3
    """Beams of the evaluation, and the model folder's default; 1 is greedy."""
    length_penalty: AnyNumber = 1.0
    """A beam's score is its log-probability over its length to this power: 0 favours short captions."""

    # ---- data and machine -----------------------------------------------------------------------------------
    shuffle_shards: Count = SHUFFLE_SHARDS
    """Shards that are mixed with each other, and read from at once, by all processes together; for more than 256
    processes give at least their number, so that none reads another's shards."""
    tolerate_bad_samples: CountOrZero = 0
    """Samples of an epoch that each process may leave out as missing or damaged; they are counted and listed."""
    cache: LocalPath = "~/.cache/captioner/shards"
    """Folder where shards behind URLs are kept, for all processes of a machine."""
    cache_gigabytes: Positive = 50.0
    """What that folder may hold, downloads under way included; the least recently used shards go first."""
    workers: WorkersOrZero = 2
    """Loader processes for each training process; 0 loads in the training process."""
    checkpoint_steps: Count = 1000
    """Optimizer steps between checkpoints; one is also written after each epoch."""
    keep_checkpoints: Count = 2
    """Checkpoints that are kept: the newest ones, and besides the one of the best CIDEr."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (pip install wandb)."""

    def model_config(self, num_words: int) -> ModelConfig:
        """The model that is asked for, once no flag that describes it is None."""
        flags = [field.name for field in fields(ModelConfig) if field.name != "vocabulary_size"]
        asked: dict[str, Any] = {name: getattr(self, name) for name in flags}
        return ModelConfig(vocabulary_size=num_words, **asked)

    def decoding(self) -> DecodingDefaults:
        """How captions are generated."""
        return DecodingDefaults(
            beam_size=self.beam_size, max_tokens=self.max_tokens, length_penalty=self.length_penalty
        )


def check_settings(settings: TrainSettings) -> None:
    """Raise UserError for settings that contradict each other."""
    if settings.cache_features and settings.finetune_encoder_from_step is not None:
        raise UserError(
            "--cache-features keeps what a frozen encoder sees, and --finetune-encoder-from-step changes the encoder: "
            "leave out one of them"
        )


def count_steps(settings: TrainSettings, epoch_steps: int, *, has_val: bool) -> int:
    """The run's optimizer steps. Raises UserError where there are none, and for settings that would do nothing."""
    total_steps = settings.epochs * epoch_steps
    if not total_steps:
        raise UserError(f"the training split in {settings.shards[0]} holds no samples: see its train.failures.jsonl")
    if (settings.finetune_encoder_from_step or 0) >= total_steps:
        raise UserError(
            f"--finetune-encoder-from-step {settings.finetune_encoder_from_step} is beyond the run's {total_steps:,} "
            "steps: give fewer, or more --epochs"
        )
    if settings.patience_epochs and not has_val:
        raise UserError("--patience-epochs looks at the val split, and there is none: pack one, or leave it out")
    return total_steps
