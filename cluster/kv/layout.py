"""How a worker's KV cache lies in memory, and the fingerprint two sides must share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLES = 256
SAMPLE_BYTES = 64 << 10


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
    """Tells weights apart: a hub model by its commit, a local one by its configuration and by its
    weight files' names, sizes and samples of their contents, ends included.

    Raises:
        OSError: a hub model's configuration can neither be fetched nor found in the cache.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{quantization}\n".encode())
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        commit = Path(snapshot_download(path, revision=revision, allow_patterns="config.json")).name
        digest.update(f"{path}@{commit}".encode())
        return digest.hexdigest()
    for file in sorted(folder.iterdir()):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin", ".pt", ".gguf"):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}\n".encode())
            with file.open("rb") as content:
                for at in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                    content.seek(at)
                    digest.update(content.read(SAMPLE_BYTES))
                content.seek(max(0, size - SAMPLE_BYTES))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()
