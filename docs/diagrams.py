"""Draw the diagrams of the documents: docs/explanation/*.svg.

python docs/diagrams.py

They follow the colours of the system (light or dark), and load nothing.
"""

import sys
from bisect import bisect_right
from collections import Counter
from html import escape
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "docs" / "explanation"
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 12px }
.middle { text-anchor: middle }
.box { fill: #f6f8fa; stroke: #59636e }
.line { fill: none; stroke: #59636e; stroke-width: 1.5 }
.head { fill: #59636e }
.cut { stroke: #1f2328; stroke-width: 2; stroke-dasharray: 4 3 }
.shard0 { fill: #b6d7f4; stroke: #59636e }
.shard1 { fill: #f7d9a8; stroke: #59636e }
.shard2 { fill: #c4e5c0; stroke: #59636e }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.box { fill: #2a313c; stroke: #9198a1 }
.line { stroke: #9198a1 }
.head { fill: #9198a1 }
.cut { stroke: #e6edf3 }
.shard0 { fill: #1f4e79; stroke: #9198a1 }
.shard1 { fill: #7a5310; stroke: #9198a1 }
.shard2 { fill: #2b6128; stroke: #9198a1 }
}
"""
CELL, GAP = 24, 12


def diagrams() -> dict[str, str]:
    """The text of each SVG file, by name."""
    return {"stages.svg": stages(), "order.svg": order(), "seek.svg": seek(), "model.svg": model()}


def stages() -> str:
    title = "Three stages that meet in files"
    desc = (
        "Photos and captions are packed into shards, from which training makes a model folder, with which any folder "
        "of photos gets captions and a gallery. Shards also feed other training loops, through captioner.streaming."
    )
    steps = ("photos, captions", "tar shards, index", "model folder", "captions, gallery")
    commands = ("make_shards.py", "train/main.py", "infer/main.py")
    parts = [box(15 + 250 * number, 20, 130, 44, name) for number, name in enumerate(steps)]
    for number, name in enumerate(commands):
        parts += [arrow(145 + 250 * number, 42, 265 + 250 * number, 42), label(205 + 250 * number, 34, name)]
    parts += [box(265, 104, 130, 44, "your own model"), arrow(330, 64, 330, 104), label(402, 89, "captioner.streaming")]
    return svg(910, 160, title, desc, *parts)


def order() -> str:
    """An epoch of 23 samples, as `EpochOrder` has it."""
    from captioner.streaming.order import EpochOrder

    sizes, global_batch, num_lanes = (10, 6, 7), 6, 3
    epoch = EpochOrder(shard_sizes=sizes, global_batch=global_batch, shuffle_shards=num_lanes)
    refs = epoch.refs(range(sum(sizes)))
    permuted = epoch.shards_of_rank(0, world_size=1)
    sequence = [(shard, index) for shard in permuted for index in range(sizes[shard])]
    bounds = [lane * len(sequence) // num_lanes for lane in range(num_lanes + 1)]
    title = "How an epoch of 23 samples in 3 shards becomes 4 global batches"
    desc = (
        "The permuted shards, one after the other, are cut into 3 lanes of equal length. Within a lane samples are "
        "shuffled. Each global batch of 6 takes the next two samples of each lane; the last one has the remaining 5. "
        "With 3 ranks, rank r takes the r-th two samples of each batch, so it reads its own lane only."
    )
    parts = [label(20, 30, "1. Permute the shards; cut the sequence into 3 lanes of equal length.", middle=False)]
    x_of = [20 + CELL * number for number in range(len(sequence))]
    parts += [cell(x, 44, *sample) for x, sample in zip(x_of, sequence, strict=True)]
    parts += [
        f'<line class="cut" x1="{20 + CELL * cut}" y1="38" x2="{20 + CELL * cut}" y2="74"/>' for cut in bounds[1:-1]
    ]
    for lane, (start, stop) in enumerate(pairwise(bounds)):
        parts.append(label(20 + CELL * (start + stop) / 2, 88, f"lane {lane}"))
    parts.append(
        label(20, 124, "2. Shuffle each lane in windows; a batch takes the next samples of every lane.", middle=False)
    )
    column_width = (global_batch // num_lanes) * CELL + 2 * GAP
    for batch in range(-(-len(refs) // global_batch)):
        y, taken = 140 + batch * (CELL + 10), Counter()
        parts.append(label(20, y + 17, f"batch {batch}", middle=False))
        for ref in refs[batch * global_batch : (batch + 1) * global_batch]:
            lane = bisect_right(bounds, sequence.index((ref.shard, ref.index_in_shard))) - 1
            parts.append(cell(100 + lane * column_width + taken[lane] * CELL, y, ref.shard, ref.index_in_shard))
            taken[lane] += 1
    parts += [label(100 + CELL + rank * column_width, 290, f"rank {rank}") for rank in range(num_lanes)]
    notes = ("a cell: a sample, its index in its shard", "a colour: a shard", "a column: what one of 3 ranks reads")
    parts += [label(360, 165 + 24 * number, note, middle=False) for number, note in enumerate(notes)]
    return svg(620, 304, title, desc, *parts)


def seek() -> str:
    title = "A resume is a seek"
    desc = (
        "The saved state is an epoch and a step. Arithmetic turns the step into positions of the order, each position "
        "into a shard and a sample's index in it. The shard's index file has the offset, size and checksum of that "
        "sample's members. One read fetches them. Nothing before the step is read."
    )
    steps = (
        ("state", "epoch 3, step 1,500"),
        ("positions of the batch", "384,000 to 384,255"),
        ("each one's sample", "shard 71, index 402"),
        ("offset, size, checksum", "10,342,912; 22,016"),
    )
    parts = []
    for number, (name, example) in enumerate(steps):
        x = 15 + 225 * number
        parts += [box(x, 20, 180, 58, name, example)]
        parts += [arrow(x + 180, 49, x + 225, 49)] if number < len(steps) - 1 else []
    parts += [label(217, 100, "x global batch 256"), label(442, 100, "the order"), label(667, 100, "the index file")]
    parts += [
        '<rect class="shard0" x="15" y="140" width="855" height="26"/>',
        label(442, 158, "the tar: nothing before is read"),
    ]
    parts += ['<rect class="shard1" x="690" y="140" width="60" height="26"/>', arrow(780, 78, 720, 140)]
    return svg(890, 180, title, desc, *parts)


def model() -> str:
    title = "From image to words"
    desc = (
        "A pretrained convolutional network turns the image into a feature map. Its mean is the LSTM's first input, "
        "then come the words so far. After each LSTM step attention looks at the positions of the feature map; both "
        "together give the probabilities of the next word."
    )
    parts = [
        box(15, 90, 110, 50, "image", "224 x 224 x 3"),
        arrow(125, 115, 165, 115), box(165, 90, 130, 50, "encoder (CNN)", "pretrained"),
        arrow(295, 115, 335, 115), box(335, 90, 130, 50, "feature map", "7 x 7 positions"),
        arrow(400, 140, 400, 190), label(450, 170, "mean, first"),
        box(165, 190, 130, 50, "words so far", "embedded"), arrow(295, 215, 335, 215),
        box(335, 190, 130, 50, "LSTM", "one step a word"),
        arrow(465, 115, 525, 115), label(495, 107, "keys"), box(525, 90, 130, 50, "attention", "8 heads"),
        path("M465 215 H500 V130 H525"), label(535, 170, "query"),
        path("M465 215 H780 V140"), path("M655 115 H715"),
        box(715, 90, 130, 50, "next word", "probabilities"),
    ]  # fmt: skip
    return svg(860, 256, title, desc, *parts)


# ---- shapes -----------------------------------------------------------------------------------------------


def svg(width: int, height: int, title: str, desc: str, *parts: str) -> str:
    head = '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title desc" '
        f'viewBox="0 0 {width} {height}">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(desc)}</desc>',
        f"<style>{STYLE}</style>",
        f'<defs>{head}<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def box(x: int, y: int, width: int, height: int, name: str, example: str = "") -> str:  # noqa: PLR0917
    middle, baseline = x + width / 2, y + height / 2 + 5
    shape = f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
    if not example:
        return shape + label(middle, baseline, name, small=False)
    return shape + label(middle, baseline - 9, name, small=False) + label(middle, baseline + 11, example)


def cell(x: int, y: int, shard: int, index: int) -> str:
    square = f'<rect class="shard{shard}" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>'
    return square + label(x + CELL / 2, y + 16, str(index))


def label(x: float, y: float, text: str, *, middle: bool = True, small: bool = True) -> str:
    classes = " ".join(name for name, wanted in (("middle", middle), ("small", small)) if wanted)
    return f'<text class="{classes}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return path(f"M{x1} {y1} L{x2} {y2}")


def path(points: str) -> str:
    return f'<path class="line" d="{points}" marker-end="url(#head)"/>'


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    for name, text in diagrams().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
