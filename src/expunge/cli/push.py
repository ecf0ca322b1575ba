"""`expunge push`: a folder that `unlearn --out` wrote, with a model card, to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import Json, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

RELEASED = (
    "README.md", "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "*.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What is uploaded. The record names files and may quote what was forgotten; the change may hold it."""


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What unlearn --out wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Name on the hub: owner/model.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The original's name on the hub, for adapters.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    message: Annotated[
        str, typer.Option("--message", help="Of the commit on the hub.")
    ] = "Unlearned with expunge",
    as_json: Json = False,
) -> None:
    """Upload a model that forgot, with a model card from its record unless there is a README.md.

    Weights, settings, tokenizer and card are uploaded; the record and the change stay here. The token
    is the one of the Hugging Face client: `hf auth login`, or HF_TOKEN.
    """
    from expunge.core.errors import UserError
    from expunge.problems._foreign import read_json
    from expunge.problems.models_on_disk import HUB_NAME
    from expunge.report.model_card import model_card, public_name

    if not HUB_NAME.fullmatch(repo):
        raise UserError(f"{repo!r} is no name on the hub; write owner/model")
    place = Path(folder).expanduser()
    record = read_record(place)
    adapters = (place / "adapter_model.safetensors").exists()
    if not adapters and not any(place.glob("model*.safetensors")):
        raise UserError(f"{place} holds no weights that transformers or peft reads")
    base = base or public_name(str((record.get("source") or {}).get("model") or ""))
    if adapters and not base:
        raise UserError(
            "the adapters belong to a model on this machine; name it as it is on the hub with --base"
        )
    check_token()
    written = write_card(place, model_card(record, base=base, adapters=adapters, repo=repo))
    if adapters:
        path = place / "adapter_config.json"
        config = read_json(path) | {"base_model_name_or_path": base}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files = sorted({p.name for pattern in RELEASED for p in place.glob(pattern)})
    url = upload(place, repo, files, private=private, message=message)
    if as_json:
        print_json({"repo": repo, "url": url, "files": files, "card": written})
        return
    typer.echo(f"card: {place / 'README.md'}{'' if written else ' (as it was)'}")
    typer.echo(f"model: {url}")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of an unlearning run in a folder.

    Raises:
        UserError: there is none.
    """
    from expunge.core.errors import UserError
    from expunge.problems._foreign import read_json
    from expunge.problems.models_on_disk import RECORD

    for name in ("record.json", RECORD):
        if (folder / name).is_file():
            record = read_json(folder / name)
            if "method" in record:
                return record
    raise UserError(f"{folder} holds no record of a run; give the folder that unlearn --out wrote")


def write_card(folder: Path, text: str) -> bool:
    """Write `README.md` if there is none; return whether it was written."""
    path = folder / "README.md"
    if path.exists():
        return False
    path.write_text(text, encoding="utf-8")
    return True


def check_token() -> None:
    """See that the client knows a token, before anything is written.

    Raises:
        UserError: it knows none, or is not installed.
    """
    from expunge.core.errors import UserError
    from expunge.problems._foreign import need

    if not need("huggingface_hub", "hub").get_token():
        raise UserError("the Hugging Face client has no token; run hf auth login, or set HF_TOKEN")


def upload(folder: Path, repo: str, files: Sequence[str], *, private: bool, message: str) -> str:
    """Upload files of a folder as one commit, into a repository that is made if it is not there.

    Returns:
        Address of the repository.

    Raises:
        ExpungeError: the hub cannot be reached, or refuses.
    """
    from expunge.core.errors import ExpungeError
    from expunge.problems._foreign import first_line, need, quiet

    hub = need("huggingface_hub", "hub")
    try:
        with quiet():
            api = hub.HfApi()
            made = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                folder_path=str(folder), repo_id=made.repo_id, allow_patterns=list(files),
                commit_message=message,
            )  # fmt: skip
            return str(made)
    except hub.errors.HfHubHTTPError as error:
        raise ExpungeError(f"the Hugging Face hub refuses {repo}: {first_line(error)}") from error
    except Exception as error:  # the client raises its own, httpx' and OS errors
        raise ExpungeError(
            f"the Hugging Face hub cannot be reached ({first_line(error)}); nothing was uploaded"
        ) from error
