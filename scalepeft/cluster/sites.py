"""A site: what its Slurm wants of a job and its nodes of a process, one YAML of ``slurm/sites``."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from scalepeft.cluster import sbatch
from scalepeft.core.errors import UserError, unknown
from scalepeft.core.fields import STRICT, Positive, _build
from scalepeft.core.files import read_mapping, shipped

Words = dict[str, str]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Site:
    """In values of the last nine, ``$NAME`` is a variable of the job on its first node.

    Attributes:
        gpus_per_node: of each node; a rank each.
        gpu: its name, as ``scalepeft plan`` knows it.
        request: how a job asks for them: ``gpus-per-node``, ``gres``, or ``none`` (whole nodes).
        gres_type: in ``--gres=gpu:TYPE:N`` or ``--gpus-per-node=TYPE:N``, where the site wants one.
        cpus_per_gpu: of each rank.
        sbatch: further options by their long names: account, partition; one without a value: ''.
        modules: what ``module load`` gets.
        network: the interface between nodes, by its whole name, for gloo and NCCL.
        environment: variables of the job.
        container: what runs a command in a container on a node (SCALEPEFT_CONTAINER).
        srun: more options for srun (SCALEPEFT_SRUN).
        scratch: folder, seen by all nodes, for what would fill a home: SCALEPEFT_CACHE, HF_HOME.
        node_local: a node's own disk, where the base is copied to at the start (SCALEPEFT_STAGE).
        internet: whether compute nodes see it; else nothing asks the hub (HF_HUB_OFFLINE).
    """

    gpus_per_node: Positive
    gpu: str | None = None
    request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    gres_type: str | None = None
    cpus_per_gpu: Positive | None = None
    sbatch: Words = Field(default_factory=dict)
    modules: list[str] = Field(default_factory=list)
    network: str | None = None
    environment: Words = Field(default_factory=dict)
    container: str | None = None
    srun: str | None = None
    scratch: str | None = None
    node_local: str | None = None
    internet: bool = True

    def __post_init__(self) -> None:
        """Raise UserError: a type of GPU where none is asked for by name."""
        if self.gres_type and self.request == "none":
            raise UserError(f"gres_type={self.gres_type}: request: none asks for none; drop one")

    def header(self, options: Words) -> Words:
        """A job's sbatch options, those that the site has an answer to replaced by its own: nodes
        stay, or hold ``--ntasks`` or ``--gpus`` where none are named; one rank stays one.
        """
        own = ("--ntasks-per-gpu", "--cpus-per-gpu", "--ntasks", *sbatch.GPU_OPTIONS)
        header = {key: value for key, value in options.items() if key not in own}
        count, gpus = self.gpus_per_node, options.get("--gpus", "").rpartition(":")[2]
        asked = {"--ntasks-per-node": str(count), "--ntasks": gpus} | options
        per_node = {"--nodes", "--ntasks-per-node"} & options.keys()
        if (ranks := sbatch.ranks_of(asked)) and (ranks == 1 or not per_node):
            header["--nodes"] = str(math.ceil(ranks / count))
            count = min(count, ranks)
        header["--ntasks-per-node"] = str(count)
        kind = f"{self.gres_type}:" if self.gres_type else ""
        gres = [g for g in options.get("--gres", "").split(",") if g and not g.startswith("gpu")]
        if self.request == "gres":
            gres.insert(0, f"gpu:{kind}{count}")
        elif self.request == "gpus-per-node":
            header["--gpus-per-node"] = f"{kind}{count}"
        header |= {"--gres": ",".join(gres)} if gres else {}
        if self.cpus_per_gpu:
            header["--cpus-per-task"] = str(self.cpus_per_gpu)
        return header | {f"--{key}": value for key, value in self.sbatch.items()}

    def shell(self) -> str:
        """A function that ``slurm/train.sh`` calls before anything of the job runs."""
        lines = "\n".join(f"    {line}" for line in self._lines())
        return f"at_site() {{\n{lines or '    :'}\n}}"

    def _lines(self) -> Iterator[str]:
        if self.modules:  # whose own shell code takes unset variables
            yield f"set +u; module load {' '.join(map(_quoted, self.modules))} || exit 2; set -u"
        values = dict(self.environment)
        if self.network:
            values |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.network)
        if self.scratch:
            values |= {"SCALEPEFT_CACHE": f"{self.scratch}/scalepeft",
                       "HF_HOME": f"{self.scratch}/huggingface"}  # fmt: skip
        for name, value in (("STAGE", self.node_local), ("CONTAINER", self.container),
                            ("SRUN", self.srun)):  # fmt: skip
            values |= {f"SCALEPEFT_{name}": value} if value else {}
        if not self.internet:
            values |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        for name, value in values.items():  # what the user exported already stays
            yield f'export {name}="${{{name}:-{_quoted(value)[1:-1]}}}"'


def _quoted(value: str) -> str:
    """In double quotes: bash fills in ``$NAME`` and reads nothing else of it as its own."""
    for special in '\\"`':
        value = value.replace(special, f"\\{special}")
    return f'"{value}"'


def find(name: str) -> Site:
    """The site of a file, or a shipped one. Raises UserError: none, or a wrong key."""
    known = {file.stem: file for file in (shipped("slurm") / "sites").glob("*.yaml")}
    file = Path(name) if Path(name).is_file() else known.get(name)
    if file is None:
        raise unknown("site (nor file of one)", name, known)
    # As text: YAML's own reading makes 43200 of 12:00:00, minutes to Slurm, and 17 of 0021.
    texts = partial(yaml.load, Loader=yaml.BaseLoader)
    values = read_mapping(file, texts, "expected the keys of docs/sites.md")
    values = {key: value for key, value in values.items() if value not in ("", "~", "null")}
    site: Site = _build(Site, values, f"{file}: site")
    return site
