"""Imported once by the tests' fork server: what every script would import and load anew."""

import evaluate  # noqa: F401
import generate  # noqa: F401
import prepare_data  # noqa: F401
import train  # noqa: F401
from storygpt.tokenizer import load_tokenizer

load_tokenizer(512)
