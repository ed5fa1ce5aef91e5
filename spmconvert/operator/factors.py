"""Whitened truncated SVD: the baseline at equal parameters, and what low rank beside other terms is.

Among all matrices of rank r it is the one that minimises E‖(W - S)(x - μ)‖² (Eckart and Young in the norm that the
covariance gives; SVD-LLM's recipe). Only the left singular vectors are needed: S = U_r U_rᵀ W. They come from an
eigendecomposition on the smaller side, whose squared condition number costs nothing that matters at the kept ranks.
A metric on the outputs only changes coordinates: the factors are those of C^(1/2) W, and U is mapped back.

U has orthonormal columns (without a metric) and V the scale; factors of equal scale train no better
(docs/results.md).
"""

import torch
from torch import Tensor

from spmconvert.errors import FitError
from spmconvert.operator.terms.module import OutputNorm

# added to the covariance, as a share of its mean diagonal, so that dead channels and few rows stay factorisable
RIDGE = 1e-6
# columns of a Gram matrix that are one product; narrower ones cost more in calls than the mirrored half saves
NARROW = 192


def gram(rows: Tensor) -> Tensor:
    """XᵀX of rows [rows, features], [features, features]: one half is multiplied, the other mirrored.

    1.25 times as fast as the whole product at 384 features, 1.4 at 768, 1.6 at 1536 (one core, 1024 and 4096 rows).
    """
    features = rows.shape[1]
    product = rows.new_empty(features, features)
    _gram_into(product, rows)
    return product


def _gram_into(product: Tensor, rows: Tensor) -> None:
    features = rows.shape[1]
    if features <= NARROW:
        torch.mm(rows.t(), rows, out=product)
        return
    half = features // 2
    first, second = rows[:, :half], rows[:, half:]
    _gram_into(product[:half, :half], first)
    _gram_into(product[half:, half:], second)
    torch.mm(first.t(), second, out=product[:half, half:])
    product[half:, :half] = product[:half, half:].t()


def covariance_root(covariance: Tensor) -> Tensor:
    """A matrix R [in_features, in_features] with RᵀR = covariance plus the ridge, float32.

    The rows of R serve as the tokens of the least-squares problem: ‖R (W - S)ᵀ‖² = trace((W - S) Σ (W - S)ᵀ).
    A covariance of zero (a single row, or a constant input) counts as the identity.
    """
    return damped_root(covariance)[0]


def damped_root(covariance: Tensor) -> tuple[Tensor, float]:
    """The same, and the ridge that it took: ``RIDGE``, or as many times ten of it as make the sum positive definite.

    A covariance has negative eigenvalues where sums of few bits cancel: a channel whose inputs are a thousand times as
    large as the others rounds theirs away.

    Raises:
        FitError: when it is not finite, which no ridge makes up for.
    """
    sigma = covariance.double()
    if not sigma.isfinite().all():
        raise FitError("weight or input statistics are not finite; a least-squares fit needs finite numbers")
    level = sigma.diagonal().mean()
    if not level > 0:
        return torch.eye(len(sigma), dtype=torch.float32, device=sigma.device), RIDGE
    sigma = (sigma + sigma.t()) / 2
    ridge = RIDGE
    while True:
        damped = sigma + ridge * level * torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor.t().float().contiguous(), ridge
        ridge *= 10


def left_singular_vectors(weight: Tensor, root: Tensor, rank: int) -> Tensor:
    """The top left singular vectors of weight @ rootᵀ: [out_features, rank], orthonormal columns, float32.

    Args:
        weight: [out_features, in_features].
        root: as ``covariance_root`` gives it.
        rank: number of vectors, at most min(out_features, in_features).
    """
    whitened = (weight.float() @ root.t()).double()
    if whitened.shape[0] <= whitened.shape[1]:
        vectors = torch.linalg.eigh(whitened @ whitened.t())[1]
        return vectors.flip(-1)[:, :rank].float()
    right = torch.linalg.eigh(whitened.t() @ whitened)[1].flip(-1)[:, :rank]
    # directions of no energy give columns that are not orthogonal to the others; QR replaces them
    return torch.linalg.qr(whitened @ right)[0].float()


def truncated_svd(weight: Tensor, root: Tensor, rank: int, metric: OutputNorm | None = None) -> tuple[Tensor, Tensor]:
    """The best factors U [out_features, rank] and V [rank, in_features] of rank r in the whitened norm.

    Args:
        weight: [out_features, in_features].
        root: as ``covariance_root`` gives it.
        rank: of the factors.
        metric: weighs the outputs' errors; None counts all directions alike.
    """
    weight = weight.float()
    return factors_on(left_singular_vectors(metric_weighted(weight, metric), root, rank), weight, metric)


def metric_weighted(weight: Tensor, metric: OutputNorm | None) -> Tensor:
    """C^(1/2) W for a weight [out_features, in_features]."""
    return weight if metric is None else metric.root(weight.t()).t()


def factors_on(basis: Tensor, weight: Tensor, metric: OutputNorm | None) -> tuple[Tensor, Tensor]:
    """Factors U [out_features, rank], V [rank, in_features] of a weight's projection.

    Args:
        basis: orthonormal columns [out_features, rank], of the weighted outputs.
        weight: [out_features, in_features].
        metric: weighs the outputs' errors; None counts all directions alike.
    """
    left = basis if metric is None else metric.inverse_root(basis.t()).t()
    return left, basis.t() @ metric_weighted(weight, metric)


def rank_at(parameters: int, in_features: int, out_features: int) -> int:
    """Largest rank whose two factors have no more than the given number of parameters."""
    return min(parameters // (in_features + out_features), in_features, out_features)
