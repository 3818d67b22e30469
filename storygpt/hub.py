"""The Hugging Face Hub: what can be a name there, publishing, and why something failed there."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from config import InputError

# What an answer means, and what mends it.
REFUSALS = {
    401: "the Hub does not know this token, or no such repo: log in with `hf auth login`, or make "
    "a token at https://huggingface.co/settings/tokens",
    403: "the token may not do that: give it permission at https://huggingface.co/settings/tokens",
    404: "there is no such repo, or the token cannot see it: check the name and the token",
    409: "the repo is being changed: run the same command again",
    412: "somebody else changed the repo meanwhile: run the same command again",
    429: "the Hub asks for a pause: run the same command again in some minutes",
}


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repo of that name: owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def explain(error: Exception) -> str:
    """In brackets what failed, then what mends it; nothing of a token, at most of an address."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    known = HfHubHTTPError | HTTPError | OfflineModeIsEnabled
    while error.__cause__ and not isinstance(error, known):
        error = error.__cause__
    name = type(error).__name__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        trouble = "the Hub has trouble: run the same command again later"
        unknown = trouble if status >= 500 else "the Hub refuses the request"
        return f"(HTTP {status}): {REFUSALS.get(status, unknown)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "(HF_HUB_OFFLINE is set): unset it and run the same command again"
    if isinstance(error, HTTPError) and constants.ENDPOINT.startswith("http"):
        return f"({name}): check the network and run the same command again"
    return f"({name}): {' '.join(str(error).split())}"


def find_token(token: str | None) -> str:
    """The token given, else that of the environment or the saved login.

    Raises InputError where there is none, or none that HTTP could carry.
    """
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    if not token:
        raise InputError(
            "there is no Hub token: log in with `hf auth login`, set HF_TOKEN, or pass --token "
            "(other users of this machine can see the last)"
        )
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library would put it into its complaint
        raise InputError("the Hub token has characters that no token has: copy it again")
    return token


def retry(call: Callable[[], object]):
    """What `call` returns, tried once more after a server's fault, a cut connection or a 429."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return call()
    except HTTPError as error:  # the base of all that the Hub's HTTP library raises
        wait, reason = 2, type(error).__name__
        if isinstance(error, HfHubHTTPError):
            status, asked = error.response.status_code, error.response.headers.get("Retry-After")
            wait, reason = int(asked) if (asked or "").isdigit() else wait, f"HTTP {status}"
            if (status < 500 and status not in (408, 429)) or wait > 60:
                raise
        print(f"{reason}: trying again in {wait} s", file=sys.stderr)
        time.sleep(wait)
        return call()


def publish(
    folder: Path, repo_id: str, token: str, private: bool, kind: str = "model"
) -> tuple[str, bool]:
    """Sends `folder`, which has a README.md, as one commit to a repo, made if need be.

    `kind` is model, or space for one of Gradio. Returns the repo's address, and whether anything
    was new to it. Raises InputError.
    """
    from huggingface_hub import HfApi, RepoCard

    api, card = HfApi(token=token), RepoCard.load(folder / "README.md")
    if not api.endpoint.startswith(("https://", "http://")):
        raise InputError(f"HF_ENDPOINT {api.endpoint} is no address: begin it with https://")

    def open_repo():
        sdk = "gradio" if kind == "space" else None
        api.create_repo(
            repo_id, repo_type=kind, private=private or None, exist_ok=True, space_sdk=sdk
        )
        return api.repo_info(repo_id, repo_type=kind)

    def upload():
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"Upload StoryGPT's {kind}",
        )

    try:
        try:
            retry(lambda: card.validate(repo_type=kind))
        except ValueError as error:  # with the server's JSON
            messages = re.findall(r'"message": *("(?:[^"\\]|\\.)*")', str(error))
            reasons = "; ".join(map(json.loads, messages)) or str(error)
            raise InputError(f"the Hub refuses the {kind} card: {reasons}") from error
        before = retry(open_repo)
        if private and not before.private:
            raise InputError(
                f"{repo_id} exists and is public: make it private in its settings on the Hub, "
                "leave out --private, or pass another --repo_id"
            )
        place = f"spaces/{repo_id}" if kind == "space" else repo_id
        return f"{api.endpoint}/{place}", retry(upload).oid != before.sha
    except InputError:
        raise
    except Exception as error:  # the Hub's client's own, and those of the layers below it
        why = explain(error).replace(token, "…")
        raise InputError(f"{repo_id} was not published {why}") from None
