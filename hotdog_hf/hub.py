"""The Hub: downloads, uploads, and its errors as clear messages."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hotdog_hf.errors import UserError

PROBE_SECONDS = 3


def fetch_file(repo: str, names: Sequence[str]) -> Path:
    """Return the first of the files `names` that a Hub model has, from the cache or downloaded.

    Raises `UserError` within seconds if the Hub can't be reached: the download itself would retry for most of
    a minute, so a request with a short timeout comes first.
    """
    for name in names:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(repo, name), str):
            return Path(cached)
    for name in names:
        with hub_errors(repo):
            try:
                huggingface_hub.get_hf_file_metadata(
                    huggingface_hub.hf_hub_url(repo, name), timeout=PROBE_SECONDS
                )
                return Path(huggingface_hub.hf_hub_download(repo, name))
            except LocalEntryNotFoundError:  # the network is down; a subclass of the error below
                raise
            except EntryNotFoundError:
                continue
    raise UserError(f"{repo} on the Hub has none of {', '.join(names)}")


def require_login(purpose: str) -> dict:
    """Return who is logged in, as the Hub describes it; `UserError` without a login or a network."""
    if huggingface_hub.get_token() is None:
        raise UserError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a write token")
    with hub_errors(purpose):
        return huggingface_hub.whoami()


def may_only_read(user: dict) -> bool:
    """Return whether the token of `require_login` cannot write anything."""
    return user.get("auth", {}).get("accessToken", {}).get("role") == "read"


def check_can_push(repo: str, repo_type: str = "model") -> None:
    """Raise `UserError` if an upload would fail: a bad name, not logged in, no permission, no network."""
    api = huggingface_hub.HfApi()
    with hub_errors(repo):
        huggingface_hub.utils.validate_repo_id(repo)
        if "/" not in repo:
            raise UserError(f"{repo!r} is not a Hub name: use the form user/name")
        user = require_login(repo)
        if api.repo_exists(repo, repo_type=repo_type):
            api.auth_check(repo, repo_type=repo_type, write=True)
            return
    namespace = repo.partition("/")[0]
    owned = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if namespace not in owned:
        raise UserError(
            f"no permission to create {repo}: you are {user['name']}, who writes to {', '.join(owned)}"
        )
    if may_only_read(user):
        raise UserError(f"no permission to create {repo}: the token of {user['name']} may only read")


def push_folder(
    folder: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    space_sdk: str | None = None,
    source: str | os.PathLike | None = None,
) -> str:
    """Upload a model folder in one commit, creating repository and branch if needed; return its URL.

    With a `space_sdk` ("gradio", "static"), the folder and those below it become a Space; `source` is then
    the model's folder. Unchanged files are not uploaded again. Raises `UserError` naming the cause; the
    folder stays unchanged.
    """
    api, kind = huggingface_hub.HfApi(), "space" if space_sdk else "model"
    files = sorted(path for path in Path(folder).glob("**/*" if space_sdk else "*") if path.is_file())
    operations = [
        huggingface_hub.CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files
    ]
    try:
        with hub_errors(repo):
            url = api.create_repo(repo, private=private, exist_ok=True, repo_type=kind, space_sdk=space_sdk)
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.create_commit(
                repo, operations, commit_message="Upload with hotdog_hf", revision=revision, repo_type=kind
            )
    except UserError as error:
        flags = [*(["--private"] if private else []), *(["--revision", revision] if revision else [])]
        flags += ["--space", space_sdk] if space_sdk else []
        kept = folder if source is None else source
        again = shlex.join(["python", "scripts/push.py", str(kept), repo, *flags])
        raise UserError(
            f"{error}. Nothing is lost: {kept} is unchanged; push it later with `{again}`"
        ) from error
    return f"{url}/tree/{revision}" if revision else str(url)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub client about `repo` into a `UserError` that says what to do."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo!r} is not a Hub name: use the form user/name ({error})") from error
    except LocalEntryNotFoundError as error:
        raise UserError(f"cannot reach {endpoint} for {repo}, and it is not in the cache") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} on the Hub has no such revision") from error
    except GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: ask for access on {endpoint}/{repo}, and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{endpoint} has no {repo}, or it is private and you are not logged in (`hf auth login`)"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = {
            401: "the token is not valid: run `hf auth login`",
            402: "the Hub asks for credit or a payment method: see your billing settings there",
            403: "your token has no permission for this",
        }
        raise UserError(f"{repo}: {reason.get(status, f'the Hub returned {status}: {error}')}") from error
    except ValueError as error:  # what the Hub or the client does not accept, such as a card's metadata
        raise UserError(f"{repo}: {' '.join(str(error).split())}") from error
    except (OSError, RuntimeError, *_transport_errors()) as error:
        if isinstance(error, OSError) and error.filename is not None:  # of this machine: a cache, a full disk
            raise UserError(f"{repo}: {error.filename}: {error.strerror}") from error
        if isinstance(error, FileNotFoundError):  # a data set that is not there, or without photos
            raise UserError(f"{repo}: {' '.join(str(error).split())}") from error
        raise UserError(f"cannot reach {endpoint} for {repo} ({type(error).__name__}: {error})") from error


def _transport_errors() -> list[type[Exception]]:
    """Return the base error of the HTTP library that this version of the Hub client uses."""
    return [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]
