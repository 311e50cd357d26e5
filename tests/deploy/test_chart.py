"""The Helm chart: its values are checked, and its manifests are valid at the oldest and newest version of Kubernetes.

`helm` is taken from PATH, or from the variable HELM. `make test-cluster` fails without it.
"""

import copy
import json
import operator
import os
import re
import shutil
import subprocess
from functools import reduce
from pathlib import Path

import pytest
import yaml

from control.settings import AgentSettings
from gateway.settings import Settings as GatewaySettings

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "gradserve"
HELM = os.environ.get("HELM") or shutil.which("helm")
VERSIONS = ("1.29", "1.37")
OFF = "gateway.settings.GATEWAY_AUTH=off"
CASES = {
    "default": [OFF],
    "keys and signatures": [
        "gateway.keysSecret=keys",
        "agent.trustedKeysSecret=trusted",
        "agent.trustedKeys={alice.pem,bob.pem}",
        "image.pullSecrets={registry}",
        "archiveAuthoritySecret=authority",
    ],
    "everything": [
        OFF,
        "agent.gpus=1",
        "agent.autoscaling.enabled=true",
        "gateway.autoscaling.enabled=true",
        "gateway.service.type=LoadBalancer",
        "agent.settings.AGENT_THREADS=2",
        "agent.nodeSelector.pool=serving",
        "networkPolicy.fromNamespaces={ingress,monitoring}",
        "ingress.enabled=true",
        "ingress.className=nginx",
        "ingress.tlsSecret=tls",
        "httpRoute.enabled=true",
        "httpRoute.gateway=public",
        "httpRoute.hostnames={models.example}",
        "serviceMonitor.enabled=true",
        "serviceMonitor.keySecret=scrape",
        "keda.enabled=true",
        "keda.prometheus=http://prometheus:9090",
        "grafanaDashboard.enabled=true",
        "prometheusRule.enabled=true",
    ],
    "little": [OFF, "operator.enabled=false", "podDisruptionBudget.enabled=false", "networkPolicy.enabled=false"],
}
# Settings that the chart decides.
DECIDED = {
    "gateway": {"plan", "agents", "keys_file", "port"},
    "agent": {"plan", "model_store", "cache", "host", "inference_host", "metrics_host", "advertised_host", "temp"}
    | {"config", "gpus", "trusted_keys", "port", "inference_port", "metrics_port"},
}
# Their schemas are not part of Kubernetes. `make .venv/crds` installs validators for them.
FOREIGN = {"HTTPRoute", "ServiceMonitor", "PrometheusRule", "ScaledObject"}
VALIDATORS = Path(__file__).parents[2] / ".venv" / "crds"
needs_validators = pytest.mark.skipif(
    HELM is None or not VALIDATORS.is_dir(), reason="no helm, or no validators: make .venv/crds"
)
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not on PATH, and HELM does not name it")


def helm(*args):
    return subprocess.run([HELM, *args], capture_output=True, text=True, check=False)


def template(values, *more):
    sets = [part for value in values for part in (("--set-string" if "settings." in value else "--set"), value)]
    return helm("template", "release", str(CHART), "--namespace", "models", *sets, *more)


@pytest.fixture(scope="module", params=CASES, ids=CASES.keys())
def manifests(request):
    done = template(CASES[request.param])
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest is not None]


def pods(manifests):
    return [each["spec"]["template"]["spec"] for each in manifests if each["kind"] == "Deployment"]


@pytest.mark.parametrize(
    ("part", "prefix", "settings"), [("gateway", "GATEWAY_", GatewaySettings), ("agent", "AGENT_", AgentSettings)]
)
def test_values_take_exactly_the_settings_that_the_chart_does_not_decide(part, prefix, settings):
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    taken = schema["properties"][part]["properties"]["settings"]["properties"]
    assert set(taken) == {prefix + field.upper() for field in settings.model_fields.keys() - DECIDED[part]}


def test_every_object_of_the_values_refuses_unknown_names():
    def walk(schema, path):
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path
        for key, inner in {**schema.get("properties", {}), **schema.get("$defs", {})}.items():
            walk(inner, f"{path}.{key}")

    walk(json.loads((CHART / "values.schema.json").read_text(encoding="utf-8")), "values")


@needs_helm
def test_every_variable_in_a_pod_is_a_setting(manifests):
    known = {"GRADSERVE_PLAN", "GRADSERVE_HOME", "GRADSERVE_GATEWAYS", "POD_IP", "SSL_CERT_FILE"}
    known |= {f"GATEWAY_{field.upper()}" for field in GatewaySettings.model_fields}
    known |= {f"AGENT_{field.upper()}" for field in AgentSettings.model_fields}
    for pod in pods(manifests):
        names = [variable["name"] for variable in pod["containers"][0]["env"]]
        assert set(names) <= known
        assert len(names) == len(set(names))


@needs_helm
def test_the_chart_passes_the_linter():
    done = helm("lint", "--strict", str(CHART), "--set-string", OFF)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_helm
@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_chart_makes_is_valid_in_the_oldest_and_the_newest_kubernetes(manifests, version):
    import kubernetes_validate  # noqa: PLC0415 — takes 3 s, in every run

    for manifest in manifests:
        if manifest["kind"] not in FOREIGN:
            kubernetes_validate.validate(manifest, version, strict=True)


def foreign_errors(manifests):
    """Return the error of each manifest by the schema of its kind, an empty text for a valid one."""
    done = subprocess.run(
        ["node", VALIDATORS / "validate.mjs"], input=json.dumps(manifests), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def foreign_manifests():
    made = yaml.safe_load_all(template(CASES["everything"]).stdout)
    return [manifest for manifest in made if manifest is not None and manifest["kind"] in FOREIGN]


@needs_validators
def test_objects_of_other_projects_are_valid_by_their_schemas(foreign_manifests):
    assert {manifest["kind"] for manifest in foreign_manifests} == FOREIGN
    assert foreign_errors(foreign_manifests) == [""] * len(foreign_manifests)


def fields(spec, path=()):
    """Yield the path of every name in the spec, but of those that a user may choose."""
    inner = spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ()
    for name, value in inner:
        if isinstance(name, str):
            yield (*path, name)
        if name not in {"labels", "annotations", "matchLabels", "metadata"}:
            yield from fields(value, (*path, name))


@needs_validators
def test_a_mistyped_name_in_an_object_of_another_project_is_found(foreign_manifests):
    wrong = []
    for manifest in foreign_manifests:
        for *outer, name in fields(manifest["spec"]):
            changed = copy.deepcopy(manifest)
            place = reduce(operator.getitem, outer, changed["spec"])
            place[name + "x"] = place.pop(name)
            wrong.append(changed)
    assert len(wrong) > 50
    assert all(foreign_errors(wrong))


@needs_helm
def test_every_pod_is_restricted_bounded_and_free_of_service_variables(manifests):
    for pod in pods(manifests):
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["readinessProbe"]
        assert container["resources"]["requests"]
        assert container["resources"]["limits"]["memory"]


@needs_helm
def test_an_upgrade_spreads_the_new_replicas_over_the_nodes(manifests):
    for each in manifests:
        if each["kind"] == "Deployment" and not each["metadata"]["name"].endswith("-operator"):
            (spread,) = each["spec"]["template"]["spec"]["topologySpreadConstraints"]
            assert spread["topologyKey"] == "kubernetes.io/hostname"
            assert spread["matchLabelKeys"] == ["pod-template-hash"], "old pods must not count"


@needs_helm
@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([], {"agents": 2, "gateway": 2}),
        (["agent.autoscaling.enabled=true"], {"gateway": 2}),
        (["gateway.autoscaling.enabled=true", "agent.replicas=3"], {"agents": 3}),
        (["keda.enabled=true", "keda.prometheus=http://prometheus:9090"], {"gateway": 2}),
    ],
)
def test_the_number_of_replicas_is_written_where_no_autoscaler_decides_it(values, written):
    made = yaml.safe_load_all(template([OFF, *values]).stdout)
    found = {each["metadata"]["name"]: each["spec"].get("replicas") for each in made if each["kind"] == "Deployment"}
    assert {part: found[f"release-{part}"] for part in ("agents", "gateway")} == {
        "agents": None,
        "gateway": None,
    } | written


@needs_helm
@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([], {"agents": 45, "gateway": 45}),
        (["gateway.settings.GATEWAY_TIMEOUT_S=30.5"], {"agents": 45, "gateway": 66}),
        (["agent.settings.AGENT_DRAIN_TIMEOUT_S=300"], {"agents": 325, "gateway": 45}),
    ],
)
def test_a_pod_has_the_time_that_its_settings_need_for_its_end(values, seconds):
    made = yaml.safe_load_all(template([OFF, *values]).stdout)
    found = {each["metadata"]["name"]: each for each in made if each["kind"] == "Deployment"}
    assert {
        part: found[f"release-{part}"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for part in ("agents", "gateway")
    } == seconds


def test_the_time_for_a_pods_end_counts_with_the_settings_own_defaults():
    defaults = {f"GATEWAY_{name.upper()}": field.default for name, field in GatewaySettings.model_fields.items()}
    defaults |= {f"AGENT_{name.upper()}": field.default for name, field in AgentSettings.model_fields.items()}
    text = "".join((CHART / "templates" / f"{part}.yaml").read_text() for part in ("agents", "gateway"))
    written = dict(re.findall(r'"((?:GATEWAY|AGENT)_\w+)" (\d+)', text))
    assert len(written) == 4
    assert {name: float(seconds) for name, seconds in written.items()} == {name: defaults[name] for name in written}


@needs_helm
def test_only_the_operator_may_write_the_plan(manifests):
    for role in (each for each in manifests if each["kind"] == "Role"):
        verbs = {verb for rule in role["rules"] for verb in rule["verbs"]}
        is_operator = role["metadata"]["name"].endswith("-operator")
        assert ("update" in verbs) == is_operator
        assert verbs <= {"get", "list", "watch"} | ({"update", "create"} if is_operator else set())
        for rule in role["rules"]:
            is_bounded = set(rule["verbs"]) == {"create"} or rule["resources"] == ["endpointslices"]
            assert is_bounded or "resourceNames" in rule


@needs_helm
def test_gateways_find_agents_by_a_headless_service_and_follow_one_plan(manifests):
    services = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "Service"}
    assert services["release-agents"]["clusterIP"] == "None"
    assert services["release-agents"]["publishNotReadyAddresses"] is True
    plans = set()
    for pod in pods(manifests):
        env = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        plans |= {value for name, value in env.items() if name.endswith("_PLAN")}
        by_name, by_watch = "http://release-agents.models.svc:9100", "kubernetes:models/release-agents:9100"
        assert env.get("GATEWAY_AGENTS") in {None, by_name, by_watch}
    assert plans == {"kubernetes:models/release-plan"}
    maps = {each["metadata"]["name"] for each in manifests if each["kind"] == "ConfigMap"}
    assert maps <= {"release-dashboard"}, "an upgrade must not bring back a plan"


@needs_helm
@pytest.mark.parametrize(
    ("discovery", "address", "may_watch"),
    [
        ("watch", "kubernetes:models/release-agents:9100", True),
        ("dns", "http://release-agents.models.svc:9100", False),
    ],
)
def test_gateways_watch_the_agents_endpoints_or_resolve_their_name(discovery, address, may_watch):
    made = list(yaml.safe_load_all(template([OFF, f"gateway.discovery={discovery}"]).stdout))
    (gateway,) = [
        each for each in made if each["kind"] == "Deployment" and each["metadata"]["name"].endswith("-gateway")
    ]
    env = {variable["name"]: variable.get("value") for variable in pods([gateway])[0]["containers"][0]["env"]}
    assert env["GATEWAY_AGENTS"] == address
    GatewaySettings(agents=address)
    (reader,) = [each for each in made if each["kind"] == "Role" and each["metadata"]["name"].endswith("-reader")]
    slices = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    assert (slices in reader["rules"]) == may_watch


@needs_helm
def test_the_dashboard_is_the_one_of_the_containers():
    done = template([OFF, "grafanaDashboard.enabled=true"])
    (found,) = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "ConfigMap"]
    original = CHART.parents[2] / "config" / "grafana" / "dashboards" / "gradserve.json"
    assert json.loads(found["data"]["gradserve.json"]) == json.loads(original.read_text(encoding="utf-8"))


@needs_helm
def test_the_alerts_are_those_of_the_containers_with_the_job_of_the_service_monitor():
    done = template([OFF, "prometheusRule.enabled=true"])
    (found,) = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "PrometheusRule"]
    original = yaml.safe_load((CHART.parents[2] / "config" / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    wanted = [rule for rule in original["groups"][0]["rules"] if rule["alert"] != "TorchServeDown"]
    wanted[0]["expr"] = 'up{job="release-gateway"} == 0'
    assert found["spec"]["groups"] == [{"name": "gradserve", "rules": wanted}]


@needs_helm
def test_disruptions_and_the_network_are_limited_by_default():
    kinds = [each["kind"] for each in yaml.safe_load_all(template([OFF]).stdout) if each]
    assert kinds.count("PodDisruptionBudget") == 2
    assert kinds.count("NetworkPolicy") == 3


@needs_helm
@pytest.mark.parametrize(
    "wrong",
    [
        "gateway.replica=3",
        "gateway.replicas=0",
        "gateway.discovery=guess",
        "agents.replicas=3",
        "gateway.settings.AGENT_WORKERS=1",
        "gateway.settings.GATEWAY_PROT=1",
        "agent.resources.limits.cpus=1",
        "image.pullPolicy=Sometimes",
        "keda.enabled=true",
        "httpRoute.enabled=true",
    ],
)
def test_a_wrong_value_is_refused(wrong):
    done = template([OFF, wrong])
    assert done.returncode != 0
    name = wrong.partition("=")[0].split(".")
    assert name[0] in done.stderr or name[-1] in done.stderr


@needs_helm
def test_gateways_without_keys_are_refused_unless_they_serve_everyone_on_purpose():
    done = template([])
    assert done.returncode != 0
    assert "gateway.keysSecret" in done.stderr
