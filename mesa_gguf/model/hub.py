"""Which file a model's name on the command line stands for: a path, a file on Hugging Face, or the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ModelError, missing_package
from ..paths import expanded
from .bundled import bundled_model

HUB_PREFIX = "hf:"
HUB_FORM = "hf:owner/repo/file.gguf"


def find_model(reference: str | None) -> Path:
    """The file that a path or hf:owner/repo/file.gguf stands for; None: the bundled model.

    Raises:
        ModelError: the file cannot be found or downloaded.
    """
    if reference is None:
        return bundled_model()
    if reference.startswith(HUB_PREFIX):
        return download(reference)
    return expanded(reference)


def download(reference: str) -> Path:
    """The local copy of a file on Hugging Face, downloaded if it is not there yet; all parts of a split file.

    Raises:
        ModelError: the reference is malformed, there is no such file, or it cannot be reached.
    """
    owner, _, rest = reference.removeprefix(HUB_PREFIX).partition("/")
    repo, _, filename = rest.partition("/")
    if not (owner and repo and filename):
        raise ModelError(f"{reference}: a model on Hugging Face is written {HUB_FORM}")
    first, *others = [_download_file(reference, f"{owner}/{repo}", name) for name in _parts(filename)]
    del others  # llama.cpp finds them beside the first
    return first


def shards(path: Path) -> list[Path]:
    """All files of a model, whose first one is given."""
    return [path.parent / name for name in _parts(path.name)]


def _parts(filename: str) -> list[str]:
    """All files of a model that is split as llama.cpp splits them, name-00001-of-00003.gguf; else the one file."""
    split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", filename)
    if split is None:
        return [filename]
    stem, n_parts = split[1], int(split[2])
    return [f"{stem}-{i:05}-of-{n_parts:05}.gguf" for i in range(1, n_parts + 1)]


def _download_file(reference: str, repo: str, filename: str) -> Path:
    # imported here: it is slow to import, and most calls name a local file
    try:
        from huggingface_hub import errors, hf_hub_download
        from huggingface_hub.utils import logging
    except ModuleNotFoundError as err:
        raise missing_package(f"a model on Hugging Face ({reference})", "huggingface-hub", "hub") from err

    logging.set_verbosity_error()  # its retries are told in one line below
    try:
        try:  # a file that was downloaded once is used again without asking the network
            return Path(hf_hub_download(repo, filename, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return Path(hf_hub_download(repo, filename))
    except errors.GatedRepoError:
        why = f"{repo} asks for its licence to be accepted first: do that on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = f"Hugging Face has no repository {repo}, or it is private and you are not logged in"
    except errors.LocalEntryNotFoundError:  # a subclass of EntryNotFoundError that says something else
        why = "Hugging Face cannot be reached and the file was not downloaded before: check the network, or give a path"
    except errors.EntryNotFoundError:
        why = f"{repo} has no file {filename}"
    except errors.HFValidationError:
        why = f"a model on Hugging Face is written {HUB_FORM}"
    except OSError as err:
        why = f"cannot be downloaded: {str(err).splitlines()[0] if str(err) else type(err).__name__}"
    raise ModelError(f"{reference}: {why}")
