"""A model of the Hugging Face Hub as a local folder: small files first, weights once those are accepted."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mechjax.base.errors import HubError
from mechjax.hub.folder import CONFIG, INDEX, WEIGHTS, read_index

SMALL_FILES = (
    CONFIG,
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNREACHABLE = (
    "Check the network and that HF_HUB_OFFLINE is not set, or copy the model's folder onto this machine and load "
    "that folder."
)


def is_hub_name(name: str) -> bool:
    """Whether `name` is spelled `org/name`, as models on the Hub are."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def fetch(
    name: str,
    *,
    revision: str | None = None,
    check: Callable[[Path], object] | None = None,
    weights: bool = True,
) -> Path:
    """The folder of the Hub's model `name`, downloaded into the Hub's cache where it is not there yet.

    Only the files that a load reads are fetched. The revision that the small files came from is pinned for the
    weights, so that a push in between cannot mix two versions.

    Args:
        name: `org/name`.
        revision: Branch, tag or commit; the main branch by default.
        check: Called with the folder when it holds the small files only; raises to refuse a model before its
            weights are fetched.
        weights: Whether to fetch them at all.

    Raises:
        HubError: No access, no such model or revision, or the Hub cannot be reached and the cache has no copy.
    """
    if not is_hub_name(name):
        raise HubError(
            f"`{name}` is no Hub name; those are spelled `org/name`, such as `openai-community/gpt2`."
        )
    folder = _snapshot(name, revision, SMALL_FILES)
    if check is not None:
        check(folder)
    if not weights:
        return folder
    sharded = (folder / INDEX).is_file()
    shards = sorted(set(read_index(folder).values())) if sharded else [WEIGHTS]
    return _snapshot(name, folder.name, (*SMALL_FILES, *shards))


def fetch_files(name: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder of the Hub's repository `name`, with the files whose paths match one of `patterns`.

    Args:
        name: `org/name`.
        patterns: As of `fnmatch`, whose `*` matches slashes too.
        revision: Branch, tag or commit; the main branch by default.

    Raises:
        HubError: No access, no such repository or revision, or the Hub cannot be reached and the cache has no copy.
    """
    return _snapshot(name, revision, patterns)


def _snapshot(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """`huggingface_hub.snapshot_download`, its failures told apart and explained."""
    from huggingface_hub import constants, errors, snapshot_download  # here: it takes 0.2 s to import

    asked = f"`{name}`" + (f" at revision `{revision}`" if revision else "")
    page = f"{constants.ENDPOINT}/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise HubError(
            f"{asked} is gated: its owner decides who may download it. Accept its conditions at {page}, then log in "
            "with `hf auth login` or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"The Hub has `{name}` but not its revision `{revision}`. Branches, tags and commits are listed at "
            f"{page}/tree/main; leave `revision` out for the main branch."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        why = (
            "HF_HUB_OFFLINE is set"
            if offline
            else f"{constants.ENDPOINT} cannot be reached ({_cause(error)})"
        )
        raise HubError(f"{asked} is not in the local cache, and {why}. {_UNREACHABLE}") from None
    except errors.HfHubHTTPError as error:
        raise HubError(_refusal(asked, page, getattr(error.response, "status_code", None))) from None
    except Exception as error:  # whatever the HTTP client of the installed huggingface_hub raises
        raise HubError(f"Fetching {asked} failed: {_cause(error)}. {_UNREACHABLE}") from None


def _refusal(asked: str, page: str, status: int | None) -> str:
    """What an HTTP status means for a reader who asked for a model."""
    if status in (401, 403):
        return (
            f"The Hub refused {asked} ({status}): it is private or gated, or the name is wrong (the Hub does not say "
            f"which). Check {page}, then log in with `hf auth login` or set HF_TOKEN."
        )
    if status == 404:
        return f"The Hub has no model {asked}. Check the spelling at {page}."
    return f"The Hub answered {asked} with HTTP status {status}. Try again later, or load a local folder."


def _cause(error: BaseException) -> str:
    """The innermost error, in one line, without addresses that may carry credentials."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
