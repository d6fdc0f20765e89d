"""Sound in, one token out.

A recording comes as log-mel chunks of equal length. Each chunk is encoded alone: normalised per mel
bin, shortened by strided convolutions over time, read by blocks with rotary positions and pooled
over time to one vector (512 wide, as CLAP's). The item's vector is the mean over its real chunks,
and a linear adapter turns it into one token of the tower.

Shape legend: b rows, c chunks a row, n chunks in all, s positions a chunk, h hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sailplan.config.schema import AudioConfig
from sailplan.model.blocks import Blocks, initial_deviation
from sailplan.model.vision import convolutional_stem


def mean_of_chunks(vectors: Tensor, chunk_mask: Tensor) -> Tensor:
    """Vectors [b * c, d] of chunks, chunk_mask bool [b, c]: their mean over each row's present
    chunks, [b, d]; zeros where there is none.
    """
    weight = chunk_mask.to(vectors.dtype)
    return (vectors.unflatten(0, chunk_mask.shape) * weight[..., None]).sum(1) / weight.sum(
        1, keepdim=True
    ).clamp(min=1)


class AudioEncoder(nn.Module):
    """Chunks of log-mel to the item's vector, [b, output]."""

    def __init__(self, config: AudioConfig, rope_base: float, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.encoder.hidden
        self.bin_gain = nn.Parameter(torch.ones(config.mel_bins))
        self.bin_shift = nn.Parameter(torch.zeros(config.mel_bins))
        self.stem = convolutional_stem(
            config.mel_bins, config.stem_width, hidden, int(math.log2(config.time_stride)), 1
        )
        self.output = nn.Linear(hidden, config.output, bias=False)
        nn.init.normal_(self.output.weight, std=1 / math.sqrt(hidden))
        self.norm = nn.RMSNorm(config.output, eps=1e-6)
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype, rope_base)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """Zero mean and unit variance of each mel bin over a chunk's time, then a learned gain
        and shift.

        The statistics are the chunk's own: batch statistics would make a row depend on its
        neighbours and on the number of ranks. A bin that never changes (silence) becomes zero.
        """
        variance, mean = torch.var_mean(log_mel, dim=-2, correction=0, keepdim=True)
        return (log_mel - mean) * torch.rsqrt(variance + 1e-3) * self.bin_gain + self.bin_shift

    def forward(self, log_mel: Tensor, chunk_mask: Tensor) -> Tensor:
        """log_mel [b, c, frames, mel_bins], chunk_mask bool [b, c].

        Returns [b, output]; zeros where no chunk is present.
        """
        log_mel = (
            log_mel.masked_fill(~chunk_mask[:, :, None, None], 0)
            .to(self.bin_gain.dtype)
            .flatten(0, 1)
        )
        hidden = self.stem(self.normalise(log_mel).transpose(1, 2)).transpose(1, 2)
        hidden = self.blocks(hidden)
        # Mean plus maximum over time, as CLAP's CNN14 encoder (Kong et al., "PANNs", arXiv
        # 1912.10211): the mean alone is nearly the same for any speech, the maximum keeps which
        # sounds occurred.
        vector = self.output(hidden.mean(1) + hidden.amax(1))
        return self.norm(mean_of_chunks(vector, chunk_mask))


class AudioAdapter(nn.Module):
    """The item's sound vector [b, output] as one token of the tower, [b, 1, hidden]."""

    def __init__(self, output: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.project = nn.Linear(output, hidden, bias=False)
        nn.init.normal_(self.project.weight, std=initial_deviation(output))
        self.to(dtype)

    def forward(self, vector: Tensor) -> Tensor:
        return self.project(vector)[:, None]
