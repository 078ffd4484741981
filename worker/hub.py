"""Models of the Hugging Face hub: downloaded once, then served from its cache, also while the hub cannot be reached."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ANSWER_SECONDS = 10.0  # until the hub counts as out of reach


@dataclass(frozen=True, slots=True)
class HubName:
    """OWNER/NAME, or OWNER/NAME@REVISION: a branch, a tag or a commit."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, name: str) -> HubName | None:
        """None where that cannot be the name of a hub model."""
        repository, _, revision = name.partition("@")
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository, re.ASCII):
            return None
        return cls(repository, revision or None)

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def from_hub(name: HubName, files: list[str], lacks: Callable[[Path], str], say: Callable[[str], None]) -> Path:
    """The folder of its snapshot. Raises OSError with a sentence.

    `files` are the patterns of what is fetched; `lacks` names the file that a folder would need, or nothing.
    """
    from huggingface_hub import HfApi, snapshot_download  # takes a third of a second to import; few starts need it

    try:
        HfApi().model_info(name.repository, revision=name.revision, timeout=ANSWER_SECONDS)
    except Exception as error:  # its errors have many types, of more than one library; each becomes a sentence
        return _from_cache(name, error, files, lacks, say)
    try:
        return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=files))
    except Exception as error:
        raise OSError(_sentence(name, error, "could not be downloaded")) from error


def _from_cache(
    name: HubName,
    refusal: Exception,
    files: list[str],
    lacks: Callable[[Path], str],
    say: Callable[[str], None],
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        cached = Path(
            snapshot_download(name.repository, revision=name.revision, allow_patterns=files, local_files_only=True)
        )
    except Exception as error:
        raise OSError(_not_cached(name, refusal)) from error
    if absent := lacks(cached):  # another program wanted no more of it
        raise OSError(_not_cached(name, refusal, f" ({absent} is not there)"))
    say(f"{_sentence(name, refusal, 'is served from the cache')}: {cached}")
    return cached


def _not_cached(name: HubName, refusal: Exception, detail: str = "") -> str:
    from huggingface_hub import constants

    sentence = _sentence(name, refusal, "could not be had")
    if not _is_unreachable(refusal):
        return sentence
    return (
        f"{sentence}, and the cache {constants.HF_HUB_CACHE} does not hold all of it{detail}; "
        "try again with a connection, or give --model a folder with the checkpoint"
    )


def _is_unreachable(error: Exception) -> bool:
    """As against an answer of the hub, which another try would get again."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500


def _sentence(name: HubName, error: Exception, what: str) -> str:
    return f"the hub model {name} {what}: {_reason(name, error)}"


def _reason(name: HubName, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; accept its terms at {constants.ENDPOINT}/{name.repository} and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {name.revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{constants.ENDPOINT} knows no such model (a private one needs HF_TOKEN)"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answers {error.response.status_code}"
    first_line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno):
        return first_line  # a name that the hub does not allow; a full disk
    return f"{constants.ENDPOINT} could not be reached ({first_line or type(error).__name__})"
