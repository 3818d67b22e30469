"""Imported once by the tests' fork server: what every script would import and load anew."""

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import tyro  # noqa: F401

import evaluate  # noqa: F401
import generate  # noqa: F401
import prepare_data  # noqa: F401
import train  # noqa: F401
from storygpt.tokenizer import load_tokenizer

load_tokenizer(512)
