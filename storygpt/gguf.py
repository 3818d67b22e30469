"""The model and its tokenizer as one file for llama.cpp, Ollama and what else reads GGUF."""

from pathlib import Path
from typing import Literal

from storygpt.formats import vocabulary, with_biases

# A chat that is no chat: what was said, and nothing else, so that programs that open a chat with
# any model go on with the story. Without one llama.cpp takes a template of its own.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path, checkpoint: dict, name: str, dtype: Literal["f16", "f32"]) -> None:
    """Writes the model, called `name`, and its tokenizer.

    Matrices are of `dtype`; positions, norms and biases stay float32, as llama.cpp wants them.
    """
    import gguf

    config = checkpoint["gpt_config"]
    vocab, merges = vocabulary(config.vocab_size)
    end_of_text = config.vocab_size - 1
    types = [gguf.TokenType.NORMAL] * end_of_text + [gguf.TokenType.CONTROL]
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "f32": gguf.LlamaFileType.ALL_F32}

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    writer.add_add_bos_token(False)  # a prompt is told on as it stands, as generate.py does
    writer.add_chat_template(CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for ours, weight in with_biases(checkpoint["model_state_dict"]).items():
        is_matrix = weight.dim() == 2 and ours != "wpe.weight"
        theirs = names.get_name(f"transformer.{ours}", try_suffixes=(".weight", ".bias"))
        data = weight.half() if dtype == "f16" and is_matrix else weight
        writer.add_tensor(theirs, data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
