"""Small images drawn in terminals that say, in the environment, that they can: kitty's and iTerm2's protocols."""

import io
import sys
from base64 import standard_b64encode
from collections.abc import Mapping
from typing import Literal

from PIL import Image

Protocol = Literal["kitty", "iterm2"]
HEIGHT_LINES = 12
CHUNK_BYTES = 4096  # of base64, which kitty takes at once


def find_protocol(environment: Mapping[str, str]) -> Protocol | None:
    """How the terminal draws images; None if stdout is no terminal, or one that does not say that it can.

    tmux and screen would pass on text only.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not sys.stdout.isatty() or "TMUX" in environment or term.startswith(("tmux", "screen")):
        return None
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    is_iterm2 = program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2"
    return "iterm2" if is_iterm2 else None


def draw(image: Image.Image, protocol: Protocol) -> str:
    """The characters that draw an RGB image HEIGHT_LINES lines high, and then begin a new line."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = standard_b64encode(buffer.getvalue()).decode()
    if protocol == "iterm2":
        options = f"inline=1;size={len(buffer.getvalue())};height={HEIGHT_LINES};preserveAspectRatio=1"
        return f"\033]1337;File={options}:{data}\a\n"
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    commands = []
    for number, chunk in enumerate(chunks, start=1):
        options = f"a=T,f=100,q=2,r={HEIGHT_LINES}," if number == 1 else ""  # q=2: the terminal sends no reply
        commands.append(f"\033_G{options}m={int(number < len(chunks))};{chunk}\033\\")
    return f"{''.join(commands)}\n"
