"""Rows of captions.jsonl, as infer writes them."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

from infer.results import FORMAT_VERSION, Row

ROOT = "photos"


def success(root: Path | str, path: str, **more: Any) -> Any:
    file = Path(root, path)
    sha256 = hashlib.sha256(file.read_bytes() if file.is_file() else os.fsencode(path)).hexdigest()
    row = {"root": str(root), "path": path, "format_version": 2, "model": "weights", "caption": f"a picture of {path}"}
    row |= {"alt": "A picture.", "score": math.log(0.5), "token_scores": [math.log(0.5)], "confidence": None}
    return row | {"review": None, "duplicate_of": None, "width": 64, "height": 48, "sha256": sha256} | more


def failure(root: Path | str, path: str, error: str = "truncated", message: str = "it is cut off") -> Any:
    row = {"root": str(root), "path": path, "format_version": 2, "model": "weights"}
    return row | {"error": error, "message": message}


def captioned(path: str, *, root: str = ROOT, caption: str = "a cat", content: str | None = None, **more: Any) -> Row:
    """A picture's row; pictures have the same bytes when they have the same `content`, by default their path."""
    digest = hashlib.sha256((path if content is None else content).encode("utf-8", "surrogatepass")).hexdigest()
    plain: Any = {
        "root": root,
        "path": path,
        "format_version": FORMAT_VERSION,
        "model": "m",
        "caption": caption,
        "alt": "A cat.",
        "score": -0.5,
        "token_scores": [-0.25, -0.75],
        "confidence": None,
        "review": None,
        "duplicate_of": None,
        "width": 640,
        "height": 480,
        "sha256": digest,
    }
    return plain | more


def failed(path: str, *, root: str = ROOT, error: str = "truncated") -> Row:
    place: Any = {"root": root, "path": path, "format_version": FORMAT_VERSION, "model": "m"}
    return place | {"error": error, "message": "what was found"}
