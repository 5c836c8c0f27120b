import torch
from torch import nn

from repvgg.models.size import count_macs, count_parameters


def test_multiply_accumulates_follow_the_formula():
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    assert count_macs(conv, torch.zeros(1, 3, 16, 16)) == 16 * 16 * 8 * 3 * 9


def test_batchnorm_statistics_are_no_parameters():
    assert count_parameters(nn.BatchNorm2d(5)) == 10
