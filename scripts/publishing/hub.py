"""Publishing a folder on the Hugging Face hub, or on what HF_ENDPOINT says, in two parts: what can go wrong without the
folder is found before it is made."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from recipe.secrets import redact_text
from utils.errors import UserError, reason
from utils.launch import say

# Of an earlier upload in another number of shards: readers would take both.
STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]


def check_hub(repo: str, private: bool) -> str:
    """The whole name, with its owner, of a repository that can be uploaded to. Nothing is created or changed.

    Raises: UserError where the name cannot be one, nobody is logged in, the hub cannot be reached or refuses the token,
        or the repository is there for all to see and was to be private.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f"--push_to_hub {repo}: not a name that a repository can have: give OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub: HF_HUB_OFFLINE is set: unset it to reach the hub")
    if not get_token():
        raise UserError("--push_to_hub: nobody is logged in: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        owner = api.whoami()["name"]
        repo = repo if "/" in repo else f"{owner}/{repo}"
        public = not api.repo_info(repo).private
    except RepositoryNotFoundError:
        return repo
    except Exception as error:
        raise UserError(f"--push_to_hub {repo}: {_problem(error)}") from error
    if public and private:
        raise UserError(f"--push_to_hub {repo}: is there already and public: give another name, or leave out --private")
    return repo


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as one commit; of the repository's own files only weights that it has no more are removed.

    Returns: the repository's address.  Raises: UserError where it fails; the folder is as it was.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Export of {folder.name}", delete_patterns=STALE
        )
    except Exception as error:
        again = f"`hf upload {repo} {folder}` tries again"
        raise UserError(f"{folder} is written; uploading it to {repo} failed: {_problem(error)}; {again}") from error
    say(f"published: {url}")
    return str(url)


def _problem(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) == 401:
        return "the hub refuses the token: log in again by `hf auth login`, or set another HF_TOKEN"
    if isinstance(error, HfHubHTTPError | OfflineModeIsEnabled | ValueError):  # ValueError: metadata of the card
        return redact_text(reason(error))
    return f"{constants.ENDPOINT} cannot be reached: {redact_text(reason(error))}"
