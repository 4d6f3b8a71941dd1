"""The loss that a transformers model computes by itself keeps the scale of a plain run."""

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from batchformer import insert


def model() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).train()


def test_labels_and_their_number_follow_the_batch() -> None:
    network, images, labels = model(), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
    handle = insert(network, before="auto", drop=0.0)
    expected = F.cross_entropy(network(images).logits, handle.expand(labels))
    torch.testing.assert_close(network(images, labels=labels).loss, expected)
    # transformers' Trainer has the loss summed and divided by the number of labels of the whole step.
    for number in (4, torch.tensor(4)):
        torch.testing.assert_close(network(images, labels=labels, num_items_in_batch=number).loss, expected)
    network.eval()
    plain = F.cross_entropy(network(images).logits, labels)
    torch.testing.assert_close(network(images, labels=labels, num_items_in_batch=4).loss, plain)
