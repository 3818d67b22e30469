"""The Hugging Face Hub: all that is said to it, and what it means when it refuses."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from config import InputError
from storygpt.cli import one_line, shorten

# What an answer means, and what mends it.
REFUSALS = {
    401: "the Hub does not know this token, or no such repo: log in with `hf auth login`, or make "
    "a token at https://huggingface.co/settings/tokens",
    402: "the account's storage or credits are used up: see https://huggingface.co/settings/billing",
    403: "the token may not do that: give it permission at https://huggingface.co/settings/tokens",
    404: "there is no such repo, or the token cannot see it: check the name and the token",
    409: "the repo is being changed: run the same command again",
    412: "somebody else changed the repo meanwhile: run the same command again",
    429: "the Hub asks for a pause: run the same command again in some minutes",
}
TRIES = (2, 4)  # seconds to wait before the second and third try
COMMIT = re.compile("[0-9a-f]{40}")
PARQUET = "refs/convert/parquet"  # the branch where the Hub keeps most data sets as parquet
MODEL_FILES = [  # what read_folder reads, and what transformers needs beside it offline
    *("config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json"),
]
OLDER_MODEL_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


class Repo(NamedTuple):
    """A repo's files at one commit; where the Hub did not answer, `offline` says why, and the
    files are those of the cache."""

    name: str
    kind: Literal["dataset", "model"]
    commit: str
    files: list[str]
    offline: str = ""


def is_hub_id(name: str) -> bool:
    """Says whether the Hub could have a repo of that name: owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


# --- What failed, and whether to try again ---


def explain(error: Exception) -> str:
    """Says in brackets what failed, then what mends it; no token, and no address of the Hub."""
    from huggingface_hub import constants, errors

    while error.__cause__ and not isinstance(error, errors.HTTPError | errors.OfflineModeIsEnabled):
        error = error.__cause__
    name = type(error).__name__
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = shorten(" ".join((error.server_message or "the Hub does not say why").split()))
        means = REFUSALS.get(status, said)
        if isinstance(error, errors.GatedRepoError):
            means = "ask for access on its page on the Hub, and log in with `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            means = "there is no such revision: check --revision"
        elif isinstance(error, errors.DisabledRepoError):
            means = said
        elif status >= 500:
            means = "the Hub has trouble: run the same command again later"
        return f"(HTTP {status}): {means}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "(HF_HUB_OFFLINE is set): unset it and run the same command again"
    if not constants.ENDPOINT.startswith(("https://", "http://")):
        return f"(HF_ENDPOINT is {constants.ENDPOINT}): begin it with https://"
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError):
        return f"({name}): check the network and run the same command again"
    if isinstance(error, errors.CachedRepoTreeNotFoundError) or getattr(error, "errno", None):
        place = getattr(error, "filename", None) or constants.HF_HUB_CACHE
        reason = getattr(error, "strerror", None) or "it cannot be written"
        return f"({reason}: {place}): free some space, or set HF_HOME to a folder elsewhere"
    return f"({name}): {one_line(error)}"


def is_transient(error: Exception) -> bool:
    """Says whether the same request may well be answered another time."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, errors.HTTPError | errors.OfflineModeIsEnabled)


def retry(call: Callable[[], object]):
    """Returns what `call` does, tried again after a server's fault, a cut connection or a 429."""
    from huggingface_hub import errors

    for wait in TRIES:
        try:
            return call()
        except errors.HTTPError as error:  # the base of all that the Hub's HTTP library raises
            reason = type(error).__name__
            if isinstance(error, errors.HfHubHTTPError):
                asked = error.response.headers.get("Retry-After") or ""
                wait = int(asked) if asked.isdigit() else wait
                reason = f"HTTP {error.response.status_code}"
            if not is_transient(error) or wait > 60:
                raise
            print(f"{reason}: trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    return call()


# --- Tokens ---


def check_token(token: str | None) -> str:
    """Returns the token given, else that of the environment or the saved login, or "".

    Raises InputError for one that HTTP could not carry.
    """
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    if not re.fullmatch(r"[!-~]*", token):  # an HTTP library would put it into its complaint
        raise InputError("the Hub token has characters that no token has: copy it again")
    return token


def find_token(token: str | None) -> str:
    """Returns a token as `check_token` does. Raises InputError where there is none."""
    token = check_token(token)
    if not token:
        raise InputError(
            "there is no Hub token: log in with `hf auth login`, set HF_TOKEN, or pass --token "
            "(other users of this machine can see the last)"
        )
    return token


# --- Downloads ---


def list_files(name: str, kind: str, revision: str | None, offline: bool) -> tuple[str, list[str]]:
    """Returns the commit that a repo is at and the names of its files there.

    Leaves both in the cache, and README.md with them; `offline` takes them from there.
    """
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):  # for one README.md
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords | {"disable": True})

    said = None
    if not offline and not COMMIT.fullmatch(revision or ""):
        said = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha
    try:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns="README.md",
            local_files_only=offline,
            tqdm_class=NoBar,
        )
    except LocalEntryNotFoundError as error:  # the fault itself, where it is wrapped around one
        raise error.__cause__ or error from None
    commit = Path(folder).name
    if said not in (None, commit):  # where its own question fails, it takes the cache's commit
        raise HTTPError(f"{name} is being changed")
    return commit, sorted(
        f.path for f in get_cached_repo_tree(name, repo_type=kind, revision=commit)
    )


def open_repo(name: str, kind: Literal["dataset", "model"], revision: str | None = None) -> Repo:
    """Lists the files of a repo on the Hub at one commit.

    Where the Hub does not answer, that is what the cache holds of the last commit seen, and a line
    says so. Raises InputError.
    """
    from huggingface_hub.errors import HFValidationError

    check_token(None)
    try:
        commit, files = retry(lambda: list_files(name, kind, revision, offline=False))
        return Repo(name, kind, commit, files)
    except HFValidationError as error:
        raise InputError(
            f"{name} is neither a file nor a folder here, nor a name on the Hub: check it, or "
            "pass owner/name"
        ) from error
    except Exception as error:  # the Hub's client's own, and those of the layers below it
        why = explain(error)
        if not is_transient(error):
            raise InputError(f"{name} cannot be downloaded {why}") from error
    try:
        commit, files = list_files(name, kind, revision, offline=True)
    except Exception as error:
        other = ", and --dataset builtin needs no network" if kind == "dataset" else ""
        raise InputError(
            f"{name} cannot be downloaded {why}; the cache does not have it whole{other}"
        ) from error
    print(f"taking {name} at commit {commit} from the cache {why}", file=sys.stderr)
    return Repo(name, kind, commit, files, offline=why)


def fetch(repo: Repo, file: str) -> Path:
    """Returns where a file of `repo` lies here, downloaded first if need be. Raises InputError."""
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(
            repo.name,
            file,
            repo_type=repo.kind,
            revision=repo.commit,
            local_files_only=bool(repo.offline),
        )

    try:
        return Path(retry(download))
    except Exception as error:  # the Hub's client's own, and those of the layers below it
        where = f"{repo.name}/{file} of commit {repo.commit}"
        if repo.offline:
            raise InputError(f"the cache does not have {where} {repo.offline}") from error
        raise InputError(f"{where} cannot be downloaded {explain(error)}") from error


def other_form(name: str) -> str:
    """Says how a data set whose files are not read can be read all the same."""
    from huggingface_hub import HfApi

    try:
        branches = HfApi().list_repo_refs(name, repo_type="dataset").converts
    except Exception:  # it is only asked to say more
        branches = []
    if any(branch.ref == PARQUET for branch in branches):
        return f"pass --revision {PARQUET}, where the Hub keeps it as parquet"
    return "download it, make a .jsonl of its stories, and pass that with --dataset"


def download_model(name: str) -> Path:
    """Returns the local folder with a Hub model's weights, configuration and tokenizer.

    Raises InputError.
    """
    from huggingface_hub.utils import filter_repo_objects

    repo = open_repo(name, "model")
    if "config.json" not in repo.files:
        raise InputError(f"{name} is no model that this reads: it has no config.json")
    files = list(filter_repo_objects(repo.files, allow_patterns=MODEL_FILES))
    if not any(
        file.endswith(".safetensors") for file in files
    ):  # most repos hold all weights twice
        files += filter_repo_objects(repo.files, allow_patterns=OLDER_MODEL_FILES)
    for file in files:
        fetch(repo, file)
    return fetch(repo, "config.json").parent


# --- Uploads ---


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
