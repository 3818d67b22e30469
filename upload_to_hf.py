"""Script: publishes a checkpoint on the Hugging Face Hub, as a model that transformers can load.

Builds the whole model repo in a folder first, then sends it as a single commit.
"""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Literal

from config import InputError, check_whole
from storygpt.cli import DEFAULT_CHECKPOINT, parse_flags, run
from storygpt.files import BEST, EVALUATION, PLOT, writing
from storygpt.hub import Built, find_token, is_hub_id, publish
from storygpt.judging.measures import story_table
from storygpt.record import Record, data_of, fingerprint_of, opening_of, record_of
from storygpt.sources import BUILTIN
from storygpt.token_files import bits_per_byte, data_fingerprint, load_meta, perplexity
from storygpt.tokenizer import GPT2_VOCAB_SIZE

# torch takes seconds to import: --help and a mistyped flag should not have to wait for it.

ROOT = Path(__file__).resolve().parent
CARD = ROOT / "docs" / "model_card.md"  # a text for readers, so it lies with those
PUBLISHED = f"checkpoints/{BEST}"  # what programs that load it with PyTorch alone expect


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
    checkpoint: Path = DEFAULT_CHECKPOINT
    """A .pt file, or a folder or Hub id that this script made of one. The loss_plot.png beside it
    is published too, and the evaluation.json of `evaluate.py --output` becomes a table."""
    data_dir: Path | None = None
    """The checkpoint knows its data. A folder passed here must hold the same."""
    language: str = "en"
    """Language of the stories, for the model card: its ISO 639 code."""
    license: str | None = None
    """Licence of the weights, for the model card, as the Hub spells it (mit, cc-by-4.0); without
    it the card names none."""
    gguf: Literal["f16", "f32", "none"] = "f16"
    """Precision of StoryGPT.gguf, the model for Ollama and llama.cpp; none leaves it out."""
    space: bool = False
    """Also publish the page of space/ as the Space owner/name-space, which shows the model. It is
    asked for on ZeroGPU (zero-a10g), which a personal account may have without a subscription."""
    replace: bool = False
    """Replace what others, or you by hand, have put there: another model, an edited card."""
    dry_run: bool = False
    """Build the folder in output_dir and stop: no token, no network."""
    output_dir: Path | None = None
    """Empty or new folder to build in, else a temporary one; the Space's has -space after it."""
    seed: int = 1337
    """Seed of the first story in the model card."""


def check(arguments: Arguments) -> None:
    """Raises InputError for flags that the Hub would refuse, or that do not go together."""
    check_whole("seed", arguments.seed, 0, 2**63 - 3)
    if not is_hub_id(arguments.repo_id):
        raise InputError(
            f"{arguments.repo_id!r} is no name of a repo on the Hub: pass --repo_id owner/name, of "
            "letters, digits, '-', '_' and '.'"
        )
    space = space_of(arguments.repo_id)
    if arguments.space and not is_hub_id(space):
        raise InputError(
            f"{space} is too long for a Space: pass a shorter --repo_id, or no --space"
        )
    if arguments.dry_run and not arguments.output_dir:
        raise InputError("--dry_run needs a folder to build: pass --output_dir DIR")


def space_of(repo_id: str) -> str:
    """Returns the name of a model's Space."""
    return f"{repo_id}-space"


# --- The model card ---


def evaluation(checkpoint: dict, record: Record) -> dict[str, tuple[str, float | int]]:
    """Returns (name, value) by metric type: how good the model is, and what it cost."""
    loss = record.val_loss
    windows = checkpoint["training_config"].windows_per_step * record.step
    tokens = windows * checkpoint["gpt_config"].context_length
    metrics = {"loss": ("Validation loss (nats a token)", round(loss, 4))}
    if math.isfinite(perplexity(loss)):
        metrics["perplexity"] = ("Validation perplexity", round(perplexity(loss), 3))
    metrics["steps"] = ("Training steps", record.step)
    metrics["tokens"] = ("Training tokens", tokens)
    if record.data:
        bits = bits_per_byte(loss, record.data.splits["validation"])
        metrics["bits_per_byte"] = ("Validation bits per byte", round(bits, 4))
    return metrics


def quote(story: str) -> str:
    """Returns a story as a Markdown quotation in which nothing is markup."""
    escaped = re.sub(r"([\\`*_\[\]<>#|~&+=-]|(?<=\d)[.)])", r"\\\1", story)
    return "\n".join(f"> {line.strip()}".rstrip() for line in escaped.splitlines())


def table(rows: Iterable[tuple]) -> str:
    """Returns the body of a Markdown table of two columns."""
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def history(record: Record, base: str | None) -> str:
    """Says what the weights come from, as the card's first lines do."""
    data = record.data
    if not record.init_from:
        start = "from scratch"
    elif base:
        start = f"from the weights of [{base}](https://huggingface.co/{base})"
    else:
        start = "from weights of another run"
    if not data or not data.name:
        stories = "a collection of stories that is not published here."
    elif data.name in BUILTIN:
        stories = "the stories built into StoryGPT, which a small grammar writes."
    else:
        subset = f" ({data.subset})" if data.subset else ""
        stories = f"[{data.name}](https://huggingface.co/datasets/{data.name}){subset}.\n"
        stories += f"The data set was at commit `{data.commit}`."
    return f"It was trained\n{start} with StoryGPT on\n{stories}"


def in_llama_cpp(repo_id: str, prompt: str) -> str:
    """Returns the card's section on StoryGPT.gguf."""
    return f"""In Ollama or llama.cpp, from [StoryGPT.gguf](StoryGPT.gguf):

```sh
ollama run hf.co/{repo_id} {prompt}
llama-cli -hf {repo_id} --single-turn -p {prompt}
```"""


def how_stories_read(path: Path, record: Record) -> str:
    """Returns the card's table of what evaluate.py wrote to `path`, or nothing, saying why."""
    if not path.is_file():
        return ""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report.get("weights_sha256") != record.weights_sha256:
            fault = "was measured of other weights"
        elif not record.data or report["data"] != record.data.fingerprint:
            fault = "was measured on other data"
        elif "columns" not in report:
            fault = "was measured without --num_stories"
        else:
            title = (
                "{num_stories} stories told from nothing at temperature {temperature}, top_k "
                "{top_k} and top_p {top_p},\nand as many from the first sentences of held-out "
                "stories, beside those held-out stories;\nmeasured in the same way, with 95 % "
                "intervals."
            ).format_map(report)
            return f"### How its stories read\n\n{title}\n\n{story_table(report['columns'])}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        fault = "is not as evaluate.py writes it"
    print(f"{path} {fault}: its table is left out")
    return ""


def card_data(arguments: Arguments, record: Record, base: str | None, metrics: dict):
    """Returns the head of the card, which programs read, as a huggingface_hub ModelCardData."""
    from huggingface_hub import EvalResult, ModelCardData

    data = record.data
    if data and data.name in (None, *BUILTIN):  # no data set on the Hub
        data = None
    return ModelCardData(
        language=arguments.language,
        license=arguments.license,
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "storygpt"],
        datasets=[data.name] if data else None,
        model_name=arguments.repo_id.split("/")[1],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data.name if data else "stories",
                dataset_name=data.name if data else "stories",
                dataset_config=data.subset if data else None,
                dataset_revision=data.commit if data else None,
                dataset_split="validation",
                metric_type=kind,
                metric_name=title,
                metric_value=value,
            )
            for kind, (title, value) in metrics.items()
        ],
    )


def model_card(arguments: Arguments, checkpoint: dict, record: Record, model, beside: Path):
    """Returns the repo's README.md as a huggingface_hub ModelCard.

    `beside`: the folder whose loss plot and evaluation are the checkpoint's.
    """
    from huggingface_hub import ModelCard

    from storygpt.generation import generate_stories

    config, recipe, repo_id = checkpoint["gpt_config"], record.recipe, arguments.repo_id
    metrics = evaluation(checkpoint, record)
    base = record.base_model if record.base_model != repo_id else None  # none is its own base
    prompt, seeds = opening_of(checkpoint), range(arguments.seed, arguments.seed + 3)
    shell_prompt = shlex.quote(prompt)
    told = zip(seeds, generate_stories(model, prompt, seeds), strict=True)
    imports = ["import torch", "from huggingface_hub import hf_hub_download"]
    if config.vocab_size == GPT2_VOCAB_SIZE:
        imports.insert(0, "import tiktoken")
        tokenizer = 'tiktoken.get_encoding("gpt2")'
    else:  # tiktoken has no other
        imports.append("from transformers import AutoTokenizer")
        tokenizer = f'AutoTokenizer.from_pretrained("{repo_id}")'
    train = record.data and record.data.splits["train"]
    body = Template(CARD.read_text(encoding="utf-8")).substitute(
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        history=history(record, base),
        parameters=f"{record.parameters:,}",
        prompt=json.dumps(prompt, ensure_ascii=False),
        shell_prompt=shell_prompt,
        seed=arguments.seed,
        in_llama_cpp=in_llama_cpp(repo_id, shell_prompt) if arguments.gguf != "none" else "",
        imports="\n".join(imports),
        tokenizer=f"tokenizer = {tokenizer}",
        stories="\n\n".join(f"Seed {seed}:\n\n{quote(story)}" for seed, story in told),
        metrics=table((title, f"{value:,}") for title, value in metrics.values()),
        windows=f"{recipe['eval_windows']:,}",
        context_length=config.context_length,
        about_bits="Bits per byte compare models of different vocabularies." if train else "",
        plot=f"![Loss over training]({PLOT})" if (beside / PLOT).is_file() else "",
        reading=how_stories_read(beside / EVALUATION, record),
        counts=f"The training split has {train['stories']:,} stories of {train['tokens']:,} tokens."
        if train
        else "",
        settings=table((asdict(config) | recipe).items()),
    )
    body = re.sub(r"\n{3,}", "\n\n", body)  # where something is left out
    head = card_data(arguments, record, base=base, metrics=metrics).to_yaml()
    return ModelCard(f"---\n{head}\n---\n\n{body}")


# --- The folder ---


def build_folder(folder: Path, arguments: Arguments, model, checkpoint: dict) -> None:
    """Fills the empty `folder` with all files of the model repo."""
    from storygpt.checkpoint import KEYS, save_checkpoint
    from storygpt.formats import write_folder
    from storygpt.gguf import write_gguf

    record = record_of(checkpoint).public()
    checkpoint = {key: checkpoint[key] for key in KEYS} | {"record": record.begun()}
    for name in ("model.py", "config.py"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / PUBLISHED).parent.mkdir()
    save_checkpoint(folder / PUBLISHED, checkpoint)
    write_folder(folder, checkpoint)
    if arguments.gguf != "none":
        name = arguments.repo_id.split("/")[1]
        write_gguf(folder / "StoryGPT.gguf", checkpoint, name, arguments.gguf)
    beside = arguments.checkpoint.parent if arguments.checkpoint.is_file() else arguments.checkpoint
    if (beside / PLOT).is_file():
        shutil.copyfile(beside / PLOT, folder / PLOT)
    card = model_card(arguments, checkpoint, record=record, model=model, beside=beside)
    card.save(folder / "README.md")


def build_space(folder: Path, repo_id: str) -> None:
    """Makes `folder`, with all files of a Space that shows the model `repo_id`."""
    from huggingface_hub import metadata_load, metadata_save

    shutil.copytree(ROOT / "space", folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    own = {"title": repo_id.split("/")[1], "models": [repo_id]}
    metadata_save(folder / "README.md", metadata_load(folder / "README.md") | own)


# --- The command ---


def folder_beside(output_dir: Path | None) -> tempfile.TemporaryDirectory:
    """Makes a temporary folder beside `output_dir`. Raises InputError where that is not empty."""
    if output_dir is None:
        return tempfile.TemporaryDirectory()
    with writing(output_dir, "pass another --output_dir"):
        if os.path.ismount(output_dir):  # nothing can be renamed to it
            raise InputError(f"{output_dir} is a mount point: pass a folder in it")
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        if output_dir.exists() and any(output_dir.iterdir()):
            raise InputError(f"{output_dir} is not empty: pass a new --output_dir")
        if output_dir.exists():
            output_dir.rmdir()  # Windows renames nothing to what is there, even if it is empty
        return tempfile.TemporaryDirectory(prefix=".", dir=output_dir.parent)


def check_data(arguments: Arguments, checkpoint: dict) -> None:
    """Raises InputError where --data_dir holds other data than a checkpoint was trained on; says
    what the card lacks where the checkpoint does not know that."""
    known, data_dir = fingerprint_of(checkpoint), arguments.data_dir
    if not data_of(checkpoint):
        print(
            f"{arguments.checkpoint} is of an older version, and does not know its data: the card "
            "names no data set, no counts and no bits per byte"
        )
    vocab_size = checkpoint["gpt_config"].vocab_size
    if known and data_dir and data_fingerprint(load_meta(data_dir, vocab_size)) != known:
        raise InputError(
            f"{data_dir} does not hold the data that {arguments.checkpoint} was trained on: leave "
            "out --data_dir, which is not needed"
        )


def main() -> None:
    arguments = parse_flags(Arguments)
    check(arguments)
    output_dir = arguments.output_dir and arguments.output_dir.resolve()

    from storygpt.checkpoint import load_to_generate

    model, checkpoint = load_to_generate(arguments.checkpoint)
    if not ("training_config" in checkpoint and math.isfinite(checkpoint["val_loss"])):
        raise InputError(
            f"{arguments.checkpoint} was never evaluated by train.py: train on to the next "
            "evaluation, or start from it with --init_from"
        )
    check_data(arguments, checkpoint)
    token = None if arguments.dry_run else find_token(arguments.token)
    space_dir = Path(f"{output_dir}-space") if output_dir and arguments.space else None
    with folder_beside(output_dir) as scratch, folder_beside(space_dir) as space_scratch:
        folder, space = Path(scratch) / "repo", Path(space_scratch) / "repo"
        folder.mkdir()
        print("building the model repo, and telling three stories for its card")
        build_folder(folder, arguments, model, checkpoint)
        folder = folder.replace(output_dir) if output_dir else folder
        repos = [Built(folder, arguments.repo_id, "model")]
        if arguments.space:
            build_space(space, arguments.repo_id)
            space = space.replace(space_dir) if space_dir else space
            repos.append(Built(space, space_of(arguments.repo_id), "space"))
        if arguments.dry_run:
            for repo in repos:
                print(f"built in {repo.folder}; publish it without --dry_run")
            return
        published = publish(repos, token, private=arguments.private, replace=arguments.replace)
        for done in published:
            print(f"{'published:' if done.changed else 'nothing changed:'} {done.url}")
            if done.plan.keep_card:
                print("its README.md was edited there, and is kept")
    if arguments.space and published[0].plan.private:
        print(f"to read {arguments.repo_id} the Space needs a secret HF_TOKEN, in its settings")


if __name__ == "__main__":
    run(main)
