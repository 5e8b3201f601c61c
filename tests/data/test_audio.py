"""Sound: wav files against SciPy's writer, features against SciPy's transforms."""

import wave

import numpy as np
import pytest
from scipy import fft, signal
from scipy.io import wavfile

from crowdmesh_jax.data import log_mel, mfcc, read_clips, read_wav
from crowdmesh_jax.data.audio import FLOOR, _mel_filters
from crowdmesh_jax.errors import DataError, DataFileError

TONE = (np.sin(2 * np.pi * 440 * np.arange(800) / 8000) * 0.5).astype(np.float32)


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 127), ("int16", 2**15), ("int32", 2**31)])
def test_samples_are_those_that_were_written(tmp_path, dtype, scale):
    path = tmp_path / "tone.wav"
    shift = 128 if dtype == "uint8" else 0
    wavfile.write(path, 8000, (TONE.astype(np.float64) * (scale - 1) + shift).astype(dtype))
    samples, rate = read_wav(path)
    assert rate == 8000
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, TONE, atol=2.5 / scale)


def test_24_bits_and_two_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    values = np.array([[2**22, -(2**21)], [-(2**23), -(2**23)], [1, 3]], "<i4")
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(2)
        stream.setsampwidth(3)
        stream.setframerate(16000)
        stream.writeframes(values.view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
    samples, rate = read_wav(path)
    assert rate == 16000
    assert samples.tolist() == [0.125, -1.0, 2 / 2**23]


def test_a_folder_is_read_by_name(tmp_path):
    names = [f"{digit}_{take}" for take in range(5) for digit in "cab"]
    for name in names:
        wavfile.write(tmp_path / f"{name}.wav", 8000, (TONE * 32767).astype(np.int16))
    clips = read_clips(tmp_path)
    assert clips.names == tuple(sorted(names))
    assert clips.rate_hz == 8000
    assert [len(samples) for samples in clips.samples] == [800] * 15
    wavfile.write(tmp_path / "d.wav", 16000, (TONE * 32767).astype(np.int16))
    with pytest.raises(DataFileError, match=r"d\.wav: expected 8000 Hz as in a_0.wav, found 16000"):
        read_clips(tmp_path)


def test_a_bad_file_or_folder_is_told_by_name(tmp_path):
    path = tmp_path / "tone.wav"
    wavfile.write(path, 8000, (TONE * 32767).astype(np.int16))
    whole = path.read_bytes()
    cases = [
        (b"", "expected a PCM wav file"),
        (b"ID3" + whole, "expected a PCM wav file"),
        (whole[:-100], "announces 800 samples at 8000 Hz, found 750; the file is truncated"),
        (whole[:30], "expected a PCM wav file"),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(DataFileError, match=message) as caught:
            read_wav(path)
        assert str(path) in str(caught.value)
    wavfile.write(path, 8000, TONE)  # floats: not PCM
    with pytest.raises(DataFileError, match="convert it"):
        read_wav(path)
    with pytest.raises(DataFileError, match=r"expected files \*\.flac, found none"):
        read_clips(tmp_path, "*.flac")
    with pytest.raises(DataFileError, match="expected a folder of wav files, found none; clone"):
        read_clips(tmp_path / "none", get="clone the recordings")


def test_log_mel_is_the_logarithm_of_filtered_power():
    noise = np.random.default_rng(0).normal(size=8000).astype(np.float32) * 0.1
    ours = log_mel([noise], 8000)[0]
    _, _, spectrum = signal.stft(
        noise, 8000, window="hann", nperseg=256, noverlap=128, boundary=None, padded=False
    )
    power = np.abs(spectrum.T * 128) ** 2 / 256  # scipy divides by the window's sum, 128
    expected = np.log(power @ _mel_filters(256, 8000, 40, 20.0, 4000.0) + FLOOR)
    assert ours.shape == (61, 40)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_louder_band_is_where_the_tone_is():
    for hz in (300, 1000, 2500):
        tone = np.sin(2 * np.pi * hz * np.arange(8000) / 8000)
        band = log_mel([tone], 8000)[0].mean(axis=0).argmax()
        edges = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (20, 4000)), 42)
        low, high = (700 * (10 ** (edges[band + i] / 2595) - 1) for i in (0, 2))
        assert low < hz < high


def test_clips_are_cut_or_filled_to_one_length():
    features = log_mel([TONE, np.tile(TONE, 20)], 8000, length_s=0.5)
    assert features.shape == (2, 30, 40)
    np.testing.assert_array_equal(features[0, -1], np.log(np.float32(FLOOR)))
    assert features[1, -1].max() > 0


def test_mfcc_is_the_orthonormal_dct():
    features = log_mel([TONE], 8000)
    expected = fft.dct(features, type=2, norm="ortho")[..., :13]
    np.testing.assert_allclose(mfcc(features, 13), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_mel([], 8000), "no clips"),
        (lambda: log_mel([np.ones((4, 2))], 8000), r"clip 0 .* got float64 \(4, 2\)"),
        (lambda: log_mel([np.ones(4, int)], 8000), "clip 0 must be a row of finite floats"),
        (lambda: log_mel([np.array([np.nan])], 8000), "clip 0"),
        (lambda: log_mel([TONE], 8000, window_s=2.0), "a window must fit into a clip"),
        (lambda: log_mel([TONE], 8000, high_hz=5000), "below half the rate"),
        (lambda: log_mel([TONE], 8000, bands=200), "band 2 of 200 is narrower"),
        (lambda: mfcc(np.ones((1, 40)), 41), r"coefficients must be 1 .. 40"),
    ],
)
def test_features_that_cannot_be_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()
