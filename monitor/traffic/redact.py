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


# Those that hold others in them come first. Every repeat is bounded or of one class: no text makes them slow.
PATTERNS = (
    Pattern("private key", _form(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,20000}(-----END [A-Z ]{0,40}-----)?")),
    Pattern("token", re.compile(r"\beyJ[\w-]{8,4096}\.[\w-]{4,8192}(\.[\w-]{0,2048})?")),  # a JWT
    Pattern("password", _form(r"\b(?<=://)[^\s:/@]{1,100}:[^\s:/@]{1,200}(?=@)")),  # in a URL
    Pattern("key", re.compile(r"\b(AKIA|ASIA|AROA|AIDA)[0-9A-Z]{16}\b")),  # AWS
    Pattern("key", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,255}|\bgithub_pat_\w{20,255}")),
    Pattern("key", re.compile(r"\bxox[abeoprs]-[\w-]{10,250}|\bAIza[\w-]{35}|\bya29\.[\w-]{20,500}")),  # Slack, Google
    Pattern("key", re.compile(r"\b(glpat-|hf_|npm_|pypi-|dop_v1_|shpat_|whsec_|SG\.)[\w.-]{16,300}")),
    Pattern("key", re.compile(r"\b[prs]k[-_][\w-]{16,250}")),  # OpenAI, Anthropic, Stripe
    Pattern("key", re.compile(r"\b\d{8,10}:[\w-]{35}\b")),  # Telegram
    Pattern("token", _form(r"(?<=\bbearer )[\w.~+/-]{12,4096}=*")),
    Pattern(
        "password",
        _form(
            r"\b(password|passwd|passphrase|pwd|secret|token|api[ _-]?key|access[ _-]?key|client[ _-]?secret)\b"
            r"[\"']?(\s{0,3}[:=]\s{0,3}|\sis\s)[\"']?(?!\[)[^\s\"',;]{4,500}+(?<![:=])"
        ),
    ),
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


def redacted(value: Any) -> Any:
    """Every string of a JSON value, names of fields too, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(k)): redacted(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(v) for v in value]
    return value
