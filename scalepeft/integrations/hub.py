"""``scalepeft push``: a run's adapter on the Hugging Face hub, under a model card of the run."""

import tempfile
from pathlib import Path

from scalepeft.adapters.layout import ABOUT, CONFIG, OLD, WEIGHTS, describe, weights_file
from scalepeft.analysis.report.load import Evaluation, evaluations_of
from scalepeft.config import schema as cfg
from scalepeft.core.errors import UserError
from scalepeft.core.files import digest, read_json
from scalepeft.core.log import say
from scalepeft.core.text import one_line
from scalepeft.eval.scores import between, shown
from scalepeft.run.folder import adapter_folder, load_run, read_run_adapter
from scalepeft.run.records import card_rows


def run(run_dir: str, repo: str, private: bool, license: str | None, base: str | None) -> None:
    """Uploads the adapter's folder to ``repo`` (ORG/NAME) in one commit. Raises UserError: no whole
    adapter, one in an older layout, or what the hub or the network refused.
    """
    folder, (settings, _, about) = adapter_folder(run_dir), read_run_adapter(run_dir)
    if weights_file(folder).name == OLD:
        fix = f"remove {folder} and run its train command again, which writes it anew"
        raise UserError(f"{folder}: in the layout of older runs, which PEFT cannot read; {fix}")
    config, rows = read_json(folder / CONFIG), {}
    if folder != Path(run_dir):
        rows = card_rows(load_run(run_dir, [], (), "a push"), about.get("step") or 0)
    named = str(base or config.get("base_model_name_or_path"))
    if base:
        config["base_model_name_or_path"] = base
        about["base_model"] = {**about.get("base_model", {}), "path": base}
    elif Path(named).exists():
        say(f"others do not have the base {named}; name it on the hub: --base-model ORG/NAME")
    found = [e for e in evaluations_of(Path(run_dir))[0] if _of_this(e, folder)]
    scores = [
        (e.task, {"tuned": "adapter"}.get(e.which, e.which), name, shown(metric), between(metric),
         str(e.scores["count"]))
        for e in found for name, metric in (e.first,)
    ]  # fmt: skip
    made = cfg.to_dict(settings)
    ours = {**about, "adapter": made} if (folder / ABOUT).is_file() else None
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        (here / WEIGHTS).symlink_to((folder / WEIGHTS).resolve())
        describe(here, config, made, ours, rows, scores, license, repo)
        say(f"in {repo}: {_upload(here, repo, private)}")


def _of_this(evaluation: Evaluation, folder: Path) -> bool:
    """False for scores of an adapter that was trained further since."""
    subject = evaluation.about.get("subject")
    same = evaluation.which != "tuned" or subject == digest(folder / WEIGHTS)
    if not same:
        say(f"{evaluation.folder}: scores of another adapter; left out of the card")
    return same


def _upload(folder: Path, repo: str, private: bool) -> str:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=private or None, exist_ok=True)
        made = HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message="By scalepeft"
        )
    except Exception as error:  # the hub's own, its HTTP client's, the disk's: no common base
        what = f"{type(error).__name__}: {one_line(error)}"
        fix = "log in (hf auth login, or HF_TOKEN) with a token that may write, and push again"
        raise UserError(f"{repo}: not pushed: {what}; {fix}") from None
    return str(made.commit_url)
