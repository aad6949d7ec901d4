"""The three losses of arXiv 2603.08429, as pure functions of vectors. They add up, each with a weight.

- [`alignment_loss`] anchors the space: without it nothing says which of all rotations is the teacher's.
- [`contrastive_loss`] pushes a query towards its document and away from the batch's others.
- [`rank_distillation_loss`] hands over the teacher's order of its nearest documents, wrong answers included.

[`loss_parts`] computes those of a batch whose weight is not 0.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F


def alignment_loss(queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Cosine distance between query vectors and the teacher's vectors of the same queries.

    Args:
        queries (`torch.Tensor` of shape `(batch, dim)`)
        targets (`torch.Tensor` of shape `(batch, dim)`)

    Returns:
        a scalar in [0, 2]; 0 where all directions agree.

    Raises:
        `ValueError`: if the shapes differ or the batch is empty.
    """
    _check_pairs(queries, targets, "targets")
    return (1 - F.cosine_similarity(queries, targets, dim=-1)).mean()


def contrastive_loss(
    queries: torch.Tensor,
    positives: torch.Tensor,
    *,
    negatives: torch.Tensor | None = None,
    positive_ids: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    known_positives: torch.Tensor | None = None,
    temperature: float = 0.05,
) -> torch.Tensor:
    """
    InfoNCE (van den Oord et al., 2018): each query picks its own positive among those of the batch and the negatives.

    A document is never its own negative: copies of a query's positive elsewhere in the batch or among the negatives,
    and its other known positives, are left out of the sum. They are recognised by id.

    Args:
        queries (`torch.Tensor` of shape `(batch, dim)`)
        positives (`torch.Tensor` of shape `(batch, dim)`): row i belongs to query i. More rows may follow, such as the
            positives of other devices; they serve as negatives.
        negatives (`torch.Tensor` of shape `(batch, n, dim)`, *optional*): hard negatives, each query's own.
        positive_ids (`torch.LongTensor` of shape `(positives,)`, *optional*)
        negative_ids (`torch.LongTensor` of shape `(batch, n)`, *optional*)
        known_positives (`torch.LongTensor` of shape `(batch, m)`, *optional*): every relevant document's id, padded
            with -1.
        temperature (`float`): of the softmax over cosine similarities.

    Returns:
        a scalar, at least 0.

    Raises:
        `ValueError`: if shapes do not fit or the temperature is not positive.
    """
    _check_temperature(temperature)
    if queries.ndim != 2 or positives.ndim != 2 or len(positives) < len(queries) or not len(queries):
        raise ValueError(
            f"contrastive_loss: queries {tuple(queries.shape)} and positives {tuple(positives.shape)} must be "
            "(batch, dim) and (batch or more, dim), with a batch of at least 1"
        )
    if queries.shape[1] != positives.shape[1]:
        raise ValueError(
            f"contrastive_loss: queries have {queries.shape[1]} dimensions, positives {positives.shape[1]}; "
            "both must be the teacher's"
        )
    queries, positives = F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)
    scores = queries @ positives.T / temperature
    own = torch.arange(len(queries), device=queries.device)
    excluded = torch.zeros_like(scores, dtype=torch.bool)
    if positive_ids is not None:
        _check_ids("positive_ids", positive_ids, positives.shape[:1])
        excluded |= positive_ids[None, :] == positive_ids[own, None]
        if known_positives is not None:
            _check_ids("known_positives", known_positives, (len(queries), known_positives.shape[-1]))
            excluded |= (positive_ids[None, :, None] == known_positives[:, None, :]).any(-1)
    excluded[own, own] = False
    scores = scores.masked_fill(excluded, -torch.inf)
    if negatives is not None:
        if negatives.ndim != 3 or negatives.shape[0] != len(queries) or negatives.shape[2] != queries.shape[1]:
            raise ValueError(
                f"contrastive_loss: negatives {tuple(negatives.shape)} must be ({len(queries)}, n, {queries.shape[1]})"
            )
        hard = torch.einsum("bd,bnd->bn", queries, F.normalize(negatives, dim=-1)) / temperature
        if negative_ids is not None:
            _check_ids("negative_ids", negative_ids, negatives.shape[:2])
            excluded = torch.zeros_like(hard, dtype=torch.bool)
            if positive_ids is not None:
                excluded |= negative_ids == positive_ids[own, None]
            if known_positives is not None:
                excluded |= (negative_ids[:, :, None] == known_positives[:, None, :]).any(-1)
            hard = hard.masked_fill(excluded, -torch.inf)
        scores = torch.cat((scores, hard), dim=1)
    return F.cross_entropy(scores, own)


def rank_distillation_loss(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 0.05,
) -> torch.Tensor:
    """
    KL(teacher || student) between the score distributions over the teacher's top documents of each query.

    Args:
        student_scores (`torch.Tensor` of shape `(batch, k)`): cosines of our vector with the k documents.
        teacher_scores (`torch.Tensor` of shape `(batch, k)`): the teacher's own, in the same order; the paper takes
            k=128.
        mask (`torch.BoolTensor` of shape `(batch, k)`, *optional*): which of them are documents; the rest is padding.
        temperature (`float`): of both softmaxes. Far too low, the teacher's distribution is one document and most of
            the order carries no gradient; far too high, all documents look alike.

    Returns:
        a scalar, at least 0.

    Raises:
        `ValueError`: if the shapes differ, the temperature is not positive, or k < 2: a distribution over one document
            is always 1 and teaches nothing.
    """
    _check_temperature(temperature)
    _check_pairs(student_scores, teacher_scores, "teacher_scores")
    if student_scores.shape[1] < 2:
        raise ValueError("rank_distillation_loss: 1 document gives no ranking; distil over at least 2")
    if mask is not None:
        low = torch.finfo(student_scores.dtype).min / 1e4  # padding takes no part on either side
        student_scores, teacher_scores = student_scores.masked_fill(~mask, low), teacher_scores.masked_fill(~mask, low)
    student = F.log_softmax(student_scores / temperature, dim=-1)
    teacher = F.log_softmax(teacher_scores / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def loss_parts(vectors: torch.Tensor, batch: Mapping[str, torch.Tensor], args) -> dict[str, torch.Tensor]:
    """
    The losses of a batch whose weight is not 0, by name.

    Args:
        vectors (`torch.Tensor` of shape `(batch, dim)`): of the queries.
        batch: from `dataset.collate`; on several devices with `other_positives` and `other_positive_ids` of the others.
        args (`NativeRetrievalTrainingArguments`): weights and temperatures.
    """
    parts = {}
    if args.alignment_weight:
        parts["alignment"] = alignment_loss(vectors, batch["targets"])
    if args.contrastive_weight:
        positives, ids = batch["positives"], batch["positive_ids"][:, 0]
        if "other_positives" in batch:
            positives = torch.cat((positives, batch["other_positives"]))
            ids = torch.cat((ids, batch["other_positive_ids"]))
        parts["contrastive"] = contrastive_loss(
            vectors,
            positives,
            positive_ids=ids,
            negatives=batch.get("negatives"),
            negative_ids=batch.get("negative_ids"),
            known_positives=batch["positive_ids"],
            temperature=args.contrastive_temperature,
        )
    if args.rank_weight:
        parts["rank"] = vectors.sum() * 0.0
        rows = batch["ranking_mask"].sum(1) > 1 if "ranking" in batch else None
        if rows is not None and rows.any():
            documents = batch["ranking"][rows]
            kl = rank_distillation_loss(
                torch.einsum("bd,bkd->bk", vectors[rows], documents),
                torch.einsum("bd,bkd->bk", batch["targets"][rows], documents),
                mask=batch["ranking_mask"][rows],
                temperature=args.rank_temperature,
            )
            # The mean is over the whole batch: a row without a ranking counts as one that is right.
            parts["rank"] = kl * rows.float().mean()
    return parts


def _check_pairs(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    if a.ndim != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"got shapes {tuple(a.shape)} and {tuple(b.shape)} for {name}; both must be equal, two-dimensional and "
            "not empty"
        )


def _check_ids(name: str, ids: torch.Tensor, shape: Sequence[int]) -> None:
    if tuple(ids.shape) != tuple(shape):
        raise ValueError(f"contrastive_loss: {name} {tuple(ids.shape)} must be {tuple(shape)}")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
