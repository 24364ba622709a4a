"""A tiny model of Qwen3's architecture with random weights, as an ordinary model folder: real, and quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "Product: Steel kettle 1.7 l\nBrand: Hearthline\nAttributes: colour: blue; capacity: 1.7 l; material: steel",
    "Description: Boils water for four cups of tea in three minutes. The lid opens wide and the handle stays cool.",
    "Query: kettle not plastic\nGrade: 4, 3, 2 or 1. Excellent, Related, Mismatch, Irrelevant; cheap alternative",
]
PROMPT: dict[str, Any] = {
    "version": 1,
    "labels": {"4": "4", "3": "3", "2": "2", "1": "1"},
    "block": 32,
    "segments": [
        {"text": "<|im_start|>Grade the product for the query: 4, 3, 2 or 1.\n"},
        {"field": "title", "before": "Product: ", "after": "\n", "budget": 32},
        {"field": "brand", "before": "Brand: ", "after": "\n", "budget": 16},
        {"field": "category", "before": "Category: ", "after": "\n", "budget": 16},
        {"field": "attributes", "before": "Attributes: ", "after": "\n", "budget": 64},
        {"field": "description", "before": "Description: ", "after": "", "budget": 128},
        {"field": "query", "before": "\nQuery: ", "after": "", "budget": 32},
        {"text": "<|im_end|>\nGrade: "},
    ],
}


def tiny_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE with single-token digits and ChatML's and Qwen's added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>")])
    return str(tokenizer.to_str())


def tiny_model(folder: Path, width: int = 64, layers: int = 2) -> Path:
    """Writes the model folder, prompt.json included, and returns it."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=Tokenizer.from_str(tiny_tokenizer()).token_to_id("<|im_end|>"),
        dtype="float32",
    )
    model: Any = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer(), encoding="utf-8")
    (folder / "prompt.json").write_text(json.dumps(PROMPT), encoding="utf-8")
    return folder
