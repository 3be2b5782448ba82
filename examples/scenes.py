"""Draw captioned scenes in COCO layout: coloured shapes in counts and relations, on textured backgrounds.

    python examples/scenes.py --output data/scenes

Writes `train2026/`, `val2026/` and `annotations/captions_{train,val}2026.json` as COCO does, and
`scenes_{train,val}.json` with the true content of each image, so that captions can be judged. The pairs in
`UNSEEN_PAIRS` never occur in training; a fifth of the validation scenes have one. Equal seeds draw equal files.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from captioner import cli
from captioner.files.storage import write_atomic
from captioner.flags import Count, File, Seed
from captioner.workers import count_processors

SHAPES = {  # name used in captions: (singular words, plural words)
    "circle": (("circle", "disc"), ("circles", "discs")),
    "square": (("square", "box"), ("squares", "boxes")),
    "triangle": (("triangle",), ("triangles",)),
    "star": (("star",), ("stars",)),
    "cross": (("cross", "plus"), ("crosses", "pluses")),
    "ring": (("ring",), ("rings",)),
}
COLOURS = {
    "red": (208, 30, 36),
    "green": (32, 150, 52),
    "blue": (34, 66, 206),
    "yellow": (244, 216, 32),
    "purple": (140, 40, 170),
    "orange": (246, 132, 20),
    "white": (250, 250, 250),
    "black": (14, 14, 14),
}
UNSEEN_PAIRS = frozenset(
    zip(
        ("red", "green", "blue", "yellow", "purple", "orange"),
        ("star", "circle", "triangle", "ring", "square", "cross"),
        strict=True,
    )
)
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)
BACKGROUNDS = ("plain", "striped", "checkered", "speckled", "shaded")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left": "right", "above": "below"}
WIDTH_PIXELS, HEIGHT_PIXELS = 120, 108
SUPERSAMPLING = 3
ROWS, COLUMNS = np.mgrid[0:HEIGHT_PIXELS, 0:WIDTH_PIXELS].astype(np.float32)
SHARE_OF_UNSEEN_SCENES = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A drawn shape: its colour and name, centre and radius in pixels, and rotation in radians."""

    colour: str
    name: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The content of one image. `relation` is that of the first shape to the second, if there are two kinds."""

    shapes: tuple[Shape, ...]
    background: str
    seed: int
    relation: str | None = None

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """The (colour, shape) pairs in the image."""
        return frozenset((shape.colour, shape.name) for shape in self.shapes)


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What to draw, and where."""

    output: File = Path("data/scenes")
    """Folder for the images and annotations."""
    train: Count = 6000
    """Number of training scenes."""
    val: Count = 500
    """Number of validation scenes; a fifth of them have a colour-shape pair that training lacks."""
    seed: Seed = 2026
    """Equal seeds draw equal images and captions."""


# ---- inventing --------------------------------------------------------------------------------------------


def invent_scene(seed: int, *, unseen: bool) -> Scene:
    """The scene of this seed: one shape, several equal ones, or two related kinds; `unseen` picks held-out pairs."""
    rng = random.Random(seed)
    first = rng.choice(sorted(UNSEEN_PAIRS) if unseen else SEEN_PAIRS)
    background = rng.choice(BACKGROUNDS)
    kind = rng.choices(("one", "some", "two"), weights=(10, 7, 3))[0]
    if kind == "one":
        radius = rng.choice((rng.uniform(19, 23), rng.uniform(32, 44)))
        return Scene(shapes=_place([first], [radius], rng), background=background, seed=seed)
    if kind == "some":
        count = rng.choice(tuple(COUNT_WORDS))
        radii = [rng.uniform(17, 22)] * count
        return Scene(shapes=_place([first] * count, radii, rng), background=background, seed=seed)
    second = rng.choice([pair for pair in SEEN_PAIRS if pair[1] != first[1] and pair[0] != first[0]])
    radii = [rng.uniform(22, 29), rng.uniform(22, 29)]
    relation = rng.choice(tuple(OPPOSITE))
    shapes = _place([first, second], radii, rng, relation=relation)
    return Scene(shapes=shapes, background=background, seed=seed, relation=relation)


def _place(
    pairs: Sequence[tuple[str, str]],
    radii: Sequence[float],
    rng: random.Random,
    *,
    relation: str | None = None,
) -> tuple[Shape, ...]:
    """Shapes inside the image that do not overlap, the first two in the wanted relation.

    They shrink a little with each failed attempt, so that this ends for any scene.
    """
    for attempt in itertools.count():
        scale = 0.999**attempt
        pieces = zip(pairs, radii, strict=True)
        shapes = tuple(_drop(colour, name, radius * scale, rng) for (colour, name), radius in pieces)
        apart = all(
            math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 3 for a, b in itertools.combinations(shapes, 2)
        )
        if apart and (relation is None or _relation(shapes[0], shapes[1]) == relation):
            return shapes
    raise AssertionError("shapes that shrink find room")


def _drop(colour: str, name: str, radius: float, rng: random.Random) -> Shape:
    """A shape of that radius at a random position inside the image."""
    x, y = (rng.uniform(radius + 2, side - radius - 2) for side in (WIDTH_PIXELS, HEIGHT_PIXELS))
    return Shape(colour=colour, name=name, x=x, y=y, radius=radius, turn=rng.uniform(-0.1, 0.1))


def _relation(first: Shape, second: Shape) -> str | None:
    """`left` or `above` if the first shape is clearly left of or above the second."""
    right, down = second.x - first.x, second.y - first.y
    if right > 1.5 * abs(down):
        return "left"
    return "above" if down > 1.5 * abs(right) else None


# ---- describing -------------------------------------------------------------------------------------------


def describe(scene: Scene) -> list[str]:
    """Five differently worded captions of the scene; each names at least one colour-shape pair in it."""
    rng = random.Random(f"captions {scene.seed}")
    if scene.relation is not None:
        templates = _relation_captions(scene, rng)
    elif len(scene.shapes) > 1:
        templates = _count_captions(scene, rng)
    else:
        templates = _single_captions(scene, rng)
    return [text[0].upper() + text[1:] for text in rng.sample(templates, 5)]


def _noun(shape: Shape, rng: random.Random, *, plural: bool = False) -> str:
    words = SHAPES[shape.name][1 if plural else 0]
    return f"{shape.colour} {rng.choices(words, weights=(3, 1)[: len(words)])[0]}"


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _ground(scene: Scene) -> str:
    return f"{_article(scene.background)} background"


def _single_captions(scene: Scene, rng: random.Random) -> list[str]:
    shape = scene.shapes[0]
    size = rng.choice(("small", "little")) if shape.radius < 27 else rng.choice(("big", "large"))
    noun = _noun(shape, rng)
    return [
        f"{_article(f'{size} {noun}')} on {_ground(scene)}.",
        f"There is {_article(f'{size} {_noun(shape, rng)}')} in the picture.",
        f"A single {_noun(shape, rng)}.",
        f"{_article(f'{size} {_noun(shape, rng)}')} and nothing else.",
        f"A picture of {_article(noun)} on {_ground(scene)}.",
        f"One {size} {_noun(shape, rng)} lies on {_ground(scene)}.",
    ]


def _count_captions(scene: Scene, rng: random.Random) -> list[str]:
    shape, count = scene.shapes[0], COUNT_WORDS[len(scene.shapes)]
    nouns = [_noun(shape, rng, plural=True) for _ in range(6)]
    return [
        f"{count} {nouns[0]} on {_ground(scene)}.",
        f"There are {count} {nouns[1]} in the picture.",
        f"A picture of {count} {nouns[2]}.",
        f"{count} small {nouns[3]} are spread over {_ground(scene)}.",
        f"A group of {count} {nouns[4]}.",
        f"I can see {count} {nouns[5]} here.",
    ]


def _relation_captions(scene: Scene, rng: random.Random) -> list[str]:
    first, second = (_article(_noun(shape, rng)) for shape in scene.shapes)
    near, far = _noun(scene.shapes[0], rng), _noun(scene.shapes[1], rng)
    if scene.relation == "left":
        ahead, behind = "to the left of", "to the right of"
    else:
        ahead, behind = "above", "below"
    return [
        f"{first} {ahead} {second}.",
        f"{second} {behind} {first}.",
        f"There is {_article(near)} {ahead} {_article(far)}.",
        f"The {far} is {behind} the {near}.",
        f"{first} and {second} on {_ground(scene)}.",
        f"On {_ground(scene)} the {near} is {ahead} the {far}.",
    ]


# ---- judging ----------------------------------------------------------------------------------------------

_WORD_TO_SHAPE = {word: name for name, forms in SHAPES.items() for words in forms for word in words}
_SHAPE_PATTERN = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(_WORD_TO_SHAPE)})\b")


def named_shapes(caption: str) -> set[str]:
    """The shapes that a caption names, whatever their colour."""
    return {_WORD_TO_SHAPE[word] for _, word in _SHAPE_PATTERN.findall(caption.lower())}


def named_pairs(caption: str) -> set[tuple[str, str]]:
    """The (colour, shape) pairs that a caption names: a colour directly before a shape's word."""
    found = _SHAPE_PATTERN.findall(caption.lower())
    return {(colour, _WORD_TO_SHAPE[word]) for colour, word in found if colour}


def share_right(named: Iterable[tuple[set, Iterable]]) -> float:
    """The share of (named, present) pairs in which something is named and all of it is present; 0 for no pairs."""
    verdicts = [bool(words) and words <= set(present) for words, present in named]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


# ---- drawing ----------------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of WIDTH_PIXELS x HEIGHT_PIXELS."""
    rng = np.random.default_rng(scene.seed)
    canvas = Image.fromarray(_background(scene.background, rng))
    for shape in scene.shapes:
        paint = np.clip(COLOURS[shape.colour] + rng.uniform(-12, 12, size=3), 0, 255)
        canvas.paste(tuple(int(value) for value in paint), mask=_mask(shape))
    return canvas


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A muted texture, uint8 (H, W, 3), less bright, less dark and less colourful than any shape."""
    tone = rng.uniform(95, 165) + rng.uniform(-18, 18, size=3)
    period, angle = rng.integers(7, 16), rng.uniform(0, math.pi)
    slanted = ROWS * math.sin(angle) + COLUMNS * math.cos(angle)
    noise = rng.standard_normal(ROWS.shape, dtype=np.float32)
    texture = {
        "plain": lambda: noise * 2,
        "striped": lambda: np.where(np.floor(slanted / period) % 2 == 0, 16, -16) + noise * 3,
        "checkered": lambda: np.where((ROWS // period + COLUMNS // period) % 2 == 0, 16, -16) + noise * 3,
        "speckled": lambda: noise * 14,
        "shaded": lambda: (slanted - slanted.mean()) * 0.35 + noise * 3,
    }[kind]()
    return np.stack([np.clip(texture + value, 0, 255).astype(np.uint8) for value in tone], axis=-1)


def _mask(shape: Shape) -> Image.Image:
    """The shape's coverage of each pixel, mode L, antialiased by supersampling."""
    mask = Image.new("L", (WIDTH_PIXELS * SUPERSAMPLING, HEIGHT_PIXELS * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    x, y, radius = (value * SUPERSAMPLING for value in (shape.x, shape.y, shape.radius))
    if shape.name in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape.name == "ring":
            inner = radius * 0.55
            pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    else:
        pen.polygon(_outline(shape.name, x, y, radius, shape.turn), fill=255)
    return mask.reduce(SUPERSAMPLING)


def _outline(name: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corner points of a polygon of that name around (x, y)."""
    if name == "cross":
        arm = 0.34
        corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        corners += [(-a, -b) for a, b in corners]
        points = [(math.hypot(a, b) * 0.94, math.atan2(b, a)) for a, b in corners]
    else:
        distances = {"square": (1.0,) * 4, "triangle": (1.0,) * 3, "star": (1.0, 0.42) * 5}[name]
        start = math.pi / 4 if name == "square" else -math.pi / 2
        points = [(length, start + 2 * math.pi * i / len(distances)) for i, length in enumerate(distances)]
    return [
        (x + radius * length * math.cos(angle + turn), y + radius * length * math.sin(angle + turn))
        for length, angle in points
    ]


# ---- writing ----------------------------------------------------------------------------------------------


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of a split's scene; no two splits share one."""
    return random.Random(f"{seed} {split} {index}").getrandbits(48)


def invent_split(seed: int, split: str, count: int) -> list[Scene]:
    """The scenes of a split. Training has no unseen pair; in other splits every fifth scene has one."""
    period = round(1 / SHARE_OF_UNSEEN_SCENES)
    return [
        invent_scene(scene_seed(seed, split, index), unseen=split != "train" and index % period == 0)
        for index in range(count)
    ]


def write_picture(scene: Scene, path: Path) -> None:
    """Draw the scene into a JPEG file."""
    draw(scene).save(path, quality=92, subsampling=0)


def write_split(settings: SceneSettings, split: str, count: int, *, pool: ProcessPoolExecutor) -> None:
    """Write images, COCO annotations and true contents of one split; the annotations come last."""
    scenes = invent_split(settings.seed, split, count)
    folder = settings.output / f"{split}2026"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"scene_{split}_{index:06d}.jpg" for index in range(count)]
    with cli.progress_bar(f"drawing {split}", total=count, unit="pictures") as bar:
        for _ in pool.map(write_picture, scenes, [folder / name for name in names], chunksize=50):
            bar.advance()
    captions = [(index + 1, caption) for index, scene in enumerate(scenes) for caption in describe(scene)]
    size = {"width": WIDTH_PIXELS, "height": HEIGHT_PIXELS}
    coco = {
        "info": {"description": "Drawn scenes of coloured shapes"},
        "images": [{"id": index + 1, "file_name": name, **size} for index, name in enumerate(names)],
        "annotations": [
            {"id": number + 1, "image_id": image_id, "caption": caption}
            for number, (image_id, caption) in enumerate(captions)
        ],
    }
    facts = {name: asdict(scene) | {"pairs": sorted(scene.pairs)} for name, scene in zip(names, scenes, strict=True)}
    write_atomic(str(settings.output / f"scenes_{split}.json"), json.dumps(facts, indent=1))
    write_atomic(str(settings.output / "annotations" / f"captions_{split}2026.json"), json.dumps(coco, indent=1))


def main(settings: SceneSettings) -> None:
    """Draw the training and validation splits, unless they exist with the same settings."""
    marker = settings.output / "settings.json"
    wanted = {"train": settings.train, "val": settings.val, "seed": settings.seed}
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        cli.console.print(f"{settings.output} is complete")
        return
    with ProcessPoolExecutor(count_processors()) as pool:
        write_split(settings, "train", settings.train, pool=pool)
        write_split(settings, "val", settings.val, pool=pool)
    write_atomic(str(marker), json.dumps(wanted, indent=1))
    cli.console.print(f"drew {settings.train} + {settings.val} scenes into {settings.output}")


if __name__ == "__main__":
    cli.run(main, SceneSettings, description=__doc__ or "")
