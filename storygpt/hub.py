"""The Hugging Face Hub: all that is said to it, and what it means when it refuses."""

import errno
import glob
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from config import InputError
from storygpt.cli import one_line, shorten
from storygpt.files import remedy

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
TRIES = (2, 4)  # seconds to wait before the second and third try
COMMIT = re.compile("[0-9a-f]{40}")
PARQUET = "refs/convert/parquet"  # the branch where the Hub keeps most data sets as parquet
MODEL_FILES = [  # what read_folder reads, and what transformers needs beside it offline
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "*.model"),  # of other tokenizers, by which read_folder knows them
]
OLDER_MODEL_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


class Repo(NamedTuple):
    """A repo's files at one commit, with their bytes; where the Hub did not answer, `offline` says
    why, and the files are those of the cache."""

    name: str
    kind: Literal["dataset", "model"]
    commit: str
    files: dict[str, int]
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


def endpoint_is_address() -> bool:
    """Tells whether HF_ENDPOINT, where it is set, says how to reach a Hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT.startswith(("https://", "http://"))


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
        # These two have many reasons, a full quota among them.
        if status in (403, 429) and error.server_message:
            means += f"; the Hub says: {said}"
        if isinstance(error, errors.GatedRepoError):
            means = "ask for access on its page on the Hub, and log in with `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            means = "there is no such revision: check its name"
        elif isinstance(error, errors.DisabledRepoError):
            means = said
        elif status >= 500:
            means = "the Hub has trouble: run the same command again later"
        return f"(HTTP {status}): {means}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "(HF_HUB_OFFLINE is set): unset it and run the same command again"
    if not endpoint_is_address():
        return f"(HF_ENDPOINT is {constants.ENDPOINT}): begin it with https://"
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError):
        return f"({name}): check the network and run the same command again"
    if isinstance(error, errors.CachedRepoTreeNotFoundError):  # the client did not say why
        error = OSError(errno.ENOSPC, "it cannot be written")
    if isinstance(error, OSError) and error.errno:
        place = error.filename or constants.HF_HUB_CACHE
        elsewhere = "set HF_HOME to a folder elsewhere"
        return f"({error.strerror}: {place}): {remedy(error, elsewhere)}"
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
            if not (is_transient(error) and endpoint_is_address()) or wait > 60:
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


def list_files(name: str, kind: str, revision: str | None, offline: bool) -> Repo:
    """Returns the files of a repo as the Hub has them.

    Leaves their names in the cache, and README.md with them; `offline` takes them from there.
    """
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):  # for one README.md
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords | {"disable": True})

    # a README.md that is not there is no reason for a word
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)
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
    tree = get_cached_repo_tree(name, repo_type=kind, revision=commit)
    return Repo(name, kind, commit, files={file.path: file.size for file in tree})


def open_repo(name: str, kind: Literal["dataset", "model"], revision: str | None = None) -> Repo:
    """Lists the files of a repo on the Hub at one commit.

    Where the Hub does not answer, that is what the cache holds of the last commit seen, and a line
    says so. Raises InputError.
    """
    from huggingface_hub.errors import HFValidationError

    check_token(None)
    try:
        return retry(lambda: list_files(name, kind, revision, offline=False))
    except HFValidationError as error:
        raise InputError(
            f"{name} is neither a file nor a folder here, nor a name on the Hub: check it, or "
            "pass owner/name"
        ) from error
    except Exception as error:  # the Hub's client's own, and those of the layers below it
        why = explain(error)
        failed = f"{name} is no file or folder here, and cannot be downloaded {why}"
        if not is_transient(error):
            raise InputError(failed) from error
    try:
        repo = list_files(name, kind, revision, offline=True)
    except Exception as error:
        other = ", and --dataset builtin needs no network" if kind == "dataset" else ""
        raise InputError(f"{failed}; the cache does not have it whole{other}") from error
    print(f"taking {name} at commit {repo.commit} from the cache {why}", file=sys.stderr)
    return repo._replace(offline=why)


def fetch(repo: Repo, file: str) -> Path:
    """Returns where a file of `repo` lies here, downloaded first if need be. Raises InputError."""
    from huggingface_hub import hf_hub_download

    download = partial(
        hf_hub_download,
        repo.name,
        file,
        repo_type=repo.kind,
        revision=repo.commit,
        local_files_only=bool(repo.offline),
    )
    try:
        path = Path(retry(download))
        if path.stat().st_size != repo.files[file]:  # cut short when a machine or its disk failed
            path = Path(retry(partial(download, force_download=True)))
        return path
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


def download_model(name: str, revision: str | None = None) -> Path:
    """Returns the local folder with a Hub model's weights, configuration and tokenizer.

    Raises InputError.
    """
    from huggingface_hub.utils import filter_repo_objects

    repo = open_repo(name, "model", revision)
    if "config.json" not in repo.files:
        raise InputError(f"{name} is no model that this reads: it has no config.json")
    files = list(filter_repo_objects(repo.files, allow_patterns=MODEL_FILES))
    if not any(file.startswith("model.safetensors") for file in files):  # most hold both kinds
        files += filter_repo_objects(repo.files, allow_patterns=OLDER_MODEL_FILES)
    for file in files:
        fetch(repo, file)
    return fetch(repo, "config.json").parent


# --- Publishing ---

SPACE_HARDWARE = "zero-a10g"  # the one that a personal account may have without a subscription
SPACE_TERMS = (
    "A personal account may have two Spaces on ZeroGPU, once it is 30 days old and its address is "
    "confirmed: leave out --space, and show the page with `python space/app.py --model ID`"
)

# A file of a model, whoever made it.
OF_A_MODEL = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|jinja)|.*(config|index|_map|_tokens)\.json|"
    r"(tokenizer|vocab|merges)\..*"
)


class Built(NamedTuple):
    """A folder with a README.md, to be sent to a repo."""

    folder: Path
    repo_id: str
    kind: Literal["model", "space"]

    @property
    def commit_title(self) -> str:
        """Returns the title by which a file is known as ours ever after."""
        return f"Upload StoryGPT's {self.kind}"


class Plan(NamedTuple):
    """What sending a folder does to its repo."""

    before: str
    """The commit that the repo is at."""
    private: bool
    keep_card: bool
    """Whether its README.md was edited there, and is left as it is."""
    delete: list[str]


class Published(NamedTuple):
    """What became of a folder."""

    url: str
    changed: bool
    """Whether anything was new to the repo."""
    plan: Plan


def publish(repos: list[Built], token: str, private: bool, replace: bool) -> list[Published]:
    """Sends each folder as one commit to its repo, made if need be, once all of them may be sent.

    The first of `repos` is the model's, and where it is private those that are made beside it are.
    What an earlier commit of ours put there, and the folder lacks, is deleted. What others have put
    there is touched with `replace` alone: without it a README.md edited there is kept where the
    model has the same weights there, and all else that is in the way is an InputError.
    """
    from huggingface_hub import HfApi

    api, plans, published = HfApi(token=token), [], []
    for repo in repos:
        with failures_explained(repo, token):
            check_card(repo)
            hidden = private or any(plan.private for plan in plans)
            info, there = open_remote(api, repo, hidden)
        if private and not info.private:
            raise InputError(
                f"{repo.repo_id} exists and is public: make it private in its settings on the Hub, "
                "leave out --private, or pass another --repo_id"
            )
        if not plans:
            same_weights = holds_weights(there, repo.folder)
        plans.append(make_plan(repo, info, there, same_weights=same_weights, replace=replace))
    for repo, plan in zip(repos, plans, strict=True):
        with failures_explained(repo, token):
            published.append(send(api, repo, plan))
    return published


@contextmanager
def failures_explained(repo: Built, token: str) -> Iterator[None]:
    """Says in one sentence, an InputError, why a repo could not be published."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the Hub's client's own, and those of the layers below it
        why = explain(error).replace(token, "…")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if repo.kind == "space" and status in (402, 403):
            why = f"{why.rstrip('.')}. {SPACE_TERMS}"
        raise InputError(f"{repo.repo_id} was not published {why}") from None


def check_card(repo: Built) -> None:
    """Raises InputError where the Hub refuses what a README.md says at its head."""
    from huggingface_hub import RepoCard

    card = RepoCard.load(repo.folder / "README.md")
    try:
        retry(lambda: card.validate(repo_type=repo.kind))
    except ValueError as error:  # with the server's JSON
        messages = re.findall(r'"message": *("(?:[^"\\]|\\.)*")', str(error))
        reasons = "; ".join(map(json.loads, messages)) or str(error)
        raise InputError(f"the Hub refuses the {repo.kind} card: {reasons}") from error


def open_remote(api, repo: Built, private: bool) -> tuple:
    """Makes a repo if there is none; returns what the Hub says of it, and its files by path as
    huggingface_hub's RepoFile with the last commit of each."""
    from huggingface_hub import RepoFile

    def open_it():
        api.create_repo(
            repo.repo_id,
            repo_type=repo.kind,
            private=private or None,
            exist_ok=True,
            space_sdk="gradio" if repo.kind == "space" else None,
            space_hardware=SPACE_HARDWARE if repo.kind == "space" else None,
        )
        tree = api.list_repo_tree(repo.repo_id, repo_type=repo.kind, recursive=True, expand=True)
        return list(tree), api.repo_info(repo.repo_id, repo_type=repo.kind)

    entries, info = retry(open_it)
    return info, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def holds_weights(there: dict, folder: Path) -> bool:
    """Tells whether a repo with the files `there` holds the weights in `folder`."""
    weights = there.get("model.safetensors")
    with (folder / "model.safetensors").open("rb") as file:
        ours = hashlib.file_digest(file, "sha256").hexdigest()
    return bool(weights and weights.lfs and weights.lfs.sha256 == ours)


def make_plan(repo: Built, info, there: dict, same_weights: bool, replace: bool) -> Plan:
    """Returns what sending a folder does to a repo of which the Hub says `info`, and which holds
    the files `there`.

    Raises InputError where what others have put there is in the way.
    """
    sent = {p.relative_to(repo.folder).as_posix() for p in repo.folder.rglob("*") if p.is_file()}
    titles = {path: entry.last_commit.title for path, entry in there.items()}
    if titles.get("README.md") == "initial commit":  # the Hub's own words, and nobody's
        del titles["README.md"]
    ours = {path for path, title in titles.items() if title.startswith(repo.commit_title)}
    theirs = {path for path in titles.keys() - ours if path in sent}
    if not ours:  # a repo of theirs: what lies beside our files would be taken for part of them
        theirs |= {path for path in titles if OF_A_MODEL.fullmatch(path)}
    keep_card = "README.md" in theirs and same_weights and not replace
    in_the_way = theirs - {"README.md"} if keep_card else theirs
    if in_the_way and not replace:
        raise InputError(
            f"{repo.repo_id} holds what others, or you by hand, have put there "
            f"({', '.join(sorted(in_the_way)[:5])}): pass another --repo_id, or --replace to put "
            "this in its place"
        )
    gone = sorted((ours | in_the_way) - sent - {".gitattributes"})
    return Plan(before=info.sha, private=info.private, keep_card=keep_card, delete=gone)


def send(api, repo: Built, plan: Plan) -> Published:
    """Makes the one commit."""
    upload = partial(
        api.upload_folder,
        repo_id=repo.repo_id,
        repo_type=repo.kind,
        folder_path=repo.folder,
        ignore_patterns="README.md" if plan.keep_card else None,
        delete_patterns=[glob.escape(path) for path in plan.delete] or None,
        commit_message=repo.commit_title,
        parent_commit=plan.before,
    )
    place = f"spaces/{repo.repo_id}" if repo.kind == "space" else repo.repo_id
    changed = retry(upload).oid != plan.before
    return Published(f"{api.endpoint}/{place}", changed=changed, plan=plan)
