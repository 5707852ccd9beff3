"""The files in cluster/: valid for the programs that read them, closed to strangers, and of the package's own versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
LAUNCHER = [CLUSTER / "aws.yaml", CLUSTER / "machines.yaml"]


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def locked() -> dict[str, str]:
    lines = [line for line in (CLUSTER / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod's specification in a document, wherever in it."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [pod for item in value.values() for pod in pods(item)]


# ------------------------------------------------------------------------------------------------ valid


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_rays_launcher_takes_it_and_refuses_a_key_too_many(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(path)[0]
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config(config | {"idle_timeout_minute": 3}))


def programs_of_the_launcher(config: dict[str, Any], source: Path) -> str:
    """What Ray's launcher runs to bring a file to a node of this cluster and into its container."""
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    class Recorded(DockerCommandRunner):
        def _check_container_status(self) -> bool:
            return True

    class Processes:  # in place of the module subprocess: there is neither node nor container here
        ran: ClassVar[list[str]] = []

        def check_call(self, command: list[str], **options: object) -> int:
            self.ran.append(" ".join(command))
            return 0

        check_output = check_call

    class Provider:
        def internal_ip(self, node: str) -> str:
            return "10.0.0.2"

    runner = Recorded(
        config["docker"], log_prefix="", node_id="node", provider=Provider(), auth_config=config["auth"],
        cluster_name=config["cluster_name"], process_runner=Processes(), use_internal_ip=True,
    )  # fmt: skip
    runner.run_rsync_up(str(source), "/home/ray/.ray/auth_token")
    return "\n".join(Processes.ran)


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_the_image_has_the_programs_that_rays_launcher_runs(path: Path, tmp_path: Path) -> None:
    """The head's container starts the workers over ssh and rsync, and every container is given files by rsync."""
    config = documents(path)[0]
    (tmp_path / "token").write_text("x")
    ran = programs_of_the_launcher(config, tmp_path / "token")
    assert {line.split()[0] for line in ran.splitlines()} == {"ssh", "rsync"}
    assert re.search(r"rsync -e \S*docker exec -i\S* -avz \S+ medssl:", ran), "a file goes on into the container"
    (installed,) = re.findall(r"apt-get install -y --no-install-recommends ([\w -]+)", (CLUSTER / "Dockerfile").read_text())
    assert {"rsync", "openssh-client"} <= set(installed.split()) and config["docker"]["image"].startswith("REGISTRY/medssl:")


def test_kuberays_schemas_take_the_manifests(shared_data: Path, tmp_path: Path) -> None:
    checker = shared_data.parent / "tools" / "check_manifests.py"
    done = subprocess.run([sys.executable, checker, *KUBERAY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    kinds = [d["kind"] for path in KUBERAY for d in documents(path) if d["apiVersion"] == "ray.io/v1"]
    assert sorted(kinds) == ["RayCluster", "RayJob"]
    wrong = documents(CLUSTER / "kuberay" / "rayjob.yaml")[0]
    wrong["spec"]["shutdownAfterJobFinish"] = True
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert subprocess.run([sys.executable, checker, tmp_path / "wrong.yaml"], capture_output=True, check=False).returncode == 1


def test_kubernetes_takes_the_other_kinds() -> None:
    import kubernetes_validate

    others = [d for path in KUBERAY for d in documents(path) if d["apiVersion"] != "ray.io/v1"]
    assert {d["kind"] for d in others} == {"ServiceAccount", "Service", "StatefulSet", "NetworkPolicy"}
    for document in others:
        kubernetes_validate.validate(document, "1.30", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(others[0] | {"autmountServiceAccountToken": False}, "1.30", strict=True)


def applied(path: Path) -> list[list[str]]:
    """The words of every `kubectl apply` in a file, as a shell makes them."""
    lines = re.sub(r"\\\n#? *", " ", path.read_text()).splitlines()
    commands = [re.split(r"`", line[line.index("kubectl apply") :])[0] for line in lines if "kubectl apply" in line]
    said = [subprocess.run(["bash", "-c", f"printf '%s\\n' {c}"], capture_output=True, text=True, check=True) for c in commands]
    return [done.stdout.splitlines()[2:] for done in said]


def test_documented_kubectl_commands_name_files_each_behind_its_own_f() -> None:
    found = {path.name: applied(path) for path in [*KUBERAY, CLUSTER / "README.md"]}
    assert [name for name, commands in found.items() if commands] == ["raycluster.yaml", "rayjob.yaml", "README.md"]
    for words in (words for commands in found.values() for words in commands):
        assert words and set(words[::2]) == {"-f"} and all((ROOT / name).is_file() for name in words[1::2]), words


def test_the_slurm_script_is_a_script() -> None:
    script = CLUSTER / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    nothing = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert nothing.returncode == 1 and "usage: sbatch cluster/slurm.sh STUDY.yaml STORE" in nothing.stderr


# ------------------------------------------------------------------------------------------------ versions


def test_everything_that_the_package_needs_is_pinned_within_its_bounds() -> None:
    pins = locked()
    fields = project()
    for text in [*fields["dependencies"], *fields["optional-dependencies"]["cluster"]]:
        needed = Requirement(text)
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), text
    assert {"aiohttp", "prometheus-client", "opencensus"} <= set(pins), "the job server and metrics of ray[default]"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())


def test_versions_in_the_files_are_the_packages_own() -> None:
    fields, pins = project(), locked()
    for path in [CLUSTER / "Dockerfile", *LAUNCHER, *KUBERAY]:
        for version in re.findall(r"REGISTRY/medssl:([\w.]+)", path.read_text()):
            assert version == fields["version"], path
    clusters = [d["spec"] if d["kind"] == "RayCluster" else d["spec"]["rayClusterSpec"]
                for path in KUBERAY for d in documents(path) if d["apiVersion"] == "ray.io/v1"]  # fmt: skip
    assert [cluster["rayVersion"] for cluster in clusters] == [pins["ray"]] * 2
    python = re.search(r"FROM python:(3\.\d+)", (CLUSTER / "Dockerfile").read_text())
    assert python and f"Python {python.group(1)} " in (CLUSTER / "requirements.lock").read_text().splitlines()[0] + " "


# ------------------------------------------------------------------------------------------------ closed


def test_every_cluster_asks_for_a_token() -> None:
    for path in KUBERAY:
        for document in documents(path):
            if document["apiVersion"] == "ray.io/v1":
                spec = document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]
                assert spec["authOptions"]["mode"] == "token"
    for path in LAUNCHER:
        config = documents(path)[0]
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
        assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text()


def labels_of_pods(value: Any) -> list[dict[str, str]]:
    """The labels that a document's own pod templates give."""
    if isinstance(value, list):
        return [labels for item in value for labels in labels_of_pods(item)]
    if not isinstance(value, dict):
        return []
    own = [value["metadata"]["labels"]] if "containers" in value.get("spec", {}) else []
    return own + [labels for item in value.values() for labels in labels_of_pods(item)]


def test_the_network_policy_is_of_every_ray_pod() -> None:
    """A RayJob's cluster has a name that KubeRay makes up: only the labels in our files are known."""
    policy = documents(CLUSTER / "kuberay" / "network-policy.yaml")[0]["spec"]
    chosen = policy["podSelector"]["matchLabels"]
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": chosen}}], "the nodes reach each other"
    for name, count in (("raycluster", 3), ("rayjob", 2)):
        path = CLUSTER / "kuberay" / f"{name}.yaml"
        found = labels_of_pods(documents(path))
        assert len(found) == count and all(chosen.items() <= labels.items() for labels in found), name
        (words,) = applied(path)
        assert "cluster/kuberay/network-policy.yaml" in words, name
    redis = labels_of_pods(documents(CLUSTER / "kuberay" / "redis.yaml"))
    assert not any(chosen.items() <= labels.items() for labels in redis), "it has a policy of its own"


def test_pods_run_without_rights() -> None:
    found = [pod for path in KUBERAY for document in documents(path) for pod in pods(document)]
    assert len(found) == 3 + 2 + 1
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    image = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^USER (\w+)", image, re.M)[-1] == "ray" and "requirements.lock" in image


def test_gpu_workers_are_drained_within_their_time_and_wait_on_tainted_nodes() -> None:
    """SIGTERM reaches `ray start`, which lets the work go on for the seconds that it finds in its environment, 30 without."""
    for path, group in (("raycluster", "gpu"), ("rayjob", "gpu")):
        document = documents(CLUSTER / "kuberay" / f"{path}.yaml")[0]
        spec = document["spec"] if path == "raycluster" else document["spec"]["rayClusterSpec"]
        pod = next(g for g in spec["workerGroupSpecs"] if g["groupName"] == group)["template"]["spec"]
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        says = "from ray._private.ray_constants import *; print(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S)"
        done = subprocess.run(
            [sys.executable, "-c", says], env=os.environ | variables, capture_output=True, text=True, check=True
        )
        assert 500 < float(done.stdout) < pod["terminationGracePeriodSeconds"], path
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        assert any(v.get("emptyDir", {}).get("medium") == "Memory" for v in pod["volumes"])


def test_no_file_holds_a_secret() -> None:
    """Values come from secrets, files and roles: nothing that looks like one stands in the files themselves."""
    for path in [p for p in CLUSTER.rglob("*") if p.is_file() and p.suffix != ".pyc" and p.name != "requirements.lock"]:
        for found in re.findall(r"(?i)(?:secret_access_key|password|token)\s*[:=]\s*[\"']?([\w+/-]{12,})", path.read_text()):
            assert found.startswith(("SKTEST", "medssl-", "RAY_AUTH", "secrets", "self", "read_")), (path.name, found)


def test_the_lock_is_what_its_program_makes_of_this_environment(tmp_path: Path) -> None:
    """The same names, whatever versions are installed here."""
    done = subprocess.run([sys.executable, CLUSTER / "lock.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {line.split("==")[0] for line in done.stdout.splitlines() if not line.startswith("#")}
    assert names == set(locked()), json.dumps(sorted(names ^ set(locked())))
