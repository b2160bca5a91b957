"""A pytest plugin for llama-cpp-python's own tests: no download, and MesaLlama in the place of Llama where asked for.

UPSTREAM_MODEL: a GGUF file that stands in for the small transformer model that those tests download.
UPSTREAM_MESA:  "1" to run the tests on MesaLlama.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import huggingface_hub
import pytest

if os.environ.get("UPSTREAM_MESA") == "1":
    import mesa_gguf  # before llama_cpp: it decides which library that loads

    sys.modules["llama_cpp"].Llama = mesa_gguf.MesaLlama  # type: ignore[attr-defined]


def hf_hub_download(repo_id: str, filename: str, **_: Any) -> str:
    if (repo_id, filename) == ("ggml-org/models", "tinyllamas/stories15M-q4_0.gguf"):
        return os.environ["UPSTREAM_MODEL"]
    pytest.skip(f"needs a download: {repo_id}/{filename}")


huggingface_hub.hf_hub_download = hf_hub_download
