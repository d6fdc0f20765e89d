"""The column loss of ``symmetric``: every pair again, with its key as the anchor and all ranks' queries as candidates.

Columns are complete when all ranks' rows are in. Everything here is [P, C] over all ranks' keys C: maxima, sums and pushes
come together over all who hold rows, and every rank then knows all columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.pairs import sum_at
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.products import softplus
from sailplan_kernels.infonce.reference import column_limits
from sailplan_kernels.infonce.setting import Setting, finite
from sailplan_kernels.infonce.sources import Source, merge
from sailplan_kernels.infonce.tile import Gradient, Statistics


class Columns:
    def __init__(self, setting: Setting, keys: Source, positives: Positives) -> None:
        self.setting, self.positives = setting, positives
        pairs = positives.pairs
        self.top, self.total, self.temperature = (torch.zeros_like(keys.moment) for _ in range(3))
        self.top.fill_(-torch.inf)
        inverse = torch.stack([torch.ones_like(positives.weight), setting.inverse[pairs.rows]])
        self.rows, total = setting.sum_of_all(sum_at(pairs.keys, inverse, setting.all_keys))
        self.inverse = keys.inverse_temperature = total / self.rows.clamp_min(1)  # mean over the rows that share a key
        keys.limit = column_limits(setting.problem, positives.cosine, setting.max_of_all)

    def merge(self, here: slice, found: Statistics) -> None:
        assert found.column_maximum is not None and found.column_sum is not None
        merge(self.top[:, here], self.total[:, here], found.column_maximum, found.column_sum)

    def finish_statistics(self) -> None:
        """All rows are in: the pairs' losses [P] and pulls, and every column's logsumexp and push."""
        setting, positives, keys = self.setting, self.positives, self.positives.pairs.keys
        highest = setting.max_of_all(self.top)
        total = setting.sum_of_all(self.total * (self.top - finite(highest)).exp())
        log_negatives = total.log() + finite(highest)
        gap = log_negatives[:, keys] - positives.cosine * self.inverse[keys]
        self.losses = (positives.weight * softplus(gap)).sum(1)
        self.pair_push = positives.weight * setting.prefix_weights * torch.sigmoid(gap)
        positives.column_pull = self.pair_push * self.inverse[keys]
        self.push = setting.sum_of_all(sum_at(keys, self.pair_push, setting.all_keys))
        self.log_negatives = finite(log_negatives)

    def add(self, here: slice, found: Gradient) -> None:
        assert found.column_temperature is not None
        self.temperature[:, here] += found.column_temperature

    def temperature_gradient(self) -> Tensor:
        """[n] d column loss of all ranks / d the rows' inverse temperatures, each a part of its positives' means."""
        pairs, positives = self.positives.pairs, self.positives
        of_column = self.temperature.sum(0) / torch.where(self.inverse > 0, self.inverse, 1.0)
        of_column -= sum_at(pairs.keys, (self.pair_push * positives.cosine).sum(0)[None], len(of_column))[0]
        of_column = self.setting.sum_of_all(of_column) / self.rows.clamp_min(1)
        return pairs.per_row(of_column[pairs.keys][None])[0]
