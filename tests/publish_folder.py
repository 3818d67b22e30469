"""Script: FOLDER REPO_ID [--private]: publishes a folder that upload_to_hf.py has built, and no
more: what can go wrong on the way to the Hub needs no second build."""

import sys
from pathlib import Path

from storygpt.hub import find_token, publish


def main() -> None:
    folder, repo_id, *private = sys.argv[1:]
    url, changed = publish(Path(folder), repo_id, find_token(None), bool(private))
    print(f"{'published:' if changed else 'nothing changed:'} {url}")
