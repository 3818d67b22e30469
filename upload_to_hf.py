"""Script: publishes a checkpoint on the Hugging Face Hub, as a model that transformers can load.

Builds the whole model repo in a folder first, then sends it as a single commit.
"""

import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from config import InputError
from storygpt.cli import parse_flags, run

# torch takes seconds to import: --help and a mistyped flag should not have to wait for it.

ROOT = Path(__file__).resolve().parent
BEST = "checkpoints/StoryGPT_best.pt"
PROMPT = "Once upon a time"
SAMPLING = {"max_new_tokens": 200, "temperature": 0.8, "top_k": 100}


@dataclass(frozen=True)
class Arguments:
    """Publish a checkpoint on the Hugging Face Hub."""

    repo_id: str
    """Model repo to publish to, owner/name; created if there is none."""
    token: str | None = None
    """Hub token with write permission. Other users of this machine can see a command line: HF_TOKEN
    or `hf auth login`, which are used without this flag, are safer."""
    private: bool = False
    """Only you can see the repo."""
    checkpoint: Path = Path(BEST)
    """Checkpoint to publish; a loss_plot.png beside it is published too."""
    data_dir: Path = Path("data")
    """Folder of the data it was trained on: its meta.json goes into the model card."""
    language: str = "en"
    """Language of the stories, for the model card."""
    dry_run: bool = False
    """Build the folder in output_dir and stop: no token, no network."""
    output_dir: Path | None = None
    """Empty or new folder to build in; without it, a temporary one."""
    seed: int = 1337
    """Seed of the first story in the model card."""


# --- The folder ---


def tokenizer_files(vocab_size: int, context_length: int) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json of the same BPE as `load_tokenizer(vocab_size)`."""
    from storygpt.tokenizer import END_OF_TEXT, gpt2_file, load_tokenizer

    end_of_text = load_tokenizer(vocab_size).eot_token
    encoder = json.loads(gpt2_file("encoder.json"))
    _, *merges = gpt2_file("vocab.bpe").split("\n")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"content": END_OF_TEXT, "normalized": False, "special": True}
    special |= {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": end_of_text, **special}],
            "normalizer": None,
            "pre_tokenizer": byte_level | {"use_regex": True},
            "post_processor": byte_level | {"use_regex": True},
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {token: i for token, i in encoder.items() if i < end_of_text}
                | {END_OF_TEXT: end_of_text},
                "merges": merges[: end_of_text - 256],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": context_length,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            # text that spells <|endoftext|> stays text, as in training
            "split_special_tokens": True,
            "added_tokens_decoder": {str(end_of_text): special},
        },
    }


def config_files(checkpoint: dict) -> dict[str, dict]:
    """config.json and generation_config.json of transformers' GPT-2."""
    config = checkpoint["gpt_config"]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.vocab_size - 1)
    return {
        "config.json": {
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
            # what a GPT-2 config has no field for, and loading it back needs
            "storygpt": {
                "bias": config.bias,
                "step": checkpoint["step"],
                "val_loss": checkpoint["val_loss"],
            },
        },
        "generation_config.json": {
            **ids,
            "do_sample": True,
            "temperature": SAMPLING["temperature"],
            "top_k": SAMPLING["top_k"],
            "max_length": config.context_length,
        },
    }


def tell_story(model, seed: int) -> str:
    """What `generate.py --seed SEED` tells on a CPU."""
    import torch

    from storygpt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.config.vocab_size)
    torch.manual_seed(seed)
    idx = torch.tensor([tokenizer.encode_ordinary(PROMPT)])
    ids = model.generate(idx, end_of_text=tokenizer.eot_token, **SAMPLING)[0].tolist()
    return tokenizer.decode([token for token in ids if token != tokenizer.eot_token])


def hub_dataset(meta: dict | None) -> str | None:
    """The data set's name where it is one on the Hub; a path of this machine stays private."""
    from storygpt.sources import FILE_TYPES

    name = (meta or {}).get("dataset", "")
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    is_file = Path(name).exists() or Path(name).suffix in (".txt", *FILE_TYPES)
    return name if is_name and not is_file else None


def evaluation(checkpoint: dict, meta: dict | None) -> list[tuple[str, str, float | int]]:
    """(metric type, name, value) of all that is known of how good the model is and what it cost."""
    recipe, loss = checkpoint["training_config"], checkpoint["val_loss"]
    tokens = recipe.batch_size * recipe.gradient_accumulation_steps * checkpoint["step"]
    metrics = [
        ("loss", "Validation loss (nats a token)", round(loss, 4)),
        ("perplexity", "Validation perplexity", round(math.exp(loss), 3)),
    ]
    if meta:
        from storygpt.token_files import bits_per_byte

        counts = meta["splits"]["validation"]
        bits = round(bits_per_byte(loss, counts), 4)
        metrics.append(("bits_per_byte", "Validation bits per byte", bits))
    return [
        *metrics,
        ("steps", "Training steps", checkpoint["step"]),
        ("tokens", "Training tokens", tokens * checkpoint["gpt_config"].context_length),
    ]


CARD = """
# {name}

A GPT-2 style language model of {parameters:,} parameters that tells short stories. It was trained
from scratch with StoryGPT on {trained_on}.

## Tell a story

With transformers:

```python
from transformers import pipeline

storyteller = pipeline("text-generation", "{repo_id}")
print(storyteller("{prompt}")[0]["generated_text"])
```

With PyTorch alone, from [model.py](model.py), [config.py](config.py) and
[the checkpoint](checkpoints/StoryGPT_best.pt):

```python
import sys

{import_tokenizer}
import torch
from huggingface_hub import hf_hub_download

for name in ("model.py", "config.py", "checkpoints/StoryGPT_best.pt"):
    path = hf_hub_download("{repo_id}", name, local_dir="StoryGPT")
sys.path.append("StoryGPT")
from model import GPT

device = "cuda" if torch.cuda.is_available() else "cpu"
checkpoint = torch.load(path, map_location=device, weights_only=False)
model = GPT(checkpoint["gpt_config"])
model.load_state_dict(checkpoint["model_state_dict"])
model.to(device).eval()

tokenizer = {tokenizer}
context = torch.tensor([tokenizer.encode("{prompt}")], device=device)
torch.manual_seed({seed})
output = model.generate(context, max_new_tokens=200, temperature=0.8, top_k=100)
print(tokenizer.decode(output[0].tolist()).split("<|endoftext|>")[0])
```

With the StoryGPT repository:

```sh
python generate.py --checkpoint {repo_id} --prompt "{prompt}" --seed {seed}
```

## Stories it tells

Told by the last of these commands on a CPU, not picked: the first three seeds.

{stories}

## Evaluation

{evaluation}

The validation loss is the training run's own estimate, on at most {windows:,} windows of
{context_length} tokens of the validation split.{compare}
{plot}
## Training

{data}A step is one optimizer update; a micro-batch has batch_size windows of
context_length tokens, a step gradient_accumulation_steps of them.

{settings}

## Intended use and limits

Meant for learning, teaching and research: how small language models are built, trained and
published, and how they write. It continues the beginning of a story, and does nothing else: it
answers no questions, follows no instructions and knows no facts. It sees {context_length} tokens at
once, forgets what came before, and loses the thread of longer or unusual stories. It repeats what
its training stories are like, their stereotypes included. What it writes is not checked by anybody:
do not put it before children unread.
"""


def quote(story: str) -> str:
    """A story as a Markdown quotation in which nothing is markup."""
    escaped = re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", story)
    return "\n".join(f"> {line}".rstrip() for line in escaped.splitlines())


def table(head: str, *rows: tuple) -> str:
    """A Markdown table of two columns."""
    return "\n".join([head, "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def model_card(
    arguments: Arguments,
    checkpoint: dict,
    meta: dict | None,
    num_parameters: int,
    stories: dict[int, str],
    has_plot: bool,
):
    """The repo's README.md as a huggingface_hub ModelCard; `stories` are by seed."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from storygpt.tokenizer import GPT2_VOCAB_SIZE

    config, recipe = checkpoint["gpt_config"], checkpoint["training_config"]
    dataset, name = hub_dataset(meta), arguments.repo_id.split("/")[1]
    if dataset:
        trained_on = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    elif meta and meta["dataset"] == "sample":
        trained_on = "the stories built into StoryGPT, which a small grammar writes"
    else:
        trained_on = "a collection of stories that is not published here"
    metrics = evaluation(checkpoint, meta)
    data = ModelCardData(
        language=arguments.language,
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "storygpt"],
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset or "stories",
                dataset_name=dataset or "stories",
                dataset_split="validation",
                metric_type=kind,
                metric_name=title,
                metric_value=value,
            )
            for kind, title, value in metrics
        ],
    )
    is_gpt2 = config.vocab_size == GPT2_VOCAB_SIZE
    auto = f'AutoTokenizer.from_pretrained("{arguments.repo_id}")'
    body = CARD.format(
        name=name,
        repo_id=arguments.repo_id,
        prompt=PROMPT,
        seed=arguments.seed,
        parameters=num_parameters,
        trained_on=trained_on,
        # tiktoken has GPT-2's whole vocabulary only
        import_tokenizer="import tiktoken" if is_gpt2 else "from transformers import AutoTokenizer",
        tokenizer='tiktoken.get_encoding("gpt2")' if is_gpt2 else auto,
        stories="\n\n".join(f"Seed {seed}:\n\n{quote(s)}" for seed, s in stories.items()),
        evaluation=table(
            "| metric | value |", *((title, f"{value:,}") for _, title, value in metrics)
        ),
        windows=recipe.eval_iters * recipe.batch_size,
        context_length=config.context_length,
        compare=" Bits per byte compare models of different vocabularies." if meta else "",
        plot="\n![Loss over training](loss_plot.png)\n" if has_plot else "",
        data="The training split has {stories:,} stories of {tokens:,} tokens.\n".format(
            **meta["splits"]["train"]
        )
        if meta
        else "",
        settings=table("| setting | value |", *(asdict(config) | asdict(recipe)).items()),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def build_folder(folder: Path, arguments: Arguments, checkpoint: dict, meta: dict | None) -> None:
    """Fills the empty `folder` with all files of the model repo."""
    from safetensors.torch import save

    from storygpt.checkpoint import KEYS, build_model, save_checkpoint, to_transformers

    config = checkpoint["gpt_config"]
    model = build_model(checkpoint, arguments.checkpoint)
    for name in ("model.py", "config.py"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / BEST).parent.mkdir()
    save_checkpoint(folder / BEST, {key: checkpoint[key] for key in KEYS})
    tensors = to_transformers(checkpoint["model_state_dict"])
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    files = tokenizer_files(config.vocab_size, config.context_length) | config_files(checkpoint)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    plot = arguments.checkpoint.parent / "loss_plot.png"
    if plot.is_file():
        shutil.copyfile(plot, folder / plot.name)
    seeds = range(arguments.seed, arguments.seed + 3)
    stories = {seed: tell_story(model, seed) for seed in seeds}
    size, has_plot = model.num_parameters(), plot.is_file()
    card = model_card(arguments, checkpoint, meta, size, stories, has_plot)
    card.save(folder / "README.md")


# --- The Hub ---


def check_repo_id(repo_id: str) -> None:
    """Raises InputError where the Hub could have no repo of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(
            f"{repo_id!r} is no name of a repo on the Hub: pass --repo_id owner/name, of letters, "
            "digits, '-', '_' and '.'"
        )


def find_token(token: str | None) -> str:
    """The token given, else that of the environment or the saved login.

    Raises InputError where there is none, or none that HTTP could carry.
    """
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    if not token:
        raise InputError(
            "there is no Hub token: log in with `hf auth login`, set HF_TOKEN, or pass --token "
            "(other users of this machine can see the last)"
        )
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library would put it into its complaint
        raise InputError("the Hub token has characters that no token has: copy it again")
    return token


def retry(call: Callable[[], object]):
    """What `call` returns, tried again after a server's fault, a cut connection or a 429.

    The Hub's client itself tries uploads again, but neither creating a repo nor committing.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for wait in (1, 2, 4):
        try:
            return call()
        except RuntimeError:  # an upload, which the client has tried often enough
            raise
        except Exception as error:
            reason = type(error).__name__
            if isinstance(error, HfHubHTTPError):
                status = error.response.status_code
                if status < 500 and status not in (408, 429):
                    raise
                reason = f"HTTP {status}"
                asked = error.response.headers.get("Retry-After", "")
                wait = int(asked) if asked.isdigit() else wait
                if wait > 60:
                    raise
            print(f"{reason}: trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    return call()


def publish(folder: Path, repo_id: str, token: str, private: bool) -> tuple[str, bool]:
    """Sends `folder` as one commit; the repo's address, and whether anything was new to it.

    Raises InputError, and whatever the Hub's client does.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token)

    def open_repo():
        try:
            return api.model_info(repo_id)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private or None)
            return api.model_info(repo_id)

    def commit():
        # New operations each time: after a commit whose answer got lost, they find nothing to do.
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        additions = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files
        ]
        message = "Upload StoryGPT: weights, code, tokenizer and model card"
        return api.create_commit(repo_id, additions, commit_message=message)

    before = retry(open_repo)
    if private and not before.private:
        raise InputError(
            f"{repo_id} exists and is public: make it private in its settings on the Hub, leave "
            "out --private, or pass another --repo_id"
        )
    return f"{api.endpoint}/{repo_id}", retry(commit).oid != before.sha


def explain(error: Exception, repo_id: str) -> str:
    """One sentence on why publishing failed, without anything the server or the token says."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error
    while cause.__cause__ and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if not isinstance(cause, HfHubHTTPError):
        return (
            f"{repo_id} was not published ({type(cause).__name__}): check the network and run the "
            "same command again"
        )
    status = cause.response.status_code
    hints = {
        401: "the Hub does not accept the token: make one at https://huggingface.co/settings/tokens",
        403: "the token may not write there: give it write permission at "
        "https://huggingface.co/settings/tokens, or pass another --repo_id",
        404: "the token cannot see that repo: check --repo_id and the token's permissions",
        409: "the repo is being changed, or exists where the token cannot see it: run the same "
        "command again, or pass another --repo_id",
        429: "the Hub asks for a pause: run the same command again in some minutes",
    }
    trouble = "the Hub has trouble: run the same command again later"
    return (
        f"{repo_id} was not published (HTTP {status}): "
        f"{hints.get(status, trouble if status >= 500 else 'the Hub refuses the request')}"
    )


# --- The command ---


def scratch_folder(output_dir: Path | None) -> tempfile.TemporaryDirectory:
    """A temporary folder beside `output_dir`, which must be new or empty. Raises InputError."""
    if output_dir is None:
        return tempfile.TemporaryDirectory()
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        if output_dir.exists() and any(output_dir.iterdir()):
            raise InputError(f"{output_dir} is not empty: pass a new --output_dir")
        return tempfile.TemporaryDirectory(prefix=".", dir=output_dir.parent)
    except OSError as error:
        raise InputError(
            f"{output_dir} cannot be written ({error.strerror}): pass another --output_dir"
        ) from error


def find_meta(data_dir: Path, vocab_size: int) -> dict | None:
    """What meta.json says of the training data, or None where it is not there.

    Raises InputError where it is damaged or of other data.
    """
    from storygpt.token_files import load_meta

    if not (data_dir / "meta.json").is_file():
        print(
            f"no meta.json in {data_dir}: the model card names no data set and no bits per byte; "
            "--data_dir says where it is"
        )
        return None
    return load_meta(data_dir, vocab_size)


def main() -> None:
    arguments = parse_flags(Arguments)
    output_dir = arguments.output_dir and arguments.output_dir.resolve()
    check_repo_id(arguments.repo_id)
    if arguments.dry_run and not output_dir:
        raise InputError("--dry_run needs a folder to build: pass --output_dir DIR")

    from storygpt.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(arguments.checkpoint)
    if not math.isfinite(checkpoint["val_loss"]):
        raise InputError(
            f"{arguments.checkpoint} was never evaluated: train on to the next evaluation, or pass "
            "another with --checkpoint"
        )
    meta = find_meta(arguments.data_dir, checkpoint["gpt_config"].vocab_size)
    with scratch_folder(output_dir) as scratch:
        token = None if arguments.dry_run else find_token(arguments.token)
        folder = Path(scratch) / "repo"
        folder.mkdir()
        print("building the model repo, and telling three stories for its card")
        build_folder(folder, arguments, checkpoint, meta)
        if output_dir:
            folder = folder.replace(output_dir)
        if arguments.dry_run:
            print(f"built in {output_dir}; publish it without --dry_run")
            return
        try:
            url, changed = publish(folder, arguments.repo_id, token, arguments.private)
        except InputError:
            raise
        except Exception as error:  # the client's own, and those of the layers below it
            raise InputError(explain(error, arguments.repo_id)) from None
        print(f"{'published:' if changed else 'nothing changed:'} {url}")


if __name__ == "__main__":
    run(main)
