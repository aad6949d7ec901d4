import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from native_retrieval.losses import alignment_loss, contrastive_loss, rank_distillation_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value(loss: torch.Tensor) -> float:
    assert loss.shape == ()
    return loss.item()


def gradient(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


# Alignment


def test_alignment_by_hand():
    queries = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    # Cosines 1 and 1 / sqrt(2): distances 0 and 0.292893, mean 0.146447.
    assert value(alignment_loss(queries, targets)) == pytest.approx(0.146447, abs=1e-6)


@pytest.mark.parametrize(("factor", "wanted"), [(3.0, 0.0), (-3.0, 2.0)])
def test_alignment_bounds(factor: float, wanted: float):
    queries = random(5, 4)
    assert value(alignment_loss(queries, factor * queries)) == pytest.approx(wanted, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_alignment_lies_between_its_bounds(batch: int, dim: int, seed: int):
    loss = value(alignment_loss(random(batch, dim, seed=seed), random(batch, dim, seed=seed + 1)))
    assert -1e-9 <= loss <= 2 + 1e-9


def test_alignment_gradient():
    targets = random(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x, targets), random(4, 3).requires_grad_())


orders, seeds = st.permutations(range(6)), st.integers(0, 1000)
factors = st.floats(0.01, 100)


def turned(*vectors: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """All of them by the same rotation of their space."""
    rotation = torch.linalg.qr(random(vectors[0].shape[-1], vectors[0].shape[-1], seed=seed))[0]
    return [some @ rotation for some in vectors]


@settings(max_examples=30, deadline=None)
@given(orders, seeds, factors)
def test_alignment_does_not_depend_on_order_length_side_or_rotation(order: list[int], seed: int, factor: float):
    queries, targets = random(6, 3, seed=seed), random(6, 3, seed=seed + 1)
    wanted = value(alignment_loss(queries, targets))
    assert value(alignment_loss(queries[order], targets[order])) == pytest.approx(wanted)
    assert value(alignment_loss(factor * queries, targets / factor)) == pytest.approx(wanted)
    assert value(alignment_loss(targets, queries)) == pytest.approx(wanted)
    assert value(alignment_loss(*turned(queries, targets, seed=seed))) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("queries", "targets"), [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((3,), (3,)), ((0, 3), (0, 3)), ((2, 1, 3), (2, 1, 3))]
)
def test_alignment_shapes(queries: tuple[int, ...], targets: tuple[int, ...]):
    with pytest.raises(ValueError) as error:
        alignment_loss(torch.ones(queries), torch.ones(targets))
    assert str(queries) in str(error.value) and str(targets) in str(error.value) and "\n" not in str(error.value)


# Contrastive

AXES = torch.eye(2)


@pytest.mark.parametrize(
    ("temperature", "wanted"),
    # Scores are 1 for a query's own document and 0 for the other: log(1 + exp(-1 / temperature)).
    [(1.0, 0.313262), (0.5, 0.126928), (0.25, 0.018150)],
)
def test_contrastive_by_hand(temperature: float, wanted: float):
    loss = contrastive_loss(5 * AXES, 3 * AXES, temperature=temperature)
    assert value(loss) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("temperature", "wanted"), [(1.0, 0.706720), (0.5, 0.499084)])
def test_contrastive_with_hard_negatives_by_hand(temperature: float, wanted: float):
    negatives = torch.tensor([[[0.0, 4.0]], [[0.0, 4.0]]])
    # At a temperature of 1, query 0: scores 1 | 0, 0: log(1 + 2 / e) = 0.551445; query 1: scores 1 | 0, 1:
    # log(2 + 1 / e) = 0.861995.
    loss = contrastive_loss(AXES, AXES, negatives=negatives, temperature=temperature)
    assert value(loss) == pytest.approx(wanted, abs=1e-6)


def test_more_positives_than_queries_by_hand():
    positives = torch.cat((AXES, torch.tensor([[-2.0, 0.0]])))
    # Query 0: scores 1 | 0, -1: log(1 + 1 / e + 1 / e^2) = 0.407606. Query 1: scores 1 | 0, 0: 0.551445.
    assert value(contrastive_loss(AXES, positives, temperature=1.0)) == pytest.approx(0.479525, abs=1e-6)


def test_contrastive_gradient():
    positives, negatives = random(5, 3, seed=1), random(4, 2, 3, seed=2)
    ids, negative_ids = torch.tensor([1, 2, 1, 3, 4]), torch.tensor([[1, 9], [4, 5], [7, 8], [3, 2]])

    def loss(q: torch.Tensor, p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(q, p, negatives=n, positive_ids=ids, negative_ids=negative_ids, temperature=0.5)

    inputs = (random(4, 3).requires_grad_(), positives.requires_grad_(), negatives.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), seeds, st.sampled_from([0.05, 0.3, 1.0]))
def test_contrastive_lies_between_its_bounds(batch: int, extra: int, seed: int, temperature: float):
    queries, positives = random(batch, 4, seed=seed), random(batch + extra, 4, seed=seed + 1)
    loss = value(contrastive_loss(queries, positives, temperature=temperature))
    assert 0 <= loss <= math.log(batch + extra) + 2 / temperature + 1e-9


@settings(max_examples=30, deadline=None)
@given(orders, st.permutations(range(4)), seeds, factors)
def test_contrastive_does_not_depend_on_order_length_or_rotation(
    order: list[int], columns: list[int], seed: int, factor: float
):
    queries, positives, negatives = random(6, 3, seed=seed), random(6, 3, seed=seed + 1), random(6, 4, 3, seed=seed + 2)
    wanted = value(contrastive_loss(queries, positives, negatives=negatives))
    permuted = contrastive_loss(queries[order], positives[order], negatives=negatives[order][:, columns])
    assert value(permuted) == pytest.approx(wanted)
    longer = contrastive_loss(factor * queries, positives / factor, negatives=4 * negatives)
    assert value(longer) == pytest.approx(wanted)
    queries, positives, negatives = turned(queries, positives, negatives, seed=seed)
    assert value(contrastive_loss(queries, positives, negatives=negatives)) == pytest.approx(wanted)


def test_a_copy_of_the_own_positive_is_no_negative():
    query, documents = random(1, 4), random(3, 4, seed=1)
    wanted = value(contrastive_loss(query, documents, positive_ids=torch.tensor([7, 8, 9])))
    doubled = torch.cat((documents, documents[:1]))
    assert value(contrastive_loss(query, doubled, positive_ids=torch.tensor([7, 8, 9, 7]))) == pytest.approx(wanted)
    assert value(contrastive_loss(query, doubled)) > wanted + 1e-3


def test_two_queries_of_one_document_are_no_negatives_of_each_other():
    queries, document = random(2, 4), random(1, 4, seed=1)
    # Nothing is left to tell the document from.
    loss = contrastive_loss(queries, document.expand(2, -1), positive_ids=torch.tensor([7, 7]))
    assert value(loss) == pytest.approx(0.0)


def test_a_copy_of_the_own_positive_among_the_hard_negatives_is_no_negative():
    queries, positives, negatives = random(2, 4), random(2, 4, seed=1), random(2, 2, 4, seed=2)
    ids = {"positive_ids": torch.tensor([7, 8]), "negative_ids": torch.tensor([[3, 4], [5, 6]])}
    wanted = value(contrastive_loss(queries, positives, negatives=negatives, **ids))
    more = torch.cat((negatives, positives[:, None]), dim=1)
    ids["negative_ids"] = torch.tensor([[3, 4, 7], [5, 6, 8]])
    assert value(contrastive_loss(queries, positives, negatives=more, **ids)) == pytest.approx(wanted)


def test_known_positives_are_no_negatives():
    queries, positives, negatives = random(2, 4), random(3, 4, seed=1), random(2, 2, 4, seed=2)
    positive_ids, negative_ids = torch.tensor([7, 8, 9]), torch.tensor([[3, 4], [5, 6]])
    # The third document answers both questions; a hard negative of each answers its own.
    known = torch.tensor([[7, 9, 3], [8, 9, 5]])
    wanted = value(
        contrastive_loss(
            queries,
            positives[:2],
            negatives=negatives[:, 1:],
            positive_ids=positive_ids[:2],
            negative_ids=negative_ids[:, 1:],
        )
    )
    masked = contrastive_loss(
        queries,
        positives,
        negatives=negatives,
        positive_ids=positive_ids,
        negative_ids=negative_ids,
        known_positives=known,
    )
    assert value(masked) == pytest.approx(wanted)


def test_padding_of_known_positives_masks_nothing():
    queries, positives = random(2, 4), random(2, 4, seed=1)
    ids = torch.tensor([0, 1])
    wanted = value(contrastive_loss(queries, positives, positive_ids=ids))
    known = torch.tensor([[0, -1, -1], [1, -1, -1]])
    assert value(contrastive_loss(queries, positives, positive_ids=ids, known_positives=known)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"queries": (3,), "positives": (3, 4)}, "queries"),
        ({"queries": (2, 4), "positives": (2, 2, 4)}, "positives"),
        ({"queries": (3, 4), "positives": (2, 4)}, "positives"),
        ({"queries": (0, 4), "positives": (0, 4)}, "batch"),
        ({"queries": (2, 4), "positives": (2, 5)}, "dimensions"),
        ({"queries": (2, 4), "positives": (2, 4), "negatives": (3, 1, 4)}, "negatives"),
        ({"queries": (2, 4), "positives": (2, 4), "negatives": (2, 4)}, "negatives"),
        ({"queries": (2, 4), "positives": (2, 4), "negatives": (2, 3, 5)}, "negatives"),
        ({"queries": (2, 4), "positives": (2, 4), "positive_ids": (3,)}, "positive_ids"),
        ({"queries": (2, 4), "positives": (2, 4), "negatives": (2, 3, 4), "negative_ids": (2, 2)}, "negative_ids"),
        ({"queries": (2, 4), "positives": (2, 4), "positive_ids": (2,), "known_positives": (3, 1)}, "known_positives"),
    ],
)
def test_contrastive_shapes(shapes: dict[str, tuple[int, ...]], message: str):
    tensors = {
        name: torch.zeros(shape, dtype=torch.long) if "ids" in name or "known" in name else torch.ones(shape)
        for name, shape in shapes.items()
    }
    if "negative_ids" in tensors:
        tensors["positive_ids"] = torch.arange(2)
    with pytest.raises(ValueError, match=message) as error:
        contrastive_loss(tensors.pop("queries"), tensors.pop("positives"), **tensors)
    assert "\n" not in str(error.value)


# Rank distillation


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.05])
def test_rank_distillation_by_hand(temperature: float):
    student = torch.tensor([[0.0, 0.0], [0.3, 0.3]], dtype=torch.float64)
    teacher = temperature * torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812, twice.
    assert value(rank_distillation_loss(student, teacher, temperature=temperature)) == pytest.approx(0.130812, abs=1e-6)


def test_rank_distillation_is_taken_from_the_teacher():
    # The other direction, KL(student || teacher), would give 1/2 log(2/3) + 1/2 log(2) = 0.143841.
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    forward = value(rank_distillation_loss(student, teacher, temperature=1.0))
    backward = value(rank_distillation_loss(teacher, student, temperature=1.0))
    assert (forward, backward) == (pytest.approx(0.130812, abs=1e-6), pytest.approx(0.143841, abs=1e-6))


def test_rank_distillation_is_zero_for_equal_scores():
    scores = random(4, 8)
    assert value(rank_distillation_loss(scores, scores)) == pytest.approx(0.0, abs=1e-12)
    # Only differences between documents count.
    assert value(rank_distillation_loss(scores + 3, scores)) == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 1000), st.sampled_from([0.05, 0.3, 1.0]))
def test_rank_distillation_is_positive_otherwise(batch: int, k: int, seed: int, temperature: float):
    student, teacher = random(batch, k, seed=seed), random(batch, k, seed=seed + 1)
    assert value(rank_distillation_loss(student, teacher, temperature=temperature)) > 0


def test_rank_distillation_gradient():
    teacher = random(3, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: rank_distillation_loss(x, teacher, temperature=0.5), random(3, 5).requires_grad_()
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), seeds)
def test_padding_of_a_ranking_takes_no_part(lengths: list[int], seed: int):
    student, teacher = random(len(lengths), 6, seed=seed), random(len(lengths), 6, seed=seed + 1)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    rows = [(student[i : i + 1, :n], teacher[i : i + 1, :n]) for i, n in enumerate(lengths)]
    wanted = sum(value(rank_distillation_loss(*row)) for row in rows) / len(rows)
    assert value(rank_distillation_loss(student, teacher, mask=mask)) == pytest.approx(wanted)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), orders, seeds, st.floats(-5, 5))
def test_rank_distillation_does_not_depend_on_order_or_level(
    rows: list[int], columns: list[int], seed: int, level: float
):
    student, teacher = random(4, 6, seed=seed), random(4, 6, seed=seed + 1)
    wanted = value(rank_distillation_loss(student, teacher))
    assert value(rank_distillation_loss(student[rows][:, columns], teacher[rows][:, columns])) == pytest.approx(wanted)
    assert value(rank_distillation_loss(student + level, teacher - level)) == pytest.approx(wanted)


# The teacher's best document is the student's best too; they differ in the order below it.
TEACHER_SCORES = torch.tensor([[0.70, 0.60, 0.50, 0.40]], dtype=torch.float64)
STUDENT_SCORES = torch.tensor([[0.70, 0.40, 0.60, 0.50]], dtype=torch.float64)


def test_rank_distillation_teaches_at_the_default_temperature():
    reached = gradient(lambda x: rank_distillation_loss(x, TEACHER_SCORES), STUDENT_SCORES)
    assert reached.abs().max() > 0.1
    # Towards the teacher: document 1 up, documents 2 and 3 down.
    assert reached[0, 1] < 0 < reached[0, 2] and reached[0, 3] > 0


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_rank_distillation_teaches_nothing_at_an_extreme_temperature(temperature: float):
    loss = rank_distillation_loss(STUDENT_SCORES, TEACHER_SCORES, temperature=temperature)
    assert torch.isfinite(loss) and value(loss) < 1e-6
    reached = gradient(lambda x: rank_distillation_loss(x, TEACHER_SCORES, temperature=temperature), STUDENT_SCORES)
    assert reached.abs().max() < 1e-6


def test_rank_distillation_needs_two_documents():
    with pytest.raises(ValueError, match="at least 2") as error:
        rank_distillation_loss(torch.ones(3, 1), torch.ones(3, 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_rank_distillation_shapes(student: tuple[int, ...], teacher: tuple[int, ...]):
    with pytest.raises(ValueError, match="teacher_scores") as error:
        rank_distillation_loss(torch.ones(student), torch.ones(teacher))
    assert "\n" not in str(error.value)


# Both with a temperature


@pytest.mark.parametrize("loss", [contrastive_loss, rank_distillation_loss])
@pytest.mark.parametrize("temperature", [0.0, -0.05, math.nan])
def test_temperatures(loss: Callable[..., torch.Tensor], temperature: float):
    with pytest.raises(ValueError, match=f"temperature={temperature}") as error:
        loss(torch.ones(2, 3), torch.ones(2, 3), temperature=temperature)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_and_teach_at_the_default_temperature(dtype: torch.dtype):
    queries, targets = random(4, 8).to(dtype), random(4, 8, seed=1).to(dtype)
    for loss in (alignment_loss, contrastive_loss, rank_distillation_loss):
        reached = gradient(lambda x, loss=loss: loss(x, targets), queries)
        assert torch.isfinite(reached).all() and reached.abs().max() > 1e-4, loss.__name__
