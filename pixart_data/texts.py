"""The text-cleaning policies: what happens to a caption before the tokenizer, in training and in sampling alike.

A policy has a version in its name and never changes: a dataset's manifest names the policy that made it, and sampling
uses that one. The default removes nothing but surplus white space. The reference lower-cases and deletes digits,
brackets and non-Latin scripts, twice over; its own later trainers dropped that.
"""

from collections.abc import Callable


def _whitespace_1(text: str) -> str:
    return " ".join(text.split())


POLICIES: dict[str, Callable[[str], str]] = {"whitespace-1": _whitespace_1}


def clean(text: str, policy: str) -> str:
    """Apply a policy by its name; `policy` comes from a validated job file or a manifest."""
    return POLICIES[policy](text)
