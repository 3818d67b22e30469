import io
import json
import locale
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prompts
from hub_server import Hub
from safetensors.torch import load_file, save_file, save_model
from test_checkpoint import Stranger

from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.builtin_stories import sample_stories
from storygpt.checkpoint import load_checkpoint, load_model, load_start, save_checkpoint
from storygpt.files import BEST
from storygpt.formats import tokenizer_files, write_folder
from storygpt.record import weights_sha256
from storygpt.tokenizer import load_tokenizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 50257}


def write_gpt2(folder: Path, half: torch.dtype | None = None, bare=False, shards=False, **changes):
    """A GPT-2 with sharp random weights and biases, written by transformers itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(SHAPE | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.to(half) if half else model
    written = model.transformer if bare else model
    written.save_pretrained(folder, **({"max_shard_size": "100KB"} if shards else {}))
    return folder


def rewrite(folder: Path, change) -> Path:
    """`folder` with its weights as `change` returns them, from names to tensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_masks(tensors: dict) -> dict:
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def with_head(tensors: dict) -> dict:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def save_tied(folder: Path) -> Path:
    """As safetensors' own function for models with tied weights saves it: of the two, the head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_gpt2(folder))
    save_model(model, folder / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")
    return folder


def without_padding(tensors: dict) -> dict:
    tensors["transformer.wte.weight"][50257:] = 0  # as training leaves them: never told
    return tensors


def beside_an_old_pickle(folder: Path) -> Path:
    (folder / "pytorch_model.bin").write_bytes(b"of another version, and not read")
    return folder


def as_bin(folder: Path, **options) -> Path:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()
    return folder


def common_names(folder: Path) -> Path:
    """`folder` with a config.json as other programs write it, which transformers reads, too."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_heads"] = config.pop("n_head")
    config["num_hidden_layers"] = config.pop("n_layer")
    path.write_text(json.dumps(config))
    return folder


GPT2S = {
    "plain": write_gpt2,
    "without transformer.": lambda f: write_gpt2(f, bare=True),
    "several files": lambda f: write_gpt2(f, shards=True),
    "several files without transformer.": lambda f: write_gpt2(f, shards=True, bare=True),
    "float16": lambda f: write_gpt2(f, half=torch.float16),
    "bfloat16": lambda f: write_gpt2(f, half=torch.bfloat16),
    "12 layers": lambda f: write_gpt2(f, n_layer=12, n_head=4),
    "one head, small vocabulary": lambda f: write_gpt2(f, n_layer=3, n_head=1, vocab_size=512),
    "padded vocabulary": lambda f: rewrite(write_gpt2(f, vocab_size=50304), without_padding),
    "harmless settings and files": lambda f: beside_an_old_pickle(
        write_gpt2(
            f, reorder_and_upcast_attn=True, n_inner=128, activation_function="gelu_pytorch_tanh"
        )
    ),
    "masks and head stored": lambda f: rewrite(write_gpt2(f), lambda t: with_head(with_masks(t))),
    "the head stored for both": save_tied,
    "names that all models have in common": lambda f: common_names(write_gpt2(f, n_head=4)),
    "pytorch_model.bin": lambda f: as_bin(write_gpt2(f)),
    "pytorch_model.bin of old": lambda f: as_bin(
        write_gpt2(f), _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("shape", GPT2S)
def test_any_gpt2_that_transformers_wrote_is_a_checkpoint(shape, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = GPT2S[shape](tmp_path / "gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, checkpoint = load_model(folder)
    assert not ours.training and checkpoint["step"] == 0 and checkpoint["val_loss"] == math.inf
    size = ours.config.vocab_size
    assert size == min(theirs.config.vocab_size, 50257)
    x = torch.randint(size, (10, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x).logits[..., :size]
        assert (ours(x)[0] - expected).abs().max() <= 1e-4
        assert expected.std() > 0.5  # so that the bound says something
    told = theirs.generate(x[:, :10], do_sample=False, max_new_tokens=20, eos_token_id=-1)
    assert told.tolist() == ours.generate(x[:, :10], 20, 0).tolist()


def with_tokenizer(folder: Path, *names: str, swap: int | None = None, late=None) -> Path:
    """`folder` with the named files of GPT-2's tokenizer; two of its tokens trade ids at `swap`,
    and the merge at `late` comes one place later."""
    files = tokenizer_files(50257, 64)
    vocab = json.loads(files["vocab.json"])
    tokenizer = json.loads(files["tokenizer.json"])
    merges = tokenizer["model"]["merges"]
    if swap:
        by_id = sorted(vocab, key=vocab.get)
        vocab[by_id[swap]], vocab[by_id[swap + 1]] = swap + 1, swap
    if late:
        merges.insert(late + 1, merges.pop(late))
    # the spelling of tokenizers 0.20 and newer
    tokenizer["model"] |= {"vocab": vocab, "merges": [pair.split(" ") for pair in merges]}
    files |= {"vocab.json": json.dumps(vocab), "tokenizer.json": json.dumps(tokenizer)}
    files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    for name in names:
        (folder / name).write_text(files[name], encoding="utf-8")
    return folder


def test_gpt2s_tokenizer_is_known_in_each_of_its_spellings(tmp_path):
    folder = write_gpt2(tmp_path / "gpt2")
    load_model(with_tokenizer(folder, "vocab.json", "merges.txt"))
    load_model(with_tokenizer(folder, "tokenizer.json"))


@pytest.mark.parametrize("size", [512, 50257])
def test_rows_that_others_added_are_of_no_text_in_any_vocabulary(size, tmp_path):
    """A pad token of its own, as many recipes add it: the end of a story is what it was."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = GPT(GPTConfig(size, context_length=48, n_layer=1, n_head=2, n_embd=16))
    run = {"gpt_config": model.config, "model_state_dict": model.state_dict()}
    run |= {"training_config": TrainingConfig(), "step": 7, "val_loss": 2.5}
    write_folder(tmp_path, run)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    for folder, multiple in ((tmp_path / "pad", None), (tmp_path / "fast", 64)):
        theirs.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
        theirs.save_pretrained(folder)
        for _ in range(2):  # without its tokenizer, and with it
            loaded, said = load_model(folder)
            assert loaded.config == model.config and said["step"] == 7
            assert torch.equal(loaded.wte.weight, model.wte.weight)
            tokenizer.save_pretrained(folder)


def edit_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_model(folder: Path, **model) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    return folder


def with_cut_tokenizer(folder: Path, size: int) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer_files(size, 64)["tokenizer.json"])
    return folder


def with_file(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"[PAD]\n[UNK]\n")
    return folder


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.parent


def bomb(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    weights = {"wte.weight": Stranger(folder / "proof")}
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def drop(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def without_large_files(folder: Path, name: str) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    return folder


def point_outside(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder.parent / "out.safetensors")
    index = {"weight_map": {"wte.weight": "../out.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def other_head(tensors: dict) -> dict:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}


def not_a_number(tensors: dict) -> dict:
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = torch.nan
    return tensors


FOREIGN = {
    "llama": (lambda f: edit_config(f, model_type="llama"), "is a llama model's"),
    "bert": (lambda f: edit_config(f, model_type="bert"), "is a bert model's"),
    "gelu": (lambda f: edit_config(f, activation_function="gelu"), "activation_function 'gelu'"),
    "n_inner": (lambda f: edit_config(f, n_inner=100), "n_inner 100"),
    "by layer": (
        lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx True",
    ),
    "unscaled": (lambda f: edit_config(f, scale_attn_weights=False), "scale_attn_weights False"),
    "untied": (lambda f: edit_config(f, tie_word_embeddings=False), "tie_word_embeddings False"),
    "other head": (lambda f: rewrite(f, other_head), "a head that is not its embedding"),
    "epsilon": (lambda f: edit_config(f, layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06"),
    "text for a number": (
        lambda f: edit_config(f, n_embd="wide"),
        "config.json is not valid: n_embd",
    ),
    "classifier": (
        lambda f: rewrite(f, lambda t: t | {"score.weight": torch.ones(2, 32)}),
        "score.weight is (2, 32), where the model has none",
    ),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"load_in_8bit": True}),
        "quantization_config {'load_in_8bit': True}, which StoryGPT's model does not do",
    ),
    "BERT's tokenizer by name": (
        lambda f: edit_config(f, tokenizer_class="BertTokenizer", vocab_size=21128),
        "tokenizer_class 'BertTokenizer'",
    ),
    "BERT's tokenizer": (
        lambda f: with_file(f, "vocab.txt"),
        "vocab.txt is a tokenizer of another kind",
    ),
    "SentencePiece": (
        lambda f: with_file(f, "spiece.model"),
        "spiece.model is a tokenizer of another kind",
    ),
    "WordPiece": (
        lambda f: with_model(f, type="WordPiece", vocab={"[PAD]": 0, "a": 1}),
        "tokenizer.json is a tokenizer of another kind",
    ),
    "Unigram": (
        lambda f: with_model(f, type="Unigram", vocab=[["<unk>", 0.0], ["a", -1.5]]),
        "tokenizer.json is a tokenizer of another kind",
    ),
    "an end of text of its own": (
        lambda f: with_model(f, type="BPE", vocab={"<|endoftext|>": 0, "a": 1}, merges=[]),
        "tokenizer.json is a tokenizer of another kind",
    ),
    "more tokens than rows": (
        lambda f: with_tokenizer(write_gpt2(f / "s", vocab_size=512), "tokenizer.json"),
        "tokenizer.json is a tokenizer of another kind",
    ),
    "the tokenizer of a smaller model": (
        lambda f: with_cut_tokenizer(f, 4096),
        "tokenizer.json is a tokenizer of another kind",
    ),
    "adapter": (
        lambda f: drop(with_file(f, "adapter_config.json"), "config.json"),
        "has no config.json; pass what PEFT's merge_and_unload and then save_pretrained make",
    ),
    "another tokenizer": (
        lambda f: with_tokenizer(f, "tokenizer.json", swap=1000),
        "tokenizer.json is a tokenizer of another kind",
    ),
    "another vocabulary": (
        lambda f: with_tokenizer(f, "vocab.json", "merges.txt", swap=1000),
        "is a tokenizer of another kind",
    ),
    "other merges": (
        lambda f: with_tokenizer(f, "vocab.json", "merges.txt", late=1000),
        "is a tokenizer of another kind",
    ),
    "half a tokenizer": (
        lambda f: cut(with_tokenizer(f, "tokenizer.json") / "tokenizer.json"),
        "tokenizer.json is damaged",
    ),
    "missing file": (
        lambda f: drop(write_gpt2(f / "s", shards=True), "model-00002-of-00003.safetensors"),
        "it has no model-00002-of-0000",
    ),
    "half a file": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
    "bomb": (bomb, "could run a stranger's code"),
    "cloned": (lambda f: without_large_files(f, "model.safetensors"), "run `git lfs pull`"),
    "cloned, older": (lambda f: without_large_files(f, "pytorch_model.bin"), "run `git lfs pull`"),
    "file elsewhere": (point_outside, "index.json is damaged"),
    "not a number": (lambda f: rewrite(f, not_a_number), "h.1.mlp.c_fc.weight in"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("plain") / "gpt2")


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_and_damaged_models_are_one_sentence(kind, plain, tmp_path):
    make, says = FOREIGN[kind]
    folder = make(Path(shutil.copytree(plain, tmp_path / "gpt2")))
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert not (folder / "proof").exists()


def test_what_diverged_tells_no_story(script, fails, run_dir, data_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / BEST)
    for name, value in (("a", torch.inf), ("b", torch.nan)):
        checkpoint["model_state_dict"]["h.0.ln_1.weight"][0] = value
        save_checkpoint(tmp_path / f"{name}.pt", checkpoint)
    fails("generate.py", "--checkpoint", tmp_path / "a.pt", says="h.0.ln_1.weight in")
    flags = ("--checkpoint", tmp_path / "b.pt", "--data_dir", data_dir)
    fails("evaluate.py", *flags, says="is not finite")


def test_the_origin_of_a_run_is_its_weights(tmp_path):
    model, checkpoint = load_model(write_gpt2(tmp_path / "gpt2"))
    config, state_dict, origin = load_start(tmp_path / "gpt2")
    assert config == model.config and state_dict.keys() == model.state_dict().keys()
    assert origin["checkpoint"] == str(tmp_path / "gpt2")
    recipe = {"training_config": TrainingConfig()}
    save_checkpoint(tmp_path / "a.pt", checkpoint | recipe)
    assert load_start(tmp_path / "a.pt")[2]["sha256"] == origin["sha256"]
    checkpoint["model_state_dict"]["wpe.weight"][0, 0] += 1
    save_checkpoint(tmp_path / "b.pt", checkpoint | recipe)
    assert load_start(tmp_path / "b.pt")[2]["sha256"] != origin["sha256"]


def told(output: str) -> str:
    return output.split(" tokens in ")[0].rsplit("\n", 1)[0]


def test_a_gpt2_of_the_hub_is_a_checkpoint_everywhere(script, fails, tmp_path, data_dir):
    """Told from, trained on, published, told from again and published elsewhere."""
    folder = write_gpt2(tmp_path / "gpt2", vocab_size=512)
    for name, text in tokenizer_files(512, 64).items():
        (folder / name).write_text(text, encoding="utf-8")
    as_bin(shutil.copytree(folder, tmp_path / "old"))
    home, run = tmp_path / "hf", tmp_path / "run"
    with Hub() as hub:
        for name, source in (("gpt2-like", folder), ("old", tmp_path / "old")):
            files = {path.name: path.read_bytes() for path in source.iterdir()}
            hub.add(
                f"models/them/{name}", files | {"tf_model.h5": b"large", "onnx/a.bin": b"larger"}
            )
        hub.repos["models/them/gpt2-like"].commits[-1]["pytorch_model.bin"] = b"twice"
        environment = hub.environment(home) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def greedy(checkpoint) -> str:
            flags = ("--checkpoint", checkpoint, "--temperature", 0, "--max_new_tokens", 20)
            flags += ("--prompt", "Once upon a time")
            result = script("generate.py", *flags, "--device", "cpu", **environment)
            assert result.code == 0, result.output
            return told(result.output)

        assert greedy(folder) == greedy("them/gpt2-like") == greedy("them/old")
        for unread in ("tf_model.h5", "onnx/a.bin", "gpt2-like/resolve/.*/pytorch_model.bin"):
            assert not any(unread in request for request in hub.requests), unread

        flags = "--max_steps 2 --warmup_steps 0 --batch_size 2 --gradient_accumulation_steps 1 "
        flags = (flags + "--learning_rate 0.01 --min_lr 0.01 --eval_windows 2 --device cpu").split()
        flags += ["--data_dir", data_dir, "--checkpoint_dir", run]
        result = script("train.py", "--init_from", "them/gpt2-like", *flags, **environment)
        assert result.code == 0, result.output

        def publish(repo_id, checkpoint) -> dict[str, bytes]:
            flags = ("--repo_id", repo_id, "--checkpoint", checkpoint, "--data_dir", data_dir)
            result = script("upload_to_hf.py", *flags, **environment)
            assert result.code == 0, result.output
            return hub.repos[f"models/{repo_id}"].commits[-1]

        published = publish("you/StoryGPT", run / "StoryGPT_final.pt")
        card = published["README.md"].decode()
        assert "\nbase_model: them/gpt2-like\n" in card and "[them/gpt2-like](" in card
        assert "the stories built into StoryGPT" in card  # those of data_dir
        assert greedy("you/StoryGPT") == greedy(run / "StoryGPT_final.pt") != greedy(folder)
        # what was published is itself a checkpoint with all that a card says
        again = publish("you/Again", "you/StoryGPT")
        for name in set(published) - {"loss_plot.png", "StoryGPT.gguf", f"checkpoints/{BEST}"}:
            content = published[name].replace(b"you/StoryGPT", b"you/Again")
            content = content.replace(b"# StoryGPT\n", b"# Again\n")
            content = content.replace(b"name: StoryGPT\n", b"name: Again\n")
            content = content.replace(b"\n\n![Loss over training](loss_plot.png)\n", b"\n")
            assert again[name] == content, name
        flags = ("--repo_id", "you/Other", "--data_dir", data_dir, "--checkpoint")
        fails("upload_to_hf.py", *flags, folder, says="start from it with --init_from")
        fails("upload_to_hf.py", *flags, "you/none", says="cannot be downloaded", **environment)
    # the server is gone: what generate.py downloaded serves transformers, too
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = {"cache_dir": home / "hub", "local_files_only": True}
    theirs = AutoModelForCausalLM.from_pretrained("you/StoryGPT", **here)
    tokenizer = AutoTokenizer.from_pretrained("you/StoryGPT", **here)
    prompt = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    ids = theirs.generate(prompt, do_sample=False, max_length=None, max_new_tokens=20)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.strip() == greedy(run / "StoryGPT_final.pt").strip()


def test_the_settings_that_others_read_are_the_models_own(tmp_path):
    from transformers import GenerationConfig, GPT2Config

    from generate import Arguments

    shape = {"vocab_size": 300, "context_length": 48, "n_layer": 3, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape, dropout=0.25, init_std=0.07, bias=False))
    run = {"gpt_config": model.config, "model_state_dict": model.state_dict()}
    run |= {"training_config": TrainingConfig(batch_size=3), "step": 7, "val_loss": 2.5}
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")  # whose files are ASCII, where nothing else is said
    try:
        write_folder(tmp_path, run)
        loaded = load_model(tmp_path)[1]
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    theirs = GPT2Config.from_pretrained(tmp_path)
    assert theirs.vocab_size == 300 and (theirs.n_layer, theirs.n_head) == (3, 2)
    assert theirs.n_positions == theirs.n_ctx == 48 and theirs.n_embd == 16
    assert theirs.attn_pdrop == theirs.embd_pdrop == theirs.resid_pdrop == 0.25
    assert theirs.initializer_range == 0.07 and theirs.activation_function == "gelu_new"
    told, default = GenerationConfig.from_pretrained(tmp_path), Arguments().sampling
    assert told.do_sample and told.max_length == 48
    assert (told.temperature, told.top_k) == (default.temperature, default.top_k)
    for ids in (theirs, told):
        assert ids.eos_token_id == ids.bos_token_id == ids.pad_token_id == 299
    assert loaded.keys() == {*run, "record"}
    assert all(loaded[key] == run[key] for key in run.keys() - {"model_state_dict"})
    assert loaded["record"] == {"data": None, "init_from": None}  # as much as there was


def tune(tensors: dict) -> dict:
    return {name: weight + 0.01 for name, weight in tensors.items()}


def tune_biases(tensors: dict) -> dict:
    return tensors | {n: t + 0.01 for n, t in tensors.items() if n.endswith("bias")}


CHANGED = {
    "tuned": tune,
    "only zeros that stood for no bias": tune_biases,
    "another precision": lambda tensors: {n: t.bfloat16() for n, t in tensors.items()},
    "one number": lambda t: t | {"wpe.weight": t["wpe.weight"].index_fill(0, torch.tensor(0), 0)},
}


@pytest.mark.parametrize("change", CHANGED)
def test_an_entry_is_believed_of_the_weights_it_was_written_for_alone(change, fails, tmp_path):
    """By whatever program they were changed; those of others keep our entry in config.json."""
    from transformers import AutoModelForCausalLM

    config = GPTConfig(
        vocab_size=300, context_length=48, n_layer=2, n_head=2, n_embd=16, bias=False
    )
    torch.manual_seed(0)
    run = {"gpt_config": config, "model_state_dict": GPT(config).state_dict()}
    run |= {"training_config": TrainingConfig(), "step": 7, "val_loss": 2.5}
    write_folder(tmp_path, run)
    right = load_model(tmp_path)[1]
    assert (right["step"], right["val_loss"]) == (7, 2.5) and not right["gpt_config"].bias
    rewrite(tmp_path, CHANGED[change])
    model, loaded = load_model(tmp_path)
    assert loaded.keys() == {"gpt_config", "model_state_dict", "step", "val_loss"}
    assert (loaded["step"], loaded["val_loss"]) == (0, math.inf)
    assert loaded["gpt_config"].bias == ("tuned" in change or "zeros" in change)
    x = torch.arange(40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (model(x)[0] - theirs(x).logits).abs().max() <= 1e-4
    flags = ("--repo_id", "you/Tuned", "--dry_run", "--output_dir", tmp_path / "out")
    says = "was never evaluated by train.py: train on to the next evaluation, or start from it with"
    fails("upload_to_hf.py", *flags, "--checkpoint", tmp_path, says=says)


def test_a_folder_published_before_there_was_a_sum_is_weights_alone(tmp_path):
    """As 4f20429 wrote it: no record, and names with `transformer.`."""
    folder = write_gpt2(tmp_path / "gpt2")
    known = {"bias": True, "step": 9, "val_loss": 1.5, "training_config": asdict(TrainingConfig())}
    model, loaded = load_model(edit_config(folder, storygpt=known))
    assert loaded.keys() == {"gpt_config", "model_state_dict", "step", "val_loss"}
    assert load_start(folder).origin["sha256"] == weights_sha256(model.state_dict())
    with pytest.raises(InputError, match=r"config.json is damaged or not a checkpoint"):
        load_model(edit_config(folder, storygpt={"record": {"data": 1}}))


def test_a_private_origin_is_not_published(script, tmp_path):
    config, state_dict, origin = load_start(write_gpt2(tmp_path / "gpt2"))
    run = {"gpt_config": config, "model_state_dict": state_dict}
    run |= {"training_config": TrainingConfig(), "step": 7, "val_loss": 2.5}
    run |= {"record": {"data": None, "init_from": origin}}
    save_checkpoint(tmp_path / "run.pt", run)
    flags = ("--repo_id", "you/StoryGPT", "--checkpoint", tmp_path / "run.pt", "--dry_run")
    out = tmp_path / "out"
    result = script("upload_to_hf.py", *flags, "--output_dir", out)
    assert result.code == 0, result.output
    card = (out / "README.md").read_text()
    assert "base_model" not in card and "from weights of another run" in card
    published = load_checkpoint(out / "checkpoints" / BEST)["record"]["init_from"]
    assert published == {"sha256": origin["sha256"]}
    assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in out.rglob("*.*"))


# --- Told elsewhere ---


PROGRAM = """\
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

folder, texts = sys.argv[1], json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(folder)
told = {}
for name, kind in (("auto", AutoTokenizer), ("gpt2", GPT2Tokenizer)):
    tokenizer = kind.from_pretrained(folder)
    told[name] = tokenizer(texts)["input_ids"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, do_sample=False, max_length=None, max_new_tokens=32)
    told[name + " end"] = tokenizer("Tom" + tokenizer.eos_token)["input_ids"][-1]
    told[name + " batch"] = [ids[i, len(ids[i]) - 32 :].tolist() for i in range(len(texts))]
json.dump(told, sys.stdout)
"""
# Other Pythons, of which each has a transformers of its own, for instance the oldest one we name.
PYTHONS = [sys.executable, *os.environ.get("TRANSFORMERS_PYTHONS", "").split()]


@pytest.mark.parametrize("python", PYTHONS)
def test_a_batch_tells_what_each_prompt_alone_tells(
    storyteller, python, tmp_path, monkeypatch, capsys
):
    model, checkpoint = storyteller
    write_folder(tmp_path, checkpoint)
    beginnings = prompts(model.config.vocab_size)
    texts = json.dumps([text for text, _ in beginnings])
    if python == sys.executable:  # without the seconds of its imports
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(texts))
        exec(PROGRAM, {})
        told = capsys.readouterr().out
    else:
        command = [python, "-c", PROGRAM, tmp_path]
        result = subprocess.run(command, input=texts, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        told = result.stdout
    theirs = json.loads(told)
    end_of_text = model.config.vocab_size - 1
    assert theirs["auto end"] == theirs["gpt2 end"] == end_of_text
    for i, (_, ids) in enumerate(beginnings):
        assert theirs["auto"][i] == theirs["gpt2"][i] == ids
        expected = model.generate(torch.tensor([ids]), 32, 0)[0, len(ids) :].tolist()
        if end_of_text in expected:
            first = expected.index(end_of_text)
            expected[first:] = [end_of_text] * (32 - first)
        assert theirs["auto batch"][i] == theirs["gpt2 batch"][i] == expected


# --- Fine-tuned elsewhere ---


def endings() -> list[str]:
    """Twenty short stories, of which each stops somewhere else."""
    tokenizer = load_tokenizer(4096)
    stories = enumerate(sample_stories(20, seed=3))
    return [tokenizer.decode(tokenizer.encode_ordinary(text)[: 20 + i]) for i, text in stories]


def how_many_end(folder: Path) -> int:
    """How many of `endings` a model tells to an end, from their first tokens."""
    model, tokenizer = load_model(folder)[0], load_tokenizer(4096)
    begun = [torch.tensor([tokenizer.encode_ordinary(text)[:8]]) for text in endings()]
    return sum(tokenizer.eot_token in model.generate(ids, 40, 0)[0] for ids in begun)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A published model that knows `endings` by heart, and has never seen an end."""
    tokenizer = load_tokenizer(4096)
    rows = torch.full((20, 48), -100)
    for row, text in zip(rows, endings(), strict=True):
        ids = tokenizer.encode_ordinary(text)
        row[: len(ids)] = torch.tensor(ids)
    shape = {"context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 48, "dropout": 0.0}
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4096, **shape, init_std=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(rows[:, :-1].clamp(min=0), rows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("endless")
    run = {"gpt_config": model.config, "model_state_dict": model.state_dict()}
    write_folder(folder, run | {"training_config": TrainingConfig(), "step": 80, "val_loss": 1.0})
    assert how_many_end(folder) == 0
    return folder


def check_labels(trainer, end_of_text: int) -> None:
    """Every story is in a trainer's labels with its end, and what is padding in none of them."""
    rows = [row for batch in trainer.get_train_dataloader() for row in batch["labels"].tolist()]
    kept = sorted([token for token in row if token != -100] for row in rows)
    tokenizer = load_tokenizer(end_of_text + 1)
    assert kept == sorted([*tokenizer.encode_ordinary(text), end_of_text] for text in endings())
    assert any(row[-1] == -100 for row in rows) and not any(row[0] == -100 for row in rows)


def test_the_documented_fine_tune_by_hf_trainer_teaches_the_end(endless, tmp_path, monkeypatch):
    docs = (Path(__file__).parent.parent / "docs" / "publishing.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n([^`]*Trainer\([^`]*)```", docs)
    for ours, here in (
        ("you/StoryGPT", str(endless)),
        ('"tuned", ', '"tuned", learning_rate=1e-2, save_strategy="no", use_cpu=True, '),
    ):
        assert ours in recipe
        recipe = recipe.replace(ours, here)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) + "\n" for text in endings()]
    (tmp_path / "stories.jsonl").write_text("".join(lines))
    names = {}
    exec(recipe, names)
    check_labels(names["trainer"], 4095)
    assert how_many_end(tmp_path / "tuned") == 20
    tuned = json.loads((tmp_path / "tuned" / "tokenizer_config.json").read_text())
    assert tuned["padding_side"] == "left"  # for generating


def test_a_fine_tune_by_trl_teaches_the_end(endless, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    config = {"num_train_epochs": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    config |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    trainer = trl.SFTTrainer(
        str(endless),
        trl.SFTConfig(str(tmp_path), **config),
        train_dataset=Dataset.from_dict({"text": endings()}),
    )
    check_labels(trainer, 4095)
    trainer.train()
    trainer.save_model(tmp_path)
    assert how_many_end(tmp_path) == 20


def test_mlx_lm_computes_what_we_do(storyteller, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    import mlx.core as mx

    model, checkpoint = storyteller
    write_folder(tmp_path, checkpoint)
    theirs, _ = mlx_lm.load(str(tmp_path))
    x = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(x)[0].numpy()
    assert np.abs(ours - np.array(theirs(mx.array(x.numpy())))).max() <= 1e-4
    assert ours.std() > 0.5  # so that the bound says something
