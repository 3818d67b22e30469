import os
import pickle
import resource
import signal
import zipfile
from dataclasses import replace

import pytest
import torch
from conftest import python

from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.checkpoint import fit_start, load_checkpoint, load_model, load_start, save_checkpoint
from storygpt.files import write_atomically

CONFIG = GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=8)


def new_checkpoint(**changes) -> dict:
    torch.manual_seed(0)
    return {
        "gpt_config": CONFIG,
        "training_config": TrainingConfig(),
        "model_state_dict": GPT(CONFIG).state_dict(),
        "step": 7,
        "val_loss": 1.5,
    } | changes


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
    assert loaded["gpt_config"] == CONFIG and loaded["training_config"] == TrainingConfig()
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
    no_number = replace(CONFIG)
    object.__setattr__(no_number, "n_layer", "2")
    wide = replace(CONFIG, n_embd=16)
    huge = replace(CONFIG, n_layer=1000)
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
        ("keyless", {"gpt_config": CONFIG}, "it has no training_config"),
        ("stepless", new_checkpoint(step="7"), "it has no step"),
        ("odd", new_checkpoint(gpt_config=no_number), "gpt_config that is not valid: n_layer"),
        ("huge", new_checkpoint(gpt_config=huge), "do not fit its configuration"),
        ("wide", new_checkpoint(gpt_config=wide), "do not fit its configuration"),
        ("short", new_checkpoint(model_state_dict={k: weights[k] for k in list(weights)[3:]}),
         "do not fit its configuration"),
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
        assert (checkpoint["step"], checkpoint["gpt_config"]) == (7, CONFIG)
        for name, weight in checkpoint["model_state_dict"].items():
            assert torch.equal(weight, expected[name])
    assert found > 100


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, new_checkpoint(step=1))
    old = path.read_bytes()

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (0, 100, len(old) // 2, len(old) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(InputError, match=r"a\.pt cannot be written .* is kept"):
                save_checkpoint(path, new_checkpoint(step=2))
            with pytest.raises(InputError, match=r"a\.pt cannot be written"):
                save_checkpoint(path, new_checkpoint(step=2, large=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(tmp_path / "no folder" / "a.pt", new_checkpoint())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.pt", old)]


@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit(143)])
@pytest.mark.parametrize("after", range(1, 8))
def test_a_wish_to_end_in_the_middle_of_a_save_stays_one(wish, after, tmp_path):
    class Interrupted:
        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            if self.writes == after:
                raise wish
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    path, weights = tmp_path / "run.pt", {"a": torch.zeros(1000), "b": torch.ones(5)}
    path.write_bytes(b"old")
    with pytest.raises(wish if isinstance(wish, type) else SystemExit):
        write_atomically(path, lambda file: torch.save(weights, Interrupted(file)))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["run.pt"]


def test_who_is_reading_the_old_file_reads_it_to_its_end(tmp_path):
    """A copy in place would change it under the reader, and be half of each where it fails."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, new_checkpoint(step=1))
    old = path.read_bytes()
    with open(path, "rb") as reader:
        begun = reader.read(100)
        save_checkpoint(path, new_checkpoint(step=2))
        assert begun + reader.read() == old
    assert load_checkpoint(path)["step"] == 2


@pytest.mark.skipif(os.name != "posix", reason="no modes here")
def test_files_are_as_open_to_others_as_the_users_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    finally:
        os.umask(before)
    assert (tmp_path / "a.pt").stat().st_mode & 0o777 == 0o640


def test_a_shorter_context_keeps_the_first_positions(tmp_path):
    save_checkpoint(tmp_path / "a.pt", new_checkpoint())
    start = load_start(tmp_path / "a.pt")
    weights = fit_start(start, replace(CONFIG, context_length=5))
    model = GPT(replace(CONFIG, context_length=5)).eval()
    model.load_state_dict(weights)
    whole, _ = load_model(tmp_path / "a.pt")
    x = torch.arange(5)[None]
    assert torch.allclose(model(x)[0], whole(x)[0], atol=1e-6)
