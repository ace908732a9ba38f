import io
import math
import struct
import wave as standard

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.audio import decode_pcm16, decode_wav, resample


def wav(samples: bytes, encoding=1, bits=16, channels=1, rate=8000, extensible=False) -> bytes:
    frame = channels * bits // 8
    head = struct.pack("<HHIIHH", 0xFFFE if extensible else encoding, channels, rate, rate * frame, frame, bits)
    if extensible:
        head += struct.pack("<HHIH", 22, bits, 0, encoding) + bytes(14)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(head)) + head + odd
    body += b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tone(frequency: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds), dtype=torch.float64) / rate)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1), st.integers(8000, 48000))
def test_what_the_standard_library_writes_is_read(samples, rate):
    file = io.BytesIO()
    with standard.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    sound = decode_wav(file.getvalue())
    assert sound.rate == rate
    assert (sound.wave * 2**15).tolist() == samples
    assert torch.equal(decode_pcm16(struct.pack(f"<{len(samples)}h", *samples), rate).wave, sound.wave)


@pytest.mark.parametrize(
    ("samples", "encoding", "bits"),
    [
        (bytes([0, 128, 192]), 1, 8),
        (struct.pack("<3h", -(2**15), 0, 2**14), 1, 16),
        (b"\0\0\x80" + b"\0\0\0" + b"\0\0\x40", 1, 24),
        (struct.pack("<3i", -(2**31), 0, 2**30), 1, 32),
        (struct.pack("<3f", -1, 0, 0.5), 3, 32),
        (struct.pack("<3d", -1, 0, 0.5), 3, 64),
    ],
)
@pytest.mark.parametrize("extensible", [False, True])
def test_every_encoding_gives_the_same_samples(samples, encoding, bits, extensible):
    sound = decode_wav(wav(samples, encoding, bits, extensible=extensible))
    assert sound.wave.tolist() == [-1, 0, 0.5]


def test_channels_are_averaged():
    assert decode_wav(wav(struct.pack("<4f", 1, 0, -1, 0.5), 3, 32, channels=2)).wave.tolist() == [0.5, -0.25]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"ID3", r"a.wav is not a .wav file; convert it"),
        (wav(b"\0\0")[:-1], r"a.wav ends 1 bytes too early"),
        (wav(b""), r"a.wav is a .wav file without samples"),
        (wav(b"\0\0", encoding=7, bits=8), r"a.wav has 1 channels of 8 bits at 8000 Hz in encoding 7"),
        (wav(b"\0\0", rate=0), "at 0 Hz"),
    ],
)
def test_what_cannot_be_read_is_named(data, why):
    with pytest.raises(ValueError, match=why):
        decode_wav(data, "a.wav")


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (16000, 8000), (44100, 16000), (8000, 11025)])
def test_a_tone_is_the_same_tone_at_another_rate(rate, to):
    found, expected = resample(tone(440, rate), rate, to), tone(440, to)
    assert len(found) == math.ceil(rate * 0.5 * to / rate)
    torch.testing.assert_close(found[200 : len(expected) - 200], expected[200:-200], atol=5e-3, rtol=0)


def test_frequencies_that_the_lower_rate_cannot_hold_are_filtered_out():
    assert resample(tone(7000, 16000), 16000, 8000)[200:-200].abs().max() < 1e-2


def test_a_sound_at_its_own_rate_is_itself():
    sound = decode_wav(wav(b"\0\1" * 9))
    assert sound.at(8000) is sound
    assert len(sound.at(16000).wave) == 18
