"""Who may look and who may decide: Streamlit's own log-in where ``[auth]`` is configured, one person where not.

``.streamlit/secrets.toml`` of the project, or of the home folder::

    [auth]                       # Streamlit's own keys, see st.login
    redirect_uri = "https://…/oauth2callback"
    cookie_secret = "…"
    client_id = "…"
    client_secret = "…"
    server_metadata_url = "https://…/.well-known/openid-configuration"

    [roles]                      # who may decide; everybody else who can log in may only look
    reviewers = ["ann@example.org"]
    claim = "groups"             # or by what the log-in says about them
    reviewer_values = ["radiology-review"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from medvlm.errors import InputError

__all__ = ["Person", "allowed_to_write", "person", "require_log_in"]


@dataclass(frozen=True)
class Person:
    """Who sits before the page."""

    name: str
    """As it signs decisions; empty where nobody logs in and the page has to ask."""
    may_write: bool
    logged_in: bool


def person() -> Person:
    """Who is logged in; without ``[auth]`` somebody on this machine, who may do everything."""
    user: Mapping[str, Any] = st.user
    # Streamlit sets the key where [auth] is configured, and only there.
    if "is_logged_in" not in user:
        return Person("", may_write=True, logged_in=False)
    if not user.get("is_logged_in"):
        return Person("", may_write=False, logged_in=False)
    name = _name(user)
    return Person(name, may_write=bool(name) and _reviews(name, user), logged_in=True)


def _name(user: Mapping[str, Any]) -> str:
    """What identifies somebody for good: an address that was verified, or the provider's own mark."""
    verified = user.get("email") if user.get("email_verified", True) in (True, "true") else None
    return str(verified or user.get("sub") or "").strip()


def _reviews(name: str, user: Mapping[str, Any]) -> bool:
    roles: Mapping[str, Any] = st.secrets.get("roles", {})
    claimed = user.get(str(roles.get("claim", ""))) or ()
    values = {claimed} if isinstance(claimed, str) else {str(value) for value in claimed}
    listed = {str(known).lower() for known in roles.get("reviewers", ())}
    return name.lower() in listed or bool(values & {str(value) for value in roles.get("reviewer_values", ())})


def require_log_in() -> None:
    """Stop the script with a button to log in, where a log-in is configured and nobody is."""
    if "is_logged_in" in st.user and not st.user.get("is_logged_in"):
        st.title("medvlm", anchor=False)
        st.text("Log in to see this workspace.")
        st.button("Log in", type="primary", on_click=st.login)
        st.stop()


def allowed_to_write() -> Person:
    """The person, if decisions may be made.

    Raises:
        InputError: They may only look.
    """
    who = person()
    if not who.may_write:
        raise InputError(
            f"{who.name or 'nobody'} may look, not decide",
            where="the log-in",
            hint="ask whoever runs this dashboard to add you to [roles] in its secrets.toml",
        )
    return who
