"""``scalepeft`` on nodes of two ranks, each with a folder of its own in ``$STAGES``; at its end
every rank prints from where it read how many bytes of tensors.
"""

import os
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from scalepeft.cli import main
from scalepeft.core.safetensors import SafetensorsFile

counted, read = Counter[str](), SafetensorsFile.read


def counting(file: SafetensorsFile, start: int, size: int) -> Any:
    counted[str(file.place.parent)] += size
    return read(file, start, size)


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    node = f"n{rank // 2 + 1}"
    socket.gethostname = lambda: node
    os.environ["SCALEPEFT_STAGE"] = str(Path(os.environ["STAGES"]) / node)
    SafetensorsFile.read = counting  # type: ignore[method-assign]
    code = main(sys.argv[1:])
    for folder, size in counted.items():
        print(f"rank {rank} of {node} read {size} in {folder}", flush=True)
    sys.exit(code)
