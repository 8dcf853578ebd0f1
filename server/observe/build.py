"""Build: the commit that this server was made from.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def commit_of(checkout: Path = CHECKOUT) -> str:
    """The commit that a checkout of git is at, read from git's own files; `unknown` where there is none, as in an
    image, which TRIMTAB_COMMIT tells it.
    """
    git = checkout / ".git"
    try:
        if git.is_file():  # a worktree of another checkout
            git = checkout / git.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if _COMMIT.fullmatch(head):
            return head
        name = head.removeprefix("ref: ")
        common = git / (git / "commondir").read_text(encoding="utf-8").strip() if (git / "commondir").exists() else git
        if (common / name).is_file():
            found = (common / name).read_text(encoding="utf-8").strip()
        else:
            packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
            found = next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except (OSError, UnicodeDecodeError):
        return UNKNOWN
    return found if _COMMIT.fullmatch(found) else UNKNOWN
