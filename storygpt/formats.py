"""The same weights as others keep them: transformers' GPT-2 and its tokenizer's files.

Any GPT-2 in transformers' layout is read, whoever trained it; what ours is written as says nothing
that a plain GPT-2 would not, but for one entry `storygpt` in config.json.
"""

import json
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import GenerationSettings, GPTConfig, InputError, TrainingConfig
from storygpt.files import BEST, refuse_pointer
from storygpt.record import from_dict, record_of, weights_sha256
from storygpt.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, gpt2_file, load_tokenizer

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of two, the first is read

# What a config.json may say and our model does; the first is also what it means by saying nothing.
OURS = {
    "tokenizer_class": (
        *("GPT2Tokenizer", "GPT2TokenizerFast", None),
        *("PreTrainedTokenizerFast", "TokenizersBackend"),  # of any kind: the files tell which
    ),
    "quantization_config": (None,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# The names that transformers' models have in common, and GPT-2's own.
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


# --- Reading ---


@contextmanager
def reading_weights(path: Path) -> Iterator[None]:
    """Turns whatever a foreign or damaged file brings about into one sentence, an InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        best = path.parent / BEST  # a run's folder
        mend = best if best.exists() else "another checkpoint"
        if (path.parent / "adapter_config.json").exists():
            mend = "what PEFT's merge_and_unload and then save_pretrained make of the adapter"
        raise InputError(
            f"{path.parent} is no model: it has no {path.name}; pass {mend}"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can fail in any layer of zip, pickle and torch
        refuse_pointer(path)
        if isinstance(error, pickle.UnpicklingError):
            raise InputError(
                f"{path} is refused: it holds more than weights and settings, and loading it could "
                "run a stranger's code"
            ) from error
        raise InputError(f"{path} is damaged or not a checkpoint: pass another") from error


def rebuild(key: str, given: dict, path: Path) -> GPTConfig | TrainingConfig:
    """Returns the configuration that a checkpoint has under `key`, of the `given` fields that this
    version knows. Raises InputError where they are not valid."""
    kind = {"gpt_config": GPTConfig, "training_config": TrainingConfig}[key]
    try:
        if "eval_iters" in given:  # of an older version, which counted batches
            given = given | {"eval_windows": given["eval_iters"] * given["batch_size"]}
        return kind(**{name: given[name] for name in kind.__dataclass_fields__ if name in given})
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{path} has a {key} that is not valid: {error}") from error


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises InputError where there is none."""
    with reading_weights(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    return content


def read_config(folder: Path) -> tuple[GPTConfig, dict]:
    """Returns the shape in a folder's config.json, and what only StoryGPT writes there (else {}).

    Raises InputError with whatever it asks of a model that ours does not do, and as
    `end_of_text_in` does.
    """
    path = folder / "config.json"
    config = {GPT2_NAMES.get(name, name): value for name, value in read_json(path).items()}
    if config.get("model_type") != "gpt2":
        raise InputError(f"{path} is a {config.get('model_type')} model's: only GPT-2's are read")
    with reading_weights(path):
        width = config.get("n_embd", 768)
        allowed = OURS | {"n_inner": (4 * width, None)}
        for key, values in allowed.items():
            if config.get(key, values[0]) not in values:
                raise InputError(
                    f"{path} has {key} {config[key]!r}, which StoryGPT's model does not do: "
                    f"there it is {values[0]!r}"
                )
        ours = config.get("storygpt", {})
        rows = config.get("vocab_size", GPT2_VOCAB_SIZE)
        # Rows after end-of-text, for speed or for special tokens, are of no text: a few.
        tokens = min(rows, GPT2_VOCAB_SIZE)
        ends = range(tokens - 1000, tokens)
        end_of_text = end_of_text_in(folder, ends)
        if end_of_text is None and ours and config.get("eos_token_id") in ends:
            end_of_text = config["eos_token_id"]
        try:
            shape = GPTConfig(
                vocab_size=tokens if end_of_text is None else end_of_text + 1,
                context_length=config.get("n_positions", 1024),
                n_layer=config.get("n_layer", 12),
                n_head=config.get("n_head", 12),
                n_embd=width,
                dropout=config.get("resid_pdrop", 0.1),
                bias=ours.get("bias", True),
                init_std=config.get("initializer_range", 0.02),
            )
        except InputError as error:
            raise InputError(f"{path} is not valid: {error}") from error
        return shape, ours


def end_of_text_in(folder: Path, ends: range) -> int | None:
    """Returns the id of end-of-text, the last token of text, in a folder's tokenizer, if it has
    one.

    Raises InputError where that is not GPT-2's, whole or cut as `load_tokenizer` cuts it, with an
    end that is among `ends`.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        with reading_weights(path):
            bpe = read_json(path)["model"]
            vocab = dict(bpe["vocab"])  # pairs where it is no BPE
            # a pair is "a b" or, since tokenizers 0.20, ["a", "b"]
            merges = [m if isinstance(m, str) else " ".join(m) for m in bpe.get("merges", ())]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, path = read_json(folder / "vocab.json"), folder / "merges.txt"
        with reading_weights(path):
            lines = path.read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
    elif others := [*folder.glob("vocab.txt"), *folder.glob("*.model")]:  # BERT's, SentencePiece's
        path, vocab, merges = others[0], {}, []
    else:
        return None
    with reading_weights(path):
        end_of_text = vocab.get(END_OF_TEXT, -1)
        known = {token: i for token, i in vocab.items() if i <= end_of_text}
        # GPT-2's tokens are 256 bytes, one a merge, and the end
        counted = end_of_text in ends and end_of_text == 256 + len(merges)
        if not counted or (known, merges) != vocabulary(end_of_text + 1):
            raise InputError(f"{path} is a tokenizer of another kind: only GPT-2's is read")
    return end_of_text


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a folder, from one file or several, of safetensors or else of torch.

    Raises InputError where there are none, a file is missing or damaged, or it holds more than
    tensors.
    """
    from safetensors.torch import load_file

    load_bin = partial(torch.load, map_location="cpu", weights_only=True)
    for name, load in zip(WEIGHTS, (load_file, load_bin), strict=True):
        index = folder / f"{name}.index.json"
        names = [name]
        if not (folder / name).is_file():
            if not index.is_file():
                continue
            with reading_weights(index):
                names = sorted(set(read_json(index)["weight_map"].values()))
                if any(Path(part).name != part for part in names):
                    raise ValueError("a part outside the folder")
        tensors = {}
        for part in names:
            with reading_weights(folder / part):
                tensors |= load(folder / part)
                if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
                    raise ValueError("not only tensors")
        return tensors
    raise InputError(f"{folder} is no model: it has no model.safetensors; pass another checkpoint")


def read_folder(folder: Path) -> dict:
    """Reads a folder in transformers' GPT-2 layout as a checkpoint: gpt_config, model_state_dict
    (float32), step and val_loss (0 and infinity where they are not known), and where StoryGPT wrote
    it, and nobody has changed its weights since, training_config and record.

    Raises InputError where it is damaged, or is something that StoryGPT's model does not do.
    """
    config, ours = read_config(folder)
    state_dict = from_transformers(read_tensors(folder), config.vocab_size)
    biases = [name for name in state_dict if name.endswith("bias")]
    if config.bias or any(state_dict[name].any() for name in biases):
        config = replace(config, bias=True)  # others also train those that were zeros
    else:
        for name in biases:
            del state_dict[name]
    checkpoint = {"gpt_config": config, "model_state_dict": state_dict}
    with reading_weights(folder / "config.json"):
        record = from_dict(ours["record"]) if "record" in ours else None
    if not record or record.weights_sha256 != weights_sha256(state_dict):
        return checkpoint | {"step": 0, "val_loss": math.inf}
    recipe = rebuild("training_config", record.recipe, folder / "config.json")
    return checkpoint | {
        "training_config": recipe,
        "step": record.step,
        "val_loss": record.val_loss,
        "record": record.begun(),
    }


def from_transformers(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Returns transformers' GPT-2, whole or without its head, as a float32 `model_state_dict` with
    biases. Its linear layers are (in, out)."""
    state_dict = {}
    for name, weight in tensors.items():
        name = name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            continue  # the causal mask, which old versions stored
        if weight.dim() == 2 and ".c_" in name:
            weight = weight.T
        elif weight.dim() == 2 and name in ("wte.weight", "lm_head.weight"):
            weight = weight[:vocab_size]
        state_dict[name] = weight.float().contiguous()
    for name, same in (("lm_head.weight", "wte.weight"), ("wte.weight", "lm_head.weight")):
        if same in state_dict:  # of tied weights one is stored, by safetensors' save_model the head
            state_dict.setdefault(name, state_dict[same])
    return state_dict


# --- Writing ---


def with_biases(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state_dict` in float32, with zeros for biases that it lacks, without the head."""
    tensors = {}
    for name, weight in state_dict.items():
        if name == "lm_head.weight":
            continue
        tensors[name] = weight.float()
        if name.endswith(".weight") and not name.startswith(("wte", "wpe")):
            bias = name.removesuffix("weight") + "bias"
            tensors[bias] = state_dict.get(bias, torch.zeros(len(weight))).float()
    return tensors


def to_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a `model_state_dict` as the float32 tensors of transformers' GPT2LMHeadModel.

    Its linear layers are (in, out), its biases always exist, and the tied head is not stored. The
    names are those of GPT-2's own file, without `transformer.`, which not every program reads.
    """
    return {
        name: (weight.T if ".c_" in name and weight.dim() == 2 else weight).contiguous()
        for name, weight in with_biases(state_dict).items()
    }


def vocabulary(vocab_size: int) -> tuple[dict[str, int], list[str]]:
    """Returns GPT-2's tokens and merges as its own files spell them, cut as by `load_tokenizer`."""
    end_of_text = load_tokenizer(vocab_size).eot_token
    encoder = json.loads(gpt2_file("encoder.json"))
    _, *merges = gpt2_file("vocab.bpe").strip().split("\n")
    vocab = {token: i for token, i in encoder.items() if i < end_of_text}
    return vocab | {END_OF_TEXT: end_of_text}, merges[: end_of_text - 256]


def tokenizer_files(vocab_size: int, context_length: int) -> dict[str, str]:
    """Returns the text of transformers' files by name, for `load_tokenizer(vocab_size)`."""
    vocab, merges = vocabulary(vocab_size)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": True}
    special = {"content": END_OF_TEXT, "normalized": False, "special": True}
    special |= {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab_size - 1, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        # in a batch, what follows the prompt must follow its last token
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **tokens,
        "added_tokens_decoder": {str(vocab_size - 1): special},
    }
    return {
        "tokenizer.json": to_json(tokenizer),
        "tokenizer_config.json": to_json(settings),
        # what transformers 4 reads where it is asked for its tokenizer in Python
        "vocab.json": to_json(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def config_files(checkpoint: dict) -> dict[str, str]:
    """Returns the text of config.json and generation_config.json of transformers' GPT-2; the former
    also has the record, so that what `read_folder` makes of it is a checkpoint."""
    config = checkpoint["gpt_config"]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.vocab_size - 1)
    shape = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": config.init_std,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        **ids,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        # what a GPT-2 config has no field for, and a checkpoint has
        "storygpt": {"bias": config.bias, "record": asdict(record_of(checkpoint).public())},
    }
    generation = {
        **ids,
        "do_sample": True,
        "temperature": GenerationSettings.temperature,
        "top_k": GenerationSettings.top_k,
        "max_length": config.context_length,
    }
    return {"config.json": to_json(shape), "generation_config.json": to_json(generation)}


def to_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_folder(folder: Path, checkpoint: dict) -> None:
    """Writes a model for transformers into `folder`: weights, configuration and tokenizer."""
    from safetensors.torch import save

    config = checkpoint["gpt_config"]
    tensors = to_transformers(checkpoint["model_state_dict"])
    # not save_file, whose files nobody else may read
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    files = tokenizer_files(config.vocab_size, config.context_length)
    for name, text in (files | config_files(checkpoint)).items():
        (folder / name).write_bytes(text.encode())  # the same on Windows, too
