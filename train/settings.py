"""The training command's flags."""

from dataclasses import dataclass

from captioner.model import ImageInput
from train.plan import WINDOW_SHARDS


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on, which model, and for how long. Mixed precision and GPUs are `accelerate launch`'s flags."""

    shards: tuple[str, ...] = ("data/shards",)
    """Dataset folders (or URLs) that sharding/make_shards.py wrote, mixed into one; `val` in them is for evaluation."""
    output: str = "runs/coco"
    """Run folder: checkpoints, TensorBoard curves, validation captions, and the model in `model/`."""
    encoder: str = "resnet152"
    """Any torchvision classification model by name; its pooled features are what the decoder sees."""
    weights: str = "default"
    """Encoder weights: `default` (torchvision's best, downloaded once), `none`, or the path of a state dict."""
    train_encoder: bool = False
    """Train the encoder too. Otherwise it is frozen, its batch-norm statistics included."""
    image_input: ImageInput = "first"
    """Feed the image embedding as the LSTM's first input, or beside each word."""
    embedding_size: int = 256
    """Width of word and image embeddings."""
    hidden_size: int = 512
    """Width of the LSTM."""
    crop: int = 224
    """Sides in pixels of the square that is cut from a stored picture, at random in training."""
    max_tokens: int = 20
    """Longer captions are cut here (and counted); generated ones are never longer."""
    epochs: int = 5
    """Passes over the training split; each picture comes once an epoch with all its captions."""
    batch_size: int = 128
    """Images of a *global* batch, over all processes."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate; it rises over the first steps and falls along a cosine."""
    beam_size: int = 3
    """Beams of the closing evaluation, and the model folder's default; 1 is greedy."""
    window_shards: int = WINDOW_SHARDS
    """Shards of each of the 64 lanes that are shuffled together: more mix better and are read from at once."""
    tolerate_bad_samples: int = 0
    """Samples of an epoch that each process may leave out as missing or damaged; they are counted and listed."""
    cache: str = "~/.cache/captioner/shards"
    """Folder where shards behind URLs are kept, for all processes of a machine."""
    cache_gigabytes: float = 50.0
    """What that folder may hold, downloads under way included; the least recently used shards go first."""
    workers: int = 2
    """Loader processes for each training process; 0 loads in the training process."""
    checkpoint_steps: int = 1000
    """Optimizer steps between checkpoints; one is also written after each epoch."""
    seed: int = 0
    """Decides initial weights, the order of samples, crops and flips."""
