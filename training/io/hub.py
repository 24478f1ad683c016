"""Models on the Hugging Face hub: files of theirs that are at hand,
in the cache of its library or fetched at once. Free of torch."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from training.errors import InputError
from training.io import http_requests
from training.io.http_requests import RequestError

PATIENCE_S = 5.0
"""For the hub, which may be out of reach: its library would try for half a minute."""
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py"]
"""Of a model: configuration, weights, tokenizer, code. Not weights in other forms."""


def cached_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a model in the library's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no name
        return None
    return Path(found) if isinstance(found, str) else None


def file_at_hand(name: str, file: str, revision: str | None = None) -> Path | None:
    """A small file of a model, fetched if the hub answers at once; None if it cannot be had."""
    if (cached := cached_file(name, file, revision)) is not None or not _answers(name, file, revision):
        return cached
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except Exception:  # the library's errors have no common base
        return None


class _TokenStays(urllib.request.HTTPRedirectHandler):
    """Redirects to another origin, such as a content network, do not get the token of the hub."""

    def redirect_request(self, req: urllib.request.Request, *rest: Any) -> urllib.request.Request | None:
        following = super().redirect_request(req, *rest)
        if following is not None and (following.type, following.host) != (req.type, req.host):
            following.remove_header("Authorization")
        return following


def fetch(request: urllib.request.Request, timeout_s: float) -> bytes:
    """What the hub answers. Raises RequestError."""
    return http_requests.fetch(request, timeout_s, urllib.request.build_opener(_TokenStays))


def _answers(name: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        address = hf_hub_url(name, file, revision=revision)
        fetch(urllib.request.Request(address, headers=build_hf_headers(), method="HEAD"), PATIENCE_S)
    except (RequestError, OSError, ValueError):
        return False
    return True


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the library's cache; None unless all of its weights are there."""
    config = cached_file(name, "config.json", revision)
    return None if config is None or not _has_weights(config.parent) else config.parent


def _has_weights(folder: Path) -> bool:
    if (folder / "model.safetensors").exists():
        return True
    try:
        files = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / str(file)).exists() for file in set(files))


def fetched_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a whole model, fetched as far as it is not in the cache. Raises InputError if it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the library's errors have no common base
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError.of(name, f"cannot be fetched from the Hugging Face hub: {told}") from error
