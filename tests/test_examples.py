"""The files in examples/ are whole: what can be known of them without a cluster. With one, they are run by tests/cluster."""

import re
import subprocess
from pathlib import Path

import processes
import pytest
import yaml

from armillary.engine.train import start

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = [EXAMPLES / "train.sbatch", EXAMPLES / "hostfile" / "train.sh"]
KUBERNETES = EXAMPLES / "kubernetes" / "train.yaml"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_shell(script):
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


def test_the_environment_of_the_hostfile_is_one_that_deepspeed_reads():
    """It splits every line at its first "=", and passes PDSH's hosts on as names."""
    for line in (EXAMPLES / "hostfile" / "deepspeed_env").read_text().splitlines():
        assert re.fullmatch(r"[A-Z_]+=[\w.,:/-]+", line), line
    for line in (EXAMPLES / "hostfile" / "hosts").read_text().splitlines():
        assert re.fullmatch(r"\w+ slots=\d+", line), line


def test_what_the_kubernetes_job_runs_is_a_command():
    from torch.distributed.run import get_args_parser

    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    torchrun, *arguments = container["command"]
    assert torchrun == "torchrun"
    parsed = get_args_parser().parse_args([a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in arguments])
    assert int(parsed.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(parsed.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert parsed.node_rank == 1
    name = job["metadata"]["name"]
    assert parsed.master_addr == f"{name}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (ROOT / parsed.training_script).exists()
    recipe = processes.presets(Path(parsed.training_script).stem)["RECIPE"]
    assert start._override(recipe, {}, parsed.training_script_args).out == Path("/runs")


def test_the_kubernetes_job_fits_its_schema():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in yaml.safe_load_all(KUBERNETES.read_text()):
        validate.validate(document, "1.31", strict=True)
