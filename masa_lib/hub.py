"""Whether the Hugging Face hub gives a model or a data set, and with what patience it is asked.

The hub is asked once and briefly. Its own client asks for every file six times, half a minute long, and then blames the
name. Nothing is loaded here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from masa_lib.errors import MasaError

#: seconds that the hub has for an answer
PATIENCE = 5.0


class HubError(MasaError, RuntimeError):
    """A model is nowhere to be had; the message says why."""


@contextlib.contextmanager
def patient(data_set: str) -> Iterator[None]:
    """Inside, the hub's client takes a data set from its cache where the hub does not answer, and asks no more."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not Path(data_set).is_dir():
        constants.HF_HUB_OFFLINE = "does not answer" in refusal(data_set, "README.md", "dataset")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def refusal(where: str, file: str = "config.json", kind: str = "model") -> str:
    """Why the hub does not give a file of a model or a data set; empty if it does."""
    import httpx
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        reply = get_session().head(hf_hub_url(where, file, repo_type=kind), headers=build_hf_headers(),
                                   timeout=PATIENCE, follow_redirects=True)
    except (httpx.HTTPError, OSError) as error:
        return f"the Hugging Face hub does not answer ({str(error) or type(error).__name__})"
    if reply.status_code == httpx.codes.NOT_FOUND:
        return "the Hugging Face hub has no model of this name"
    if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return ("the Hugging Face hub has none of this name, or gives it only to those who agreed to its terms "
                "(`hf auth login`)")
    return f"the Hugging Face hub answers with an error ({reply.status_code})" if reply.status_code >= 400 else ""
