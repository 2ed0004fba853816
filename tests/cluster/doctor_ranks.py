"""Three ranks for test_doctor.py: a clock that is 5 s ahead, a rank that hangs, one that dies."""

import os
import time
from typing import Any

from scalepeft.cluster.doctor import network as links
from scalepeft.cluster.doctor.rendezvous import meet
from scalepeft.core.launch import launch_variables
from scalepeft.parallel.ranks import Ranks

env = launch_variables(os.environ)


meeting = meet(env, timeout=30)


ranks = Ranks(meeting.rank, meeting.world_size, int(env["LOCAL_RANK"]))


def linked() -> dict[str, Any]:
    links.join(ranks, meeting.client(), 30)
    return links.try_collectives(ranks, ranks.device)


def clocks() -> list[tuple[float, float]]:
    return links.clock_offsets(ranks, lambda: time.time() + (5 if ranks.rank == 1 else 0))


def hang_or_die() -> str:
    if ranks.rank == 1:
        time.sleep(1000)
    if ranks.rank == 2:
        os._exit(3)
    return "well"


def show(text: str) -> None:
    if meeting.rank == 0:
        print(text, flush=True)


outcomes = meeting.stage(linked)


show(links.judge_links("links", "gloo", outcomes, meeting.hosts).line() if outcomes else "")


outcomes = meeting.stage(clocks)


show(links.judge_clocks(outcomes, meeting.hosts).line() if outcomes else "")


meeting.timeout = 1.5


for outcome in meeting.stage(hang_or_die):
    show(f"{outcome}")


os._exit(0)
