"""Encrypts environment variables for a cluster with its token, which only the two sides have.

Everyone with access to the cluster can read what a job is submitted with, so it must not have secrets in plain text.
The key is derived from the token (HKDF, RFC 5869); sealing is Fernet (AES-128-CBC with HMAC-SHA256).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import InputError

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

VARIABLE = "MUSTER_SEALED"
_PURPOSE = b"muster: environment of a job"


def seal(values: Mapping[str, str], token: str) -> str:
    return _fernet(token).encrypt(json.dumps(dict(values)).encode()).decode()


def unseal(sealed: str, token: str) -> dict[str, str]:
    """Raises InputError if it was sealed with another token."""
    from cryptography.fernet import InvalidToken

    try:
        values: dict[str, str] = json.loads(_fernet(token).decrypt(sealed.encode()))
    except InvalidToken:
        raise InputError.of(
            "env", "was encrypted with a different token than this cluster's; submit the job again"
        ) from None
    return values


def open_environment() -> None:
    """Decrypt the variables for this process into its environment, and remove the encrypted text."""
    sealed = os.environ.pop(VARIABLE, None)
    if sealed is not None:
        token = os.environ.get("RAY_AUTH_TOKEN") or Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        os.environ.update(unseal(sealed, token))


def _fernet(token: str) -> Fernet:
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE).derive(token.encode())
    return Fernet(base64.urlsafe_b64encode(key))
