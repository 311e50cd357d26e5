"""The example for KServe: one pod with an agent and a gateway, whose names and settings are right.

KServe's own schema is not in a package registry: docs/how-to/kubernetes.md says by which one the example was checked.
"""

from pathlib import Path

import pytest
import yaml

from control.settings import AgentSettings
from gateway.settings import Settings as GatewaySettings

KSERVE = Path(__file__).parents[2] / "deploy" / "kserve"
RUNTIME = yaml.safe_load((KSERVE / "serving-runtime.yaml").read_text(encoding="utf-8"))
SERVICE = yaml.safe_load((KSERVE / "inference-service.yaml").read_text(encoding="utf-8"))
AGENT, GATEWAY = RUNTIME["spec"]["containers"]


def variables(container):
    return {variable["name"]: variable["value"] for variable in container["env"]}


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_pod_is_valid_in_the_oldest_and_the_newest_kubernetes(version):
    import kubernetes_validate  # noqa: PLC0415 — takes 3 s, in every run

    spec = {name: RUNTIME["spec"][name] for name in ("containers", "volumes")}
    for name in ("enableServiceLinks", "terminationGracePeriodSeconds"):
        spec[name] = SERVICE["spec"]["predictor"][name]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, version, strict=True)
    mounted = {mount["name"] for container in (AGENT, GATEWAY) for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_the_settings_are_ours_and_agree():
    agent, gateway = variables(AGENT), variables(GATEWAY)
    names = {name for name in agent if name.startswith("AGENT_")}
    assert names <= {f"AGENT_{field.upper()}" for field in AgentSettings.model_fields}
    read = GatewaySettings(**{name.removeprefix("GATEWAY_").lower(): value for name, value in gateway.items()})
    assert str(read.plan) == agent["AGENT_PLAN"] == agent["GRADSERVE_HOME"] + "/plan.json"
    assert read.agents == (f"http://127.0.0.1:{AgentSettings.model_fields['port'].default}",)
    assert {agent[f"AGENT_{of}HOST"] for of in ("", "INFERENCE_", "METRICS_")} == {"127.0.0.1"}


def test_kserve_sends_calls_to_the_gateways_port():
    assert AGENT["name"] == "kserve-container", "KServe makes its Service from this container's first port"
    port = int(variables(GATEWAY)["GATEWAY_PORT"])
    assert AGENT["ports"][0]["containerPort"] == port
    assert AGENT["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port}


def test_both_containers_are_restricted_and_bounded():
    for container in (AGENT, GATEWAY):
        security = container["securityContext"]
        assert security["runAsNonRoot"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]


def test_the_service_names_the_runtime_and_its_format():
    model = SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    (supported,) = RUNTIME["spec"]["supportedModelFormats"]
    assert model["modelFormat"] == {name: supported[name] for name in ("name", "version")}
    assert [model["protocolVersion"]] == RUNTIME["spec"]["protocolVersions"]
