"""Trainings under a real Slurm on two machines, submitted by a user with `examples/train.sbatch`."""

import json
import re

from machines import UID, until


def test_tasks_of_two_machines_are_ranks_of_one_run(undisturbed, runs):
    record = json.loads((runs.folder(undisturbed) / "run.json").read_text())
    assert record["world"] == 2 and record["machine"] == "n1"
    assert runs.folder(undisturbed).stat().st_uid == UID
    assert "ranks left with 0" in runs.said(undisturbed)


def test_a_job_that_is_put_back_into_the_queue_continues_to_the_same_bits(undisturbed, jobs, slurm, runs):
    job = jobs.submit("requeued")
    runs.reaches("requeued", 3)
    slurm("scontrol", "requeue", job)
    jobs.ends(job, "COMPLETED", "requeued")
    said = runs.said("requeued")
    assert "stopped by a signal at step" in said and "ranks left with 75" in said and "continuing " in said, said
    assert runs.same_bits("requeued", undisturbed)


def test_a_preempted_job_leaves_comes_back_and_continues_to_the_same_bits(undisturbed, jobs, slurm, runs):
    job = jobs.submit("preempted")
    runs.reaches("preempted", 3)
    urgent = slurm(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--ntasks-per-node=2", "-o", "/dev/null", "--wrap", "srun true"
    )
    assert until(lambda: slurm.state(urgent) == "COMPLETED", 60), slurm("squeue", "-t", "all")
    jobs.ends(job, "COMPLETED", "preempted")
    said = runs.said("preempted")
    assert said.index("ranks left with 75") < said.index("continuing "), said
    assert runs.same_bits("preempted", undisturbed)


def test_a_cancelled_job_saves_and_stays_cancelled(jobs, slurm, runs):
    job = jobs.submit("cancelled", "--train.steps", "4000")
    runs.reaches("cancelled", 2)
    slurm("scancel", job)
    jobs.ends(job, "CANCELLED", "cancelled", 60)
    assert "ranks left with 75" in runs.said("cancelled")
    assert (runs.folder("cancelled") / "checkpoints" / "latest").exists()
    assert slurm("squeue", "-h") == ""  # those that wait and those that run


def test_a_survey_embedded_by_two_machines_goes_on_after_a_rank_was_killed(undisturbed, jobs, machines, runs):
    out, alone = machines.home / "parts", machines.home / "alone"

    def words(place):
        options = ["--part-rows", "1", "--batch", "1", "--device", "cpu"]
        return [
            "-m",
            "armillary",
            "embed",
            *map(str, (runs.folder(undisturbed), "--data", runs.survey, "-o", place)),
            *options,
        ]

    def done():
        return len(list(out.glob(".fill/part-*.json")))

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

    job = jobs.submit_words("embedded", words(out))
    assert until(lambda: done() >= 3, 120), runs.said("embedded")
    machines.signal("n2", "KILL", machines.pids("n2", "python -m armillary embed")[-1])
    jobs.ends(job, "FAILED", "embedded", 60)
    said = runs.said("embedded")
    assert 3 <= done() < 90 and "ranks left with 137" in said, said
    assert "another process is gone" in said and "the same command goes on" in said, said
    jobs.ends(jobs.submit_words("embedded", words(out)), "COMPLETED", "embedded")
    assert machines.run("n1", ["python", *words(alone)], 120).returncode == 0
    assert contents(out) == contents(alone) and len(contents(out)) == 90 + 1


def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(jobs, runs, machines):
    """Two ranks on each of two machines; one of the second machine's is killed as the kernel does when memory is short."""
    job = jobs.submit("killed", "--train.steps", "4000", "--checkpoint.every-steps", "2", ranks_a_node=2)
    runs.reaches("killed", 3)
    machines.signal("n2", "KILL", runs.left("n2")[-1])
    jobs.ends(job, "FAILED", "killed", 20)  # .2 s after the connection is gone, and Slurm's own few
    said = runs.said("killed")
    assert (
        "4 x cpu" in said
        and "killed: other ranks are gone" in said
        and re.search(r"the same command continues from step-\d+", said)
    ), said
    assert not runs.left("n1") and not runs.left("n2")
    done = runs.steps("killed") + 2
    jobs.ends(jobs.submit("killed", "--train.steps", str(done), ranks_a_node=2), "COMPLETED", "killed")
    assert "continuing " in runs.said("killed") and runs.steps("killed") == done
