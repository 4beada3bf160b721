"""Uploads an exported folder to a model hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # its HTTP client's own

from so8t.errors import FetchError


def push_to_hub(folder: Path, repo: str) -> str:
    """Uploads every file of `folder` into the model repository `repo` (`owner/name`), made private if it is new; returns its
    address.

    Raises:
        FetchError: the hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, repo_type="model", folder_path=folder, commit_message="A safe agent, exported by SO8T"
        )
    except (HTTPError, HFValidationError, OSError) as error:  # OSError: offline, no token, no connection
        told = " ".join(str(error).split())
        raise FetchError(f"{repo}: not pushed: {told} (log in with `hf auth login`; {folder} is whole and stays)") from error
    return str(commit.repo_url)
