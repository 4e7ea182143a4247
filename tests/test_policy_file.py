"""Policy files: what is refused and how it is said, what overrides inherit, and what comes out of the cards."""

import json
import re
from pathlib import Path

import pytest

from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.policy.file import load_policy, policy_of
from monitor.policy.resolve import resolve
from monitor.types import Caller, Mode, Phase
from probes_store.calibration import Calibration
from probes_store.store import Store

from .test_cli import refused, run, state  # noqa: F401

MODEL, NAME = "smollm2-135m-instruct", "harmful-intent"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shipped():
    return [Store().load(MODEL, NAME, "v1")]


@pytest.fixture
def read(tmp_path):
    def load(data):
        path = tmp_path / "policy.yaml"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return load_policy(path)

    return load


def rule(probes, file, name, phase, form="chat"):
    (found,) = [r for r in resolve(probes, file)[name].rules[form] if r.phase is phase]
    return found


def probe(**phases):
    return {"probes": {NAME: phases}}


ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("[]", "must hold keys and values"),
        ("a: [", "is not YAML"),
        (f"probes:\n  {NAME}: {{}}\n  {NAME}: {{}}", f"key '{NAME}' is given twice, again in line 3"),
        ("name: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("target_fpr: 2", "target_fpr is 2: Input should be less than 0.5"),
        ("fail_mode: maybe", "fail_mode is 'maybe'"),
        ("tresholds: {}", "tresholds is {}: Extra inputs are not permitted"),
        ("name: a b", "name 'a b' must be letters"),
        ("blocked_prompt: {say: no}", "blocked_prompt"),
        ("blocked_prompt: {}", "blocked_prompt is {}: Value error, there is nothing in it; write the text"),
        ("blocked_answer: {}", "blocked_answer is {}"),
        (probe(prompt={"mode": "kill"}), f"probes.{NAME}.prompt.mode is 'kill'"),
        (probe(prompt={"threshold": 1, "target_fpr": 0.1}), "give threshold or target_fpr, not both"),
        (probe(prompt={"min_tokens": 3}), "belong to `response`"),
        (probe(response={"on_history": "flag"}), "an answer has no history"),
        (probe(prompt={"escalate": 0.0}), "there is no `second` to ask"),
        (probe(prompt={"threshold": float("nan")}), "prompt.threshold"),
        ({"second": {}}, "name either `probes` or `url`"),
        ({"second": {"probes": ["b", "a", "b"]}}, "`probes` names 'b' twice"),
        ({"second": {"probes": [NAME]}} | probe(response={"escalate": 0.0}), "would be its own second judge"),
        ({"second": {"url": "ftp://x", "model": "m"}}, "second.url is 'ftp://x'"),
        ({"second": {"url": "http://x"}}, "needs `model`"),
        ({"second": ENDPOINT | {"prompt": "judge!"}}, "must contain {conversation}"),
        ({"overrides": [{"name": "x"}]}, "overrides.0 needs a name and a `when`"),
        ({"overrides": [{"name": "x", "when": {}}]}, "must name a key, a model or a route"),
        ({"overrides": [{"name": "x", "when": {"route": ["images"]}}]}, "overrides.0.when.route.0 is 'images'"),
        ({"overrides": [{"name": "default", "when": {"key": ["a"]}}]}, "'default' is used twice"),
        ({"overrides": [{"name": "x", "when": {"key": ["a"]}, "fail_mode": "?"}]}, "overrides.0.fail_mode is '?'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_in_one_line(read, data, says):
    with pytest.raises(ConfigInvalid) as caught:
        read(data)
    assert says in str(caught.value) and "policy.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nobody.yaml", "."])
def test_a_file_that_can_not_be_read(tmp_path, name):
    with pytest.raises(ConfigInvalid, match="can't be read"):
        load_policy(tmp_path / name)


def test_the_first_override_that_matches_everything_it_names_stands(read):
    file = read(
        {
            "name": "house",
            "overrides": [
                {"name": "acme-chat", "when": {"key": ["acme"], "route": ["chat"]}},
                {"name": "acme", "when": {"key": ["acme", "acme-2"]}},
                {"name": "raw", "when": {"route": ["completions"]}},
            ],
        }
    )
    chosen = {
        ("acme", "chat"): "acme-chat",
        ("acme", "completions"): "acme",
        ("acme-2", "chat"): "acme",
        ("", "completions"): "raw",
        ("other", "chat"): "house",
    }
    assert {who: file.choose(Caller(*who)) for who in chosen} == chosen


def test_an_override_inherits_what_it_does_not_say(read, shipped):
    file = read(
        {
            "fail_mode": "open",
            "annotate": True,
            "probes": {NAME: {"prompt": {"mode": "block", "target_fpr": 0.02, "on_history": "block"}}},
            "overrides": [
                {"name": "by-value", "when": {"key": ["a"]}, "probes": {NAME: {"prompt": {"threshold": 3.5}}}}
            ],
        }
    )
    base, other = (rule(shipped, file, name, Phase.PROMPT) for name in ("default", "by-value"))
    assert other.threshold == 3.5 != base.threshold, "a value replaces a rate"
    assert (other.mode, other.on_history, other.fail_mode) == (Mode.BLOCK, Mode.BLOCK, "open")
    assert resolve(shipped, file)["by-value"].terms.annotate


def test_rates_come_out_of_the_card_and_are_shared_by_what_has_none_of_its_own(read, shipped):
    card = shipped[0].card
    prompt, response = (card.calibration["chat"][p.value] for p in Phase)
    plain = read({"target_fpr": 0.02})
    assert rule(shipped, plain, "default", Phase.PROMPT).threshold == prompt.threshold(0.01)
    own = read({"target_fpr": 0.02} | probe(response={"target_fpr": 0.05}))
    assert rule(shipped, own, "default", Phase.RESPONSE).threshold == response.threshold(0.05)
    assert rule(shipped, own, "default", Phase.PROMPT).threshold == prompt.threshold(0.02), "it has the rest alone"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"probes": {"nobody": {}}}, "names probe 'nobody'; of this model harmful-intent are live"),
        ({"second": {"probes": ["nobody"]}}, "names probe 'nobody'"),
        (probe(prompt={"mode": "block", "target_fpr": 1e-6}), "can't block in phase prompt"),
        ({"target_fpr": 0.005}, "in phase response (chat): 610 benign requests can't certify"),
        (probe(prompt={"target_fpr": 0.001}), "more are needed (2995 in all); calibrate it with more, or raise"),
        (probe(prompt={"by_length": True}), "can't block in phase prompt (chat): the card knows no lengths"),
        ({"target_fpr": 0.4}, "too few for a rate of 20.000%; lower it"),
        ({"second": ENDPOINT} | probe(prompt={"threshold": 1.0, "escalate": 2.0}), "must lie below the threshold"),
        ({"second": ENDPOINT} | probe(prompt={"mode": "flag", "escalate_fpr": 0.03}), "phase prompt: its mode is flag"),
    ],
    ids=str,
)
def test_what_the_probes_can_not_do_is_refused(read, shipped, data, says):
    with pytest.raises(ConfigInvalid, match=re.escape(says)):
        resolve(shipped, read(data))


def test_settings_and_a_file_do_not_mix(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("{}")
    with pytest.raises(ConfigInvalid, match="target_fpr is given beside a policy file"):
        policy_of(load_settings(policy=path, target_fpr=0.1))
    assert policy_of(load_settings(policy=path)).name == "default"


def test_the_key_of_a_second_judge_is_missed_at_start(tmp_path, monkeypatch):
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"second": ENDPOINT | {"api_key_env": "JUDGE_KEY"}}))
    with pytest.raises(ConfigInvalid, match=r"'JUDGE_KEY' .* is not set"):
        policy_of(load_settings(policy=path))
    monkeypatch.setenv("JUDGE_KEY", "x")
    assert policy_of(load_settings(policy=path)).default.second.api_key == "x"


@pytest.mark.parametrize("n", [300, 1000, 4000])
@pytest.mark.parametrize("alpha", [0.011, 0.02, 0.05])
def test_a_threshold_is_certified_for_the_rate_it_was_made_for(n, alpha):
    """And hardly for less: one value more above it would break the promise."""
    calibration = Calibration.fit([float(i) for i in range(n)], "made up")
    threshold = calibration.threshold(alpha)
    assert calibration.rate(threshold) <= alpha + 1e-6
    assert calibration.rate(threshold - 1) > alpha
    assert calibration.rate(-1.0) is None, "below what the card keeps nothing can be said"


def test_readmes_policy_is_one(tmp_path, monkeypatch, shipped):
    (sample,) = re.findall(r"```yaml\n(name: house.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "policy.yaml"
    path.write_text(sample)
    policies = resolve(shipped, load_policy(path))
    assert set(policies) == {"house", "partners"} and policies["partners"].rules["chat"][0].fail_mode == "open"


def test_check_prints_every_threshold_with_its_rate(run, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"name": "house", "second": ENDPOINT} | probe(prompt={"escalate_fpr": 0.03})))
    code, out, _ = run("policy", "check", path, "--json")
    assert code == 0
    rows = {(r["format"], r["phase"]): r for r in json.loads(out)["rules"]}
    prompt = rows["chat", "prompt"]
    assert prompt["certified_fpr"] <= 0.005 < prompt["asked_fpr"] <= 0.03
    assert rows["raw", "response"]["certified_fpr"] is None
    assert "house: everybody else" in run("policy", "check", path)[1]
    path.write_text("fail_mode: maybe")
    refused(run("policy", "check", path), "fail_mode is 'maybe'")
