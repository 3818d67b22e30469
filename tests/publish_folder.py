"""Script: FOLDER REPO_ID [--private] [--replace]: publishes a folder that was built, and no more:
what can go wrong on the way to the Hub needs no second build."""

import sys
from pathlib import Path

from storygpt.hub import Built, find_token, publish


def main() -> None:
    folder, repo_id, *flags = sys.argv[1:]
    repo = Built(Path(folder), repo_id, "model")
    private, replace = ("--private" in flags), ("--replace" in flags)
    (done,) = publish([repo], find_token(None), private=private, replace=replace)
    print(f"{'published:' if done.changed else 'nothing changed:'} {done.url}")
