"""Checkpoints by name: a folder on this machine, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from reachrl.errors import CheckpointError

# No code, and of pickles one that is read as tensors alone: what is not listed is never downloaded.
_FILES = ["*.json", "*.safetensors", "tokenizer.model", "proprio_projector--*.pt"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(checkpoint: Path) -> Path:
    """Return the local folder of a checkpoint; a repository `owner/name` is downloaded into the hub's cache first.

    A cached download is only checked for a newer version; without a network the cached version is used.

    Args:
        checkpoint: an existing folder, or `owner/name`.

    Raises:
        CheckpointError: it is neither, or the repository cannot be downloaded.
    """
    name = checkpoint.as_posix()
    if checkpoint.is_dir():
        return checkpoint
    if checkpoint.exists() or not _REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"policy checkpoint {name} does not exist or is not a folder; give the folder with the model's config.json "
            "and safetensors files, or a repository of the Hugging Face hub as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise CheckpointError(
            f"policy checkpoint {name} is gated: accept its terms on https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"policy checkpoint {name} is neither a folder here nor a model on the Hugging Face hub; check the "
            "spelling, and for a private model log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"policy checkpoint {name} is no folder here, and the Hugging Face hub cannot be reached to download it "
            f"({error}). Connect and try again, or copy its files into a folder and give that"
        ) from error
    except Exception as error:  # a broken transfer has no common base: of the transport, of storage, of the disk
        raise CheckpointError(
            f"policy checkpoint {name} could not be downloaded: {type(error).__name__}: {error}. The same command "
            "continues where it stopped; if the disk is full, set HF_HOME to a folder on a larger one"
        ) from error
