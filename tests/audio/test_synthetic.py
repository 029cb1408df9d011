"""The corpus made in code: the same on every call, and truthful about what is said, when and by whom."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from d2v_audio.synthetic import PHONES, SILENCE, WORDS, SyntheticSpeech, Utterance, frame_labels


@pytest.fixture(scope="module")
def corpus() -> SyntheticSpeech:
    return SyntheticSpeech("train", size=20, seed=3)


@pytest.fixture(scope="module")
def utterances(corpus: SyntheticSpeech) -> list[Utterance]:
    return [utterance for utterance in corpus]  # ends because an index past the end raises IndexError


def digest(utterance: Utterance) -> str:
    return hashlib.sha256(utterance.waveform.tobytes()).hexdigest()


def band_energy(utterance: Utterance, phone: str, low_hz: float, high_hz: float) -> float:
    """Energy between two frequencies over all stretches of one phone."""
    energy = 0.0
    for phone_id, start, end in utterance.phones:
        if PHONES[phone_id] == phone:
            rate = utterance.sample_rate
            piece = utterance.waveform[round(start * rate) : round(end * rate)]
            hz = np.fft.rfftfreq(len(piece), 1 / rate)
            energy += float((np.abs(np.fft.rfft(piece)) ** 2)[(hz >= low_hz) & (hz < high_hz)].sum())
    return energy


def test_vocabulary_covers_all_phones_and_spells_each_in_one_way():
    assert len(PHONES) == 27 and PHONES[SILENCE] == "sil"
    assert len(WORDS) == 32 and len(set(WORDS.values())) == 32
    assert {phone for phones in WORDS.values() for phone in phones} == set(PHONES) - {"sil"}
    letters = {"iy": "EE", "ih": "I", "eh": "E", "ae": "A", "aa": "O", "ao": "AW", "ah": "U", "uw": "OO"}
    for word, phones in WORDS.items():
        assert word == "".join(letters.get(phone, phone.upper()) for phone in phones)


def test_same_in_any_order_size_and_object(utterances: list[Utterance]):
    again = SyntheticSpeech("train", size=1000, seed=3)
    for i in (19, 4, 0, 4):
        assert again[i].phones == utterances[i].phones and again[i].transcript == utterances[i].transcript
        assert np.array_equal(again[i].waveform, utterances[i].waveform)


def test_same_in_another_process_and_untouched_by_global_random_state(utterances: list[Utterance]):
    code = (
        "import hashlib, numpy; numpy.random.seed(1); from d2v_audio.synthetic import SyntheticSpeech\n"
        "print(hashlib.sha256(SyntheticSpeech('train', 20, 3)[7].waveform.tobytes()).hexdigest())\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == digest(utterances[7])


def test_seed_split_and_index_each_change_the_sound(utterances: list[Utterance]):
    others = [
        SyntheticSpeech("train", 20, seed=4)[0],
        SyntheticSpeech("dev", 20, 3)[0],
        SyntheticSpeech("test", 20, 3)[0],
    ]
    digests = [digest(utterance) for utterance in [*utterances, *others]]
    assert len(set(digests)) == len(digests)


def test_splits_share_no_speaker():
    corpora = [SyntheticSpeech("train", 1500), SyntheticSpeech("dev", 1500), SyntheticSpeech("test", 1500)]
    train, dev, test = ({corpus._plan(i).speaker for i in range(1500)} for corpus in corpora)
    assert (len(train), len(dev), len(test)) == (200, 30, 60)  # all were drawn, with this seed
    assert not train & dev and not (train | dev) & test


def test_waveform_is_float32_bounded_and_as_long_as_announced(corpus: SyntheticSpeech, utterances: list[Utterance]):
    for i, utterance in enumerate(utterances):
        assert utterance.waveform.dtype == np.float32 and utterance.waveform.shape == (corpus.num_samples(i),)
        assert utterance.sample_rate == 16000
        assert np.isfinite(utterance.waveform).all() and 0.2 < np.abs(utterance.waveform).max() <= 1


def test_phones_cover_the_waveform_and_match_the_transcript(utterances: list[Utterance]):
    for utterance in utterances:
        ids, starts, ends = zip(*utterance.phones, strict=True)
        assert starts[0] == 0 and starts[1:] == ends[:-1] and all(np.array(ends) > np.array(starts))
        assert ends[-1] == pytest.approx(len(utterance.waveform) / 16000)
        assert ids[0] == ids[-1] == SILENCE
        words = utterance.transcript.split(" ")
        assert 3 <= len(words) <= 6
        spoken = [PHONES[i] for i in ids if i != SILENCE]
        assert spoken == [phone for word in words for phone in WORDS[word]]


def test_mean_duration_is_about_two_seconds():
    corpus = SyntheticSpeech("train", size=400)
    assert 1.7 < np.mean([corpus.num_samples(i) for i in range(400)]) / 16000 < 2.2


def test_sound_agrees_with_the_labels(utterances: list[Utterance]):
    def share_above_3_khz(phone: str) -> float:
        high = sum(band_energy(u, phone, 3000, 8000) for u in utterances)
        return high / (high + sum(band_energy(u, phone, 0, 3000) for u in utterances))

    assert share_above_3_khz("s") > 0.5 > 0.2 > share_above_3_khz("uw")
    power = {"sil": [], "aa": []}
    for utterance in utterances:
        for phone, start, end in utterance.phones:
            if PHONES[phone] in power:
                piece = utterance.waveform[round(start * 16000) : round(end * 16000)] / utterance.waveform.std()
                power[PHONES[phone]].append(np.mean(piece**2))
    assert np.mean(power["aa"]) > 3 * np.mean(power["sil"])


@pytest.mark.parametrize("sample_rate", [8000, 22050])
def test_other_sample_rates_say_the_same(sample_rate: int, utterances: list[Utterance]):
    corpus = SyntheticSpeech("train", size=20, seed=3, sample_rate=sample_rate)
    utterance = corpus[5]
    assert utterance.sample_rate == sample_rate and len(utterance.waveform) == corpus.num_samples(5)
    assert np.isfinite(utterance.waveform).all()
    assert (utterance.transcript, utterance.speaker) == (utterances[5].transcript, utterances[5].speaker)
    for phone, reference in zip(utterance.phones, utterances[5].phones, strict=True):
        assert phone == pytest.approx(reference, rel=0.01)  # 22050 / 200 is not whole, so hops are 4.99 ms


def test_frame_labels_by_hand():
    phones = ((0, 0.0, 0.1), (5, 0.1, 0.3), (7, 0.3, 0.35))
    labels = frame_labels(phones, num_frames=6, hop_s=0.1, offset_s=0.0)  # centres 0, 0.1, 0.2, 0.3, then past the end
    assert labels.dtype == np.int64 and labels.tolist() == [0, 5, 5, 7, SILENCE, SILENCE]
    assert frame_labels(phones, 3, 0.1, 0.05).tolist() == [0, 5, 5]
    assert frame_labels(phones[1:], 2, 0.1, 0.05).tolist() == [SILENCE, 5]  # before the first phone
    assert frame_labels(phones, 0, 0.1, 0.0).shape == (0,)


@pytest.mark.parametrize("index", [-1, 20])
def test_index_out_of_range(index: int, corpus: SyntheticSpeech):
    with pytest.raises(IndexError, match=f"utterance {index} of a corpus with 20"):
        corpus[index]
    with pytest.raises(IndexError):
        corpus.num_samples(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid", "size": 1}, "'valid'; expected one of train, dev, test"),
        ({"split": "dev", "size": -1}, "size=-1"),
        ({"split": "dev", "size": 1, "sample_rate": 2000}, "2000 Hz; expected at least 4000"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SyntheticSpeech(**arguments)
