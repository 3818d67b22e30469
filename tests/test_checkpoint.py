import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, new_checkpoint, python

from config import InputError, TrainingConfig
from model import GPT
from storygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from storygpt.record import opening_of, weights_sha256


class Stranger:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_model_comes_back_as_it_was(tmp_path):
    checkpoint = new_checkpoint()
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    model, loaded = load_model(tmp_path / "a.pt")
    assert loaded["gpt_config"] == SMALL and loaded["training_config"] == TrainingConfig()
    assert (loaded["step"], loaded["val_loss"]) == (7, 1.5)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, checkpoint["model_state_dict"][name])
    assert model.lm_head.weight is model.wte.weight
    assert not model.training


def test_loading_is_quick_to_start(tmp_path):
    save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    load = "import sys; from storygpt import checkpoint; checkpoint.load_model(sys.argv[1])"
    result = python("-c", f"{load}; assert 'torch._dynamo' not in sys.modules", tmp_path / "a.pt")
    assert result.returncode == 0, result.stderr


def test_readable_by_the_reference_program(tmp_path):
    save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    checkpoint = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=False)
    model = GPT(checkpoint["gpt_config"])
    model.load_state_dict(checkpoint["model_state_dict"])


def strangers(folder, proof):
    """(name, what the error says) of files that are no checkpoints."""
    good = folder / "good.pt"
    save_checkpoint(good, new_checkpoint())
    data = good.read_bytes()
    weights = new_checkpoint()["model_state_dict"]
    no_number = replace(SMALL)
    object.__setattr__(no_number, "n_layer", "2")
    wide = replace(SMALL, n_embd=16)
    huge = replace(SMALL, n_layer=1000)
    for name, content, says in (
        ("missing", None, "there is no checkpoint"),
        ("empty", b"", "is damaged or not a checkpoint"),
        ("half", data[: len(data) // 2], "is damaged or not a checkpoint"),
        ("text", b"Once upon a time" * 100, "is damaged or not a checkpoint"),
        ("cloned", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "git lfs pull"),
        ("flipped", data[:3000] + bytes([data[3000] ^ 16]) + data[3001:], "is damaged"),
        ("pickle", pickle.dumps(Stranger(proof)), "is damaged or not a checkpoint"),
        ("stranger", new_checkpoint(step=Stranger(proof)), "could run a stranger's code"),
        ("tensor", torch.zeros(3), "it has no gpt_config"),
        ("keyless", {"gpt_config": SMALL}, "it has no training_config"),
        ("stepless", new_checkpoint(step="7"), "it has no step"),
        ("odd", new_checkpoint(gpt_config=no_number), "gpt_config that is not valid: n_layer"),
        ("huge", new_checkpoint(gpt_config=huge), "do not fit its configuration"),
        ("wide", new_checkpoint(gpt_config=wide), "do not fit its configuration"),
        ("short", new_checkpoint(model_state_dict={k: weights[k] for k in list(weights)[3:]}),
         "do not fit its configuration"),
        ("whole", new_checkpoint(model_state_dict={k: w.int() for k, w in weights.items()}),
         "its weights are of another kind"),
        ("sparse", new_checkpoint(model_state_dict={k: w.to_sparse() for k, w in weights.items()}),
         "its weights are of another kind"),
        ("more", new_checkpoint(model_state_dict=weights | {"more": torch.zeros(3)}),
         r"more is \(3,\), where the model has none"),
    ):  # fmt: skip
        path = folder / f"{name}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        yield path, says
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    yield folder / "zip.pt", "is damaged or not a checkpoint"


def test_strangers_are_refused_in_one_sentence_and_run_nothing(tmp_path):
    for path, says in strangers(tmp_path, tmp_path / "proof"):
        with pytest.raises(InputError, match=says) as error:
            load_model(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "proof").exists()


def test_a_head_of_its_own_is_refused_and_not_lost(tmp_path):
    """Our model has none: what it would compute with the embedding in its place is another's."""
    weights = new_checkpoint()["model_state_dict"]
    weights["lm_head.weight"] = weights["wte.weight"] + 1
    save_checkpoint(tmp_path / "a.pt", new_checkpoint(model_state_dict=weights))
    with pytest.raises(InputError, match="a head that is not its embedding"):
        load_model(tmp_path / "a.pt")


def test_a_checkpoint_of_an_older_version_has_as_many_validation_windows_as_it_had(tmp_path):
    """It counted batches of batch_size windows."""
    older = replace(TrainingConfig(), batch_size=16)
    del older.__dict__["eval_windows"]
    older.__dict__["eval_iters"] = 20
    save_checkpoint(tmp_path / "a.pt", new_checkpoint(training_config=older))
    assert load_checkpoint(tmp_path / "a.pt")["training_config"].eval_windows == 320


def test_every_flipped_byte_is_found_or_harmless(tmp_path):
    expected = new_checkpoint()["model_state_dict"]
    save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    data = (tmp_path / "a.pt").read_bytes()
    found = 0
    for position in range(0, len(data), max(1, len(data) // 400)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "b.pt").write_bytes(flipped)
        try:
            checkpoint = load_checkpoint(tmp_path / "b.pt")
        except InputError:
            found += 1
            continue
        assert (checkpoint["step"], checkpoint["gpt_config"]) == (7, SMALL)
        for name, weight in checkpoint["model_state_dict"].items():
            assert torch.equal(weight, expected[name])
    assert found > 100


def test_weights_in_half_precision_are_read_as_float32(tmp_path):
    weights = {name: w.bfloat16() for name, w in new_checkpoint()["model_state_dict"].items()}
    save_checkpoint(tmp_path / "a.pt", new_checkpoint(model_state_dict=weights, record=None))
    model, checkpoint = load_model(tmp_path / "a.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert opening_of(checkpoint) == "Once upon a time"
    assert len(weights_sha256(checkpoint["model_state_dict"])) == 64
