"""Imports go one way (DESIGN.md): every arrow in the tree is one of these, and data crosses borders without pickle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("monitor", "training", "probes_store")

WORDS = {"monitor.types", "monitor.errors"}
PURE = WORDS | {"monitor.aggregate", "monitor.heads", "monitor.probe", "monitor.template", "monitor.tap"}
# Who may import whom, by longest prefix. types <- {probe, aggregate, policy, ...} <- watch <- engines and api <- cli.
OPTIONS = WORDS | {"monitor.cli.options", "monitor.config"}  # what most commands need
COMMAND = "monitor.cli.command"  # the one module that may reach everything
MAY = {
    "monitor": set(),
    "monitor.types": set(),
    "monitor.errors": set(),
    "monitor.heads": set(),
    "monitor.aggregate": {"monitor.heads"},
    "monitor.plain_yaml": set(),
    "monitor.config": WORDS | {"monitor.plain_yaml"},
    "monitor.keys": WORDS | {"monitor.plain_yaml"},
    "monitor.logs": {"monitor.config"},
    "monitor.probe": WORDS,
    "monitor.template": WORDS,
    "monitor.tap": WORDS | {"monitor.probe"},
    "monitor.policy": set(),
    "monitor.policy.rule": WORDS | {"monitor.aggregate"},
    "monitor.policy.file": WORDS | {"monitor.config", "monitor.plain_yaml", "monitor.policy.rule"},
    "monitor.policy.resolve": WORDS | {"monitor.policy", "probes_store"},
    "monitor.policy.keeper": WORDS | {"monitor.config", "monitor.policy", "monitor.live"},
    "monitor.policy.second": WORDS | {"monitor.policy.file"},
    "monitor.coverage": {"monitor.types"},
    "monitor.track": {"monitor.types", "monitor.aggregate", "monitor.policy.rule"},
    "monitor.question": {"monitor.types", "monitor.policy.rule", "monitor.track"},
    "monitor.ruling": {"monitor.types", "monitor.policy.rule", "monitor.track", "monitor.question"},
    "monitor.sequence": {
        "monitor.types",
        "monitor.policy.rule",
        "monitor.coverage",
        "monitor.track",
        "monitor.question",
        "monitor.ruling",
    },
    "monitor.metrics": WORDS
    | {"monitor.policy.rule", "monitor.metrics", "probes_store.calibration", "probes_store.moments"},
    "monitor.offenders": {"monitor.types"},
    "monitor.audit": WORDS,
    "monitor.reread": {"monitor.types"},
    "monitor.traffic": WORDS | {"monitor.traffic", "monitor.reread"},
    "monitor.notice": {"monitor.types"},
    "monitor.live": {
        "monitor.types",
        "monitor.errors",
        "monitor.config",
        "monitor.policy",
        "monitor.probe",
        "monitor.template",
        "probes_store",
    },
    "monitor.engines": PURE
    | {
        "monitor.reread",
        "monitor.config",
        "monitor.policy",
        "monitor.question",
        "monitor.sequence",
        "monitor.live",
        "monitor.engines",
    },
    "monitor.engines.vllm.launch": PURE
    | {"monitor.config", "monitor.live", "monitor.reread", "monitor.engines", "probes_store"},
    "monitor.api": PURE
    | {
        "monitor",
        "monitor.audit",
        "monitor.config",
        "monitor.keys",
        "monitor.live",
        "monitor.logs",
        "monitor.metrics",
        "monitor.notice",
        "monitor.offenders",
        "monitor.policy",
        "monitor.traffic",
        "monitor.engines",
        "monitor.observer",
        "monitor.upstream",
        "monitor.api",
        "probes_store",
    },
    "monitor.notebook": PURE
    | {"monitor.config", "monitor.live", "monitor.sequence", "monitor.engines", "probes_store"},
    "monitor.scoring": PURE
    | {
        "monitor.config",
        "monitor.live",
        "monitor.metrics",
        "monitor.sequence",
        "monitor.engines",
        "monitor.api",
    },
    "monitor.terminal": set(),
    "monitor.cli": {"monitor.cli"},
    "monitor.cli.options": {"monitor.config"},
    "monitor.cli.show": OPTIONS | {"monitor.terminal", "monitor.traffic"},
    "monitor.cli.score": OPTIONS | {"monitor.scoring", "monitor.terminal"},
    COMMAND: {"monitor", "training", "probes_store"},
    "monitor.cli.keys": OPTIONS | {"monitor.keys"},
    "monitor.cli.live": OPTIONS | {"monitor.audit", "probes_store"},
    "monitor.cli.probe": OPTIONS | {"monitor.cli.live", "probes_store"},
    "monitor.cli.lint": OPTIONS | {"training"},
    "monitor.cli.lens": OPTIONS
    | {
        "monitor.engines.embedded",
        "monitor.live",
        "monitor.sequence",
        "probes_store",
        "training",
    },
    "monitor.observer": PURE
    | {"monitor.config", "monitor.live", "monitor.engines", "monitor.observer", "probes_store"},
    "monitor.upstream": PURE
    | {
        "monitor.policy",
        "monitor.question",
        "monitor.sequence",
        "monitor.live",
        "monitor.observer",
        "monitor.upstream",
    },
    "monitor.cli.observer": OPTIONS | {"monitor.observer"},
    "monitor.cli.train": OPTIONS | {"training"},
    "monitor.cli.gate": OPTIONS | {"training"},
    "monitor.cli.evaluate": OPTIONS | {"training"},
    "monitor.cli.retrain": OPTIONS | {"monitor.audit", "training"},
    "monitor.cli.log": OPTIONS | {"monitor.audit", "monitor.traffic"},
    "monitor.cli.harvest": OPTIONS | {"monitor.engines", "monitor.reread", "training"},
    "monitor.cli.select": OPTIONS | {"monitor.cli.harvest", "training"},
    "monitor.cli.review": OPTIONS | {"monitor.terminal", "monitor.traffic"},
    "monitor.cli.top": WORDS | {"monitor.top"},
    "monitor.top": WORDS | {"monitor.terminal", "monitor.top"},
    "monitor.cli.policy": OPTIONS | {"monitor.policy", "probes_store"},
    "probes_store": WORDS | {"monitor.aggregate", "probes_store"},
    "training": PURE
    | {"monitor", "monitor.config", "monitor.reread", "monitor.engines.embedded", "probes_store", "training"},
    # Data of the log crosses here: labels, features and, with the key, texts.
    "training.retrain.traffic": WORDS | {"monitor.traffic", "probes_store", "training"},
    "training.retrain.said": WORDS
    | {"monitor.config", "monitor.engines.embedded", "monitor.traffic", "probes_store", "training"},
}
LAZY = {("monitor", "monitor.notebook")}  # `monitor.watch`, resolved on first use


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def allowed(source, target):
    if source == target or (source, target) in LAZY:
        return True
    rule = max((m for m in MAY if source == m or source.startswith(m + ".")), key=len)
    if rule == "monitor" and source != "monitor":
        return False  # a new module must be given its place above
    return any(
        target == t or (target.startswith(t + ".") and t != "monitor") or (t == "monitor" and source == COMMAND)
        for t in MAY[rule]
    )


def test_every_import_is_an_arrow_of_the_design():
    ours = {name for name, _ in modules()}
    wrong = [
        f"{source} -> {target}"
        for source, path in modules()
        for target in imports(path)
        if target.split(".")[0] in PACKAGES and not allowed(source, target)
    ]
    assert len(ours) > 30
    assert wrong == []


def test_nothing_unpickles_or_evaluates():
    forbidden = ("pickle", "torch.load(", "eval(", "exec(", "yaml.load(")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for _, path in modules()
        for word in forbidden
        if word in path.read_text().replace(".eval()", "").replace("create_subprocess_exec(", "")
    ]
    assert found == []


def test_files_are_rooms():
    """One noun a file: its purpose in the first line, and no file much over 300 lines."""
    for name, path in modules():
        text = path.read_text()
        assert text.startswith('"""'), f"{name} has no purpose in its first line"
        assert len(text.splitlines()) <= 310, f"{name} is crowded"
