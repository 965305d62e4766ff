"""Publishing an export on the Hugging Face hub: only when asked, after the check, and never over something that is there."""

import re
from pathlib import Path
from typing import Any

from selfsight.errors import StorageError, UsageError
from selfsight.redact import redact

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SAID = {401: "the token is not accepted", 403: "the token may not write there", 409: "exists; name another repository"}


def require_name(name: str) -> str:
    """A repository's name.

    Raises:
        UsageError: not USER/NAME.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"--push: {name!r} is not USER/NAME")
    return name


def require_token(name: str, api: Any = None) -> None:
    """Raise UsageError where nobody is logged in."""
    from huggingface_hub import HfApi, get_token

    if not ((api or HfApi()).token or get_token()):
        raise UsageError(f"--push {name}: no token; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool = False, api: Any = None) -> str:
    """Create the repository and upload the folder; the answer is its address.

    The token is the login's or the environment's (`HF_TOKEN`), never an argument.

    Args:
        api: in place of huggingface_hub's own `HfApi()`.

    Raises:
        UsageError: no token, a token that is refused, or a repository that exists.
        StorageError: no network, or an upload that ended.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    require_name(name)
    api = api or HfApi()
    require_token(name, api)
    created = False
    try:
        address = str(api.create_repo(name, private=private, exist_ok=False))
        created = True
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Encoder exported by selfsight")
    except (
        HfHubHTTPError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # no network has a class of each of the last three
        status = getattr(getattr(error, "response", None), "status_code", None)
        told = _SAID.get(status or 0) or redact(
            str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
        )
        kind = UsageError if status in _SAID else StorageError
        left = "; the repository was created, but is not complete" if created else ""
        raise kind(f"--push {name}: {told}{left}; {folder} is whole") from None
    return address
