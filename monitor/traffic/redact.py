"""Secrets and personal data out of texts, before anything of them is kept: one table of patterns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Pattern(NamedTuple):
    """holds: what a match must also be, like a card's check digit"""

    name: str
    form: re.Pattern[str]
    holds: Callable[[str], bool] = bool


def luhn(number: str) -> bool:
    """The check digit of cards."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [d if i % 2 == 0 else 2 * d - 9 * (d > 4) for i, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0


def iban(number: str) -> bool:
    """The check digits of bank accounts: ISO 13616."""
    plain = "".join(number.split()).upper()
    turned = plain[4:] + plain[:4]
    return turned.isascii() and turned.isalnum() and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


# Names of what is a secret, alone or within DB_PASSWORD, secretAccessKey, spring.datasource.password or JWT_SECRET_2.
_WORD = (
    r"(?:pass(?:words?|wd|phrase|code)|(?<![a-z0-9])pass(?=\s{0,3}[:=]|\\{0,7}[\"']|\Z)|pwd|secrets?|token|credentials?"
    r"|(?:api|access|account|auth|encryption|master|private|session|signing)[ _-]?key)"
)
_COUNTED = r"(?![_-](?:budget|count|id|ids|length|limit|type|usage)\b)"  # of tokens: numbers, and no secrets
_NAME = rf"{_WORD}{_COUNTED}\d{{0,3}}(?:[_.-]?(?:hash|key|string|text|value))?(?:[_.-][a-z0-9]{{1,24}}){{0,3}}"
# Quotes may be escaped: JSON in a string of JSON, in a string of JSON.
_SIGN = r"(?:\\{0,7}[\"'])?\s{0,3}(?::=|=>|={1,3}|:)\s{0,3}"
# A mark that would end a value, but stands within it: with something of it before and behind, no blank and no quote.
_INSIDE = r"(?<![\s\"',;:=(\[{\\])[\"',;](?![\s\"',;:)\]}\\]|\Z)"
_VALUE = (
    r"(?!(?:null|none|true|false|undefined)\b|\[[a-z ]{3,24}\])"
    r"(?:b?(?P<quote>\\{0,7}[\"'])(?:(?!(?<!\\)(?P=quote))[^\n]){1,8192}+(?<!\\)(?P=quote)"
    rf"|(?:\\{{0,7}}[\"'])?(?!\[[a-z ]{{3,24}}\])(?:[^\s\"',;\\]|\\(?!\\{{0,7}}[\"'])|{_INSIDE}){{4,}}+)"
)

# Those that hold others in them come first. Every repeat is bounded, of one class, or the end of its pattern: no text
# makes them slow, and of what is long no end stays.
PATTERNS = (
    Pattern(
        "private key",
        _form(
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY( BLOCK)?-----([^-]|-(?!----)){0,20000}+(-----END [A-Z ]{0,40}-----)?"
        ),
    ),
    Pattern("token", re.compile(r"\beyJ[\w-]{8,4096}+\.[\w-]{4,}+(\.[\w-]*)?")),  # a JWT
    Pattern("password", _form(r"(?<=://)[^\s:/@]{0,100}+:[^\s/@]{1,4096}+(?=@)")),  # in a URL
    Pattern("key", re.compile(r"\b(AKIA|ASIA|AROA|AIDA)[0-9A-Z]{16}\b")),  # AWS
    Pattern("key", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}")),
    Pattern("key", re.compile(r"\bxox[abeoprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}")),  # Slack, Google
    Pattern("key", re.compile(r"\b(glpat-|hf_|npm_|pypi-|dop_v1_|shpat_|whsec_|SG\.)[\w.-]{16,}")),
    Pattern("key", re.compile(r"\b[prs]k[-_][\w-]{16,}")),  # OpenAI, Anthropic, Stripe
    Pattern("key", re.compile(r"\b\d{8,10}:[\w-]{35}\b")),  # Telegram
    Pattern(
        "token",
        _form(
            rf"\bauthorization{_SIGN}(?:\\{{0,7}}[\"'])?(?!\[)(?:(?:apikey|basic|bearer|digest|token)\s{{1,3}}(?!\[))?"
            r"[^\s\"',;]{4,}"
        ),
    ),
    Pattern("token", _form(r"(?<=\bbearer )[\w.~+/-]{12,}=*")),
    Pattern("password", _form(rf"{_NAME}(?:{_SIGN}|\sis\s)(?!{_NAME}{_SIGN}){_VALUE}")),
    Pattern("mail", _form(r"[\w.%+-]{1,64}@[a-z0-9][a-z0-9-]{0,62}(\.[a-z0-9-]{1,63}){1,8}")),
    Pattern("account", _form(r"\b[A-Z]{2}\d{2}([ ]?[A-Z0-9]{4}){2,7}([ ]?[A-Z0-9]{1,4})?\b"), iban),
    Pattern("card", re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d])"), luhn),
    Pattern("social security number", re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")),
    Pattern("phone", re.compile(r"(?<![\w+])(\+|00)[1-9]\d{0,2}([ ().-]{0,2}\d){6,12}(?!\d)")),
    Pattern("phone", re.compile(r"(?<![\d.-])(\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\d-])")),
    Pattern(
        "address", re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])")
    ),
)


def redact(text: str) -> str:
    """The text with `[name]` in place of every match. What looks like none of the patterns stays."""
    for pattern in PATTERNS:
        text = pattern.form.sub(lambda m, p=pattern: f"[{p.name}]" if p.holds(m[0]) else m[0], text)  # type: ignore[misc]
    return text


_NAMED = _form(rf"(?:{_NAME}|\bauthorization)\Z")


def redacted(value: Any, secret: bool = False) -> Any:
    """Every string of a JSON value, names of fields too, redacted; and whatever stands behind the name of a secret.

    secret: it stands behind such a name
    """
    if isinstance(value, str):
        return "[password]" if secret and value else redact(value)
    if isinstance(value, dict):
        named = _is_named(value.get("name"))  # {"name": "DB_PASSWORD", "value": ...}
        return {redact(str(k)): redacted(v, _is_named(k) or (named and k == "value")) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(v, secret) for v in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return "[password]" if secret else _number(value)


def _is_named(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= 200 and _NAMED.search(name) is not None


def _number(value: float) -> Any:
    """A card's may be one. Of few digits, as most are, none is looked at; nor of more than a card has."""
    if not 10**12 <= value < 10**19:
        return value
    found = redact(plain := str(value))
    return value if found == plain else found
