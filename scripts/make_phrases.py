"""Make the embedded phrases: English dates, numbers, amounts and times with their translations.

    pip install babel==2.18.0 num2words==0.5.14
    python scripts/make_phrases.py

Both sides express one value by the rules of Unicode's CLDR (babel) and of num2words, so that every
English phrase has one correct translation. The output has the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any, Literal

from babel import dates, numbers, units
from num2words import num2words  # type: ignore[import-untyped]
from reproducible_gzip import compress_lines

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "bench/src/apollo_bench/workloads/translation/embedded/phrases"
SIZES = {"train": 20_000, "valid": 1_000, "test": 1_000}
LANGUAGES = ("en", "de")
EN, DE = "en_US", "de_DE"
README = """\
# English and German phrases

{train:,} training, {valid:,} validation and {test:,} test pairs: dates, times, numbers, ordinals,
amounts of money, measures, spans of time, and short sentences that hold two of them, one a line.

Made by `scripts/make_phrases.py`, which writes the same bytes each time, with
[babel](https://babel.pocoo.org) 2.18.0 (BSD licence), which speaks by the rules and with the words
of [Unicode's CLDR](https://cldr.unicode.org) (Unicode License v3), and with
[num2words](https://github.com/savoirfairelinux/num2words) 0.5.14 (LGPL, which does not cover its
output). No text of other origin is in it.

Every value (a day, a time of day, a number) belongs to one of the three splits: what is said in the
test set is said in no form in the training set, though all its words and digits are there. Of forms
that leave something out, as a day without its year, no text stands in two splits.

SHA256SUMS is checked whenever the phrases are read.
"""

Pair = tuple[str, str]
Unit = Literal["year", "month", "week", "day", "hour"]
Draw = Callable[[Random], Any]
Form = Callable[[Random, Any], Pair]  # expresses a value of the type that its kind draws

CURRENCIES = ("EUR", "USD", "GBP", "CHF", "SEK", "PLN", "CZK", "CAD")
# the currencies that num2words names in both languages
SPELLED_CURRENCIES = {
    "EUR": (("euro", "euros", "cent", "cents"), ("Euro", "Euro", "Cent", "Cent")),
    "USD": (("dollar", "dollars", "cent", "cents"), ("Dollar", "Dollar", "Cent", "Cent")),
    "GBP": (("pound", "pounds", "penny", "pence"), ("Pfund", "Pfund", "Penny", "Pence")),
}
MEASURES = (
    *("length-kilometer", "length-meter", "length-mile", "mass-kilogram", "mass-gram"),
    *("volume-liter", "area-square-meter", "area-hectare", "temperature-celsius"),
    *("speed-kilometer-per-hour", "digital-megabyte", "duration-minute"),
)
SPANS: dict[Unit, int] = {
    "year": 365 * 86400,
    "month": 30 * 86400,
    "week": 7 * 86400,
    "day": 86400,
    "hour": 3600,
}


# random values; all phrases that express a value are in the same split


def day(random: Random) -> datetime.date:
    return datetime.date(1900, 1, 1) + datetime.timedelta(days=random.randrange(150 * 365))


def moment(random: Random) -> datetime.time:
    return datetime.time(random.randrange(24), random.randrange(60))


def whole(random: Random) -> Decimal:
    return Decimal(random.randrange(10 ** (1 + random.randrange(6))))


def rank(random: Random) -> Decimal:
    return Decimal(1 + random.randrange(10 ** (2 + random.randrange(3))))


def count(random: Random) -> Decimal:
    return Decimal(2 + random.randrange(400))


def decimal(random: Random) -> Decimal:
    places = 1 + random.randrange(2)
    value = Decimal(1 + random.randrange(10 ** (2 + random.randrange(5)))).scaleb(-places)
    return value if random.randrange(5) else -value


def cents(random: Random) -> Decimal:
    return Decimal(100 + random.randrange(10 ** (3 + random.randrange(5)))).scaleb(-2)


def both(express: Callable[[str], str]) -> Pair:
    return express(EN), express(DE)


# dates


def date_in(english: str, german: str) -> Callable[[Random, datetime.date], Pair]:
    def say(random: Random, value: datetime.date) -> Pair:
        return (
            dates.format_date(value, english, locale=EN),
            dates.format_date(value, german, locale=DE),
        )

    return say


def spelled_date(random: Random, value: datetime.date) -> Pair:
    month_en, month_de = both(lambda locale: dates.format_date(value, "MMMM", locale=locale))
    ordinal_en, ordinal_de = (num2words(value.day, lang=one, to="ordinal") for one in LANGUAGES)
    year_en, year_de = (num2words(value.year, lang=one, to="year") for one in LANGUAGES)
    return f"the {ordinal_en} of {month_en} {year_en}", f"der {ordinal_de} {month_de} {year_de}"


def date_span(random: Random, value: datetime.date) -> Pair:
    end = value + datetime.timedelta(days=1 + random.randrange(60))
    while split_of(end) != split_of(value):
        end += datetime.timedelta(days=1)
    return both(
        lambda locale: (
            f"{dates.format_date(value, 'long', locale=locale)} "
            f"{'to' if locale == EN else 'bis'} {dates.format_date(end, 'long', locale=locale)}"
        )
    )


# times


def clock(random: Random, value: datetime.time) -> Pair:
    english = dates.format_time(value, "h:mm a", locale=EN)
    return english, f"{dates.format_time(value, 'HH:mm', locale=DE)} Uhr"


def precise_clock(random: Random, value: datetime.time) -> Pair:
    value = value.replace(second=random.randrange(60))
    english = dates.format_time(value, "h:mm:ss a", locale=EN)
    return english, f"{dates.format_time(value, 'HH:mm:ss', locale=DE)} Uhr"


def spoken_clock(random: Random, value: datetime.time) -> Pair:
    """Return a time in words: "ten to four" is "zehn vor vier"."""
    hour, minute = value.hour, value.minute
    past = minute <= 30
    minutes = minute if past else 60 - minute
    this, following = (1 + (hour - 1) % 12, 1 + hour % 12)

    def say(language: str) -> str:
        def word(number: int) -> str:
            return str(num2words(number, lang=language))

        english = language == "en"
        if minute == 0:
            return (
                f"{word(this)} o'clock" if english else f"{word(this) if this > 1 else 'ein'} Uhr"
            )
        if minute == 30:
            return f"half past {word(this)}" if english else f"halb {word(following)}"
        if minutes == 15:
            size = "quarter" if english else "Viertel"
        elif english:
            size = f"{word(minutes)} minute{'s' * (minutes > 1)}"
        else:
            size = f"{word(minutes)} Minuten" if minutes > 1 else "eine Minute"
        if english:
            return f"{size} {'past' if past else 'to'} {word(this if past else following)}"
        return f"{size} {'nach' if past else 'vor'} {word(this if past else following)}"

    return say("en"), say("de")


# numbers


def plain(random: Random, value: Decimal) -> Pair:
    return both(lambda locale: numbers.format_decimal(value, locale=locale))


def percent(random: Random, value: Decimal) -> Pair:
    return both(
        lambda locale: numbers.format_percent(
            value.scaleb(-2), locale=locale, decimal_quantization=False
        )
    )


def spelled(random: Random, value: Decimal) -> Pair:
    number = int(value) if value == int(value) else value
    return num2words(number, lang="en"), num2words(number, lang="de")


def ordinal(random: Random, value: Decimal) -> Pair:
    english, german = (num2words(int(value), lang=one, to="ordinal") for one in LANGUAGES)
    return f"the {english}", f"der {german}"


def millions(random: Random, value: Decimal) -> Pair:
    value = abs(value) * 10**6
    return both(
        lambda locale: numbers.format_compact_decimal(
            value, format_type="long", locale=locale, fraction_digits=2
        )
    )


def measure(random: Random, value: Decimal) -> Pair:
    unit = MEASURES[random.randrange(len(MEASURES))]
    return both(lambda locale: units.format_unit(value, unit, locale=locale))


def span(random: Random, value: Decimal) -> Pair:
    name = list(SPANS)[random.randrange(len(SPANS))]
    seconds = SPANS[name] * int(value) * (1 if random.randrange(2) else -1)
    return both(
        lambda locale: dates.format_timedelta(
            seconds, granularity=name, threshold=10**6, add_direction=True, locale=locale
        )
    )


# amounts


def amount(random: Random, value: Decimal) -> Pair:
    currency = CURRENCIES[random.randrange(len(CURRENCIES))]
    value = value if random.randrange(6) else -value
    return both(lambda locale: numbers.format_currency(value, currency, locale=locale))


def named_amount(random: Random, value: Decimal) -> Pair:
    currency = CURRENCIES[random.randrange(len(CURRENCIES))]
    return both(
        lambda locale: numbers.format_currency(value, currency, locale=locale, format_type="name")
    )


def spelled_amount(random: Random, value: Decimal) -> Pair:
    names = list(SPELLED_CURRENCIES.values())[random.randrange(len(SPELLED_CURRENCIES))]
    large, small = divmod(int(value * 100), 100)
    said = []
    for language, (one, many, part, parts), joint in zip(
        LANGUAGES, names, ("and", "und"), strict=True
    ):

        def counted(number: int, single: str, plural: str, language: str = language) -> str:
            word = str(num2words(number, lang=language))
            if language == "de" and number % 100 == 1:
                word = word.removesuffix("s")  # ein Euro, einhundertein Euro
            return f"{word} {single if number == 1 else plural}"

        text = counted(large, one, many)
        said.append(f"{text} {joint} {counted(small, part, parts)}" if small else text)
    return said[0], said[1]


# phrases: a value and the forms that express it

DATES = (
    *(date_in("long", "long"), date_in("full", "full"), date_in("medium", "medium")),
    *(date_in("short", "short"), date_in("d MMMM y", "d. MMMM y"), date_in("y-MM-dd", "y-MM-dd")),
    *(date_in("EEE, MMM d", "EEE d. MMM"), date_in("EEEE, MMMM d", "EEEE, d. MMMM")),
    *(spelled_date, date_span),
)
TIMES = (clock, precise_clock, spoken_clock)
WHOLES = (plain, spelled, measure)
DECIMALS = (plain, percent, spelled, measure, millions)
AMOUNTS = (amount, named_amount, spelled_amount)
KINDS: tuple[tuple[Draw, tuple[Form, ...]], ...] = (
    *((day, DATES), (moment, TIMES), (whole, WHOLES), (decimal, DECIMALS), (cents, AMOUNTS)),
    *((rank, (ordinal,)), (count, (span,))),
)

# sentences: two values, each in the form of its placeholder
Sentence = tuple[str, str, tuple[Draw, Form], tuple[Draw, Form]]
LONG = date_in("long", "long")
WEEKDAY = date_in("EEEE, MMMM d, y", "EEEE, 'dem' d. MMMM y")
SENTENCES: tuple[Sentence, ...] = (
    (
        "The invoice of {} amounts to {}.",
        "Die Rechnung vom {} beläuft sich auf {}.",
        *((day, LONG), (cents, named_amount)),
    ),
    (
        "The meeting on {} begins at {}.",
        "Die Besprechung am {} beginnt um {}.",
        *((day, WEEKDAY), (moment, clock)),
    ),
    (
        "The train leaves at {} and arrives at {}.",
        "Der Zug fährt um {} ab und kommt um {} an.",
        *((moment, clock), (moment, clock)),
    ),
    (
        "To be paid: {} by {}.",
        "Zu zahlen: {} bis zum {}.",
        *((cents, spelled_amount), (day, date_in("medium", "medium"))),
    ),
    (
        "The balance changed by {} to {}.",
        "Der Saldo änderte sich um {} auf {}.",
        *((decimal, percent), (cents, amount)),
    ),
    (
        "On {} there were {} visitors.",
        "Am {} kamen {} Besucher.",
        *((day, LONG), (whole, plain)),
    ),
    (
        "The office is closed on {} and on {}.",
        "Das Büro ist am {} und am {} geschlossen.",
        *((day, LONG), (day, LONG)),
    ),
    (
        "It is {}; the next bus leaves at {}.",
        "Es ist {}; der nächste Bus fährt um {}.",
        *((moment, spoken_clock), (moment, clock)),
    ),
)


def split_of(value: object) -> str:
    """Return the split that a value belongs to: 5 % are for validation and 5 % for test."""
    # 3, 3.0 and -3 have the same digits, so they belong to the same split
    text = str(abs(value).normalize()) if isinstance(value, Decimal) else str(value)
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20
    return {0: "valid", 1: "test"}.get(place, "train")


def phrases(split: str) -> Iterator[Pair]:
    """Yield phrases without end, drawn with the seed of the split."""
    random = Random(split)

    def drawn(draw: Draw) -> Any:
        while True:
            value = draw(random)
            if split_of(value) == split:
                return value

    while True:
        if random.randrange(4):
            draw, forms = KINDS[random.randrange(len(KINDS))]
            pair = forms[random.randrange(len(forms))](random, drawn(draw))
        else:
            english, german, *places = SENTENCES[random.randrange(len(SENTENCES))]
            said = [say(random, drawn(draw)) for draw, say in places]
            pair = (
                english.format(*(one for one, _ in said)),
                german.format(*(other for _, other in said)),
            )
        # plain spaces in place of the narrow and unbreakable ones of the CLDR
        english, german = (" ".join(text.split()) for text in pair)
        yield english, german


def make(sizes: dict[str, int]) -> dict[str, list[Pair]]:
    """Return the pairs of each split; every English and every German phrase occurs in one only."""
    taken: dict[str, str] = {}
    splits: dict[str, list[Pair]] = {}
    # The small splits come first and keep phrases that two values share, such as a date without
    # its year.
    for split in sorted(sizes, key=lambda name: (sizes[name], name)):
        pairs: dict[str, str] = {}
        source = phrases(split)
        while len(pairs) < sizes[split]:
            english, german = next(source)
            if all(taken.get(text, split) == split for text in (english, german)):
                pairs.setdefault(english, german)
                taken[english] = taken[german] = split
        splits[split] = list(pairs.items())
    return {split: splits[split] for split in sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    target = parser.parse_args().target
    target.mkdir(parents=True, exist_ok=True)
    sums = {}
    for split, pairs in make(SIZES).items():
        for language, lines in zip(LANGUAGES, zip(*pairs, strict=True), strict=True):
            content = compress_lines(lines)
            name = f"{split}.{language}.gz"
            (target / name).write_bytes(content)
            sums[name] = hashlib.sha256(content).hexdigest()
    (target / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    (target / "README.md").write_text(README.format(**SIZES))
    total = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
