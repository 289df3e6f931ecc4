# SPDX-License-Identifier: Apache-2.0
"""Turns the errors of `obstore` into errors of this package, and says which of them may pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from shardckpt.errors import AlreadyExists, CheckpointError, MissingFile, StoreError

_KINDS: Final[tuple[tuple[type[Exception], type[CheckpointError], str], ...]] = (
    (FileNotFoundError, MissingFile, "it was deleted, never written, or bucket or name are wrong"),
    (AlreadyExistsError, AlreadyExists, "an existing object is never overwritten: use another step or root"),
    (PreconditionError, StoreError, "somebody replaced the object in the meantime: load again"),
    (PermissionDeniedError, StoreError, "these credentials may not do this: check the policy of the bucket"),
    (UnauthenticatedError, StoreError, "the credentials are missing or wrong: check the environment"),
    (NotSupportedError, StoreError, "this object store, as it is set up here, has no such operation"),
)

_STATUS: Final = re.compile(r"status code: (\d{3})")
_PASSING_STATUS: Final = frozenset({408, 409, 425, 429, *range(500, 600)})
# An error in the body of a reply with status 200, and one of the connection.
_PASSING_TEXT: Final = ("Server returned error response", "HTTP error", "error decoding response body")
# A request that was never sent, because of its URL.
_UNSENT: Final = "builder error"
_VARIABLES: Final = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}


def variables_of(url: str) -> str:
    """What the names of the variables begin with that hold the settings for a URL."""
    return _VARIABLES.get(url.partition("://")[0], "AWS")


@contextmanager
def explained(operation: str, url: str, name: str, missing: type[CheckpointError] = MissingFile) -> Iterator[None]:
    """Raise errors of the block as `MissingFile`, `AlreadyExists` or `StoreError`, with the cause chained.

    ``missing`` is the kind for what is not found; while writing that can only be the bucket.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        raise _translated(operation, url, name, error, missing) from error


def _translated(operation: str, url: str, name: str, error: Exception, missing: type[CheckpointError]) -> CheckpointError:
    reason = str(error).partition("\n")[0].strip()
    message = f"cannot {operation} {name!r} in {url}: {reason}"
    details = {"operation": operation, "url": url, "name": name}
    for source, kind, advice in _KINDS:
        if isinstance(error, source):
            return (missing if kind is MissingFile else kind)(f"{message}; {advice}", **details)
    if _UNSENT in reason and "http://" in reason:
        remedy = f"plain http is refused: set {variables_of(url)}_ALLOW_HTTP=true, or use https"
        return StoreError(f"{message}; {remedy}", **details)
    if _may_pass(str(error)):
        return StoreError(f"{message}; the service or the network is troubled: try again", **details, transient=True)
    return StoreError(f"{message}; check the URL and the AWS_*, GOOGLE_* or AZURE_* variables", **details)


def _may_pass(text: str) -> bool:
    # The library gives no code for the rest of the errors, only text.
    status = _STATUS.search(text)
    if status:
        return int(status[1]) in _PASSING_STATUS
    return _UNSENT not in text and any(sign in text for sign in _PASSING_TEXT)
