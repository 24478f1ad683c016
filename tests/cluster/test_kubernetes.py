"""Clusters on Kubernetes: what is rendered is what KubeRay's own schema allows;
kubectl is asked for the right things."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import registry as homes
from cluster.errors import ClusterError
from cluster.providers.kubernetes import KubernetesProvider
from launcher.submit import clusters

CONFIG = Path(__file__).parents[2] / "configs" / "clusters" / "kubernetes.yaml"
SCHEMA = Path(__file__).parent / "data" / "raycluster-v1.json.xz"
"""openAPIV3Schema of rayclusters.ray.io, v1, without the descriptions (KubeRay, 2026-08, Apache-2.0)."""

KUBECTL = """#!/bin/bash
# Stands in for kubectl: writes down what it is asked, answers as an API server would.
echo "$@" >> "$LOG"
case "$*" in
  *apply*) cat > "$LOG.applied" ;;
  *"get pod"*) echo pod/train-head ;;
  *port-forward*) echo "Forwarding from 127.0.0.1:43211 -> 8265"; exec sleep 60 ;;
  *"can-i create pods/portforward"*) echo no; exit 1 ;;
esac
"""


def strict(schema: Any) -> Any:
    """The schema with keys that it does not name refused, as the API server's own checks warn of them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        inner = {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        inner["additionalProperties"] = False
    return inner


def test_what_is_rendered_is_a_raycluster_by_kuberays_schema():
    rendered = yaml.safe_load(clusters.render(CONFIG))
    schema = json.loads(lzma.decompress(SCHEMA.read_bytes()))
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(rendered, strict(schema))
    rendered["spec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rendered, strict(schema))


def test_the_cluster_wants_a_token_and_listens_on_loopback():
    spec = yaml.safe_load(clusters.render(CONFIG))["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "train-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    for variables in (head["env"], spec["autoscalerOptions"]["env"]):  # nobody is served figures
        assert {"name": "AUTOSCALER_METRIC_PORT", "value": "-1"} in variables


def test_pods_come_and_go_and_offer_what_the_file_says():
    spec = yaml.safe_load(clusters.render(CONFIG))["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 8)
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 600
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "96", "memory": "900Gi", "nvidia.com/gpu": "8"}
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"accelerator_type:H100": 1}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.fixture
def kubectl(tmp_path, monkeypatch) -> Path:
    """The log of what kubectl was asked."""
    monkeypatch.setenv("MUSTER_HOME", str(tmp_path / "muster"))
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").write_text(KUBECTL)
    (folder / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def test_up_applies_what_is_rendered_with_the_token_beside_it_and_down_takes_both_away(kubectl):
    clusters.up(CONFIG, lambda text: None)
    home = homes.find("train")
    assert home is not None
    asked = kubectl.read_text()
    assert Path(f"{kubectl}.applied").read_text() == clusters.render(CONFIG)
    assert f"create secret generic train-token --from-file=auth_token={home.token_file}" in asked
    assert home.token() not in asked + Path(f"{kubectl}.applied").read_text()
    assert all(line.startswith("--namespace ml ") for line in asked.splitlines())
    clusters.down("train", lambda text: None, force=True)
    assert "delete raycluster train" in kubectl.read_text()
    assert "delete secret train-token" in kubectl.read_text()
    assert homes.known() == []


def test_the_door_is_a_port_forward_that_ends_with_the_block(kubectl):
    provider = KubernetesProvider(clusters.load(CONFIG))  # type: ignore[arg-type]
    home = homes.claim("train", {"spec": {}})
    with provider.connection(home) as connection:
        assert connection.url == "http://127.0.0.1:43211"
        assert connection.token == home.token()
    assert "port-forward service/train-head-svc :8265" in kubectl.read_text()


def test_doctor_says_which_right_is_missing(kubectl):
    wrong = [finding for finding in clusters.doctor(CONFIG) if not finding.well]
    assert [finding.what for finding in wrong] == ["the right to forward ports"]


def test_without_an_api_server_everything_is_told(kubectl):
    (kubectl.parent / "bin" / "kubectl").write_text("#!/bin/bash\necho 'connection refused' >&2\nexit 1\n")
    assert not any(finding.well for finding in clusters.doctor(CONFIG))
    with pytest.raises(ClusterError, match="connection refused"):
        clusters.up(CONFIG, lambda text: None)
    assert [home.name for home in homes.known()] == ["train"]  # it could not be ended either


def test_more_at_least_than_at_most_is_refused(tmp_path, muster):
    file = tmp_path / "k.yaml"
    file.write_text(CONFIG.read_text().replace("min: 0", "min: 9"))
    answer = muster("cluster", "render", str(file))
    assert answer.status == 2
    assert "min is 9, more than max, which is 8" in answer.err
    assert answer.err.startswith(f"{file}:10: pools.h100")
