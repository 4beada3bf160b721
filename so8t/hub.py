"""A model hub: an exported folder goes up, files of data sets come down."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP client's own
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from so8t.errors import FetchError
from so8t.fetch import offline

log = logging.getLogger(__name__)

LOG_IN = "it is gated: accept its terms on its page with an account, then `hf auth login`"


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


def dataset_file(repo: str, file: str, *, revision: str, gated: bool) -> Path:
    """One file of a data set's repository `repo` (`owner/name`), out of huggingface_hub's cache or downloaded into it.

    Raises:
        FetchError: it is not cached and the hub cannot be reached, does not have it, or wants a login.
    """
    try:
        path = hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=offline())
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, GatedRepoError) or (gated and isinstance(error, RepositoryNotFoundError)):
            reason = LOG_IN
        elif isinstance(error, LocalEntryNotFoundError):  # an EntryNotFoundError too, of the cache
            out = "SO8T_OFFLINE is set" if offline() else "the hub cannot be reached"
            reason = f"not in the cache ($HF_HOME), and {out}; a local copy can be named as data.sources.NAME.path"
            reason += f" ({LOG_IN})" if gated else ""
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such repository, or it is private"
        elif isinstance(error, RevisionNotFoundError):
            reason = f"the hub has no revision {revision}"
        elif isinstance(error, EntryNotFoundError):
            reason = f"there is no such file at revision {revision}"
        raise FetchError(f"{repo}/{file}: {reason}") from error
    log.info("%s/%s, revision %s: %s", repo, file, revision, path)  # its snapshot is named by the commit
    return Path(path)
