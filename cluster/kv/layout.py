"""The fingerprint of what two sides' KV must have in common."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.kv.geometry import KvGeometry

SAMPLES = 256
SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class KvLayout:
    """An engine's KV, apart from how it is cut into ranks and blocks.

    Attributes:
        model_digest: of the model's configuration and weight files, `model_digest()`.
        dtype: of the cache, such as float32.
        content: items of one token of one head: its K and V, or its latent.
        geometry: how it is cut.
    """

    model_digest: str
    dtype: str
    num_layers: int
    content: int
    geometry: KvGeometry

    def fingerprint(self) -> str:
        """Equal for two layouts between which blocks may move; 32 hex digits.

        Blocks of one geometry can be laid out anew for another, unless the order of their items is
        not known: then the geometry must be the same, too.
        """
        what = {**asdict(self), "geometry": self.geometry.heads}
        if self.geometry.opaque:
            what["geometry"] = self.geometry.encode()
        canonical = json.dumps(what, sort_keys=True).encode()
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
