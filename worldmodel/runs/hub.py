"""Runs on the Hugging Face Hub: download a run into the user's cache, upload an exported folder.

A run is downloaded into a plain folder per commit: the links of the Hub's own cache are not allowed in a run folder.
Only files that `load` reads are downloaded: YAML, JSON and safetensors. Nothing is unpickled, and no code is run.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from data_pipelines.errors import UserError, one_line
from data_pipelines.files import user_cache_dir
from worldmodel.runs.checkpoint import EXPORTED_FILES, checkpoint_name

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
OF_RESULTS = (
    *("metrics.json", "readout.safetensors", "recalibration.safetensors", "surprise.safetensors"),
    *("decoder.json", "decoder.safetensors"),
)
"""The files of an exported run that `evaluate` and `decode` wrote."""
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repository_name(text: str) -> bool:
    """Return True if the text has the form owner/name."""
    return NAME.fullmatch(text) is not None


def folder_of(run: str | Path, which: Literal["latest", "best"] = "latest", revision: str | None = None) -> Path:
    """Return the folder of a run. One with the name owner/name that is not here is downloaded.

    Raises:
        UserError: it is neither here nor on the Hub, or a revision of a folder is asked for.
    """
    is_on_hub = isinstance(run, str) and not os.path.lexists(run) and is_repository_name(run)
    if not is_on_hub:
        if revision is not None:
            raise UserError(f"revision={revision!r} belongs to a repository on the Hub, but {run} is a folder")
        return Path(run)
    try:
        return download(str(run), revision, which)
    except UserError as error:
        raise UserError(f"there is no folder {run!r} here, and {error}") from error


def download(name: str, revision: str | None, which: Literal["latest", "best"]) -> Path:
    """Download a checkpoint of the run owner/name, and return its folder.

    revision: a branch, a tag or a commit; by default the main branch. Files that were downloaded before are reused. A
    full commit hash that was downloaded before needs no network.

    Raises:
        UserError: there is no such repository, revision or checkpoint, or it cannot be downloaded.
    """
    from huggingface_hub import HfApi

    cache = user_cache_dir()
    if cache is None:
        raise UserError("this user has no home folder for runs from the Hub: download the run, and load its folder")
    with _explained(name):
        api = HfApi(library_name="worldmodel")
        commit = revision
        if revision is None or not COMMIT.fullmatch(revision):
            commit = api.model_info(name, revision=revision).sha
        if commit is None or not COMMIT.fullmatch(commit):  # it becomes a path
            raise UserError(f"the Hub gives no valid commit for {name!r}")
        folder = cache / "hub" / name / commit
        fetch = partial(api.snapshot_download, name, revision=commit, local_dir=folder)
        fetch(allow_patterns=["config.yaml", "checkpoints/index.json"])
        checkpoint = checkpoint_name(folder, which)
        if checkpoint is None or not (folder / "config.yaml").is_file():
            missing = "config.yaml" if checkpoint else f"the {which} checkpoint in checkpoints/index.json"
            raise UserError(f"the repository {name!r} does not hold a run: it lacks {missing}")
        parts = [f"checkpoints/{checkpoint}/{file}" for file in EXPORTED_FILES]
        fetch(allow_patterns=[*parts, *OF_RESULTS])
    return folder


def check_upload(name: str) -> None:
    """Check the name of a repository and that there is a token, before the work begins.

    Raises:
        UserError: the name is not valid, or there is no token.
    """
    from huggingface_hub import get_token

    if not is_repository_name(name):
        raise UserError(f"{name!r} is not a valid name of a repository: give owner/name")
    if get_token() is None:
        raise UserError("uploading needs a token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload the files of an exported folder to the repository owner/name, and return its URL.

    A new repository is private or public as stated. An earlier run in the repository is replaced in a new commit.

    Raises:
        UserError: the repository is public and `private` is True, or the upload fails.
    """
    from huggingface_hub import HfApi

    with _explained(name):
        api = HfApi(library_name="worldmodel")
        url = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(f"the repository {name!r} is public: allow a public upload, or choose another name")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a run",
            delete_patterns=["checkpoints/*", *OF_RESULTS, "*.pt2"],
        )
    return str(url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn errors of huggingface_hub about the repository `name` into UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"the repository {name!r} is gated: ask for access on its page on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the Hugging Face Hub has no repository {name!r}: check the name; a private one needs `hf auth login` or "
            "HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"the repository {name!r} does not have this revision: check it on the Hub") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        message = f" ({error.server_message[:200]})" if error.server_message else ""
        hint = "check the permissions of your token" if status in (401, 403) else "try again later"
        raise UserError(f"the Hugging Face Hub answers {status} for {name!r}{message}: {hint}") from None
    except ValueError as error:  # a name or a file that the Hub does not accept
        raise UserError(f"the Hugging Face Hub does not accept {name!r}: {one_line(error)}") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"the Hugging Face Hub cannot be reached for {name!r}: check the name and the network ({one_line(error)})"
        ) from None
    except OSError as error:
        raise UserError(f"cannot store {name!r} from the Hub: {one_line(error)}") from None
