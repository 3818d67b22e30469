"""What a model is: its data, what it started from, how it was trained, and how well it does.

The first two are made once, by `train.py` as a run starts, and lie in every checkpoint as
"record"; a published config.json has all of it. Card, evaluation and default prompt ask here.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from storygpt.hub import is_hub_id
from storygpt.sources import BUILTIN
from storygpt.token_files import SPLITS, data_fingerprint

if TYPE_CHECKING:  # --help should not have to wait for torch
    from torch import Tensor

PROMPT = "Once upon a time"  # of a model that does not say how its stories begin
COUNTS = ("stories", "tokens", "bytes")


@dataclass(frozen=True)
class Data:
    """The stories that a model was trained on."""

    name: str | None
    """A data set on the Hub, or of `BUILTIN`; None for any other, whose path is nobody's business.
    """
    subset: str | None
    commit: str | None
    fingerprint: str
    """`token_files.data_fingerprint`: equal where the token files are."""
    splits: dict[str, dict[str, int]]
    """The stories, tokens and bytes of train and validation."""
    openings: list
    """The commonest beginnings of its training stories with their shares, commonest first."""

    def __post_init__(self):
        """Raises ValueError or TypeError where a file, which anybody may have written, is wrong."""
        if self.name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name):
            raise ValueError(f"{self.name!r} is no data set on the Hub")
        counts = [self.splits[split][name] for split in SPLITS for name in COUNTS]
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError("splits must be counted")
        if not all(isinstance(text, str) for text, _ in self.openings):
            raise ValueError("openings must be text")


@dataclass(frozen=True)
class Record:
    """All that is known of a model."""

    data: Data | None
    """None where an older version trained it."""
    init_from: dict[str, str] | None
    """The origin of the weights it started from (`checkpoint.Start.origin`); None: from scratch."""
    parameters: int
    recipe: dict
    """The fields of its `TrainingConfig`."""
    step: int
    val_loss: float
    weights_sha256: str
    """Of all weights: whoever changes them has another model, and none of these numbers."""

    def begun(self) -> dict:
        """Returns what was known as its run began: "record" in a checkpoint, see `begin_record`."""
        return {"data": self.data and asdict(self.data), "init_from": self.init_from}

    @property
    def base_model(self) -> str | None:
        """The Hub id of the model that it started from, if that is there."""
        name = (self.init_from or {}).get("checkpoint", "").split("@")[0]
        return name if is_hub_id(name) else None

    def public(self) -> "Record":
        """Returns what everybody may know: no path of this machine."""
        if not self.init_from or self.base_model:
            return self
        return replace(self, init_from={"sha256": self.init_from["sha256"]})


def read_begun(begun: dict | None) -> tuple[Data | None, dict[str, str] | None]:
    """Returns the data and the origin in what a file has as "record", if it has one.

    Raises AttributeError, KeyError, TypeError or ValueError where that is not as we write it.
    """
    if begun is None:
        return None, None
    data, origin = begun["data"], begun["init_from"]
    if origin is not None and not all(isinstance(origin[key], str) for key in {"sha256", *origin}):
        raise ValueError("an origin is text")
    return Data(**data) if data else None, origin


def from_dict(known: dict) -> Record:
    """Reads a record from its fields. Raises as `read_begun` does."""
    data, origin = read_begun(known)
    numbers = {"step": int(known["step"]), "val_loss": float(known["val_loss"])}
    return Record(**known | numbers | {"data": data, "init_from": origin})


def begin_record(meta: dict, init_from: dict[str, str] | None) -> dict:
    """Returns what every checkpoint of a run holds as "record": its data, from their meta.json, and
    the origin of its weights."""
    # only what is on the Hub has a revision: a path of this machine may be spelled alike
    public = meta["dataset"] in BUILTIN or meta.get("revision")
    data = Data(
        name=meta["dataset"] if public else None,
        subset=meta.get("subset") if public else None,
        commit=meta.get("revision"),
        fingerprint=data_fingerprint(meta),
        splits={split: {name: meta["splits"][split][name] for name in COUNTS} for split in SPLITS},
        openings=meta.get("openings", []),
    )
    return {"data": asdict(data), "init_from": init_from}


def record_of(checkpoint: dict) -> Record:
    """Returns what a checkpoint says of its model; one of an older version knows no data."""
    data, _ = read_begun(checkpoint.get("record"))
    weights = own_weights(checkpoint["model_state_dict"])
    return Record(
        data=data,
        init_from=origin_of(checkpoint),
        parameters=sum(weight.numel() for weight in weights.values()),
        recipe=asdict(checkpoint["training_config"]),
        step=checkpoint["step"],
        val_loss=checkpoint["val_loss"],
        weights_sha256=weights_sha256(checkpoint["model_state_dict"]),
    )


# What one file alone wants to know; checkpoints of older versions have no record.


def origin_of(checkpoint: dict) -> dict[str, str] | None:
    """Returns the origin of the weights that a checkpoint's run started from, if any."""
    return (checkpoint.get("record") or checkpoint).get("init_from")


def data_of(checkpoint: dict) -> dict | None:
    """Returns what a checkpoint says of its data (the fields of `Data`), if it does."""
    return (checkpoint.get("record") or {}).get("data")


def fingerprint_of(checkpoint: dict) -> str | None:
    """Returns the fingerprint of a checkpoint's data, where it says it."""
    data = data_of(checkpoint)
    return data["fingerprint"] if data else checkpoint.get("data")


def opening_of(checkpoint: dict) -> str:
    """Returns how most stories of a checkpoint's data begin: what to ask its model for."""
    data = data_of(checkpoint)
    return data["openings"][0][0] if data and data["openings"] else PROMPT


def own_weights(state_dict: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Returns a model's parameters by name: the head is the embedding once more."""
    return {name: weight for name, weight in state_dict.items() if name != "lm_head.weight"}


def weights_sha256(state_dict: "Mapping[str, Tensor]") -> str:
    """Returns the SHA-256 of all weights, by sorted name: the same weights have the same sum in a
    .pt file, a folder and on the Hub."""
    digest = hashlib.sha256()
    for name, weight in sorted(own_weights(state_dict).items()):
        digest.update(name.encode() + weight.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
