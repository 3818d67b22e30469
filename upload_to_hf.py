"""Script: publishes a checkpoint on the Hugging Face Hub, as a model that transformers can load.

Builds the whole model repo in a folder first, then sends it as a single commit.
"""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Literal

from config import InputError, check_whole
from storygpt.cli import DEFAULT_CHECKPOINT, parse_flags, run
from storygpt.files import EVALUATION, writing
from storygpt.hub import find_token, is_hub_id, publish
from storygpt.token_files import bits_per_byte, data_fingerprint, load_meta

# torch takes seconds to import: --help and a mistyped flag should not have to wait for it.

ROOT = Path(__file__).resolve().parent
CARD = ROOT / "docs" / "model_card.md"  # a text for readers, so it lies with those
PUBLISHED = "checkpoints/StoryGPT_best.pt"  # what programs that load it with PyTorch alone expect


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
    """A .pt file, or a folder or Hub id that this script made of one. The loss_plot.png beside the
    file is published too, and the evaluation.json of `evaluate.py --output` becomes a table."""
    data_dir: Path = Path("data")
    """Folder of the data it was trained on: its meta.json goes into the model card."""
    language: str = "en"
    """Language of the stories, for the model card: its ISO 639 code."""
    license: str | None = None
    """Licence of the weights, for the model card, as the Hub spells it (mit, cc-by-4.0); without
    it the card names none."""
    gguf: Literal["f16", "f32", "none"] = "f16"
    """Precision of StoryGPT.gguf, the model for Ollama and llama.cpp; none leaves it out."""
    space: bool = False
    """Also publish the page of space/ as the Space owner/name-space, which shows the model."""
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
    for name, valid, example in (
        ("language", r"[a-z]{2,3}|code|multilingual", "two or three letters of ISO 639, as in en"),
        ("license", r"[a-z0-9][a-z0-9.+-]*", "one such as mit, apache-2.0 or cc-by-4.0"),
    ):
        value = getattr(arguments, name)
        if value is not None and not re.fullmatch(valid, value):
            raise InputError(f"{value!r} is no {name} of the Hub: pass --{name} with {example}")
    if arguments.dry_run and not arguments.output_dir:
        raise InputError("--dry_run needs a folder to build: pass --output_dir DIR")


# --- The folder ---


def hub_dataset(meta: dict) -> str | None:
    """The data set's name where it came from the Hub, which alone has revisions; a path of this
    machine, which may be spelled alike, stays private."""
    return meta["dataset"] if meta.get("revision") else None


def published(checkpoint: dict) -> dict:
    """What of a checkpoint is for everybody: no optimizer's state, no path of this machine."""
    from storygpt.checkpoint import KEYS

    shown = {key: checkpoint[key] for key in KEYS}
    if origin := checkpoint.get("init_from"):
        shown["init_from"] = {k: v for k, v in origin.items() if k != "checkpoint" or is_hub_id(v)}
    return shown


def evaluation(checkpoint: dict, meta: dict) -> dict[str, tuple[str, float | int]]:
    """(name, value) by metric type of all that is known of how good it is and what it cost."""
    recipe, loss, step = (checkpoint[key] for key in ("training_config", "val_loss", "step"))
    windows = recipe.batch_size * recipe.gradient_accumulation_steps * step
    metrics = {
        "loss": ("Validation loss (nats a token)", round(loss, 4)),
        "perplexity": ("Validation perplexity", round(math.exp(loss), 3)),
        "steps": ("Training steps", step),
        "tokens": ("Training tokens", windows * checkpoint["gpt_config"].context_length),
    }
    if meta:
        bits = bits_per_byte(loss, meta["splits"]["validation"])
        metrics["bits_per_byte"] = ("Validation bits per byte", round(bits, 4))
    return metrics


def quote(story: str) -> str:
    """A story as a Markdown quotation in which nothing is markup."""
    escaped = re.sub(r"([\\`*_\[\]<>#|~&+=-]|(?<=\d)[.)])", r"\\\1", story)
    return "\n".join(f"> {line.strip()}".rstrip() for line in escaped.splitlines())


def table(rows: Iterable[tuple]) -> str:
    """The body of a Markdown table of two columns."""
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def fill(template: str, **values) -> str:
    """`template` with values for its $names; what follows `<!-- if name other -->` stays where
    one of them is true, and what follows `<!-- if not name other -->` where none is."""

    def kept(part: re.Match) -> str:
        is_there = any(values[name] for name in part[2].split())
        return part[3] if is_there != bool(part[1]) else ""

    parts = r"<!-- if (not )?([\w ]+) -->\n(.*?)<!-- end -->\n"
    return Template(re.sub(parts, kept, template, flags=re.DOTALL)).substitute(values)


def read_report(path: Path, step: int, data: str) -> dict:
    """Reads what evaluate.py wrote of the weights of `step` and the data with that fingerprint.

    Empty where it wrote nothing to `path`, or of others.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if (report["step"], report["data"]) == (step, data) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def model_card(arguments: Arguments, checkpoint: dict, meta: dict, model, beside: Path):
    """The repo's README.md as a huggingface_hub ModelCard; `meta` may be empty."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from storygpt.generation import PROMPT, generate_stories
    from storygpt.judging.measures import story_table
    from storygpt.kernels import pack_linears
    from storygpt.sources import BUILTIN
    from storygpt.tokenizer import GPT2_VOCAB_SIZE

    config, recipe, step = (checkpoint[k] for k in ("gpt_config", "training_config", "step"))
    dataset, name = hub_dataset(meta), arguments.repo_id.split("/")[1]
    base = checkpoint.get("init_from", {}).get("checkpoint")
    metrics = evaluation(checkpoint, meta)
    of_dataset = dict.fromkeys(("dataset_type", "dataset_name"), dataset or "stories")
    of_dataset |= {"task_type": "text-generation", "dataset_split": "validation"}
    if dataset:
        of_dataset["dataset_config"] = meta.get("subset")
        of_dataset["dataset_revision"] = meta.get("revision")
    data = ModelCardData(
        language=arguments.language,
        license=arguments.license,
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "storygpt"],
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=[
            EvalResult(metric_type=kind, metric_name=title, metric_value=value, **of_dataset)
            for kind, (title, value) in metrics.items()
        ],
    )
    seeds = range(arguments.seed, arguments.seed + 3)
    pack_linears(model)  # as generate.py does
    told = zip(seeds, generate_stories(model, PROMPT, seeds), strict=True)
    report = read_report(beside / EVALUATION, step, meta and data_fingerprint(meta))
    counts = meta["splits"]["train"] if meta else {"stories": 0, "tokens": 0}
    body = fill(
        CARD.read_text(encoding="utf-8"),
        name=name,
        repo_id=arguments.repo_id,
        prompt=PROMPT,
        seed=arguments.seed,
        parameters=f"{model.num_parameters():,}",
        scratch="init_from" not in checkpoint,
        base=base,
        gguf=arguments.gguf != "none",
        dataset=dataset,
        commit=meta.get("revision"),
        builtin=meta.get("dataset") in BUILTIN,
        whole_vocabulary=config.vocab_size == GPT2_VOCAB_SIZE,  # tiktoken has no other
        stories="\n\n".join(f"Seed {seed}:\n\n{quote(story)}" for seed, (story, _) in told),
        metrics=table((title, f"{value:,}") for title, value in metrics.values()),
        reading=story_table(report["columns"]) if "columns" in report else "",
        num_judged=report.get("num_stories"),
        temperature=report.get("temperature"),
        windows=f"{recipe.eval_windows:,}",
        context_length=config.context_length,
        meta=meta,
        num_stories=f"{counts['stories']:,}",
        num_tokens=f"{counts['tokens']:,}",
        plot=(beside / "loss_plot.png").is_file(),
        settings=table((asdict(config) | asdict(recipe)).items()),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def build_folder(folder: Path, arguments: Arguments, model, checkpoint: dict, meta: dict) -> None:
    """Fills the empty `folder` with all files of the model repo."""
    from storygpt.checkpoint import save_checkpoint
    from storygpt.formats import write_folder, write_gguf

    for name in ("model.py", "config.py"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / PUBLISHED).parent.mkdir()
    save_checkpoint(folder / PUBLISHED, checkpoint)
    write_folder(folder, checkpoint)
    if arguments.gguf != "none":
        name = arguments.repo_id.split("/")[1]
        write_gguf(folder / "StoryGPT.gguf", checkpoint, name, arguments.gguf)
    beside = arguments.checkpoint.parent if arguments.checkpoint.is_file() else arguments.checkpoint
    if (beside / "loss_plot.png").is_file():
        shutil.copyfile(beside / "loss_plot.png", folder / "loss_plot.png")
    model_card(arguments, checkpoint, meta, model, beside).save(folder / "README.md")


def build_space(folder: Path, repo_id: str) -> None:
    """Makes `folder`, with all files of a Space that shows the model `repo_id`."""
    from huggingface_hub import metadata_load, metadata_save

    shutil.copytree(ROOT / "space", folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    own = {"title": repo_id.split("/")[1], "models": [repo_id]}
    metadata_save(folder / "README.md", metadata_load(folder / "README.md") | own)


# --- The command ---


def scratch_folder(output_dir: Path | None) -> tempfile.TemporaryDirectory:
    """A temporary folder beside `output_dir`, which must be new or empty. Raises InputError."""
    if output_dir is None:
        return tempfile.TemporaryDirectory()
    with writing(output_dir, "pass another --output_dir"):
        if output_dir.is_mount():  # nothing can be renamed to it
            raise InputError(f"{output_dir} is a mount point: pass a folder in it")
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        if output_dir.exists() and any(output_dir.iterdir()):
            raise InputError(f"{output_dir} is not empty: pass a new --output_dir")
        return tempfile.TemporaryDirectory(prefix=".", dir=output_dir.parent)


def main() -> None:
    arguments = parse_flags(Arguments)
    check(arguments)
    output_dir = arguments.output_dir and arguments.output_dir.resolve()

    from storygpt.checkpoint import load_model

    data_dir, (model, checkpoint) = arguments.data_dir, load_model(arguments.checkpoint)
    if not ("training_config" in checkpoint and math.isfinite(checkpoint["val_loss"])):
        raise InputError(
            f"{arguments.checkpoint} was never evaluated by train.py: train on to the next "
            "evaluation, or start from it with --init_from"
        )
    checkpoint, meta = published(checkpoint), {}
    if (data_dir / "meta.json").is_file():
        meta = load_meta(data_dir, checkpoint["gpt_config"].vocab_size)
    else:
        print(f"no meta.json in {data_dir} (--data_dir): no data set, no bits per byte on the card")
    token = None if arguments.dry_run else find_token(arguments.token)
    space_dir = Path(f"{output_dir}-space") if output_dir and arguments.space else None
    with scratch_folder(output_dir) as scratch, scratch_folder(space_dir) as space_scratch:
        folder, space = Path(scratch) / "repo", Path(space_scratch) / "repo"
        folder.mkdir()
        print("building the model repo, and telling three stories for its card")
        build_folder(folder, arguments, model, checkpoint, meta)
        repos = [("model", arguments.repo_id, folder, output_dir)]
        if arguments.space:
            build_space(space, arguments.repo_id)
            repos.append(("space", f"{arguments.repo_id}-space", space, space_dir))
        for kind, repo_id, built, place in repos:
            folder = built.replace(place) if place else built
            if arguments.dry_run:
                print(f"built in {folder}; publish it without --dry_run")
            else:
                url, changed = publish(folder, repo_id, token, arguments.private, kind)
                print(f"{'published:' if changed else 'nothing changed:'} {url}")
    if arguments.space and arguments.private:
        print(f"to read {arguments.repo_id} the Space needs a secret HF_TOKEN, in its settings")


if __name__ == "__main__":
    run(main)
