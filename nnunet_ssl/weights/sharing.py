"""An encoder as others want to find it: a folder for Hugging Face with the weights, their sizes, and a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError, one_line
from nnunet_ssl.files import written_beside
from nnunet_ssl.nnunet_folders import Variable
from nnunet_ssl.weights.pretrained import ENCODER, PretrainedEncoder

AUDITS = "audits/*/verdict.json"
"""Where `nnssl_audit` leaves its verdicts, below a corpus' folder in ``$nnUNet_raw``."""

HUB_LICENCES = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
)
"""Licences that Hugging Face knows by these words; another is `other` there, and named in the card."""


def verdicts_of(file: Path, corpus: str | None) -> list[dict[str, Any]]:
    """Return what audits of an encoder's corpus found.

    Args:
        file: the encoder; a run's lies in ``$nnUNet_results/CORPUS/RECIPE``.
        corpus: the name of the corpus, where the file lies elsewhere.
    """
    variable: Variable = "nnUNet_raw"
    raw = os.environ.get(variable)
    name = corpus or next((part for part in reversed(file.absolute().parts) if part.startswith("Dataset")), None)
    if not raw or not name:
        return []
    return [json.loads(path.read_text()) for path in sorted((Path(raw) / name).glob(AUDITS))]


def config_of(pretrained: PretrainedEncoder) -> dict[str, Any]:
    """Return what `config.json` says, which Hugging Face counts downloads by."""
    return {
        "library_name": "nnunet_ssl",
        "architecture": pretrained.architecture,
        "method": pretrained.method,
        "step": pretrained.step,
        "preprocessing": pretrained.preprocessing,
        "weights": ENCODER,
    }


def model_card(
    pretrained: PretrainedEncoder, verdicts: Sequence[Mapping[str, Any]], *, licence: str | None, repository: str | None
) -> str:
    """Write the README of a repository of weights; what is not known is said to be unknown.

    Args:
        pretrained: the encoder with what its file tells.
        verdicts: of audits, see :func:`verdicts_of`.
        licence: of the weights; None: that of the weights they were imported from, else unstated.
        repository: where they will be.
    """
    metadata, zoo = pretrained.metadata, pretrained.metadata.get("zoo") or {}
    licence = licence or zoo.get("licence")
    word = (licence or "unknown").lower()
    method, backbone = pretrained.method or "unknown method", pretrained.architecture["backbone"]
    numbers = sum(tensor.numel() for tensor in pretrained.tensors.values())
    place = repository or "OWNER/NAME"
    sections = {
        "What it is": [
            f"- {backbone} encoder, {numbers:,} parameters, for volumes of {pretrained.architecture['in_channels']} "
            "channel(s)",
            f"- pre-trained by {method}, {pretrained.step or 'unknown'} steps",
            f"- architecture: `{json.dumps(pretrained.architecture)}`",
            f"- preprocessing: `{json.dumps(pretrained.preprocessing) if pretrained.preprocessing else 'unknown'}`",
        ],
        "Corpus": _corpus_lines(metadata, zoo),
        "Has it seen your test data?": _audit_lines(verdicts),
        "Use": [
            "```bash",
            f"nnssl_weights fetch {place} --recipe {pretrained.method or 'NAME'}",
            "nnssl_checkpoint=PATH nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerSSL",
            "```",
        ],
        "Recipe": ["```json", json.dumps(metadata["config"], indent=1), "```"]
        if metadata.get("config")
        else ["Unknown."],
        "Licence": [licence or "Unstated: ask the authors before you use or pass on these weights."],
        "Citations": [f"- {text}" for text in metadata.get("citations") or zoo.get("sources") or ["Unknown."]],
    }
    front = {"license": word if word in HUB_LICENCES else "other", "tags": ["medical", "mri", "brain", "nnunet_ssl"]}
    if front["license"] == "other":
        front["license_name"] = word.replace(" ", "-")
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {place.rpartition('/')[2] if repository else f'{backbone} by {method}'}", ""]
    for title, text in sections.items():
        lines += [f"## {title}", "", *map(str, text), ""]
    return "\n".join(lines)


def _corpus_lines(metadata: Mapping[str, Any], zoo: Mapping[str, Any]) -> list[str]:
    counts = metadata.get("corpus")
    if not isinstance(counts, Mapping):
        return [f"{zoo['corpus']}, of {zoo['repository']}." if zoo else "Unknown."]
    by_modality = ", ".join(f"{name} {count:,}" for name, count in counts.get("scans_by_modality", {}).items())
    sizes = ", ".join(f"{counts[name]:,} {name}" for name in ("subjects", "sessions", "scans"))
    return [
        f"- {sizes} ({by_modality})",
        f"- sessions with two modalities in one place: {counts.get('sessions_mcl', 'unknown')}",
    ]


def _audit_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each audit what was compared and found; without one, that nobody looked."""
    if not verdicts:
        return ["Not audited: nobody compared the corpus with labelled data (`nnssl_audit`)."]
    lines = []
    for verdict in verdicts:
        pairs = ", ".join(f"{count} {name}" for name, count in verdict["pairs"].items() if count) or "nothing"
        how = "names and images" if verdict["content_compared"] else "names only"
        lines.append(
            f"- {verdict['labelled']} ({how}): {pairs} found, {verdict['cases_met']} of {verdict['cases']} cases; "
            f"{verdict['subjects_to_exclude']} subjects were named for exclusion; origins shared: "
            f"{', '.join(verdict['origins_shared']) or 'none known'}"
        )
    return lines


def write_folder(folder: Path, encoder: Path, pretrained: PretrainedEncoder, card: str) -> None:
    """Write a repository's files: the encoder as it is, config.json and README.md.

    Raises:
        UserError: the folder holds other things.
    """
    strangers = (
        [path.name for path in folder.iterdir() if path.name not in (ENCODER, "config.json", "README.md")]
        if folder.is_dir()
        else []
    )
    if strangers:
        raise UserError(
            f"{folder} holds other files, such as {strangers[0]}, which would be published: choose another -o."
        )
    with written_beside(folder / ENCODER) as path:
        shutil.copyfile(encoder, path)
    with written_beside(folder / "config.json") as path:
        path.write_text(json.dumps(config_of(pretrained), indent=2))
    with written_beside(folder / "README.md") as path:
        path.write_text(card)


def upload(folder: Path, repository: str) -> str | None:
    """Upload a folder into a private repository, made if need be; return its address, None where there is no token.

    Raises:
        UserError: Hugging Face refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        return None
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload an encoder of nnunet_ssl")
    except Exception as error:  # huggingface_hub passes on those of the package that it speaks HTTP with
        raise UserError(f"{folder} cannot be uploaded to huggingface.co/{repository}: {one_line(error)}") from error
    return f"https://huggingface.co/{repository}"
