"""What the container files say, without an engine: one place per setting, nothing exposed, every package locked."""

import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from control.settings import AgentSettings
from gateway.settings import Settings as GatewaySettings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
# What the layout of the containers decides; .env does not reach these.
FIXED = {
    "AGENT_": {"host", "port", "plan", "model_store", "config", "temp", "management_log", "inference_host"}
    | {"advertised_host", "metrics_host", "inference_port", "metrics_port"},
    "GATEWAY_": {"host", "port", "agents", "plan", "auth", "keys_file"},
}
LOCKED = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ;.*)? \\$", re.MULTILINE)
METRIC = re.compile(r"\b(?:gateway|ts)_[a-z_]+\b|\bRequests\dXX\b")


@pytest.mark.parametrize(
    ("service", "prefix", "settings"),
    [("gateway", "GATEWAY_", GatewaySettings), ("torchserve", "AGENT_", AgentSettings)],
)
def test_every_setting_reaches_its_container(service, prefix, settings):
    passed = {entry for entry in SERVICES[service]["environment"] if "=" not in entry}
    assert passed == {prefix + name.upper() for name in settings.model_fields.keys() - FIXED[prefix]}


def test_settings_that_compose_fixes_exist():
    fields = {"AGENT_": AgentSettings.model_fields, "GATEWAY_": GatewaySettings.model_fields}
    for prefix, names in FIXED.items():
        assert names <= fields[prefix].keys()


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_contained_and_bounded(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].split(":")[0] not in {"0", "root"}
    assert service["mem_limit"]
    assert service["pids_limit"]


def test_everything_is_published_on_loopback_only():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_torchserve_is_on_the_private_network_alone():
    assert COMPOSE["networks"]["serving"] == {"internal": True}
    assert SERVICES["torchserve"]["networks"] == ["serving"]
    assert "ports" not in SERVICES["torchserve"]


def test_only_operators_and_the_first_start_write_the_plan_and_the_models():
    writers = set()
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            if volume.split(":")[0] in {"state", "models"} and not volume.endswith(":ro"):
                writers.add(name)
    assert writers == {"prepare", "gradserve", "training"}


def test_another_address_comes_with_keys():
    public = yaml.safe_load((ROOT / "config" / "compose.public.yml").read_text(encoding="utf-8"))
    gateway = public["services"]["gateway"]
    assert "GATEWAY_AUTH=keys" in gateway["environment"]
    assert "GATEWAY_KEYS_FILE=/run/secrets/gateway_keys" in gateway["environment"]
    assert gateway["secrets"] == ["gateway_keys"]


@pytest.mark.parametrize("process", ["gateway", "serving", "training"])
def test_lock_files_hold_what_pyproject_names_with_hashes(process):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = dict(
        requirement.split("==")
        for requirement in project["dependencies"] + project["optional-dependencies"][process]
        if not requirement.startswith("torch==")
    )
    text = (ROOT / "requirements" / f"{process}.txt").read_text(encoding="utf-8")
    locked = dict(LOCKED.findall(text))
    assert {name: locked.get(name) for name in named} == named, "run `make lock`"
    entries = re.split(r"\n(?=[a-z])", text)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "torch" not in locked


def test_the_images_command_imports_a_function():
    text = (ROOT / "Dockerfile.torchserve").read_text(encoding="utf-8")
    imports = re.findall(r"from (\S+) import (\w+)\\n", text)
    assert len(imports) == 2
    for module, name in imports:
        assert inspect.isfunction(getattr(importlib.import_module(module), name))


def test_no_two_lock_files_name_a_package_in_two_versions():
    """A developer's machine installs all of them together, each file by its hash."""
    versions: dict[str, set[str]] = {}
    for file in ("gateway", "serving", "training", "dev", "bulk", "build"):
        text = (ROOT / "requirements" / f"{file}.txt").read_text(encoding="utf-8")
        assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=[a-z])", text)[1:])
        for name, version in LOCKED.findall(text):
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = dict(
        re.sub(r"\[.*\]", "", tool).lower().split("==") for tool in project["project"]["optional-dependencies"]["dev"]
    )
    assert {name: versions.get(name) for name in tools} == {name: {version} for name, version in tools.items()}
    assert versions["setuptools"] == {project["build-system"]["requires"][0].removeprefix("setuptools==")}


@pytest.mark.long
def test_the_sboms_list_what_the_images_install(tmp_path):
    subprocess.run([ROOT / "requirements" / "sbom.sh", Path(sys.executable).parent, tmp_path], check=True)
    for name, files in (("gateway", ["gateway"]), ("torchserve", ["torch-cpu", "serving"])):
        document = json.loads((tmp_path / f"gradserve-{name}.cdx.json").read_text(encoding="utf-8"))
        locked = [LOCKED.findall((ROOT / "requirements" / f"{file}.txt").read_text("utf-8")) for file in files]
        listed = {(part["name"], part["version"]) for part in document["components"]}
        assert document["bomFormat"] == "CycloneDX"
        assert listed == {pair for pairs in locked for pair in pairs}


def test_torch_is_locked_for_both_builds_at_pyprojects_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (version,) = {r.split("==")[1] for r in project["optional-dependencies"]["serving"] if r.startswith("torch==")}
    for build, wanted in (("cpu", f"{version}+cpu"), ("cuda", version)):
        text = (ROOT / "requirements" / f"torch-{build}.txt").read_text(encoding="utf-8")
        assert dict(LOCKED.findall(text))["torch"] == wanted


def test_the_gateways_lock_has_no_torch_and_no_mlflow():
    text = (ROOT / "requirements" / "gateway.txt").read_text(encoding="utf-8")
    assert not {"torch", "torchvision", "numpy", "mlflow"} & {name for name, _ in LOCKED.findall(text)}


def dashboards() -> list[dict]:
    return [json.loads(path.read_text("utf-8")) for path in (ROOT / "config/grafana/dashboards").glob("*.json")]


def expressions() -> list[str]:
    rules = yaml.safe_load((ROOT / "config/prometheus/rules.yml").read_text(encoding="utf-8"))
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    panels = [panel for dashboard in dashboards() for panel in dashboard["panels"]]
    return found + [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_dashboards_and_rules_ask_for_metrics_that_exist():
    gateway = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "gateway").rglob("*metrics.py"))
    torchserve = (ROOT / "config" / "torchserve" / "metrics.yaml").read_text(encoding="utf-8")
    exported = set(re.findall(r'"(gateway_[a-z_]+)"', gateway)) | set(re.findall(r"name: (\w+)", torchserve))
    for expression in expressions():
        for name in METRIC.findall(re.sub(r'"[^"]*"', '""', expression)):
            assert re.sub(r"_(total|bucket|sum|count)$", "", name) in exported or name in exported, expression


def test_dashboard_panels_have_their_own_numbers_and_places():
    for dashboard in dashboards():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells = [
            (x, y)
            for panel in panels
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert all(0 <= x < 24 for x, _ in cells)


def unknown_to_grafana(dashboard: dict) -> list[str]:
    """The parts that Grafana's own models drop: it ignores without a word what it does not know."""
    register_default_plugins()
    kept = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    return list(lost(dashboard, kept))


def lost(before: object, after: object, place: str = "") -> Iterator[str]:
    """Where `after` lacks, or changes, what `before` has."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after.get(key), f"{place}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (value, kept) in enumerate(zip(before, after, strict=True)):
            yield from lost(value, kept, f"{place}[{number}]")
    elif before != after:
        yield place


def test_grafanas_own_models_know_every_part_of_the_dashboards():
    for dashboard in dashboards():
        assert unknown_to_grafana(dashboard) == []


def test_a_part_that_grafana_does_not_know_is_found():
    (dashboard,) = dashboards()
    number, panel = next((n, p) for n, p in enumerate(dashboard["panels"]) if p["type"] == "stat")
    panel["options"]["colourMode"] = "value"
    panel["targets"][0]["legendFormt"] = "calls"
    assert unknown_to_grafana(dashboard) == [
        f".panels[{number}].options.colourMode", f".panels[{number}].targets[0].legendFormt"
    ]  # fmt: skip


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def test_alerts_fire_at_what_they_are_for_and_at_nothing_else(tmp_path):
    tool = promtool()
    for path in (ROOT / "config" / "prometheus" / "rules.yml", ROOT / "tests" / "containers" / "alerts.yml"):
        shutil.copy(path, tmp_path)
    answer = subprocess.run(
        [tool, "test", "rules", "alerts.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_promtool_accepts_configuration_rules_and_the_dashboards_expressions(tmp_path):
    tool = promtool()
    asked = [
        {"record": f"panel:{n}", "expr": expression.replace("$__rate_interval", "1m")}
        for n, expression in enumerate(expressions())
    ]
    rules = tmp_path / "expressions.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": asked}]}), encoding="utf-8")
    config = ROOT / "config" / "prometheus"
    for command in (
        ["check", "config", "--syntax-only", str(config / "prometheus.yml")],
        ["check", "rules", str(config / "rules.yml"), str(rules)],
    ):
        answer = subprocess.run([tool, *command], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("name", ["Dockerfile.gateway", "Dockerfile.torchserve"])
def test_dockerignore_lets_through_all_that_an_image_copies(name):
    lets_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(\S+) ", (ROOT / name).read_text(), re.MULTILINE)
    assert copied
    for source in copied:
        names = {source, f"{Path(source).parent}/*{Path(source).suffix}"} | {str(p) for p in Path(source).parents}
        assert names & lets_through or any(each.startswith(f"{source}/") for each in lets_through), source
