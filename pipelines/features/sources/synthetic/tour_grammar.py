"""Words and sentence frames of the tour's Swedish grammar."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from pipelines.infra.errors import LabError

# Words. For a frame that needs agreement, each word has its forms.

CHORES = (  # infinitive phrase, past-tense verb, its object
    ("laga cykeln", "lagade", "cykeln"),
    ("baka bröd", "bakade", "bröd"),
    ("tvätta bilen", "tvättade", "bilen"),
    ("måla staketet", "målade", "staketet"),
    ("städa förrådet", "städade", "förrådet"),
    ("klippa gräset", "klippte", "gräset"),
    ("ringa tandläkaren", "ringde", "tandläkaren"),
    ("plocka svamp", "plockade", "svamp"),
    ("hugga ved", "högg", "ved"),
    ("vattna blommorna", "vattnade", "blommorna"),
    ("beställa biljetter", "beställde", "biljetter"),
    ("skotta snö", "skottade", "snö"),
    ("koka sylt", "kokade", "sylt"),
    ("stryka skjortorna", "strök", "skjortorna"),
    ("byta lampan", "bytte", "lampan"),
)
PEOPLE = ("min bror", "min syster", "grannen", "farmor", "hon", "han", "vår kusin", "min pappa")
CITIES = ("Uppsala", "Lund", "Falun", "Kalmar", "Umeå", "Gävle", "Örebro", "Borås", "Växjö", "Luleå", "Halmstad")
REGIONS = ("Skåne", "Dalarna", "Småland", "Jämtland", "Värmland", "Lappland", "Blekinge", "Hälsingland", "Bohuslän")
LOCATIONS = (  # article, indefinite, definite
    ("ett", "apotek", "apoteket"),
    ("ett", "bibliotek", "biblioteket"),
    ("en", "bank", "banken"),
    ("ett", "postombud", "postombudet"),
    ("en", "skola", "skolan"),
    ("ett", "museum", "museet"),
    ("ett", "hotell", "hotellet"),
    ("en", "simhall", "simhallen"),
    ("en", "restaurang", "restaurangen"),
    ("en", "blomsteraffär", "blomsteraffären"),
    ("ett", "sjukhus", "sjukhuset"),
    ("en", "lekplats", "lekplatsen"),
    ("ett", "bageri", "bageriet"),
    ("en", "frisör", "frisören"),
)
COLOURS = (  # en-form, ett-form, definite form
    ("röd", "rött", "röda"),
    ("blå", "blått", "blå"),
    ("grön", "grönt", "gröna"),
    ("gul", "gult", "gula"),
    ("svart", "svart", "svarta"),
    ("vit", "vitt", "vita"),
    ("brun", "brunt", "bruna"),
    ("grå", "grått", "grå"),
)
CLOTHES = (  # article, indefinite, definite
    ("en", "jacka", "jackan"),
    ("en", "tröja", "tröjan"),
    ("en", "klänning", "klänningen"),
    ("en", "halsduk", "halsduken"),
    ("en", "kjol", "kjolen"),
    ("en", "mössa", "mössan"),
    ("en", "skjorta", "skjortan"),
    ("ett", "linne", "linnet"),
    ("ett", "bälte", "bältet"),
    ("ett", "paraply", "paraplyet"),
)
TOO = (("dyr", "dyrt"), ("stor", "stort"), ("liten", "litet"))
PRICED = ("biljetten", "boken", "lampan", "stolen", "väskan", "hammaren", "tårtan", "blombuketten")
COUNTED = ("ägg", "böcker", "koppar", "stolar", "äpplen", "servetter", "ljus", "tallrikar", "kuddar", "bullar")
HOBBIES = ("spela piano", "dansa tango", "segla", "spela fiol", "rida", "laga mat", "teckna", "åka skridskor")
HOBBIES += ("spela schack", "dyka", "fotografera", "sjunga i kör")
UNITS = ("", "ett", "två", "tre", "fyra", "fem", "sex", "sju", "åtta", "nio", "tio", "elva", "tolv", "tretton")
UNITS += ("fjorton", "femton", "sexton", "sjutton", "arton", "nitton")
TENS = ("", "", "tjugo", "trettio", "fyrtio", "femtio", "sextio", "sjuttio", "åttio", "nittio")


def number_word(value: int) -> str:
    """Return a number from 1 to 999 as one Swedish word: 142 is hundrafyrtiotvå, 342 trehundrafyrtiotvå."""
    if not 1 <= value <= 999:
        raise LabError(f"Number words run from 1 to 999, got {value}")
    hundreds, rest = divmod(value, 100)
    head = ("", "hundra")[hundreds] if hundreds < 2 else f"{UNITS[hundreds]}hundra"
    return head + (UNITS[rest] if rest < len(UNITS) else TENS[rest // 10] + UNITS[rest % 10])


def _number_words(values: Iterable[int]) -> list[str]:
    return [number_word(value) for value in values]


# Frames: each returns all its sentences, in a fixed order.


def _plans() -> list[str]:
    times = ("i morgon", "på lördag", "efter lunch", "i eftermiddag", "före helgen", "nästa vecka")
    return [f"{time} ska {who} {chore}" for time, who, (chore, _, _) in product(times, PEOPLE, CHORES)]


def _past() -> list[str]:
    times = ("i går", "i lördags", "förra veckan", "i onsdags", "efter jobbet", "på förmiddagen")
    return [f"{time} {verb} {who} {what}" for time, who, (_, verb, what) in product(times, PEOPLE, CHORES)]


def _requests() -> list[str]:
    openings = ("kan du hjälpa mig att {}?", "glöm inte att {}!", "vem vill {}?", "jag orkar inte {} i dag")
    openings += ("du borde {} redan i dag", "hinner du {} i kväll?", "när tänkte du {}?", "hon lovade att {} åt oss")
    return [opening.format(chore) for opening, (chore, _, _) in product(openings, CHORES)]


def _directions() -> list[str]:
    return [
        sentence
        for article, noun, the_noun in LOCATIONS
        for sentence in (
            f"var ligger närmaste {noun}?",
            f"finns det {article} {noun} i närheten?",
            f"hur kommer man till {the_noun} härifrån?",
            f"är det långt till {the_noun}?",
            f"jag har inte hittat till {the_noun} än",
            f"ta första gatan till höger efter {the_noun}",
            f"vi träffas utanför {the_noun} klockan fem",
        )
    ]


def _neighbours() -> list[str]:
    relations = ("bredvid", "mittemot", "bakom", "snett emot", "inte långt från")
    names = [the_noun for _, _, the_noun in LOCATIONS]
    pairs = [(one, other) for one, other in product(names, names) if one != other]
    return [f"{one} ligger {relation} {other}" for relation, (one, other) in product(relations, pairs)]


def _prices() -> list[str]:
    kronor = _number_words((18, 25, 39, 45, 59, 72, 85, 99, 120, 149, 165, 230, 275, 399, 450, 620))
    frames = ("{} kostar {} kronor", "betalade du {1} kronor för {0}?", "{} kostade {} kronor förra året")
    return [frame.format(what, price) for frame, what, price in product(frames, PRICED, kronor)]


def _counts() -> list[str]:
    numbers = _number_words((3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24))
    frames = ("det ligger {} {} på bordet", "vi behöver {} {} till", "det saknas {} {}")
    frames += ("jag räknade till {} {}", "finns det verkligen {} {} kvar?")
    suits = {"ligger": {"ägg", "böcker", "äpplen", "servetter", "ljus", "bullar"}}
    return [
        frame.format(number, what)
        for frame, number, what in product(frames, numbers, COUNTED)
        if "ligger" not in frame or what in suits["ligger"]
    ]


def _distances() -> list[str]:
    kilometres = _number_words((12, 15, 20, 27, 34, 48, 56, 70, 85, 90, 140, 160))
    return [f"det är {far} kilometer kvar till {city}" for far, city in product(kilometres, CITIES)]


def _departures() -> list[str]:
    what = ("tåget", "bussen", "nästa tåg", "sista bussen")
    hours = ("halv åtta", "kvart över fem", "tio i nio", "fem över sex", "kvart i tre", "halv ett", "tjugo över elva")
    return [f"{which} till {city} går klockan {hour}" for which, city, hour in product(what, CITIES, hours)]


def _journeys() -> list[str]:
    who = ("vi", "mina vänner", "våra grannar", "några kollegor")
    times = ("i sommar", "till helgen", "nästa månad", "på torsdag")
    means = ("tåg", "bil", "buss")
    return [
        f"{one} reser till {city} med {mean} {time}" for one, city, mean, time in product(who, CITIES, means, times)
    ]


def _forecasts() -> list[str]:
    times = ("i morgon", "i kväll", "på söndag", "till helgen", "på måndag")
    kinds = ("soligt", "mulet", "blåsigt", "kyligt", "varmt", "regnigt", "dimmigt", "växlande molnighet", "halt")
    return [f"{time} blir det {kind} i {region}" for time, kind, region in product(times, kinds, REGIONS)]


def _weather_now() -> list[str]:
    verbs = ("regnar", "snöar", "blåser", "åskar")
    manners = ("ordentligt", "nästan hela tiden", "fortfarande", "mer än vanligt")
    return [f"det {verb} {manner} i {region}" for verb, manner, region in product(verbs, manners, REGIONS)]


def _clothes() -> list[str]:
    sentences = []
    for (article, noun, the_noun), (common, neuter, definite) in product(CLOTHES, COLOURS):
        colour, pointer = (common, "den") if article == "en" else (neuter, "det")
        sentences += [
            f"jag letar efter {article} {colour} {noun}",
            f"har ni {article} {colour} {noun} på lager?",
            f"vad kostar {pointer} {definite} {the_noun}?",
            f"hon köpte {article} {colour} {noun} till sin mamma",
            f"någon har glömt {article} {colour} {noun} på bussen",
        ]
    return sentences


def _fits() -> list[str]:
    sentences = []
    for (article, _, the_noun), (_, _, colour), (common, neuter) in product(CLOTHES, COLOURS, TOO):
        pointer, too = ("den", common) if article == "en" else ("det", neuter)
        sentences.append(f"{pointer} {colour} {the_noun} är för {too}")
    return sentences


def _groceries() -> list[str]:
    goods = ("ett kilo äpplen", "två liter mjölk", "ett paket smör", "tre limpor", "en påse lök", "en burk oliver")
    goods += ("ett dussin ägg", "fyra tomater", "en bit ost", "en flaska saft", "två knippen dill", "en ask jordgubbar")
    frames = ("jag skulle vilja ha {}, tack", "kan du köpa {} på vägen hem?", "vi måste ha {} till middagen")
    frames += ("hon lade {} i korgen", "kom ihåg att köpa {}!", "det står {} på listan")
    return [frame.format(good) for frame, good in product(frames, goods)]


def _wishes() -> list[str]:
    frames = ("jag skulle vilja lära mig att {}", "min dotter drömmer om att få {}", "jag önskar att jag kunde {}")
    frames += ("har du alltid velat {}?", "han tycker om att {} på fritiden", "hon lärde sig {} redan som barn")
    frames += ("det är aldrig för sent att börja {}", "om jag hade tid skulle jag {}", "kan din bror {}?")
    return [frame.format(hobby) for frame, hobby in product(frames, HOBBIES)]


def _habits() -> list[str]:
    habits = ("dricker te", "läser tidningen", "går en promenad", "äter gröt", "lyssnar på radio", "löser korsord")
    habits += ("matar fåglarna", "tränar yoga", "skriver dagbok")
    times = ("varje morgon", "på söndagarna", "nästan varje dag", "före jobbet", "om kvällarna")
    return [f"{who} {habit} {time}" for who, habit, time in product(PEOPLE, habits, times)]


def _belongings() -> list[str]:
    lying = ("boken", "plånboken", "telefonen", "tidningen", "sjalen", "kameran", "kartan", "halsbandet")
    spots = ("på bordet", "i lådan", "under soffan", "i min väska", "på hyllan", "bakom datorn", "i bilen")
    frames = ("{} ligger {}", "jag tror att {} ligger {}", "varför ligger {} {}?", "låg {} {} i går?")
    return [frame.format(what, spot) for frame, what, spot in product(frames, lying, spots)]


def _possessions() -> list[str]:
    owners = (("min", "mitt"), ("din", "ditt"), ("vår", "vårt"), ("hennes", "hennes"), ("deras", "deras"))
    things = (("en", "cykel"), ("en", "bil"), ("en", "soffa"), ("en", "lägenhet"), ("ett", "hus"), ("ett", "kök"))
    things += (("en", "båt"), ("ett", "skrivbord"), ("en", "balkong"), ("ett", "kontor"))
    predicates = (("ny", "nytt"), ("gammal", "gammalt"), ("för liten", "för litet"), ("billig", "billigt"))
    predicates += (("ganska liten", "ganska litet"), ("verkligen fin", "verkligen fint"))
    return [
        f"{owner[article == 'ett']} {thing} är {predicate[article == 'ett']}"
        for owner, (article, thing), predicate in product(owners, things, predicates)
        if predicate[0] != "billig" or thing not in {"kök", "balkong", "kontor"}
    ]


def _moods() -> list[str]:
    who = (
        ("barnet", 1),
        ("flickan", 0),
        ("pojken", 0),
        ("läraren", 0),
        ("min son", 0),
        ("biträdet", 1),
        ("sällskapet", 1),
    )
    moods = (("trött", "trött"), ("glad", "glatt"), ("nöjd", "nöjt"), ("hungrig", "hungrigt"), ("tyst", "tyst"))
    causes = ("efter resan", "efter lektionen", "när dagen var slut", "efter en lång dag", "efter utflykten")
    return [f"{one} var {mood[neuter]} {cause}" for (one, neuter), mood, cause in product(who, moods, causes)]


def _aches() -> list[str]:
    parts = ("ryggen", "magen", "huvudet", "armen", "knät", "nacken", "foten", "örat", "handen", "tummen")
    frames = ("jag har ont i {} i dag", "har du fortfarande ont i {}?", "läkaren undersökte {} noga")
    lifting = ("ryggen", "armen", "nacken", "handen")
    bumped = ("huvudet", "armen", "knät", "foten", "handen", "tummen")
    return [
        *(frame.format(part) for frame, part in product(frames, parts)),
        *(f"han fick ont i {part} av att bära lådor" for part in lifting),
        *(f"hon slog i {part} i dörren" for part in bumped),
    ]


def _opening_hours() -> list[str]:
    shops = (("apoteket", "öppet"), ("biblioteket", "öppet"), ("museet", "öppet"), ("bageriet", "öppet"))
    shops += (("banken", "öppen"), ("simhallen", "öppen"), ("restaurangen", "öppen"), ("frisören", "öppen"))
    days = ("i dag", "på fredagar", "på julafton", "på onsdag")
    frames = ("när stänger {0} {2}?", "{0} har stängt {2}", "är {0} {1} {2}?", "tyvärr är inte {0} {1} {2}")
    return [frame.format(shop, is_open, day) for frame, (shop, is_open), day in product(frames, shops, days)]


FRAMES = (
    _plans,
    _past,
    _requests,
    _directions,
    _neighbours,
    _prices,
    _counts,
    _distances,
    _departures,
    _journeys,
    _forecasts,
    _weather_now,
    _clothes,
    _fits,
    _groceries,
    _wishes,
    _habits,
    _belongings,
    _possessions,
    _moods,
    _aches,
    _opening_hours,
)
