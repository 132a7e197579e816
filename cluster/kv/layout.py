"""How a worker's KV cache lies in memory, and the fingerprint two sides must share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class KvLayout:
    """One engine rank's KV cache.

    A layer's cache is a view `[blocks, heads, tokens, content]`; `content` is a token's K and V of
    one head in the attention backend's own packing, so bytes are exchanged only between equal
    backends and in whole blocks.

    Attributes:
        model_digest: of the model's configuration and weight files, `model_digest()`.
        dtype: of the cache, such as float32.
        backend: the attention backend's name.
        ranks: tensor-parallel size.
    """

    model_digest: str
    dtype: str
    item_bytes: int
    num_layers: int
    heads: int
    tokens: int
    content: int
    backend: str
    ranks: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.heads * self.tokens * self.content * self.item_bytes

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.tokens)

    def fingerprint(self) -> str:
        """Equal for two layouts between which blocks may move; 32 hex digits."""
        canonical = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def model_digest(path: str, revision: str | None, quantization: str | None) -> str:
    """Tells models apart: a local model by its config and its weight files' names and sizes, a hub
    model by name and revision."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{revision}\n{quantization}\n".encode())
    folder = Path(path)
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.exists() else b"")
    for weights in sorted(folder.glob("*.safetensors")):
        digest.update(f"{weights.name}:{weights.stat().st_size}\n".encode())
    return digest.hexdigest()
