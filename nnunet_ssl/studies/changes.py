"""Refuse a study whose file has changed since its data, encoders or models were made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nnunet_ssl.errors import UserError
from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.run.outputs import CONFIG
from nnunet_ssl.studies.places import pretrained
from nnunet_ssl.studies.stages import making
from nnunet_ssl.studies.starts import another_folder, refuse_another_start
from nnunet_ssl.studies.study import Making, Pretraining, Study


def refuse_changes(study: Study, folder: Path) -> None:
    """Refuse a study whose data or encoders were made as its file no longer says: all that follows was made from them.

    Raises:
        UserError: a command of its synthetic data, a setting of a pre-training, or what the models of an arm start from
            has changed since.
    """
    for run in study.runs():
        if isinstance(run, Making):
            for stage in making(run, folder):
                if before := stage.made_otherwise():
                    raise UserError(
                        f"synthetic.{run.name} was made by '{before}', and now is to be by '{stage.noted}'. "
                        f"{another_folder(folder)}"
                    )
        elif isinstance(run, Pretraining) and (recorded := pretrained(run, folder) / CONFIG).is_file():
            then, now = (
                replace(config, workers=0).as_dict()  # has no influence
                for config in (load_config(recorded), load_config(run.recipe, list(run.overrides)))
            )
            if changed := [key for key in now if now[key] != then.get(key)]:
                raise UserError(
                    f"The pre-training {run.name} has other settings than the study has now: {', '.join(changed)} "
                    f"(see {recorded}). {another_folder(folder)}"
                )
    for arm in study.arms:
        refuse_another_start(arm, study, folder)
