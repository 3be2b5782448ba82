"""The evaluation command's flags. Imports no torch."""

from dataclasses import dataclass, fields
from pathlib import Path

from captioner.errors import UserError
from captioner.flags import AnyNumber, Count, File, LocalPath, Location, Positive, WorkersOrZero, flag_name
from train.evaluation.java_metrics import JavaMetric

SCORING_FLAGS = ("results", "references", "against", "java_metrics", "json")  # the others are for captioning a split


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Either --model and --shards, or --results and --references. GPUs are `accelerate launch`'s flags."""

    model: File | None = None
    """Model folder that train/main.py wrote."""
    shards: tuple[Location, ...] = ()
    """Dataset folders (or URLs) that sharding/make_shards.py wrote."""
    split: str = "val"
    """Split of the shards that is captioned and scored."""
    beam_size: Count | None = None
    """Beams of the search; 1 is greedy. Without it the model folder's default."""
    length_penalty: AnyNumber | None = None
    """A beam's score is its log-probability over its length to this power. Without it the model folder's default."""
    batch_size: Count = 128
    """Images that all processes together caption at once."""
    workers: WorkersOrZero = 2
    """Loader processes for each captioning process; with 0 it loads itself."""
    cache: LocalPath = "~/.cache/captioner/shards"
    """Folder where shards behind URLs are kept, for all processes of a machine."""
    cache_gigabytes: Positive = 50.0
    """Size limit of that folder, downloads in progress included; the least recently used shards are evicted."""
    calibrate: bool = False
    """Also calibrate the model's confidence and measure what its images are like, and keep both in its folder."""
    output: File = Path("results.json")
    """COCO results file to write with the model's captions."""

    results: File | None = None
    """COCO results file of any model, to be scored."""
    references: File | None = None
    """COCO caption file with the references of its images."""

    against: File | None = None
    """Another COCO results file of the same images: also the differences from its scores, with paired intervals."""
    java_metrics: tuple[JavaMetric, ...] = ()
    """Also METEOR or SPICE, which need Java and `pip install -e '.[java]'`."""
    json: File | None = None
    """JSON file to write with the scores and what was scored."""

    @property
    def scores_file(self) -> bool:
        """Whether a results file is scored; else a split is captioned."""
        return self.results is not None or self.references is not None


def check_settings(settings: EvaluateSettings) -> None:
    """Raise UserError for flags that are missing, that the other use takes, or that name the same file twice."""
    if settings.scores_file:
        others = [
            field.name
            for field in fields(settings)
            if field.name not in SCORING_FLAGS and getattr(settings, field.name) != field.default
        ]
        if others:
            raise UserError(
                f"{flag_name(others[0])} is for captioning a split, not for scoring --results: leave it out"
            )
        if settings.results is None or settings.references is None:
            raise UserError("a results file is scored against references: give both --results and --references")
    elif settings.model is None or not settings.shards:
        raise UserError("give --model and --shards to caption a split, or --results and --references to score a file")
    _check_files(settings)


def _check_files(settings: EvaluateSettings) -> None:
    """Raise UserError where a file to be written is a folder, or another file of this command."""
    inputs = ("results", "references", "against")
    files = {name: getattr(settings, name) for name in (*inputs, "json")}
    if not settings.scores_file:
        files["output"] = settings.output
    for name in ("json", "output"):
        path = files.pop(name, None)
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{flag_name(name)} {path} is a folder: give the name of a file")
        same = [flag_name(other) for other, file in files.items() if file and file.resolve() == path.resolve()]
        if same:
            raise UserError(f"{flag_name(name)} {path} is also {same[0]}: give another file")
