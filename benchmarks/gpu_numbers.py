"""Checks of gpu_check.py that compare numbers: encoders, attention, compiled graphs, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import attention
import numpy as np
import torch
import torch._dynamo
from gpu_measures import Finding, Place, difference, verdict
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from recipes import CORPUS
from torch import Tensor, nn

from nnunet_ssl.architectures import attention as attention_module
from nnunet_ssl.architectures import window_attention
from nnunet_ssl.architectures.attention import attention as attend
from nnunet_ssl.architectures.networks import build_encoder
from nnunet_ssl.architectures.window_attention import kernels_serve
from nnunet_ssl.corpus.prepared import open_corpus
from nnunet_ssl.pretraining.config import PretrainingConfig
from nnunet_ssl.pretraining.model import Learner
from nnunet_ssl.pretraining.objectives.masked import bottleneck_grid, draw_masks
from nnunet_ssl.pretraining.views import intensity
from nnunet_ssl.pretraining.views.augmentation import augment
from nnunet_ssl.pretraining.views.loading import make_loader
from nnunet_ssl.pretraining.views.spatial import affine_matrix, resample
from nnunet_ssl.trainers.augmentation import BatchAugmentation
from nnunet_ssl.trainers.freezing import with_trainable_encoder

WINDOWS_AT_ONCE = 7
"""Where attention is to work in many parts."""

ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative differences that rounding explains: a few units in the last place of the type."""


def limit_of_network(name: str) -> float:
    """Of maps and gradients of a float32 network.

    The paper's Swin encoder on a CPU is 4e-6 and 3e-3 away from float64, and 3e-4 and 3e-2 with hidden cells: gradients
    jump where a LeakyReLU bends, and the many equal tokens of hidden cells bend together.
    """
    kind = "gradients" if "gradients" in name else "maps"
    return ({"maps": 3e-3, "gradients": 1e-1} if "masked" in name else {"maps": 1e-4, "gradients": 2e-2})[kind]


# --- encoders


def encoder_is_exact(place: Place, backbone: str) -> Finding:
    """Maps and gradients, with hidden cells and without; Swin's attention as it is chosen, and by PyTorch in parts."""
    config = place.config("mcl_mim", backbone)
    architecture = config.architecture()
    torch.manual_seed(0)
    reference = build_encoder(architecture).double()
    own = build_encoder(architecture)
    own.load_state_dict(reference.state_dict())
    reference.load_state_dict(own.state_dict())  # the same, rounded to float32
    own.to(place.device)
    volumes, hidden = example(config, 1)
    ways: dict[str, Callable[[], AbstractContextManager]] = {"": nullcontext}
    if backbone == "swin":
        scores = architecture["num_heads"][0] * architecture["window_size"] ** 6
        ways[" by PyTorch in parts"] = partial(pytorchs_attention, scores)
    measured: dict[str, float] = {}
    for way, mask in {"": None, "masked ": hidden}.items():
        expected = maps_and_gradients(reference, reference, volumes.double(), mask)
        inputs = [tensor if tensor is None else tensor.to(place.device) for tensor in (volumes, mask)]
        for part, patched in ways.items():
            with patched(), full_precision():
                results = maps_and_gradients(own, own, *inputs)
            measured |= {way + what + part: difference(results[what], expected[what]) for what in results}
    return verdict(measured, limit_of_network)


def compiled_is_eager(place: Place, backbone: str) -> Finding:
    """Small networks through what a compiled graph may be tied to: frozen or not, masks, a key network of one class."""
    measured_on: dict[str, dict[str, list[Tensor]]] = {}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for compiled in ("false", "true"):
        config = place.config("mcl_mim", backbone, "bf16=false", f"compile={compiled}", small=True)
        volumes, mask = (tensor.to(place.device) for tensor in example(config, 2))
        with full_precision(), quick_compiler(place.device):
            learner = Learner(config, place.device)
            query, results = learner.query, {}
            # First, because PyTorch may wrongly go on with the first graph that it has.
            results["frozen maps"] = with_trainable_encoder(query, False).encode(volumes)
            with_trainable_encoder(query, True)
            for name, given in {"unfrozen": None, "masked": mask}.items():
                passed = maps_and_gradients(query.encode, query.encoder, volumes, given)
                results |= {f"{name} {what}": tensors for what, tensors in passed.items()}
            with torch.no_grad():
                results["key maps"] = learner.key.encode(volumes)
        measured_on[compiled] = results
    eager, own = measured_on["false"], measured_on["true"]
    same = verdict({name: difference(own[name], eager[name]) for name in eager}, limit_of_network)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    return Finding(same.passed and graphs > 0, f"{graphs} graphs; {same.measured}")


def example(config: PretrainingConfig, count: int) -> tuple[Tensor, Tensor]:
    """Volumes (N, 1, X, Y, Z) and masks of them."""
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn(count, 1, *config.patch_size, generator=generator)
    return volumes, draw_masks(count, bottleneck_grid(config.patch_size, config.stride), (0.5, 0.75), generator)


def maps_and_gradients(encode: Callable, encoder: nn.Module, *inputs: Tensor | None) -> dict[str, list[Tensor]]:
    """The maps, and the gradients of their sum under fixed weights; zero for what received none."""
    encoder.zero_grad(set_to_none=True)
    maps = encode(*inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(level.shape, generator=generator, dtype=torch.float64).to(level) for level in maps]
    sum((level * weight).sum() for level, weight in zip(maps, weights, strict=True)).backward()
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in encoder.parameters()]
    return {"maps": [level.detach() for level in maps], "gradients": gradients}


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32, in which a GPU's convolutions keep ten bits: that is no fault, but would hide some."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


@contextmanager
def quick_compiler(device: torch.device) -> Iterator[None]:
    """On a CPU, where Inductor takes minutes, let torch.compile trace and differentiate, and run what it traced."""
    compile_module = nn.Module.compile

    def use(module: nn.Module, **options: object) -> None:
        compile_module(module, **{**options, "backend": "aot_eager"})

    with patch.object(nn.Module, "compile", use) if device.type == "cpu" else nullcontext():
        yield


# --- attention


def attention_in_parts(scores: int) -> AbstractContextManager:
    """Inside the block attention treats few windows at once, on every device; `scores`: of one window, all heads."""
    return patch.multiple(
        attention_module,
        SCORES_PER_PART=WINDOWS_AT_ONCE * scores,
        SCORES_PER_THREAD=4 * WINDOWS_AT_ONCE * scores // torch.get_num_threads(),
    )


@contextmanager
def pytorchs_attention(scores: int) -> Iterator[None]:
    """Inside the block window attention is PyTorch's, on few windows at once, also where kernels would serve."""
    with patch.object(window_attention, "_decide", lambda *_: False), attention_in_parts(scores):
        yield


def attention_is_exact(place: Place, dtype: torch.dtype) -> Finding:
    """Query, key and value in the type of an autocast, the trained bias in float32, as encoders pass them."""
    windows, heads, length, width = (24, 3, 343, 16) if place.device.type == "cuda" else (24, 2, 27, 8)
    generator = torch.Generator().manual_seed(0)
    shapes = [(windows, heads, length, width)] * 4 + [(heads, length, length)]
    drawn = [torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes]
    types = [dtype] * 4 + [torch.float32]

    def results(inputs: list[Tensor], attend: Callable) -> list[Tensor]:
        query, key, value, weight, bias = inputs
        trained = [tensor.requires_grad_() for tensor in (query, key, value, bias)]
        out = attend(*trained)
        return [out, *torch.autograd.grad((out * weight).sum(), trained)]

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return (query @ key.mT / width**0.5 + bias).softmax(-1) @ value

    measured, expected = {}, results(drawn, plain)
    for way, parted in {"one": nullcontext(), "many": attention_in_parts(heads * length**2)}.items():
        inputs = [one.detach().to(place.device, kind) for one, kind in zip(drawn, types, strict=True)]
        with parted, torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
            measured[way] = difference(results(inputs, attend), expected)
    return verdict(measured, ROUNDING[dtype])


def operator_is_exact(place: Place, dtype: torch.dtype) -> Finding:
    """The operator on the paper's grids: windows with padding, cut and whole, of every stage, against float64."""
    if not kernels_serve(place.device, dtype, 16):
        return Finding(
            None if place.device.type != "cuda" else False, "PyTorch's attention serves here; the log says why"
        )
    measured = {}
    for case in attention.cases(96, 1, place.device, dtype):

        def results(way: Callable, inputs: list[Tensor]) -> list[Tensor]:
            trained = [one.detach().requires_grad_() for one in inputs]
            out = way(*trained)
            weight = torch.linspace(-1, 1, out.numel(), device=place.device, dtype=torch.float64).view_as(out)
            return [out, *torch.autograd.grad(out, trained, weight.to(out.dtype))]

        ways = case.ways()
        own = results(ways["kernels"], case.inputs)
        expected = results(ways["PyTorch"], [one.double() for one in case.inputs])
        measured[case.name] = difference(own, expected)
        again = results(ways["kernels"], case.inputs)
        if not all(torch.equal(one, other) for one, other in zip(own, again, strict=True)):
            return Finding(False, f"{case.name}: two runs differ")
    return verdict(measured, ROUNDING[dtype])


def operator_is_fast(place: Place) -> Finding:
    """Forward and backward in milliseconds, beside PyTorch's attention; slower than that is no gain, but no fault."""
    if not kernels_serve(place.device, torch.bfloat16, 16):
        return Finding(None, "PyTorch's attention serves here")
    texts = []
    for case in attention.cases(96, 8, place.device, torch.bfloat16):
        taken = attention.times(case)
        texts.append(f"{case.name}: " + " against ".join(f"{one:.2f} + {other:.2f}" for one, other in taken.values()))
    return Finding(True, f"ms at batch 8, {'; '.join(texts)}")


# --- augmentation


def transforms() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each deterministic transform, of two volumes."""
    turned = {"rotation": (0.3, -0.2, 0.1), "scale": (1.1, 0.9, 1.0), "shear": (0.3, 0.0, 0.2)}
    matrix = affine_matrix(flip_axis=0, spacing=(1, 1, 1), **turned)
    fields = np.random.default_rng(0).uniform(0, 0.05, (2, len(intensity.BIAS_TERMS))).tolist()
    return {
        "affine map": lambda views: resample(views[0], matrix, np.array(views.shape[1:]) / 2, views.shape[1:]),
        "contrast": lambda views: intensity.scale_around_mean(views, (0.9, 1.1)),
        "smoothing": lambda views: intensity.smooth(views, [(0.5, 0.7, 1.0), (1.0, 0.6, 0.8)]),
        "bias field": lambda views: intensity.bias_field(views, fields),
        "Gibbs ringing": lambda views: intensity.gibbs(views, (0.23, 0.37)),
        "gamma": lambda views: intensity.gamma(views, (0.9, 1.1)),
        "low resolution": lambda views: intensity.lower_resolution(views, (0.83, 0.95)),
    }


def transform_is_the_cpus(place: Place, transform: Callable[[Tensor], Tensor]) -> Finding:
    views = torch.randn(2, 48, 56, 52, generator=torch.Generator().manual_seed(0))
    return verdict({"difference": difference([transform(views.to(place.device))], [transform(views)])}, 1e-4)


def noise_is_sound(place: Place) -> Finding:
    """Devices draw other numbers from one seed, so sizes are compared."""
    views = torch.zeros(3, 48, 48, 48, device=place.device)
    noise = intensity.add_noise(views, (0.5, 2.0, 0.5), (7, 8, 7)).flatten(1).cpu()
    off = float((noise.std(dim=1) / torch.tensor([0.5, 2.0, 0.5]) - 1).abs().max())
    by_seed = torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1] / 4)
    text = f"standard deviation off by {off:.1%} (limit 2 %), {'' if by_seed else 'not '}by its seed"
    return Finding(off <= 0.02 and by_seed, text)


def finetuning_augmentation_is_the_cpus(place: Place) -> Finding:
    """nnU-Net's augmentation of a batch, without noise: images, and the share of labels that differ."""
    angles = (-np.pi / 6, np.pi / 6)
    transforms = nnUNetTrainer.get_training_transforms((32, 36, 28), angles, None, (0, 1, 2), False)
    augmentation = BatchAugmentation(transforms, [0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 2, 52, 58, 46, generator=generator)
    labels = torch.randint(0, 3, (12, 1, 52, 58, 46), generator=generator).to(torch.int16)
    drawn = augmentation.draw(12, 2, images.shape[2:])
    for one in filter(None, (one for parameters in drawn for one in parameters)):
        one.update({"sigmas": 0.0} if "seeds" in one else {})
    expected, targets = augmentation.apply(images.clone(), labels, drawn)
    own, own_targets = augmentation.apply(images.to(place.device), labels.to(place.device), drawn)
    differing = float((own_targets.cpu() != targets).float().mean())
    return verdict({"images": difference([own], [expected]), "labels": differing}, 1e-3)


def augmentation_is_the_cpus(place: Place) -> Finding:
    config = place.config("mcl_mim", "swin", "augmentation.noise_probability=0")
    loader = make_loader(
        open_corpus(CORPUS),
        kind="mcl",
        batch_size=8,
        patch_size=config.patch_size,
        sampling=config.sampling,
        augmentation=config.augmentation,
        seed=0,
        stop_step=1,
        pin_memory=place.device.type == "cuda",
    )
    (raw,) = loader
    own, expected = augment(raw, place.device), augment(raw, "cpu")
    names = ("targets", "views")
    return verdict({name: difference([getattr(own, name)], [getattr(expected, name)]) for name in names}, 1e-4)
