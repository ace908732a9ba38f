"""Super-classes: what is confused goes together."""

import pytest
import torch

from moeify.train import confusion, super_classes


def test_confusion_counts_pairs_of_label_and_prediction():
    predicted, labels = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1])
    assert confusion(predicted, labels).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert confusion(predicted, labels, classes=4).shape == (4, 4)
    with pytest.raises(ValueError, match="4 predictions of 3 labels"):
        confusion(predicted, labels[:3])


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_classes_that_are_confused_are_in_one_group(groups):
    wanted = torch.arange(12) % groups
    alike = wanted.unsqueeze(0) == wanted.unsqueeze(1)
    confused = torch.where(alike, 20, 1) + 200 * torch.eye(12).long() + torch.randint(3, (12, 12))
    found = super_classes(confused, groups)
    assert torch.equal(found.unsqueeze(0) == found.unsqueeze(1), alike)


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="3 classes cannot be put into 4 groups; choose 2 to 3"):
        super_classes(torch.ones(3, 3), 4)
    with pytest.raises(ValueError, match="a confusion matrix is square"):
        super_classes(torch.ones(3, 4), 2)
