"""Self-distillation of hidden tokens, against a reference that loops."""

import pytest
import torch
from torch.nn import functional as F

from nnunet_ssl.pretraining.config import load_config
from nnunet_ssl.pretraining.objectives.base import Examples
from nnunet_ssl.pretraining.objectives.tokens import TokenHead, Tokens, distillation
from nnunet_ssl.pretraining.views.augmentation import Batch


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    return student, teacher, hidden, torch.randn(7, generator=generator, dtype=torch.float64)


def test_the_loss_is_the_cross_entropy_over_hidden_tokens(scores):
    student, teacher, hidden, centre = scores
    per_view = []
    for view in range(2):
        terms = []
        for token in torch.nonzero(hidden[view])[:, 0]:
            target = ((teacher[view, token] - centre) / 0.05).softmax(0)
            terms.append(-(target * (student[view, token] / 0.1).log_softmax(0)).sum())
        per_view.append(sum(terms) / len(terms))
    result = distillation(*scores, student_temperature=0.1, teacher_temperature=0.05)
    assert float(result.loss) == pytest.approx(float(sum(per_view) / 2), rel=1e-5)  # computed in float32
    torch.testing.assert_close(result.centre, teacher.float().mean(dim=(0, 1)))


def test_visible_tokens_get_no_gradient(scores):
    student, *rest = scores
    student.requires_grad_()
    distillation(student, *rest, student_temperature=0.1, teacher_temperature=0.05).loss.backward()
    moved = student.grad.abs().sum(dim=-1) > 0
    assert torch.equal(moved, scores[2])


def test_perplexity_tells_collapse_from_even_use():
    hidden = torch.ones(1, 4, dtype=torch.bool)
    settings = {"student_temperature": 0.1, "teacher_temperature": 0.01}
    spread, same = torch.eye(4)[None], torch.eye(4)[[0, 0, 0, 0]][None]
    assert float(distillation(spread, spread, hidden, torch.zeros(4), **settings).perplexity) == pytest.approx(4)
    assert float(distillation(same, same, hidden, torch.zeros(4), **settings).perplexity) == pytest.approx(1)


def test_scores_are_cosines_with_the_prototypes():
    head = TokenHead(6, 8, 4, 5)
    scores = head(torch.randn(2, 6, 2, 3, 2))
    assert scores.shape == (2, 12, 5)
    assert scores.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head.prototypes.weight.norm(dim=1), torch.ones(5))


def test_scores_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    head, level = TokenHead(6, 8, 4, 5), torch.randn(2, 6, 2, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(level)
        tokens = head.layers(level.flatten(2).transpose(1, 2))
    assert tokens.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(scores, F.normalize(tokens.float(), dim=-1) @ head.prototypes.weight.T)


@pytest.mark.parametrize(("view", "order"), [("other", [2, 3, 0, 1, 4]), ("own", [0, 1, 2, 3, 4])])
def test_a_view_is_told_the_tokens_that_the_settings_say(view, order):
    """Two pairs, view by view, and a scan without a pair, which has no view but its own."""
    views = torch.zeros(2, 2, 1, 4, 4, 4)
    nobody = torch.zeros(2, dtype=torch.long)
    batch = Batch(views=views, targets=views, subject=nobody, session=nobody, scan_ids=[], step=0)
    maps = [None, None, None, torch.arange(5).view(5, 1)]

    class Key:
        def head(self, name, level):
            return level

    taught = Tokens(load_config("mcl_ibot", [f"masked.tokens.view={view}"])).teach(
        Key(), maps, Examples(batch=batch, unpaired=None, mask=None)
    )
    assert taught[:, 0].tolist() == order
