"""Print one of README's two shell blocks: `python tools/readme_commands.py first|second`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def blocks() -> list[str]:
    """The fenced `sh` blocks of README.md, in order."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    print(blocks()[("first", "second").index(sys.argv[1])], end="")
