"""Checkpoints: written whole or not at all, and read without running anybody's code."""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from config import GPTConfig, InputError, TrainingConfig
from model import GPT

BEST, FINAL, LATEST = (f"StoryGPT_{name}.pt" for name in ("best", "final", "latest"))

KEYS = {
    "gpt_config": GPTConfig,
    "training_config": TrainingConfig,
    "model_state_dict": dict,
    "step": int,
    "val_loss": float,
}


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a temporary file, then renames it to `path`: no reader sees half a file.

    Raises InputError where the disk is full or the folder cannot be written; an older `path`
    stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch.save turns a full disk into either
            kept = ", and the one before it is kept" if path.exists() else ""
            reason = getattr(error, "strerror", None) or "the disk is full or the file too large"
            raise InputError(
                f"{path} cannot be written ({reason}){kept}: free some space or pass another folder"
            ) from error
        raise
    if os.name == "posix":  # the rename itself survives a power cut only once the folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Saves a dict with at least `KEYS`. Raises InputError, an older file at `path` kept."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path, map_location: str | torch.device = "cpu") -> dict:
    """Reads a checkpoint: tensors, numbers and the two config classes, nothing else.

    Raises InputError where there is no such file, it is damaged, or it is no StoryGPT checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint {path}: train one with `python train.py`, or pass another "
            "with --checkpoint"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        with torch.serialization.safe_globals([GPTConfig, TrainingConfig]):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it holds more than weights and settings, and loading it could "
            "run a stranger's code"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can fail in any layer of zip, pickle and torch
        raise InputError(
            f"{path} is damaged or not a checkpoint: pass another with --checkpoint"
        ) from error
    for key, kind in KEYS.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise InputError(f"{path} is no StoryGPT checkpoint: it has no {key}")
    try:  # unpickling does not call __post_init__
        for key in ("gpt_config", "training_config"):
            KEYS[key](**vars(checkpoint[key]))
    except (InputError, TypeError) as error:
        raise InputError(f"{path} has a {key} that is not valid: {error}") from error
    return checkpoint


def load_weights(model: GPT, state_dict: dict, path: Path, assign: bool = False) -> None:
    """Puts `state_dict` into `model`. Raises InputError where names or shapes do not fit it."""
    try:
        model.load_state_dict(state_dict, assign=assign)
    except Exception as error:
        raise InputError(
            f"the weights in {path} do not fit its gpt_config: the file was put together wrongly"
        ) from error


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """The model of a checkpoint on `device`, in evaluation mode, and the checkpoint itself.

    Raises InputError as `load_checkpoint` and `load_weights` do.
    """
    checkpoint = load_checkpoint(path)
    config, state_dict = checkpoint["gpt_config"], checkpoint["model_state_dict"]
    if len(state_dict) < config.n_layer:  # before building whatever size a stranger asks for
        raise InputError(f"the weights in {path} do not fit its gpt_config")
    with torch.device("meta"):  # no memory and no random numbers for weights soon replaced
        model = GPT(config)
    load_weights(model, state_dict, path, assign=True)
    model.lm_head.weight = model.wte.weight
    return model.to(device).eval(), checkpoint
