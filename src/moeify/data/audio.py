"""Sounds as waveforms: `.wav` files are decoded without any library, and resampled by windowed sinc functions."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
"""Encodings of a `.wav` file by number; the third has the number in a longer header."""


@dataclass(frozen=True)
class Sound:
    """A waveform of one channel.

    Attributes:
        wave: samples, mostly between -1 and 1.
        rate: samples per second.
    """

    wave: Float[Tensor, "N"]
    rate: int

    def at(self, rate: int) -> Sound:
        """The sound with another number of samples per second."""
        return self if rate == self.rate else Sound(resample(self.wave, self.rate, rate), rate)


def decode_wav(data: bytes, name: object = "the sound") -> Sound:
    """Decode a `.wav` file: PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64; the mean of its channels.

    Args:
        data: the bytes of the file.
        name: what to call it in messages.

    Raises:
        ValueError: no `.wav` file, a damaged one, or another encoding, such as mu-law.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{name} is not a .wav file; convert it: ffmpeg -i IN OUT.wav")
    chunks = dict(_chunks(data, name))
    head, samples = chunks.get(b"fmt ", b""), chunks.get(b"data", b"")
    if len(head) < 16 or not samples:
        raise ValueError(
            f"{name} is a .wav file without {'samples' if len(head) >= 16 else 'a header'}; record it again"
        )
    encoding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", head)
    if encoding == EXTENSIBLE and len(head) >= 26:
        (encoding,) = struct.unpack_from("<H", head, 24)
    if (encoding, bits) not in _DECODERS or not channels or not rate:
        raise ValueError(
            f"{name} has {channels} channels of {bits} bits at {rate} Hz in encoding {encoding}, which cannot be read; "
            "convert it: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        )
    frame = channels * bits // 8
    wave = _DECODERS[encoding, bits](bytearray(samples[: len(samples) // frame * frame]))
    return Sound(wave.view(-1, channels).mean(1), rate)


def decode_pcm16(data: bytes, rate: int) -> Sound:
    """Decode signed 16-bit samples of one channel, the low byte first, that have no header."""
    return Sound(_DECODERS[PCM, 16](bytearray(data[: len(data) // 2 * 2])), rate)


def _chunks(data: bytes, name: object) -> Iterator[tuple[bytes, bytes]]:
    """The name and the content of every chunk of a RIFF file."""
    place = 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        if place + 8 + size > len(data):
            raise ValueError(f"{name} ends {place + 8 + size - len(data)} bytes too early; copy it again")
        yield data[place : place + 4], data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _integers(dtype: torch.dtype, bits: int):
    return lambda data: torch.frombuffer(data, dtype=dtype).float() / 2 ** (bits - 1)


def _of_24_bits(data: bytearray) -> Tensor:
    low, middle, high = torch.frombuffer(data, dtype=torch.uint8).view(-1, 3).int().unbind(1)
    return ((high << 24 | middle << 16 | low << 8) >> 8).float() / 2**23


_DECODERS = {
    (PCM, 8): lambda data: torch.frombuffer(data, dtype=torch.uint8).float() / 128 - 1,
    (PCM, 16): _integers(torch.int16, 16),
    (PCM, 24): _of_24_bits,
    (PCM, 32): _integers(torch.int32, 32),
    (FLOAT, 32): lambda data: torch.frombuffer(data, dtype=torch.float32).clone(),
    (FLOAT, 64): lambda data: torch.frombuffer(data, dtype=torch.float64).float(),
}


def resample(wave: Float[Tensor, "N"], rate: int, to: int, *, zeros: int = 6) -> Float[Tensor, "M"]:
    """The waveform at another rate, M = ceil(N · to / rate), by a sinc function under a Hann window.

    Frequencies above 0.99 of half the lower rate are filtered out.

    Args:
        wave: samples.
        rate: samples per second.
        to: samples per second of the result.
        zeros: zero crossings of the sinc function on either side; more give a steeper filter.
    """
    common = math.gcd(rate, to)
    old, new = rate // common, to // common
    cutoff = 0.99 * min(old, new)  # in zero crossings of the sinc function per `old` samples
    reach = math.ceil(zeros * old / cutoff)
    offsets = torch.arange(-reach, reach + old, dtype=torch.float64) / old
    time = (offsets - torch.arange(new, dtype=torch.float64).unsqueeze(1) / new) * cutoff  # (new, taps)
    window = torch.cos(time.clamp(-zeros, zeros) * math.pi / zeros / 2) ** 2
    filters = (torch.sinc(time) * window * cutoff / old).to(wave.dtype)
    padded = torch.nn.functional.pad(wave, (reach, reach + old))
    found = torch.nn.functional.conv1d(padded[None, None], filters.unsqueeze(1), stride=old)  # (1, new, blocks)
    return found[0].mT.flatten()[: -(-len(wave) * new // old)]
