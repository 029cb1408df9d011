"""d2v_audio.files: what is found, what is refused and in which words; damage never passes as shorter audio."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from d2v_audio import files
from d2v_audio.files import BadClip, Clip, read, scan
from d2v_core.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"


def tone(seconds: float = 0.5, rate: int = 16000, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    """(n,) or (n, channels) float32 sine of amplitude 0.5."""
    x = (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)
    return x if channels == 1 else np.repeat(x[:, None], channels, axis=1)


def write(path: Path, x: np.ndarray | None = None, rate: int = 16000, **kind: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, tone() if x is None else x, rate, **kind)
    return path


def probe(path: Path) -> Clip | BadClip:
    return files._probe(files._Entry(path.name, path), 16000)


def reason(path: Path) -> str:
    """Why a scan has no clip for this file."""
    result = probe(path)
    assert isinstance(result, BadClip), f"{path} passed: {result}"
    return str(result)


def clip_of(path: Path, **options) -> Clip:
    (clip,) = scan(path, **options).clips
    return clip


def user_error(path: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        scan(path, **options)
    return str(caught.value)


def tsv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ formats and samples


KINDS: dict[str, dict[str, Any]] = {
    "a.wav": {},
    "f.wav": {"subtype": "FLOAT"},
    "p24.WAV": {"subtype": "PCM_24"},
    "ex.wav": {"format": "WAVEX"},
    "rf64.wav": {"format": "RF64"},
    "a.aiff": {},
    "a.flac": {},
    "a.opus": {"format": "OGG", "subtype": "OPUS"},
    "a.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "a.mp3": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_each_format_returns_its_samples(tmp_path, name):
    clip = clip_of(write(tmp_path / name, **KINDS[name]))
    assert (clip.num_samples, clip.source_rate, clip.channels, clip.id) == (8000, 16000, 1, name)
    x = read(clip, 16000)
    assert x.shape == (8000,) and x.dtype == np.float32
    lossy = name.endswith(("opus", "ogg", "mp3"))
    np.testing.assert_allclose(x[2000:6000], tone()[2000:6000], atol=0.05 if lossy else 1e-4)


def test_stereo_8_khz_is_averaged_and_resampled(tmp_path):
    left = tone(1.0, rate=8000)
    path = write(tmp_path / "st.wav", np.stack([left, np.zeros_like(left)], axis=1), rate=8000, subtype="FLOAT")
    clip = clip_of(path)
    assert (clip.num_samples, clip.source_rate, clip.channels) == (16000, 8000, 2)
    x = read(clip, 16000)
    assert x.shape == (16000,)
    np.testing.assert_allclose(x[1000:-1000], 0.5 * tone(1.0)[1000:-1000], atol=2e-3)  # a 440 Hz sine at either rate


@pytest.mark.parametrize(("rate", "frames", "expected"), [(44100, 44100, 16000), (44100, 44101, 16001), (48000, 4, 2)])
def test_length_after_resampling_is_rounded_up(tmp_path, rate, frames, expected):
    clip = clip_of(write(tmp_path / "a.wav", np.zeros(frames, np.float32), rate))
    assert clip.num_samples == expected == len(read(clip, 16000))


def test_resampling_removes_what_the_target_rate_cannot_hold(tmp_path):
    clip = clip_of(write(tmp_path / "a.wav", tone(1.0, rate=44100, hz=12000), 44100))  # Nyquist of 16 kHz is 8 kHz
    assert np.abs(read(clip, 16000)[500:-500]).max() < 1e-3


def test_an_odd_rate_is_refused_before_it_costs_memory(tmp_path):
    path = write(tmp_path / "a.wav", rate=16001)
    assert reason(path) == "its rate of 16001 Hz cannot be resampled to 16000 Hz: convert it to a usual rate"


def test_mp3_with_an_id3_tag(tmp_path):
    path = write(tmp_path / "a.mp3", tone(2.0))
    path.write_bytes(b"ID3\x04\0\0" + bytes([0, 0, 4, 10]) + bytes(522) + path.read_bytes())
    assert len(read(clip_of(path), 16000)) == 32000


def test_import_leaves_torch_out():
    code = "import sys, d2v_audio.files; assert not {'torch', 'torchaudio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["a.wav", "f.wav", "p24.WAV", "ex.wav", "rf64.wav", "a.aiff", "a.opus", "a.ogg"])
def test_truncation_is_seen_at_scan_wherever_it_falls(tmp_path, name):
    whole = write(tmp_path / name, **KINDS[name]).read_bytes()
    cuts = [*range(0, 120), *np.random.default_rng(0).integers(120, len(whole), 200), len(whole) - 2, len(whole) - 1]
    for cut in cuts:
        (tmp_path / "cut.bin").write_bytes(whole[:cut])
        assert isinstance(probe(tmp_path / "cut.bin"), BadClip), f"{name} cut to {cut} bytes"


def test_truncated_wav_says_how_much_is_missing(tmp_path):
    path = write(tmp_path / "a.wav")
    path.write_bytes(path.read_bytes()[:1044])
    assert reason(path) == "truncated: 16000 bytes of audio promised, 1000 present"


def test_damaged_ogg_is_seen_at_scan_or_in_read(tmp_path):
    path = tmp_path / "a.opus"
    whole = write(path, tone(4.0), format="OGG", subtype="OPUS").read_bytes()
    path.write_bytes(whole[:-1])
    assert reason(path) == "truncated or damaged: an Ogg page does not fit its checksum"
    path.write_bytes(whole[: whole.rfind(b"OggS")])
    assert reason(path).startswith("truncated: its last Ogg page is not the end of the stream")
    for bit in np.random.default_rng(3).integers(0, 8 * len(whole), 100):
        mutant = bytearray(whole)
        mutant[bit // 8] ^= 1 << bit % 8
        path.write_bytes(mutant)
        if isinstance(clip := probe(path), Clip):
            with pytest.raises(BadClip, match=r"a\.opus: (truncated or damaged|truncated): "):
                read(clip, 16000)


def test_truncated_after_the_scan(tmp_path):
    path = write(tmp_path / "a.wav")
    clip = clip_of(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadClip, match=r"a\.wav: truncated: 16000 bytes of audio promised, 15998 present"):
        read(clip, 16000)


def test_truncated_flac_passes_the_scan_and_fails_in_read(tmp_path):
    whole = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype("f4")).read_bytes()
    for cut in np.random.default_rng(1).integers(8300, len(whole), 50):  # after the metadata
        (tmp_path / "cut.flac").write_bytes(whole[:cut])
        clip = clip_of(tmp_path / "cut.flac")
        with pytest.raises(BadClip, match=r"cut\.flac: damaged: "):
            read(clip, 16000)


def test_truncated_mp3_is_seen_at_scan_and_in_read(tmp_path):
    whole = write(tmp_path / "a.mp3", tone(3.0)).read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / "a.mp3") == f"truncated: {len(whole)} bytes promised, {len(whole) // 2} present"
    at = whole.find(b"Xing") if b"Xing" in whole else whole.find(b"Info")
    hidden = whole[: at + 7] + bytes([whole[at + 7] & 1]) + whole[at + 8 :]  # a tag without the count of bytes
    (tmp_path / "b.mp3").write_bytes(hidden[: len(whole) // 2])
    with pytest.raises(BadClip, match=r"b\.mp3: (damaged: 48000 samples promised|changed)"):
        read(Clip(tmp_path / "b.mp3", "b.mp3", 48000, 16000, 1), 16000)


def test_an_mp3_that_lacks_its_last_bytes(tmp_path):
    """mpg123 takes a hundredth less without a word, and libsndfile gives silence in its place."""
    whole = write(tmp_path / "a.mp3", tone(3.0)).read_bytes()
    for lost in (1, 10, len(whole) // 200):
        (tmp_path / "a.mp3").write_bytes(whole[:-lost])
        assert reason(tmp_path / "a.mp3").startswith("truncated: ")


def test_mp3_without_length_tag_is_refused(tmp_path):
    whole = write(tmp_path / "a.mp3", tone(3.0)).read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[whole.find(whole[:2], 200) :])  # the tag is a frame of its own
    assert reason(tmp_path / "a.mp3") == "an MP3 without length tag, ffmpeg -i in.mp3 -c copy out.mp3 adds one"


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFDB])
def test_wav_written_to_a_pipe_is_read_whole(tmp_path, size):
    path = write(tmp_path / "a.wav")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 4 + whole[8:40] + size.to_bytes(4, "little") + whole[44:])
    np.testing.assert_allclose(read(clip_of(path), 16000), tone(), atol=1e-4)


def test_wav_of_a_recording_that_was_not_closed(tmp_path):
    path = write(tmp_path / "a.wav")
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(4) + whole[44:])
    assert reason(path).startswith("its header says 0 bytes of audio (a recording that was not closed)")


@pytest.mark.parametrize("pad", [b"", b"\0"])
def test_odd_chunks_with_and_without_their_pad_byte(tmp_path, pad):
    path = write(tmp_path / "a.wav")
    whole = path.read_bytes()
    odd = b"note" + (3).to_bytes(4, "little") + b"abc" + pad
    path.write_bytes(whole[:36] + odd + whole[36:])
    with path.open("rb") as raw:
        size = path.stat().st_size
        files._check_chunks(raw, size, 8000)
        with pytest.raises(BadClip, match="truncated: 16000 bytes of audio promised, 15999 present"):
            files._check_chunks(raw, size - 1, 8000)


def test_long_chunk_list_ends(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF\x24\0\0\0WAVE" + bytes(2_000_000))
    assert reason(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path, value):
    x = tone()
    x[[17, 4000]] = value
    clip = clip_of(write(tmp_path / "a.wav", x, subtype="FLOAT"))
    with pytest.raises(BadClip, match=r"a\.wav: 2 samples are NaN or infinite, the first is number 17"):
        read(clip, 16000)


def test_text_named_wav(tmp_path):
    (tmp_path / "a.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    said = reason(tmp_path / "a.wav")
    assert said.startswith("not an audio file that libsndfile can read: ")
    assert "it starts with b'version https://git-lfs" in said


def test_empty_silent_and_missing_files(tmp_path):
    (tmp_path / "zero.wav").touch()
    assert reason(tmp_path / "zero.wav") == "the file is empty (0 bytes)"
    assert reason(write(tmp_path / "none.wav", np.zeros(0, np.float32))) == "it holds no samples"
    assert reason(tmp_path / "gone.wav") == "no such file"


def test_format_without_a_check_is_refused(tmp_path):
    assert reason(write(tmp_path / "a.wav", format="W64")) == "format W64 is not supported: convert it to FLAC"


@pytest.mark.parametrize("digit", [0x0, 0xF])
def test_flac_without_a_believable_length(tmp_path, digit):
    path = write(tmp_path / "a.flac")
    whole = bytearray(path.read_bytes())
    whole[21] = whole[21] & 0xF0 | digit  # 36 bits of STREAMINFO count the samples; 0 means unknown
    whole[22:26] = bytes([17 * digit]) * 4
    path.write_bytes(whole)
    assert reason(path).startswith("its header gives no believable length: ")


def test_a_silent_flac_is_believable(tmp_path):
    clip = clip_of(write(tmp_path / "a.flac", np.zeros((16000 * 60, 8), np.float32)))
    assert not read(clip, 16000).any()


def test_read_refuses_a_file_that_was_replaced(tmp_path):
    clip = clip_of(write(tmp_path / "a.wav"))
    write(tmp_path / "a.wav", tone(0.25))
    with pytest.raises(BadClip, match="changed since the scan, or scanned for another rate than 16000 Hz"):
        read(clip, 16000)


def test_mutated_files_end_in_samples_or_bad_clip(tmp_path):
    """Bits flipped at random, mostly in headers: nothing but BadClip, and nothing of another length."""
    rng = np.random.default_rng(2)
    path = tmp_path / "mutant"
    for name in ("a.wav", "a.flac", "a.opus", "rf64.wav", "a.aiff"):
        whole = write(tmp_path / name, **KINDS[name]).read_bytes()
        for _ in range(40):
            mutant = bytearray(whole)
            for at in rng.integers(0, min(len(whole), rng.choice([60, 5000])), 3):
                mutant[at] ^= 1 << rng.integers(8)
            path.write_bytes(mutant)
            clip = probe(path)
            if isinstance(clip, Clip) and clip.num_samples < 10**7:
                try:
                    assert read(clip, 16000).shape == (clip.num_samples,)
                except BadClip as error:
                    assert str(path) in str(error)


# ------------------------------------------------------------------------------------------------ folders


def test_folder_is_sorted_and_takes_any_name(tmp_path):
    names = ["b/ö é.wav", "b/a b.FLAC", "Z.wav", "a.ogg", "日本/音.wav"]
    for name in names:
        write(tmp_path / name, subtype="VORBIS" if name.endswith("ogg") else "PCM_16")
    for other in ("b/notes.txt", ".hidden.wav", "b/._a b.FLAC", ".cache/x.wav"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("no audio")
    report = scan(tmp_path)
    assert [clip.id for clip in report.clips] == sorted(names)
    assert all(clip.path == tmp_path / clip.id and clip.path.is_absolute() for clip in report.clips)
    assert (report.bad, report.too_short, report.resampled) == ((), 0, 0)
    assert all(len(read(clip, 16000)) == 8000 for clip in report.clips)
    assert scan(tmp_path, num_threads=1) == report


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are a matter of Linux file systems")
def test_name_that_is_not_utf8(tmp_path):
    os.rename(write(tmp_path / "a.wav"), os.fsencode(tmp_path) + b"/\xff.wav")
    (clip,) = scan(tmp_path).clips
    assert len(read(clip, 16000)) == 8000
    clip.path.write_bytes(b"text")
    assert "\\udcff.wav (not an audio file" in user_error(tmp_path)


def test_librispeech_layout(tmp_path):
    for utterance in ("84-121123-0000", "84-121123-0001", "84-121123-0002"):
        write(tmp_path / "84" / "121123" / f"{utterance}.flac")
    write(tmp_path / "other" / "x" / "y.flac")
    tsv(
        tmp_path / "84" / "121123" / "84-121123.trans.txt",
        "84-121123-0000 GO ON",
        "84-121123-0001 YES",
        "84-121123-0002",
    )
    found = [(clip.id.split("/")[-1], clip.transcript, clip.speaker) for clip in scan(tmp_path).clips]
    assert found == [
        ("84-121123-0000.flac", "GO ON", "84"),
        ("84-121123-0001.flac", "YES", "84"),
        ("84-121123-0002.flac", None, None),
        ("y.flac", None, None),
    ]


def test_linked_folders_are_followed_once(tmp_path):
    write(tmp_path / "store" / "a.wav")
    data = tmp_path / "data"
    data.mkdir()
    (data / "one").symlink_to(tmp_path / "store", target_is_directory=True)
    (data / "two").symlink_to(tmp_path / "store", target_is_directory=True)
    (data / "loop").symlink_to(data, target_is_directory=True)
    assert [clip.id for clip in scan(data).clips] == ["one/a.wav"]


def test_split_of_a_folder_is_a_sub_folder(tmp_path):
    write(tmp_path / "train" / "a.wav")
    write(tmp_path / "dev" / "b.wav")
    assert [clip.id for clip in scan(tmp_path, split="dev").clips] == ["dev/b.wav"]
    said = user_error(tmp_path, split="test")
    assert said == f"data.path={tmp_path} has no sub-folder 'test'. Sub-folders: dev, train."
    assert "has no sub-folder '..'" in user_error(tmp_path / "dev", split="..")


def test_folder_without_audio(tmp_path):
    said = user_error(tmp_path)
    assert "no audio files in" in said and "found no files at all" in said
    for name in ("a.txt", "b.txt", "c.m4a", "README"):
        (tmp_path / name).write_text("x")
    said = user_error(tmp_path)
    assert "Looked for .aif .aifc .aiff .flac .mp3 .oga .ogg .opus .wav; found 2 x .txt" in said
    assert "1 x .m4a" in said and "1 x no extension" in said and "ffmpeg -i in.m4a out.flac" in said


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", f"{top}/secret"))

    monkeypatch.setattr("os.walk", walk)
    said = user_error(tmp_path)
    assert said.endswith(f"cannot list {tmp_path}/secret (Permission denied): mend its permissions.")


def test_path_that_does_not_exist(tmp_path):
    (tmp_path / "librispeech").mkdir()
    said = user_error(tmp_path / "libirspeech" / "train")
    assert said.startswith(f"data.path={tmp_path}/libirspeech/train does not exist: there is no 'libirspeech' in")
    assert said.endswith("Did you mean 'librispeech'?")
    assert user_error(tmp_path / "qq").endswith("There is: librispeech.")
    assert user_error(" ") == "data.path is empty: give a folder, a .tsv table or an audio file."


def test_other_kinds_of_path(tmp_path):
    write(tmp_path / "a.wav")
    said = user_error(tsv(tmp_path / "list.csv", "file"))
    assert said.endswith("expected a folder, a .tsv table or an audio file (" + " ".join(files.AUDIO_EXTENSIONS) + ").")
    assert user_error(tmp_path / "a.wav", split="dev").endswith(
        "is one file and has no split 'dev': leave the split out."
    )


# ------------------------------------------------------------------------------------------------ tables


def test_fairseq_manifest(tmp_path):
    write(tmp_path / "audio" / "b c.wav")
    write(tmp_path / "audio" / "x" / "a.flac")
    for root in (tmp_path / "audio", "audio"):
        manifest = tsv(tmp_path / "train.tsv", str(root), "x/a.flac\t8000", "b c.wav\t8000")
        report = scan(manifest)
        assert [clip.id for clip in report.clips] == ["b c.wav", "x/a.flac"]
        assert report.clips[0].path == tmp_path / "audio" / "b c.wav"


def test_manifest_whose_files_are_missing_or_of_another_length(tmp_path):
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav", tone(0.25))
    manifest = tsv(tmp_path / "m.tsv", str(tmp_path), "a.wav\t8000", "b.wav\t8000", "c.wav\t8000")
    report = scan(manifest, max_bad_ratio=0.7)
    assert report.bad == (("b.wav", "the manifest lists 8000 samples, the file has 4000"), ("c.wav", "no such file"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a.wav", "does not have the 2 fields"),
        ("a.wav 8000", "does not have the 2 fields"),
        ("a.wav\t8000\tx", "does not have the 2 fields"),
        ("\t8000", "does not have the 2 fields"),
        ("a.wav\t0.5", "has '0.5' for a number of samples"),
        ("a.wav\t", "has '' for a number of samples"),
        ("../a.wav\t8000", "names a file outside of "),
        ("x/../../a.wav\t8000", "names a file outside of "),
        ("/etc/a.wav\t8000", "names a file outside of "),
        ("./ok.wav\t8000", "repeats the file of line 2; remove one of the two"),
    ],
)
def test_malformed_manifest_line(tmp_path, line, problem):
    write(tmp_path / "ok.wav")
    said = user_error(tsv(tmp_path / "m.tsv", str(tmp_path), "ok.wav\t8000", line))
    assert f"line 3 {problem}" in said and said.endswith(f": {line!r}. Expected file<TAB>number of samples.")


def test_table_with_header(tmp_path):
    for name in ("a.wav", "sub/b ü.wav", "c.wav"):
        write(tmp_path / name)
    table = tsv(
        tmp_path / "t.tsv",
        "speaker\tfile\ttranscript\tsplit\tduration",
        'ann\tc.wav\tSAID "YES"\ttrain\t0.5',
        "",
        "bob\tsub/b ü.wav\tNO\tdev\t0.5",
        "\ta.wav\t\ttrain\t0.5",
    )
    found = [(clip.id, clip.transcript, clip.speaker) for clip in scan(table).clips]
    assert found == [("a.wav", None, None), ("c.wav", 'SAID "YES"', "ann"), ("sub/b ü.wav", "NO", "bob")]
    assert [clip.id for clip in scan(table, split="train").clips] == ["a.wav", "c.wav"]
    assert user_error(table, split="test").endswith("lists no files of split 'test'; its splits are dev, train.")


def test_table_with_windows_line_ends_and_byte_order_mark(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbffile\ttranscript\r\na.wav\tYES\r\n")
    assert clip_of(tmp_path / "t.tsv").transcript == "YES"


def test_table_that_is_no_table(tmp_path):
    said = user_error(tsv(tmp_path / "t.tsv", "path\tsentence", "a.wav\tYES"))
    assert r"line 1 is 'path\tsentence': expected tab separated columns with 'file' among them" in said
    assert "the root folder, which must exist" in user_error(tsv(tmp_path / "t.tsv", "/no/such/root", "a.wav\t8000"))
    assert "line 1 is ''" in user_error(tsv(tmp_path / "t.tsv"))
    assert user_error(tsv(tmp_path / "t.tsv", "file\tsplit")).endswith("lists no files after line 1.")
    write(tmp_path / "a.wav")
    said = user_error(tsv(tmp_path / "t.tsv", "file", "a.wav"), split="dev")
    assert said.endswith("has no column 'split' to find 'dev' in: leave the split out.")
    (tmp_path / "t.tsv").write_bytes(b"file\n\xe9.wav\n")
    assert "is not UTF-8 text (invalid continuation byte at byte 5): save it as UTF-8." in user_error(
        tmp_path / "t.tsv"
    )


def test_malformed_table_line(tmp_path):
    table = tsv(tmp_path / "t.tsv", "file\ttranscript", "a.wav\tYES", "b.wav")
    assert "line 3 does not have the 2 fields: 'b.wav'. Expected file<TAB>transcript." in user_error(table)
    table = tsv(tmp_path / "t.tsv", "speaker\tfile", "ann")
    assert "line 2 does not have the 2 fields: 'ann'. Expected speaker<TAB>file." in user_error(table)


# ------------------------------------------------------------------------------------------------ limits and report


def test_too_short(tmp_path):
    write(tmp_path / "a.wav", tone(0.4))
    write(tmp_path / "b.wav", tone(0.5))
    report = scan(tmp_path, min_s=0.5)
    assert (report.too_short, [clip.id for clip in report.clips]) == (1, ["b.wav"])
    write(tmp_path / "c.wav", np.zeros(7, np.float32), 48000)
    assert 7 / 48000 * 48000 > 7 and clip_of(tmp_path / "c.wav", min_s=7 / 48000, sample_rate=48000)
    (tmp_path / "c.wav").unlink()
    said = user_error(tmp_path, min_s=2)
    assert (
        "none of 2 audio files is usable, 2 are shorter than data.min_s=2 s and 0 unreadable. Lower data.min_s" in said
    )


def test_rate_policy_refuse(tmp_path):
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav", rate=44100)
    said = user_error(tmp_path, rate_policy="refuse")
    assert "1 of 2 files are not at data.sample_rate=16000 Hz, first b.wav at 44100 Hz." in said
    assert said.endswith("Set data.rate_policy=resample, or data.sample_rate=44100 if all are at that rate.")
    assert clip_of(tmp_path / "b.wav", sample_rate=44100, rate_policy="refuse").num_samples == 8000


def test_sample_rate_in_khz(tmp_path):
    assert user_error(tmp_path, sample_rate=16) == "data.sample_rate=16: expected 1000 to 768000 Hz, such as 16000."


def test_too_many_unreadable_files(tmp_path):
    write(tmp_path / "ok.wav")
    for i in range(7):
        (tmp_path / f"bad{i}.wav").touch()
    said = user_error(tmp_path)
    assert (
        "7 of 8 audio files (87.5%) are unreadable, more than data.max_bad_ratio=0.01 allows:\n  bad0.wav (the file is"
        in said
    )
    assert "bad4.wav" in said and "bad5.wav" not in said and "\n  and 2 more\n" in said
    assert said.endswith("raise data.max_bad_ratio to do without them.")
    assert len(scan(tmp_path, max_bad_ratio=0.875).bad) == 7


def test_summary(tmp_path):
    write(tmp_path / "a.wav", tone(9.0))
    write(tmp_path / "b.wav", tone(9.0, rate=8000), rate=8000)
    write(tmp_path / "c.wav", tone(0.1))
    (tmp_path / "d.wav").touch()
    report = scan(tmp_path, min_s=0.25, max_bad_ratio=0.5)
    assert report.seconds() == pytest.approx(18)
    assert report.summary() == (
        "2 clips, 18.0 s at 16000 Hz; 1 dropped as shorter than data.min_s=0.25 s; 1 resampled (1 from 8000 Hz)\n"
        "1 unreadable: d.wav (the file is empty (0 bytes))"
    )
    assert scan(tmp_path / "a.wav").summary() == "1 clips, 9.0 s at 16000 Hz"


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    ("archive", "table"),
    [
        ("an4/an4.tar", "an4/an4.tsv"),
        ("librispeech_mini/librispeech_mini_opus.tar", "librispeech_mini/librispeech_mini.tsv"),
    ],
)
def test_real_speech(tmp_path, archive, table):
    if not (DATA / archive).is_file():
        pytest.skip(f"{DATA / archive} is not here")
    lines = (DATA / table).read_text(encoding="utf-8").splitlines()[:21]
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    with tarfile.open(DATA / archive) as tar:
        for row in rows:
            member = tar.extractfile(row["file"])
            assert member is not None
            (tmp_path / row["file"]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / row["file"]).write_bytes(member.read())
    report = scan(tsv(tmp_path / "t.tsv", *lines), split="train")
    assert len(report.clips) == 20 and not report.bad and not report.resampled
    by_id = {clip.id: clip for clip in report.clips}
    for row in rows:
        clip = by_id[row["file"]]
        assert (clip.transcript, clip.speaker) == (row["transcript"], row["speaker"])
        assert len(read(clip, 16000)) / 16000 == pytest.approx(float(row["duration"]), abs=0.06)
    assert [clip.id for clip in scan(tmp_path).clips] == sorted(by_id)
