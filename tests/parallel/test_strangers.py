"""Ranks and processes that are none of them: who gets in, and what is said of one that is gone."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, TINY, Job, adapter_bytes, losses

from scalepeft.core.errors import UserError
from scalepeft.parallel import rendezvous
from scalepeft.parallel.ranks import Ranks

RUN = ["train", *TINY, "engine.name=ddp", "train.max_steps=6"]
OTHERS = 65534  # nobody


def listeners(job: Job) -> set[tuple[str, int]]:
    """Address and port at which ranks listen."""
    inodes = set()
    for p in job.ranks:
        for link in Path(f"/proc/{p.pid}/fd").glob("*") if p.poll() is None else ():
            try:
                inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            row = line.split()
            if row[3] == "0A" and row[9] in inodes:
                address, port = row[1].split(":")
                text = ".".join(str(b) for b in bytes.fromhex(address)[::-1])
                found.add((text, int(port, 16)))
    return found


def program(folder: Path, text: str) -> tuple[str, ...]:
    file = folder / "ranks.py"
    file.write_text(f"import os, sys, time\nfrom scalepeft.parallel import rendezvous\n{text}")
    return (str(file),)


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="a second user takes root")
def test_another_user_runs_and_reads_nothing_and_the_run_is_the_same(tmp_path: Path) -> None:
    assert Job(2, [*RUN, f"run_dir={tmp_path}/quiet"]).wait()[0] == [0, 0]
    folder = tempfile.mkdtemp()  # /tmp is everybody's
    rogue = (ROOT / "tests/parallel/rogue.py").read_text()
    command = ["/usr/bin/env", "python3", "-c", rogue, folder, f"{tmp_path}/executed"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, user=OTHERS, group=OTHERS, extra_groups=[], **pipes) as stranger:
        assert stranger.stdin is not None
        job = Job(2, [*RUN, f"run_dir={tmp_path}/run"], {"SCALEPEFT_RENDEZVOUS": folder})
        known: set[tuple[str, int]] = set()
        while any(p.poll() is None for p in job.ranks):
            for place in listeners(job) - known:
                known.add(place)
                stranger.stdin.write(f"{place[1]}\n")
                stranger.stdin.flush()
            time.sleep(0.005)
        codes, text = job.wait()
        seen = stranger.communicate()[0].splitlines()
    assert codes == [0, 0], text
    assert {address for address, _ in known} == {"127.0.0.1"}
    assert any(line.startswith("reached") for line in seen)
    assert all(line.startswith("reached") for line in seen), "the start's folder was read"
    assert not (tmp_path / "executed").exists()
    assert losses(tmp_path / "run") == losses(tmp_path / "quiet")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "quiet")


@pytest.mark.multiprocess
def test_who_does_not_know_the_secret_is_found_out(tmp_path: Path) -> None:
    text = """
import torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=3, store=rendezvous.open_store(os.environ, "x"))
print(rank, [rendezvous.prove(dist.group.WORLD, s) for s in (b"same", b"other" if rank == 2 else b"same")])
dist.destroy_process_group()
"""  # noqa: E501
    codes, printed = Job(3, [], program=program(tmp_path, text)).wait()
    assert codes == [0, 0, 0], printed
    assert sorted(printed.split("\n"))[-3:] == [f"{r} [True, False]" for r in range(3)]


@pytest.mark.multiprocess
def test_a_store_on_a_port_listens_on_one_interface(tmp_path: Path) -> None:
    text = """
store = rendezvous.open_store(os.environ, "x")
store.set(os.environ["RANK"], "")
store.wait(["0", "1", "end"])
"""
    job = Job(2, [], {"SCALEPEFT_RENDEZVOUS": ""}, program=program(tmp_path, text))
    until = time.monotonic() + 60
    while not (found := listeners(job)) and time.monotonic() < until:
        time.sleep(0.05)
    job.kill()
    assert {address for address, _ in found} == {"127.0.0.1"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_say_which_rank_was_killed(tmp_path: Path, killed: int) -> None:
    job = Job(2, [*RUN, f"run_dir={tmp_path}/run", "train.max_steps=5000"])
    rows = tmp_path / "run" / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size) and job.ranks[0].poll() is None:
        time.sleep(0.05)
    job.ranks[killed].send_signal(signal.SIGKILL)
    codes, text = job.wait(60)
    assert codes[killed] == -9 and codes[1 - killed] == 1, text
    said = f"scalepeft: failed on rank {1 - killed}: rank {killed} on {socket.gethostname()} ended"
    assert text.count(said) == 1 and "Traceback" not in text, text


@pytest.mark.multiprocess
@pytest.mark.parametrize("end", ["os._exit(3)", "sys.exit(3)", ""])
def test_what_a_rank_said_last_is_what_the_others_say(tmp_path: Path, end: str) -> None:
    text = f"""
rank = int(os.environ["RANK"])
rendezvous.Presence(rendezvous.folder(), rank)
while rank == 0 and not os.path.exists(f"{{rendezvous.folder()}}/rank-1"):
    time.sleep(0.01)
if rank == 1 and {end!r}:
    rendezvous.tell("OSError: no\\nroom")
    {end}
if rank == 0:
    print(rendezvous.who_is_gone(10 if {end!r} else 1))
"""
    codes, printed = Job(2, [], program=program(tmp_path, text)).wait(60)
    assert codes == [0, 3 if end else 0]
    said = f"rank 1 on {socket.gethostname()} ended: OSError: no room"
    assert (said if end else "None") in printed.splitlines()


def test_a_folder_that_others_may_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEPEFT_RENDEZVOUS", str(tmp_path))
    tmp_path.chmod(0o755)
    with pytest.raises(UserError, match="other users may enter it"):
        rendezvous.folder()
    tmp_path.chmod(0o700)
    assert rendezvous.folder() == tmp_path


def test_other_ranks_get_what_json_gives_back() -> None:
    plain = {"a": [1, 2.5, None, True, "\udcff", float("inf")], "b": {}}
    assert Ranks().gather(plain) == [plain]
    for value in (Path("x"), (1,), {1: 2}, [{"a": b""}], ValueError()):
        with pytest.raises(AssertionError, match="JSON"):
            Ranks().gather(value)


def test_ranks_that_are_dealt_to_nodes_in_turns_find_their_own_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = [["a", "of a"], ["b", "of b"], ["a", None], ["b", None]]
    for rank, (host, value) in enumerate(every):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(Ranks, "gather", lambda _, mine: every)
        assert Ranks(rank, 4, rank // 2).of_node(value) == f"of {host}"


@pytest.mark.multiprocess
def test_each_start_of_the_launcher_has_a_folder_of_its_own(tmp_path: Path) -> None:
    show = tmp_path / "python"
    show.write_text('#!/bin/sh\nstat -c "%n %a" "$SCALEPEFT_RENDEZVOUS"\n')
    show.chmod(0o755)
    env = {**os.environ, "PYTHON": str(show)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [ROOT / "launch/local.sh", "2", "train"], env=env, capture_output=True, text=True
        )
        (line,) = set(done.stdout.splitlines())
        assert line.endswith(" 700")
        found.append(line)
        assert not Path(line.split()[0]).exists()
    assert found[0] != found[1]
