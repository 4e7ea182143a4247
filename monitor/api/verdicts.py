"""What a client is told of verdicts: two headers, and by policy Azure's annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from monitor.policy.rule import worst
from monitor.types import Action, Opening, Phase, ProbeReading, Record, Terms, is_candidate

DECISION, POLICY = "x-midstream-decision", "x-midstream-policy"


def verdict_headers(policy: str, actions: Iterable[Action]) -> dict[str, str]:
    """The worst verdict that was known when the answer began, and the name of the policy."""
    return {DECISION: str(worst(list(actions))), POLICY: policy}


def filter_results(readings: Iterable[ProbeReading]) -> dict[str, Any]:
    """Azure's `content_filter_results`: filtered where it was blocked, detected where a threshold was crossed. A probe
    without a value is Azure's outage; a candidate is not spoken of."""
    results: dict[str, Any] = {}
    for r in readings:
        if is_candidate(r.probe):
            continue
        if r.action is Action.UNMONITORED:
            results["error"] = {"code": "content_filter_error", "message": f"{r.probe} could not score this text"}
        else:
            detected = r.crossed_at is not None
            results[r.probe] = {"filtered": r.action is Action.BLOCK, "detected": detected}
    return results


def prompt_annotation(terms: Terms, openings: Mapping[int, Opening], n: int) -> dict[str, Any]:
    """`prompt_filter_results`, where the policy wants them. openings: by choice; n: choices of each prompt"""
    if not terms.annotate:
        return {}
    prompts = {i // n: openings[i] for i in sorted(openings, reverse=True)}
    return {
        "prompt_filter_results": [
            {"prompt_index": p, "content_filter_results": filter_results(prompts[p].readings)} for p in sorted(prompts)
        ]
    }


def answer_annotation(terms: Terms, record: Record) -> dict[str, Any]:
    """`content_filter_results` of a choice that has ended, where the policy wants them."""
    if not terms.annotate:
        return {}
    return {"content_filter_results": filter_results(r for r in record.readings if r.phase is Phase.RESPONSE)}


def known(openings: Mapping[int, Opening], records: Mapping[int, Record]) -> list[Action]:
    """Every verdict so far: of a stream those on the prompts, of a whole answer each choice's."""
    return [r.action for o in openings.values() for r in o.readings] + [r.verdict for r in records.values()]
