"""Make the embedded English and German phrases: dates, times, numbers, amounts and measures.

    pip install babel==2.18.0 num2words==0.5.14
    python scripts/make_phrases.py

Both languages say the same by the rules of Unicode's CLDR (babel) and of num2words; a small model
must learn how they are put together. The same bytes each time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import random
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path

from babel.dates import format_date, format_time, format_timedelta
from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent
from babel.units import format_unit
from num2words import num2words

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src/apollo_qn/experiments/data/embedded/phrases"
COUNTS = {"train": 24000, "valid": 1000, "test": 1000}
README = """\
# Phrases

{train} training, {valid} validation and {test} test pairs of English and German phrases: dates,
times, numbers, ordinals, amounts, percentages, measures and spans of time; no English phrase stands
there twice, so the test phrases are combinations that were not trained on.

Made by `scripts/make_phrases.py` with babel 2.18.0 (BSD licence; the rules are those of Unicode's
CLDR) and num2words 0.5.14 (LGPL; its output is not covered). SHA256SUMS is checked whenever the
data are read. The phrases are in the public domain.
"""
EN, DE = "en_US", "de_DE"
CURRENCIES = ("EUR", "USD", "CHF", "GBP", "JPY", "SEK", "PLN", "CZK")
UNITS = (
    *("length-kilometer", "length-meter", "length-mile", "mass-kilogram", "mass-gram"),
    *("volume-liter", "duration-hour", "duration-minute", "duration-week", "area-hectare"),
    *("temperature-celsius", "speed-kilometer-per-hour", "digital-megabyte"),
)
FRAMES = {
    "date": (
        *(
            ("{}", "{}"),
            ("on {}", "am {}"),
            ("until {}", "bis zum {}"),
            ("since {}", "seit dem {}"),
        ),
    ),
    "time": (
        *(("{}", "{} Uhr"), ("at {}", "um {} Uhr"), ("after {}", "nach {} Uhr")),
        *(("not before {}", "nicht vor {} Uhr"),),
    ),
    "amount": (
        *(("{}", "{}"), ("more than {}", "mehr als {}"), ("less than {}", "weniger als {}")),
        *(("about {}", "etwa {}"), ("exactly {}", "genau {}"), ("at least {}", "mindestens {}")),
    ),
}
Pair = tuple[str, str]


def both(form: Callable[[str], str]) -> Pair:
    return form(EN), form(DE)


def dates(draw: random.Random) -> Pair:
    day = date(1900, 1, 1) + timedelta(days=draw.randrange(365 * 150))
    form = draw.choice(("full", "long", "medium", "short", "day", "month"))
    patterns = {"day": ("MMMM d", "d. MMMM"), "month": ("MMMM y", "MMMM y")}
    english, german = patterns.get(form, (form, form))
    return framed(
        "date",
        format_date(day, english, locale=EN),
        format_date(day, german, locale=DE),
        draw,
        only=form in ("month", "full"),
    )


def times(draw: random.Random) -> Pair:
    moment = time(draw.randrange(24), draw.randrange(60))
    english = format_time(moment, "h:mm a", locale=EN)
    return framed("time", english, format_time(moment, "HH:mm", locale=DE), draw)


def numbers(draw: random.Random) -> Pair:
    value = Decimal(draw.randrange(-(10 ** draw.randint(1, 8)), 10 ** draw.randint(1, 9)))
    value /= 10 ** draw.choice((0, 0, 1, 2))
    return framed("amount", *both(lambda locale: format_decimal(value, locale=locale)), draw)


def words(draw: random.Random) -> Pair:
    value = draw.randrange(10 ** draw.randint(2, 6))
    return num2words(value, lang="en"), num2words(value, lang="de")


def ordinals(draw: random.Random) -> Pair:
    value = draw.randrange(1, 10 ** draw.randint(2, 4))
    english = num2words(value, to="ordinal", lang="en")
    return f"the {english}", f"der {num2words(value, to='ordinal', lang='de')}"


def amounts(draw: random.Random) -> Pair:
    value = Decimal(draw.randrange(1, 10 ** draw.randint(2, 8))) / draw.choice((1, 100))
    currency, form = draw.choice(CURRENCIES), draw.choice(("name", "standard"))
    return framed(
        "amount",
        *both(lambda locale: format_currency(value, currency, locale=locale, format_type=form)),
        draw,
    )


def percentages(draw: random.Random) -> Pair:
    value = Decimal(draw.randrange(-1000, 10000)) / 10000
    return framed("amount", *both(lambda x: format_percent(value, "#,##0.0#%", locale=x)), draw)


def compact(draw: random.Random) -> Pair:
    value = draw.randrange(1000, 10 ** draw.randint(4, 11))

    def say(locale: str) -> str:
        return format_compact_decimal(value, format_type="long", locale=locale, fraction_digits=1)

    return framed("amount", *both(say), draw)


def measures(draw: random.Random) -> Pair:
    value = Decimal(draw.randrange(1, 10 ** draw.randint(1, 5))) / draw.choice((1, 1, 10))
    unit = draw.choice(UNITS)
    return framed("amount", *both(lambda x: format_unit(value, unit, locale=x)), draw)


def spans(draw: random.Random) -> Pair:
    step = draw.choice((60, 3600, 86400, 604800, 2629800, 31557600))
    span = timedelta(seconds=step * draw.choice((-1, 1)) * draw.randrange(1, 60))
    return both(lambda x: format_timedelta(span, threshold=99, add_direction=True, locale=x))


def framed(kind: str, english: str, german: str, draw: random.Random, only: bool = False) -> Pair:
    here, there = FRAMES[kind][0] if only else draw.choice(FRAMES[kind])
    return here.format(english), there.format(german)


KINDS = (dates, dates, times, numbers, words, words, ordinals, amounts, percentages, compact)
KINDS += (measures, spans)


def phrases(count: int) -> list[Pair]:
    """Draw so many, each English phrase once, their spaces all plain."""
    draw = random.Random(14)
    found: dict[str, str] = {}
    while len(found) < count:
        english, german = (" ".join(text.split()) for text in draw.choice(KINDS)(draw))
        found.setdefault(english, german)
    return list(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    pairs = phrases(sum(COUNTS.values()))
    arguments.target.mkdir(parents=True, exist_ok=True)
    sums, start = [], 0
    for split, count in COUNTS.items():
        for side, language in enumerate(("en", "de")):
            name = f"{split}.{language}.gz"
            buffer = io.BytesIO()
            with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
                lines = [f"{pair[side]}\n" for pair in pairs[start : start + count]]
                file.write("".join(lines).encode())
            (arguments.target / name).write_bytes(buffer.getvalue())
            sums.append(f"{hashlib.sha256(buffer.getvalue()).hexdigest()}  {name}\n")
        start += count
    (arguments.target / "SHA256SUMS").write_text("".join(sums))
    (arguments.target / "README.md").write_text(README.format(**COUNTS))


if __name__ == "__main__":
    main()
