"""Send an export to the Hugging Face Hub: `graft push EXPORT OWNER/NAME`."""

from pathlib import Path

from data.errors import UserError
from data.readers.source import HUB_ID
from sft.export.integrity import read_parity
from sft.runs.model_card import licence_of
from sft.untrusted import check_contents


class PushError(UserError):
    """An export can't be sent, or the Hub refuses it."""


def push(folder: Path, repo: str, dry_run: bool = False) -> list[str]:
    """Send an export, or only list its files if `dry_run`; returns a line for each. A new repository is private."""
    if not HUB_ID.fullmatch(repo):
        raise PushError(f"{repo}: is not a repository's name; write OWNER/NAME")
    check_contents(folder, str(folder))
    read_parity(folder)  # only finished exports
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    lines = [f"{path.relative_to(folder)}  {path.stat().st_size:,} bytes" for path in files]
    lines += [f"{size / 1e9:.3f} GB to {repo}, private if new; licence of the base: {licence_of(folder) or 'unknown'}"]
    if dry_run:
        return [*lines, "nothing was sent: --dry-run"]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        url = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by Graft")
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PushError(f"{repo}: {reason}; run `hf auth login` with a token that may write to it") from error
    return [*lines, f"sent: {url}"]
