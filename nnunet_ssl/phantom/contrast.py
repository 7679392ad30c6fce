"""What a scanner makes of tissue: MR signal equations, so that every contrast differs truly from the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_ssl.phantom.anatomy import Anatomy


@dataclass(frozen=True)
class Tissue:
    """Relaxation times in ms, proton density relative to water, apparent diffusion coefficient in 1e-3 mm2/s."""

    t1: float
    t2: float
    t2star: float
    density: float
    adc: float


# Rounded textbook values at 3 T (after Wansapura 1999, Stanisz 2005); lesions from the stroke and epilepsy literature:
# acute infarct = restricted diffusion, a longer T2 and a slightly longer T1; cavity = nearly CSF; gliosis, white-matter
# hyperintensity and dysplasia = prolonged T1 and T2 in falling order. Fat's density and diffusion stand for the fat
# suppression that most protocols use.
TISSUES = {
    "csf": Tissue(4000, 1500, 900, 1.00, 3.00),
    "gm": Tissue(1350, 95, 56, 0.82, 0.84),
    "wm": Tissue(830, 75, 44, 0.70, 0.74),
    "vessel": Tissue(1800, 30, 12, 0.60, 1.80),
    "meninges": Tissue(3500, 900, 300, 0.90, 2.60),
    "vitreous": Tissue(4200, 1600, 900, 1.00, 2.80),
    "bone": Tissue(1000, 4, 1, 0.15, 0.30),
    "fat": Tissue(420, 70, 25, 0.45, 1.50),
    "muscle": Tissue(1300, 42, 25, 0.80, 1.30),
    "infarcted_gm": Tissue(1580, 130, 62, 0.85, 0.45),
    "infarcted_wm": Tissue(1080, 122, 58, 0.77, 0.42),
    "cavity": Tissue(3300, 900, 500, 0.98, 2.50),
    "gliosis": Tissue(1750, 160, 75, 0.90, 1.25),
    "hyperintensity": Tissue(1150, 125, 58, 0.80, 1.05),
    "dysplasia": Tissue(1380, 112, 55, 0.83, 0.92),
    "enhancing": Tissue(420, 60, 15, 0.85, 1.20),
}


@dataclass(frozen=True)
class Sequence:
    """Timing in ms and the diffusion weighting b in 1e3 s/mm2; `ti` 0 means no inversion pulse."""

    tr: float
    te: float
    ti: float = 0.0
    b: float = 0.0
    gradient_echo: bool = False
    contrast_agent: bool = False


SEQUENCES = {
    "t1": Sequence(tr=2200, te=3, ti=950, gradient_echo=True),
    "t1c": Sequence(tr=2200, te=3, ti=950, gradient_echo=True, contrast_agent=True),
    "t2": Sequence(tr=5000, te=90),
    "flair": Sequence(tr=9000, te=115, ti=2550),
    "pd": Sequence(tr=3000, te=15),
    "t2s": Sequence(tr=700, te=20, gradient_echo=True),
    "swi": Sequence(tr=1500, te=35, gradient_echo=True),
    "dwi": Sequence(tr=6000, te=75, b=1.0),
    "b0": Sequence(tr=6000, te=75),
}

MODALITIES = (*(name for name in SEQUENCES if name != "b0"), "adc")
"""The modalities :func:`render` knows, named as FOMO60K names its files."""


def signal(tissue: Tissue, sequence: Sequence) -> float:
    """Return the magnitude of the (inversion-)recovery signal of a tissue; about 0.03 to 0.7."""
    recovery = 1 - np.exp(-sequence.tr / tissue.t1)
    if sequence.ti:
        recovery = abs(1 - 2 * np.exp(-sequence.ti / tissue.t1) + np.exp(-sequence.tr / tissue.t1))
    decay = np.exp(-sequence.te / (tissue.t2star if sequence.gradient_echo else tissue.t2))
    return float(tissue.density * recovery * decay * np.exp(-sequence.b * tissue.adc))


def render(anatomy: Anatomy, modality: str, rng: np.random.Generator) -> np.ndarray:
    """Return the noise-free image of an anatomy, float32 (X, Y, Z); grey matter is about 1 in every modality but adc.

    Timings vary by a few per cent from scan to scan, as protocols do. An ADC map comes in 1e-3 mm2/s.
    """
    if modality == "adc":
        return _mix(anatomy, {name: tissue.adc for name, tissue in TISSUES.items()})
    base = SEQUENCES[modality]
    vary = {name: getattr(base, name) * rng.normal(1, 0.03) for name in ("tr", "te", "ti")}
    sequence = Sequence(**vary, b=base.b, gradient_echo=base.gradient_echo, contrast_agent=base.contrast_agent)
    tissues = dict(TISSUES)
    if sequence.contrast_agent:
        tissues["vessel"] = tissues["enhancing"]
    grey = signal(TISSUES["gm"], sequence)
    return _mix(anatomy, {name: signal(tissue, sequence) / grey for name, tissue in tissues.items()})


def _mix(anatomy: Anatomy, values: dict[str, float]) -> np.ndarray:
    image = np.zeros(anatomy.grid.shape, dtype=np.float32)
    for name, fraction in anatomy.fractions.items():
        image += np.float32(values[name]) * fraction
    return image
