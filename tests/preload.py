"""Imported once by the tests' fork server: what every script would import and load anew."""

import logging
import sys

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401  by conftest.py
import torch._dynamo  # noqa: F401  by an optimizer's first step
import typeguard  # noqa: F401  by tyro
import tyro  # noqa: F401
from huggingface_hub import HfApi, RepoCard, snapshot_download  # noqa: F401

import evaluate  # noqa: F401
import generate  # noqa: F401
import prepare_data  # noqa: F401
import train  # noqa: F401
import upload_to_hf  # noqa: F401
from storygpt.tokenizer import load_tokenizer

load_tokenizer(512)

# The Hub's client reads the environment as it is imported, which each script does for itself; what
# the client imports is here already.
for name in [*sys.modules]:
    if name.partition(".")[0] == "huggingface_hub":
        del sys.modules[name]
logging.getLogger("huggingface_hub").handlers.clear()  # or it would say everything twice
