"""``scalepeft init``: a recipe's config and job file in a folder of the user's, to be edited."""

import os
import shlex
import sys
from pathlib import Path

from scalepeft.cluster import sbatch, sites
from scalepeft.config import files
from scalepeft.core.errors import UserError, unknown
from scalepeft.core.files import shipped, write_atomically, writing
from scalepeft.core.text import table

TEMPLATE = "slurm/hoft_llama70b.sh"  # whose #SBATCH lines a job of ours has
JOB = """\
#!/bin/bash
# By scalepeft init, {where}; edit what your site wants. From this folder:
#   sbatch {name}.sh
#   sbatch {name}.sh train.lr=1e-4     whatever follows is laid over {name}.yaml
{header}
# --signal: so long before the time limit the run saves and requeues itself; scalepeft plan says
# what a step and a save need.

{site}CONFIG={name}.yaml
SETTINGS=()
SCALEPEFT_ROOT=${{SCALEPEFT_ROOT:-{root}}}
PYTHON=${{PYTHON:-{python}}}
source "$SCALEPEFT_ROOT/slurm/train.sh" "$@"
exit 2  # only reached where that is not there: it has moved; name its new place above
"""


def run(folder: str, recipe: str, site: str | None, listed: bool) -> None:
    """Write RECIPE.yaml and RECIPE.sh. Raises UserError: no such recipe or site; another's file."""
    recipes = {f.stem: f for part in ("runs", "recipes") for f in _yamls("configs", part)}
    known = {f.stem: f for f in _yamls("slurm", "sites")}
    if listed:
        for what, found in (("recipes", recipes), ("sites", known)):
            rows = [(n, file.read_text().splitlines()[0].lstrip("# ")) for n, file in found.items()]
            print(f"{what}:", *(line[:120] for line in table(rows, left=2)), sep="\n")
        return
    if recipe not in recipes:
        raise unknown("recipe", recipe, recipes)
    place, where = sites.find(site) if site else None, f"for {site or 'nodes of 8 GPUs'}"
    made = {
        f"{recipe}.yaml": recipes[recipe].read_text(),
        f"{recipe}.sh": _job(recipes[recipe], place, where),
    }
    into = Path(folder)
    for name, text in made.items():
        if (into / name).exists() and (into / name).read_text() != text:
            raise UserError(
                f"{into / name}: is there and holds something else; name another folder"
            )
    with writing(into):
        into.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            write_atomically(into / name, text)
    local, first = shipped("launch") / "local.sh", []
    model = files.values_of(str(recipes[recipe]), [], [])["model"]
    if place and not place.internet and not model["path"].startswith("builtin:"):
        where = f" --out {place.scratch}/huggingface" if place.scratch else ""  # the job's HF_HOME
        first = [f"  scalepeft fetch {recipe}.yaml{where}"]
    print(
        f"{into / recipe}.yaml, {into / recipe}.sh: yours to edit",
        *([f"  cd {shlex.quote(folder)}"] if folder != "." else []),
        *first,
        f"  scalepeft train {recipe}.yaml",
        f"  {local} 2 train {recipe}.yaml engine=fsdp2",
        f"  scalepeft submit {recipe}.sh --dry-run",
        sep="\n",
    )


def _yamls(folder: str, part: str) -> list[Path]:
    return sorted((shipped(folder) / part).glob("*.yaml"))


def _job(recipe: Path, site: sites.Site | None, where: str) -> str:
    root = shipped("slurm").parent
    values = files.values_of(str(recipe), [], [])
    alone = (values.get("engine") or {}).get("name", "single") == "single"
    gpus = (values.get("recipe") or {}).get("gpus", 1 if alone else 8)
    header = sbatch.header_of(sbatch.read(str(root / TEMPLATE)))
    del header["--nodes"], header["--ntasks-per-node"]  # of which --ntasks makes the site's
    header |= {"--job-name": recipe.stem, "--ntasks": str(gpus)}
    header = (site or sites.Site(gpus_per_node=8)).header(header)
    return JOB.format(
        name=recipe.stem, where=where, site=f"{site.shell()}\n" if site else "",
        header="\n".join(f"#SBATCH {option}" for option in sbatch.arguments(header)),
        root=shlex.quote(str(root)), python=shlex.quote(os.path.abspath(sys.executable)),
    )  # fmt: skip
