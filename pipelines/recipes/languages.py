"""Whisper's languages: the code of a language that people write in other ways, such as `Swedish` or `sv-SE`."""

from __future__ import annotations

import difflib
import re

from pipelines.infra.errors import LabError

_TABLE = """
af afrikaans, am amharic, ar arabic, as assamese, az azerbaijani, ba bashkir, be belarusian, bg bulgarian, bn bengali,
bo tibetan, br breton, bs bosnian, ca catalan, cs czech, cy welsh, da danish, de german, el greek, en english, es
spanish, et estonian, eu basque, fa persian, fi finnish, fo faroese, fr french, gl galician, gu gujarati, ha hausa,
haw hawaiian, he hebrew, hi hindi, hr croatian, ht haitian creole, hu hungarian, hy armenian, id indonesian, is
icelandic, it italian, ja japanese, jw javanese, ka georgian, kk kazakh, km khmer, kn kannada, ko korean, la latin, lb
luxembourgish, ln lingala, lo lao, lt lithuanian, lv latvian, mg malagasy, mi maori, mk macedonian, ml malayalam, mn
mongolian, mr marathi, ms malay, mt maltese, my myanmar, ne nepali, nl dutch, nn nynorsk, no norwegian, oc occitan, pa
punjabi, pl polish, ps pashto, pt portuguese, ro romanian, ru russian, sa sanskrit, sd sindhi, si sinhala, sk slovak,
sl slovenian, sn shona, so somali, sq albanian, sr serbian, su sundanese, sv swedish, sw swahili, ta tamil, te telugu,
tg tajik, th thai, tk turkmen, tl tagalog, tr turkish, tt tatar, uk ukrainian, ur urdu, uz uzbek, vi vietnamese, yi
yiddish, yo yoruba, yue cantonese, zh chinese
"""
AUTO = "auto"
"""In place of a language: detect it."""
NAMES = dict(entry.split(" ", 1) for entry in _TABLE.replace("\n", " ").strip().split(", "))
"""Code to English name of the languages of Whisper's tokenizer, as in its `LANGUAGES`."""
_OTHER_NAMES = (
    # names that Whisper's tokenizer accepts, too
    "burmese my, valencian ca, flemish nl, haitian ht, letzeburgesch lb, pushto ps, panjabi pa, moldavian ro, "
    "moldovan ro, sinhalese si, castilian es, mandarin zh, "
    # the Nordic languages in their own words and their codes of three letters
    "svenska sv, norsk no, bokmål no, dansk da, suomi fi, íslenska is, føroyskt fo, "
    "swe sv, nor no, nob no, nno nn, dan da, fin fi, isl is, fao fo, eng en, "
    # codes of today that Whisper's table lacks
    "nb no, cmn zh, fil tl, jv jw, iw he, in id"
)
_CODES = {name: code for code, name in NAMES.items()} | dict(entry.rsplit(" ", 1) for entry in _OTHER_NAMES.split(", "))


def find(text: str) -> str:
    """Return Whisper's code of a language, or "" if it has none.

    `text` is a code, with or without a region (`sv`, `SV`, `sv-SE`, `sv_SE.UTF-8`), or a name (`Swedish`, `svenska`).
    """
    name = " ".join(text[:100].strip().strip("<|>").casefold().split())
    code = re.split(r"[-_.@]", name, maxsplit=1)[0]
    return _CODES.get(name) or (code if code in NAMES else _CODES.get(code, "") if len(code) <= 3 else "")


def tag(code: str) -> str:
    """Return the tag that HTML uses for a language of Whisper: its code, but for Javanese."""
    return "jv" if code == "jw" else code


def parse(text: str) -> str:
    """Return Whisper's code of a language (see `find`). Raises LabError if it has none."""
    if code := find(text):
        return code
    near = difflib.get_close_matches(text[:40].strip().casefold(), [*_CODES, *NAMES], n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise LabError(
        "language must be one of Whisper's, as a code or an English name such as sv or Swedish, "
        f"got {text[:40]!r}{hint}"
    )


def parse_or_auto(text: str) -> str:
    """Return Whisper's code of a language, `auto` to detect it, or "" for white space. Raises LabError like `parse`."""
    return AUTO if text.strip().casefold() == AUTO else parse_optional(text)


def parse_optional(text: str) -> str:
    """Return Whisper's code of a language, or "" for white space. Raises LabError like `parse`, also for `auto`."""
    return parse(text) if text.strip() else ""
