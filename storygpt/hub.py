"""The Hugging Face Hub: what can be a name there, what is worth a second try, and why it failed."""

import sys
import time
from collections.abc import Callable

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


def check_endpoint() -> None:
    """Raises InputError where HF_ENDPOINT is no address."""
    from huggingface_hub import constants

    if not constants.ENDPOINT.startswith(("https://", "http://")):
        raise InputError(f"HF_ENDPOINT {constants.ENDPOINT} is no address: begin it with https://")


def retry(call: Callable[[], object]):
    """What `call` returns, tried once more after a server's fault, a cut connection or a 429.

    Raises InputError for an HF_ENDPOINT that is no address, and whatever `call` does.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    check_endpoint()
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


def explain(error: Exception) -> str:
    """ "(kind of failure): what mends it", without anything of the token or of an address."""
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
    if isinstance(error, HTTPError):
        return f"({name}): check the network and run the same command again"
    return f"({name}): {' '.join(str(error).split())}"
