"""Script: NAME: prints the folder of a model on the Hub, once it is here."""

import sys

from storygpt.hub import download_model


def main() -> None:
    print(download_model(sys.argv[1]))
