"""What to say of a token that does not do; nothing of the token itself."""

from __future__ import annotations

import os

FLAWED_TOKEN = "the token holds characters that none has: set HF_TOKEN anew, or log in again with `hf auth login`"


def is_token_flawed() -> bool:
    """Whether the client would stumble over its token, and show a part of it in what it says."""
    from huggingface_hub import get_token

    token = get_token() or ""
    return not (token.isascii() and token.isprintable()) or " " in token


def is_logged_in() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def refused_token(said: str = "") -> str:
    """The Hub answers that it does not accept the token; `said` is what it says, in parentheses."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return (
                f"{name} is set and not accepted by the Hub{said}: set it anew, or unset it to be who `hf auth login` "
                "has logged in"
            )
    return f"the Hub does not accept the token{said}: log in again with `hf auth login`"
