import json
import os
import re
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import torch
from conftest import prompts

from storygpt.gguf import CHAT_TEMPLATE, write_gguf
from storygpt.tokenizer import load_tokenizer, story_text


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_gguf_holds_the_weights_and_the_tokenizer(storyteller, dtype, tmp_path):
    model, checkpoint = storyteller
    size, kind = model.config.vocab_size, np.float16 if dtype == "f16" else np.float32
    write_gguf(tmp_path / "a.gguf", checkpoint, "StoryGPT", dtype)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    state = model.state_dict()
    assert len(tensors) == 2 + 12 * model.config.n_layer + 2
    for theirs, ours in (
        ("token_embd.weight", "wte.weight"),
        ("blk.0.attn_qkv.weight", "h.0.attn.c_attn.weight"),
        ("blk.1.ffn_down.weight", "h.1.mlp.c_proj.weight"),
    ):
        assert tensors[theirs].dtype == kind
        assert np.array_equal(tensors[theirs], state[ours].numpy().astype(kind))
    assert np.array_equal(tensors["position_embd.weight"], state["wpe.weight"].numpy())
    bias = state.get("h.0.attn.c_attn.bias", torch.zeros(3 * 48)).numpy()
    assert np.array_equal(tensors["blk.0.attn_qkv.bias"], bias)

    def field(name):
        return reader.get_field(name).contents()

    assert field("general.architecture") == field("tokenizer.ggml.model") == "gpt2"
    assert field("tokenizer.ggml.pre") == "gpt-2" and field("gpt2.context_length") == 128
    assert field("tokenizer.ggml.bos_token_id") == field("tokenizer.ggml.eos_token_id") == size - 1
    assert field("tokenizer.ggml.tokens")[-2:][1] == "<|endoftext|>"
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL  # the latter are never text
    assert field("tokenizer.ggml.token_type") == [kinds[0]] * (size - 1) + [kinds[1]]
    assert field("general.file_type") == {"f16": 1, "f32": 0}[dtype]  # as llama.cpp counts
    assert len(field("tokenizer.ggml.tokens")) == size
    assert len(field("tokenizer.ggml.merges")) == size - 257
    assert field("tokenizer.ggml.add_bos_token") is False
    assert field("tokenizer.chat_template") == CHAT_TEMPLATE


def test_llama_cpp_tells_the_same_to_a_prompt_and_in_a_chat(storyteller, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp")
    model, checkpoint = storyteller
    write_gguf(tmp_path / "a.gguf", checkpoint, "StoryGPT", "f32")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(tmp_path / "a.gguf"), 128, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server, tokenizer = xllamacpp.Server(params), load_tokenizer(model.config.vocab_size)
    for text, ids in prompts(model.config.vocab_size):
        told = model.generate(torch.tensor([ids]), 64, 0, end_of_text=tokenizer.eot_token)
        story = story_text(tokenizer, told[0, len(ids) :].tolist())
        flags = {"max_tokens": 64, "temperature": 0}
        chat = [{"role": "user", "content": text}]
        raw = server.handle_completions({"prompt": text, **flags})
        said = server.handle_chat_completions({"messages": chat, **flags})
        assert raw["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"] == len(ids)
        assert raw["choices"][0]["text"] == said["choices"][0]["message"]["content"] == story


@pytest.mark.skipif(
    not (shutil.which("node") and os.environ.get("OLLAMA_UTILS_DIR")),
    reason="needs node, and in OLLAMA_UTILS_DIR a folder with @huggingface/ollama-utils",
)
def test_the_hub_tells_ollama_to_pass_the_prompt_on():
    """By the Hub's own code, which makes Ollama's template of the GGUF's."""
    program = f"""
        const {{convertGGUFTemplateToOllama}} = require("@huggingface/ollama-utils");
        const gguf = {{chat_template: {json.dumps(CHAT_TEMPLATE)}}};
        console.log(JSON.stringify(convertGGUFTemplateToOllama(gguf).ollama));
    """
    command = ["node", "-e", program]
    folder = os.environ["OLLAMA_UTILS_DIR"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    parts = ("System", "Prompt", "Response")
    assert re.sub(r"\{\{ (if \.\w+|end) \}\}", "", made["template"]) == "".join(
        f"{{{{ .{part} }}}}" for part in parts
    )
    assert not made["tokens"] and not made["params"]["stop"]
