"""Script: ARGUMENTS MOST: what open_stories gives for these arguments, a JSON object, as JSON, with
at most so many stories of a split. What can go wrong on the way from the Hub needs no tokens."""

import json
import sys
from itertools import islice

from storygpt.sources import open_stories


def main() -> None:
    arguments, most = map(json.loads, sys.argv[1:])
    found = open_stories(**arguments)
    splits = {split: [*islice(stories, most)] for split, stories in found.splits.items()}
    print(json.dumps({"commit": found.commit, "splits": splits, "left_out": found.left_out}))
