"""Super-classes: which classes a model confuses, and groups of them for experts to share (Mobile V-MoE)."""

from __future__ import annotations

import torch
from jaxtyping import Int, Num
from torch import Tensor


def confusion(predicted: Int[Tensor, "N"], labels: Int[Tensor, "N"], classes: int | None = None) -> Int[Tensor, "C C"]:
    """The confusion matrix: how often each class (row) was predicted as each class (column).

    Args:
        predicted: the predicted classes.
        labels: the true classes.
        classes: C; by default one more than the largest.

    Raises:
        ValueError: not one label per prediction.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"{len(predicted)} predictions of {len(labels)} labels; give one label for each")
    classes = int(torch.stack([predicted, labels]).max()) + 1 if classes is None else classes
    return (labels * classes + predicted).bincount(minlength=classes * classes).view(classes, classes)


def super_classes(confused: Num[Tensor, "C C"], groups: int, *, seed: int = 0) -> Int[Tensor, "C"]:
    """The group of each class, so that a model rarely confuses classes of different groups.

    Spectral clustering (scikit-learn) of the graph whose edges are how often two classes are confused
    (Mobile V-MoE, arXiv 2309.04354, section 3). Count on images that are not the test set.

    Args:
        confused: the confusion matrix of a dense model, with labels in rows.
        groups: number of groups, that of experts.
        seed: of the clustering.

    Raises:
        ValueError: fewer than 2 groups, or more groups than classes; a matrix that is not square.
        ImportError: scikit-learn is not installed.
    """
    if confused.dim() != 2 or confused.shape[0] != confused.shape[1]:
        raise ValueError(f"a confusion matrix is square, and this has shape {tuple(confused.shape)}")
    if not 2 <= groups <= len(confused):
        raise ValueError(f"{len(confused)} classes cannot be put into {groups} groups; choose 2 to {len(confused)}")
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError:
        raise ImportError("clustering needs scikit-learn; pip install 'moeify[adapters]'") from None
    share = confused.double() / confused.sum(1, keepdim=True).clamp_min(1)
    edges = (share + share.t()) / 2
    edges.fill_diagonal_(0)
    clustering = SpectralClustering(groups, affinity="precomputed", random_state=seed, assign_labels="cluster_qr")
    return torch.as_tensor(clustering.fit_predict((edges + 1e-6).numpy())).long()
