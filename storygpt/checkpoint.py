"""Checkpoints: written whole or not at all, and read without running anybody's code.

A checkpoint is a .pt file, or a published model: a folder or a Hub repo with `config.json` and
`model.safetensors` in the layout of transformers' GPT-2 (see formats.py).
"""

import re
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.files import write_atomically
from storygpt.formats import WEIGHTS, read_folder, reading_weights, rebuild
from storygpt.hub import download_model, is_hub_id
from storygpt.kernels import pack_linears
from storygpt.record import read_begun, weights_sha256

KEYS = {
    "gpt_config": GPTConfig,
    "training_config": TrainingConfig,
    "model_state_dict": dict,
    "step": int,
    "val_loss": float,
}


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Saves a dict with at least `KEYS`. Raises InputError, an older file at `path` kept."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint: tensors, numbers and the two config classes, nothing else.

    Raises InputError where there is no such file, it is damaged, or it is no StoryGPT checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder where a .pt file belongs")
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint {path}: train one with `python train.py`, or pass another "
            "with --checkpoint (of the Hub, owner/name)"
        )
    with reading_weights(path):
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        with torch.serialization.safe_globals([GPTConfig, TrainingConfig]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for key, kind in KEYS.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise InputError(f"{path} is no StoryGPT checkpoint: it has no {key}")
    weights = checkpoint["model_state_dict"]
    if not all(isinstance(name, str) and is_plain(weight) for name, weight in weights.items()):
        raise InputError(f"{path} is no StoryGPT checkpoint: its weights are of another kind")
    checkpoint["model_state_dict"] = {name: weight.float() for name, weight in weights.items()}
    for key in ("gpt_config", "training_config"):  # unpickling does not call __post_init__
        checkpoint[key] = rebuild(key, vars(checkpoint[key]), path)
    with reading_weights(path):
        read_begun(checkpoint.get("record"))
    return checkpoint


def is_plain(weight) -> bool:
    """Tells whether `weight` is a tensor of numbers, all of which are there."""
    return (
        torch.is_tensor(weight)
        and weight.is_floating_point()
        and weight.layout is torch.strided
        and not weight.is_meta
    )


def load_weights(model: GPT, state_dict: dict, path: Path, assign: bool = False) -> None:
    """Puts `state_dict` into `model`. Raises InputError where names or shapes do not fit it, it
    holds NaN or infinity, or its head is not its embedding."""
    shapes, given = (
        {name: tuple(weight.shape) for name, weight in weights.items()}
        for weights in (model.state_dict(), state_dict)
    )
    for name in sorted(shapes.keys() | given.keys()):
        if shapes.get(name) != given.get(name):
            raise InputError(
                f"the weights in {path} do not fit its configuration: {name} is "
                f"{given.get(name, 'none')}, where the model has {shapes.get(name, 'none')}"
            )
    # torch notes `assign` in the state dict itself: written to a file again, the note would have
    # whoever loads that assign too, and come away with untied embeddings. A copy takes it.
    model.load_state_dict(dict(state_dict), assign=assign)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(
                f"{name} in {path} is not finite: the run that wrote it diverged; pass another "
                "checkpoint"
            )
    if not torch.equal(state_dict["lm_head.weight"], state_dict["wte.weight"]):
        raise InputError(
            f"{path} has a head that is not its embedding, which StoryGPT's model does not"
        )


class HubModel(NamedTuple):
    """A model on the Hub."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def on_the_hub(path: Path) -> HubModel | None:
    """Returns the model that a path means, if it is none here: owner/name, owner/name@revision, or
    the address of its page (in which a Path has one slash for two)."""
    page = r"(?:https?:/+)?(?:huggingface\.co|hf\.co)/([^/@]+/[^/@?#]+)"
    page += r"(?:/(?:tree|blob|resolve)/([^/?#]+).*|[?#].*)?"
    short = r"([^/@]+/[^/@]+)(?:@(.+))?"
    found = re.fullmatch(page, path.as_posix()) or re.fullmatch(short, path.as_posix())
    if not found or path.suffix == ".pt" or path.exists() or not is_hub_id(found[1]):
        return None
    return HubModel(name=found[1], revision=found[2] and unquote(found[2]))


class SkipInit(TorchFunctionMode):
    """Draws no weights: on the meta device that would import torch's compiler, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def build_model(checkpoint: dict, path: Path, device: str | torch.device = "cpu") -> GPT:
    """Returns the model of a checkpoint read from `path`, on `device` and in evaluation mode.

    Raises InputError where weights and gpt_config do not fit.
    """
    config, state_dict = checkpoint["gpt_config"], checkpoint["model_state_dict"]
    # no memory and no random numbers for weights soon replaced
    with SkipInit(), torch.device("meta"):
        model = GPT(config)
    load_weights(model, state_dict, path, assign=True)
    model.lm_head.weight = model.wte.weight
    return model.to(device).eval()


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[GPT, dict]:
    """Returns the model of a .pt file, of a published model's folder or the weights in it, or on
    the Hub, and the checkpoint itself.

    Raises InputError as `load_checkpoint`, `read_folder`, `download_model` and `build_model` do.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = read_folder(path)
    elif path.name in WEIGHTS and path.is_file():
        checkpoint = read_folder(path.parent)
    elif there := on_the_hub(path):
        checkpoint = read_folder(download_model(there.name, there.revision))
    else:
        checkpoint = load_checkpoint(path)
    return build_model(checkpoint, path, device), checkpoint


def load_to_generate(
    path: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[GPT, dict]:
    """Loads as `load_model` does, in the precision `dtype` and packed for speed: such a model
    generates and scores, but cannot be trained or saved."""
    model, checkpoint = load_model(path, device)
    model.to(dtype)
    pack_linears(model)
    return model, checkpoint


class Start(NamedTuple):
    """What a new run can start from."""

    config: GPTConfig
    weights: dict
    """A `model_state_dict`."""
    origin: dict[str, str]
    """What metrics and record remember as "init_from": {"checkpoint": the Hub id or the local path
    made absolute, "sha256": `weights_sha256`}."""


def load_start(path: Path) -> Start:
    """Reads a model to start from. Raises InputError as `load_model` does."""
    path = Path(path)
    there = on_the_hub(path)
    if not (path.exists() or there):
        raise InputError(
            f"there is no {path} to start from: pass --init_from with a .pt file, a folder, or a "
            "Hub id, owner and name, as in openai-community/gpt2; or leave it out to --resume"
        )
    model, _ = load_model(path)
    name = str(there or path.resolve())
    origin = {"checkpoint": name, "sha256": weights_sha256(model.state_dict())}
    return Start(config=model.config, weights=model.state_dict(), origin=origin)


def fit_start(start: Start, gpt: GPTConfig) -> dict:
    """Returns the weights of a start for a model of shape `gpt`, its positions cropped if need be.

    Raises InputError where the two shapes differ in more than dropout, init_std, which only new
    weights are drawn with, and a shorter context.
    """
    for field in fields(GPTConfig):
        ours, given = getattr(gpt, field.name), getattr(start.config, field.name)
        shorter = field.name == "context_length" and ours < given
        if ours != given and not shorter and field.name not in ("dropout", "init_std"):
            raise InputError(
                f"{start.origin['checkpoint']} has {field.name} {given}, not {ours}: leave --"
                f"{field.name} out, or start without --init_from"
            )
    return start.weights | {"wpe.weight": start.weights["wpe.weight"][: gpt.context_length]}
