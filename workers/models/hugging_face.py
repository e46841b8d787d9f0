"""How the built-in GPT is described to Hugging Face: as Llama, whose names and computation it has. Pure.

Source: https://huggingface.co/docs/transformers, "LlamaConfig" and "Tokenizer configuration".
"""

from __future__ import annotations

from typing import Any

from ps.errors import MismatchError
from ps.types import ParameterTable
from workers.config import JobConfig
from workers.data.bpe import END_OF_TEXT

#: The embedding, which is the output projection too.
EMBEDDING = "model.embed_tokens.weight"
#: As `windlass sample` writes unless told otherwise.
_TEMPERATURE, _TOP_K = 0.8, 50


def check_model(job: JobConfig, table: ParameterTable, vocab_size: int) -> None:
    """See that Hugging Face can be told what this model is.

    Raises:
        MismatchError: it is not the built-in GPT, or not of this vocabulary.
    """
    if job.model.name != "gpt":
        raise MismatchError(f"model.name={job.model.name}: only the built-in gpt has a form in Hugging Face (Llama)")
    rows = next((tensor.shape[0] for tensor in table.tensors if tensor.name == EMBEDDING), None)
    if rows is None:
        raise MismatchError(f"the checkpoint holds no {EMBEDDING}: it is not the built-in gpt")
    if rows != vocab_size:
        raise MismatchError(
            f"the tokenizer has {vocab_size} entries and the checkpoint's {EMBEDDING} {rows}: they are not of one "
            f"run; name the run's tokenizer with --tokenizer FILE"
        )


def model_config(job: JobConfig, vocab_size: int, end_of_text: int, dtype: str) -> dict[str, Any]:
    """Return config.json.

    Args:
        end_of_text: the special token, which stands before the first token of a text and after the last one.
        dtype: of the weights: float32, float16 or bfloat16.
    """
    model = job.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.feed_forward_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.hidden_size // model.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": job.data.sequence_length,
        "rms_norm_eps": model.norm_eps,
        # Before transformers 5, and since.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        # Before transformers 4.56, and since.
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def generation_config(end_of_text: int) -> dict[str, Any]:
    """Return generation_config.json."""
    return {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "do_sample": True,
        "temperature": _TEMPERATURE,
        "top_k": _TOP_K,
    }


def tokenizer_config(sequence_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json: what is in tokenizer.json is used as it is."""
    return {
        # Named, because what is chosen for a Llama model otherwise differs between versions.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
