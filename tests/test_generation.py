import pytest
import torch

from config import GenerationSettings, GPTConfig
from model import GPT
from storygpt import generation
from storygpt.generation import generate_ids, generate_stories
from storygpt.tokenizer import load_tokenizer


def test_a_story_from_nothing_does_not_end_before_it_began():
    model = GPT(GPTConfig(vocab_size=512, context_length=32, n_layer=1, n_head=1, n_embd=8)).eval()
    (token,) = load_tokenizer(512).encode_ordinary(" a")
    with torch.no_grad():  # it answers everything with " a a a a"
        model.wte.weight[token] = 1.0  # all others are near 0
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
    settings = GenerationSettings(max_new_tokens=5, temperature=0)
    assert generate_stories(model, "", [1], settings) == [" a" * 5]


def test_a_story_is_that_of_its_seed_whatever_is_generated_beside_it(small):
    settings = GenerationSettings(max_new_tokens=30)
    model, seeds = small.model("long"), (5, 6, 7)
    alone = [generate_stories(model, "One day", [seed], settings)[0] for seed in seeds]
    assert generate_stories(model, "One day", seeds, settings) == alone and len(set(alone)) == 3


@pytest.mark.parametrize("ended", [0, 2])
@torch.no_grad()
def test_stories_of_different_lengths_are_those_of_each_alone(ended, small):
    model = small.model("short")
    if ended:  # what two of the greedy stories come to
        model.wte.weight[[114, 511]] = model.wte.weight[[511, 114]]
    starts = [[511], [511, 5], [511, *range(40)], [511, *range(90)]]  # the last is over the context
    settings = GenerationSettings(max_new_tokens=20, temperature=0)
    rows = generate_ids(model, starts, seed=1, settings=settings)
    for start, ids in zip(starts, rows, strict=True):
        alone = model.generate(torch.tensor([start]), 20, temperature=0, end_of_text=511)[0]
        assert ids == alone.tolist()


def test_no_batch_of_stories_repeats_another(small, monkeypatch):
    monkeypatch.setattr(generation, "AT_ONCE", 2)
    settings = GenerationSettings(max_new_tokens=64, temperature=1)
    rows = generate_ids(small.model("short"), [[511]] * 4, seed=1, settings=settings)
    assert len({tuple(ids) for ids in rows}) == 4
