"""Learning rates: nnU-Net's own curve, the paper's, and the two teeth of a saw."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_ssl.errors import UserError
from nnunet_ssl.schedules import warmup_poly
from nnunet_ssl.trainers.recipes import SCHEDULES
from nnunet_ssl.trainers.schedules import Schedule
from nnunet_ssl.trainers.settings import Settings

PEAK = 1e-3


def schedule_of(text, *, from_scratch=False):
    return Schedule.of_settings(Settings().updated(text), from_scratch=from_scratch)


def rates(schedule, part, steps=None):
    return [schedule.rate(part, step, PEAK) for step in (range(schedule.steps) if steps is None else steps)]


def nnunets_rates(steps):
    """What nnU-Net's scheduler sets in each of so many epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = PolyLRScheduler(optimizer, PEAK, steps)
    for epoch in range(steps):
        scheduler.step(epoch)
        yield optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_poly_without_a_rise_is_nnunets(steps):
    assert [warmup_poly(step, steps=steps, warmup=0, peak=PEAK) for step in range(steps)] == [*nnunets_rates(steps)]


def test_warmup_rises_in_a_line_and_then_follows_nnunets_curve_over_what_is_left():
    schedule = schedule_of("schedule=warmup,steps=1000")
    for part in ("decoder", "encoder"):
        assert rates(schedule, part, range(50)) == pytest.approx([PEAK * (step + 1) / 50 for step in range(50)])
        assert rates(schedule, part, range(50, 1000)) == pytest.approx([*nnunets_rates(950)])


def test_a_sawtooth_raises_the_decoder_alone_and_then_both():
    schedule = schedule_of("schedule=sawtooth,steps=1000,freeze_share=0.1")
    decoder, encoder = rates(schedule, "decoder"), rates(schedule, "encoder")
    assert decoder[:50] == pytest.approx([PEAK * (step + 1) / 50 for step in range(50)])
    assert decoder[50:100] == pytest.approx([*nnunets_rates(50)])
    assert encoder[:100] == [0] * 100
    assert decoder[100:] == encoder[100:]
    assert encoder[100:150] == pytest.approx([PEAK * (step + 1) / 50 for step in range(50)])
    assert encoder[150:] == pytest.approx([*nnunets_rates(850)])


def test_the_numbers_of_the_published_sawtooth_come_out_of_the_defaults():
    """PretrainedTrainer_sawtooth: 25 epochs of rise and 25 of fall, 50 of rise, of 1000."""
    schedule = schedule_of("recipe=long,schedule=sawtooth")
    epoch = 250
    assert schedule.freeze_steps == 50 * epoch and schedule.warmup_steps == 50 * epoch
    decoder = [schedule.rate("decoder", step, 1.0) for step in range(0, 101 * epoch)]
    assert decoder[25 * epoch - 1] == decoder[25 * epoch] == decoder[100 * epoch - 1] == decoder[100 * epoch] == 1.0
    assert decoder[50 * epoch - 1] < 1e-3 and decoder[50 * epoch] == pytest.approx(1 / (50 * epoch))


def test_in_the_papers_schedule_the_decoder_follows_one_curve_and_the_encoder_starts_late():
    schedule = schedule_of("")
    decoder, encoder = rates(schedule, "decoder"), rates(schedule, "encoder")
    assert decoder.index(max(decoder)) == 249 and max(decoder) == PEAK
    assert all(one > other for one, other in itertools.pairwise(decoder[250:]))
    assert encoder[:1500] == [0] * 1500 and max(encoder) == encoder[1500 + 249] == PEAK
    assert decoder[-1] == encoder[-1] == pytest.approx(PEAK / 50)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("decay", ["cosine", "poly"])
def test_an_encoder_from_scratch_never_rests(name, decay):
    schedule = schedule_of(f"schedule={name},decay={decay}", from_scratch=True)
    assert schedule.freeze_steps == 0
    assert rates(schedule, "encoder") == rates(schedule, "decoder")


@given(
    st.sampled_from([*SCHEDULES]),
    st.sampled_from(["cosine", "poly"]),
    st.integers(1, 400),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_whatever_learns_has_a_rate_up_to_its_peak_at_every_step(name, decay, steps, freeze_share, warmup_share):
    """At the first and the last step too, and the encoder rests exactly as long as it is frozen."""
    shares = {"freeze_share": 0.0 if name == "warmup" else freeze_share, "warmup_share": warmup_share}
    try:
        settings = Settings(schedule=name, decay=decay, steps=steps, **shares)
    except UserError:
        return
    schedule = Schedule.of_settings(settings, from_scratch=False)
    decoder, encoder = rates(schedule, "decoder"), rates(schedule, "encoder")
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in decoder)
    assert [rate == 0 for rate in encoder] == [step < schedule.freeze_steps for step in range(steps)]
    assert max(encoder, default=0) <= PEAK * (1 + 1e-12)
