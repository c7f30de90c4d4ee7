"""Swedish speech from espeak-ng: the same bytes for the same arguments, independent of earlier calls.

espeak-ng keeps hidden state between utterances (the phase of its pitch flutter, its gain control, a cycle counter)
that neither setting the voice again nor espeak_Terminate() resets, and it seeds its breath noise with the clock, so the
same call returns other bytes each time. So the library is loaded again with a fixed seed for every utterance, about
3 ms. If the library cannot be unloaded (Windows, or another package uses it) the utterance is synthesised in a new
Python process instead, about 0.1 s, with the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipelines.infra.errors import LabError, missing_package

REQUIREMENT = "espeakng-loader>=0.2.4"
SAMPLE_RATE_HZ = 22_050
"""Sample rate of espeak-ng: mono, 16-bit."""
VARIANTS = tuple(f"sv+f{i}" for i in range(1, 6)) + tuple(f"sv+m{i}" for i in range(1, 8))
"""The Swedish voice as five women and seven men. espeak-ng accepts unknown variants without an error."""
ENGLISH_VARIANTS = tuple(variant.replace("sv+", "en+") for variant in VARIANTS)
"""The English voice of the same people."""
RATES_WPM = range(80, 451)
"""Speaking rates in words per minute. espeak-ng accepts any value without an error."""
PITCHES = range(100)
"""Pitch; 50 is the default of the voice. espeak-ng accepts any value without an error."""

# Constants of espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS, _DONT_EXIT_ON_ERROR = 2, 0x8000
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_POSITION_CHARACTER, _TEXT_UTF8 = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_NOISE_SEED = 1

_DATA_FILES = ("phondata", "phonindex", "phontab", "intonations")
_LANGUAGE_FILES = {"sv": ("sv_dict", "lang/gmq/sv"), "en": ("en_dict", "lang/gmw/en")}
_PATH_LIMIT = 160  # characters; espeak-ng cannot find its data under a longer path

_LOCK = threading.Lock()  # espeak-ng has one global state per process


class _StillLoaded(Exception):
    """The library could not be unloaded, so it keeps the state of earlier utterances."""


def synthesise(text: str, variant: str, rate_wpm: int, pitch: int) -> bytes:
    """Return a WAV file (mono, 16-bit, SAMPLE_RATE_HZ) of `text` that depends on the four arguments only.

    Raises LabError for an argument outside VARIANTS, RATES_WPM or PITCHES, and for an error of espeak-ng.
    """
    _check(text, variant, rate_wpm, pitch)
    with _LOCK:
        try:
            return _wav(_samples_here(text, variant, rate_wpm, pitch))
        except _StillLoaded:
            return _wav_from_child(text, variant, rate_wpm, pitch)


def version() -> str:
    """Return the version of the espeak-ng library, such as 1.52.0."""
    with _LOCK:
        library = _load(_loader())
        library.espeak_Info.restype = ctypes.c_char_p
        number = library.espeak_Info(None).decode()
        _unload(library)
    return number


def build_sha256(language: str = "sv") -> str:
    """Return a digest of the library and the data files of a language: builds of one version may sound different."""
    loader = _loader()
    data = Path(loader.get_data_path())
    voices = [data / "voices" / "!v" / variant.removeprefix("sv+") for variant in VARIANTS]
    names, digest = (*_DATA_FILES, *_LANGUAGE_FILES[language]), hashlib.sha256()
    for path in [Path(loader.get_library_path()), *(data / name for name in names), *voices]:
        digest.update(hashlib.sha256(_read(path)).digest())
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabError(
            f"espeak-ng's file {path} cannot be read ({error.strerror}). Run: pip install --force-reinstall "
            f"'{REQUIREMENT}'"
        ) from error


def _check(text: str, variant: str, rate_wpm: int, pitch: int) -> None:
    if not text.strip():
        raise LabError("espeak-ng needs a text to speak, got an empty one")
    if variant not in VARIANTS + ENGLISH_VARIANTS:
        raise LabError(f"Unknown espeak-ng variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    if rate_wpm not in RATES_WPM:
        raise LabError(f"rate_wpm must be a whole number from {RATES_WPM[0]} to {RATES_WPM[-1]}, got {rate_wpm!r}")
    if pitch not in PITCHES:
        raise LabError(f"pitch must be a whole number from {PITCHES[0]} to {PITCHES[-1]}, got {pitch!r}")


def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise missing_package("espeakng-loader", REQUIREMENT, "The tour corpus (speech from espeak-ng)") from error
    return espeakng_loader


def _load(loader: ModuleType) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(loader.get_library_path())
    except OSError as error:
        raise LabError(f"espeak-ng's library cannot be loaded ({error}). Run: pip install '{REQUIREMENT}'") from error


def _unload(library: ctypes.CDLL) -> None:
    """Close the library; when no user is left it is unmapped, and its state is lost."""
    if os.name == "posix":
        import _ctypes  # ctypes has no public way to close a library

        _ctypes.dlclose(library._handle)


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """Load espeak-ng in its initial state. Raises _StillLoaded if it has been used before."""
    loader = _loader()
    library = _load(loader)
    try:
        if library.espeak_ng_GetSampleRate() != 0:  # zero only until the first initialisation
            raise _StillLoaded
        _initialise(library, loader.get_data_path())
        yield library
        _expect_ok(library.espeak_Terminate(), "espeak_Terminate()")
    finally:
        _unload(library)


def _initialise(library: ctypes.CDLL, data_path: str) -> None:
    """Initialise espeak-ng with its packaged data. Raises LabError if it fell back to a system-wide copy."""
    rate_hz = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data_path), _DONT_EXIT_ON_ERROR)
    library.espeak_Info.restype = ctypes.c_char_p
    used = ctypes.c_char_p()
    library.espeak_Info(ctypes.byref(used))
    if rate_hz != SAMPLE_RATE_HZ or os.fsdecode(used.value or b"") != data_path:
        raise LabError(
            f"espeak-ng did not start with its data in {data_path} (rate {rate_hz}, expected {SAMPLE_RATE_HZ}). "
            f"Its path holds {len(data_path)} characters; from about {_PATH_LIMIT} on, install into a shorter one"
        )
    # Initialising seeds the noise of the breathy variants (f2, f3, f5) with the time of day.
    _expect_ok(library.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED)), f"espeak_ng_SetRandSeed({_NOISE_SEED})")


def _samples_here(text: str, variant: str, rate_wpm: int, pitch: int) -> bytes:
    """Synthesise in this process. Returns little-endian int16 samples at SAMPLE_RATE_HZ."""
    chunks: list[bytes] = []

    @_CALLBACK
    def collect(samples, count, events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # continue

    with _fresh_library() as library:
        library.espeak_SetSynthCallback(collect)
        _expect_ok(library.espeak_SetVoiceByName(variant.encode()), f"espeak_SetVoiceByName({variant!r})")
        _expect_ok(library.espeak_SetParameter(_PARAMETER_RATE, rate_wpm, 0), f"rate {rate_wpm}")
        _expect_ok(library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0), f"pitch {pitch}")
        _synthesise_text(library, text)
    if not chunks:
        raise LabError(f"espeak-ng returned no audio for {text!r}")
    return b"".join(chunks)


def _synthesise_text(library: ctypes.CDLL, text: str) -> None:
    encoded = text.encode() + b"\0"
    size = ctypes.c_size_t(len(encoded))
    status = library.espeak_Synth(encoded, size, 0, _POSITION_CHARACTER, 0, _TEXT_UTF8, None, None)
    _expect_ok(status, f"espeak_Synth({text!r})")
    _expect_ok(library.espeak_Synchronize(), "espeak_Synchronize()")


def _expect_ok(status: int, call: str) -> None:
    if status != 0:
        raise LabError(f"espeak-ng failed at {call} with status {status}, expected 0. Reinstall '{REQUIREMENT}'")


def _wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        writer.writeframes(samples)
    return file.getvalue()


def _wav_from_child(*arguments: str | int) -> bytes:
    """Synthesise in a new Python process, whose library is in its initial state. Returns a WAV file."""
    root = Path(__file__).resolve().parents[4]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {__name__} as espeak; espeak._run_child()"
    request = json.dumps(arguments).encode()
    done = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise LabError(f"espeak-ng failed in a child process: {reason}")
    return done.stdout


def _run_child() -> None:
    """Run in the child of _wav_from_child: arguments as JSON on stdin, the WAV file on stdout."""
    text, variant, rate_wpm, pitch = json.loads(sys.stdin.buffer.read())
    sys.stdout.buffer.write(_wav(_samples_here(text, variant, rate_wpm, pitch)))
