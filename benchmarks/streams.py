"""Write streams of fresh requests of one kind, for what a drafter learns from traffic.

    python benchmarks/streams.py FOLDER

Needs only the standard library. The same bytes each time. `science.jsonl` is for choosing, the
others are for reporting; no bundled drafter was trained on any of them. `mixed.jsonl` changes its
kind every 100 requests. `code-long.jsonl` asks each request of `code` in five ways, so do
`support-long.jsonl` and `german-long.jsonl`.
"""

import json
import sys
from itertools import product
from pathlib import Path
from random import Random

COUNT, CHANGE = 600, 100


def phrases(text: str) -> list[str]:
    """The parts of a text between semicolons."""
    return [" ".join(part.split()) for part in text.split(";")]


SCIENCE = phrases("""
    Explain how {x} works, for a student in the first year.; Which experiment first showed {x}?;
    What are the units in which one measures {x}?; Name a common mistake about {x} and correct it.;
    How does temperature change {x}?; Give a worked example with numbers about {x}.;
    Compare {x} with a phenomenon of daily life.; What limits {x} in practice?;
    Which instrument would you use to observe {x}, and why?; Summarise what is known about {x}.
""")
SCIENCE_OF = phrases("""
    surface tension; osmosis; the photoelectric effect; nuclear fission; diffraction of light;
    convection in liquids; catalysis; the Doppler effect; electrolysis; radioactive decay;
    capillary action; superconductivity; resonance; the greenhouse effect; buoyancy; refraction;
    crystal growth; chemical equilibrium; static electricity; viscosity; friction; fermentation;
    polarised light; electromagnetic induction; heat conduction; plate tectonics; neutron stars;
    enzyme kinetics; acid rain; semiconductors; the Coriolis force; lift on a wing; diffusion;
    fluorescence; ocean currents; cell division; nitrogen fixation; sonar; lasers; evaporation;
    tidal locking; red shift; protein folding; muscle contraction; nerve signals; vaccination;
    soil erosion; cloud formation; lightning; sedimentation; magnetic hysteresis; sound insulation;
    piezoelectricity; freezing point depression; stellar parallax; isotopes; entropy; corrosion;
    bioluminescence; photosynthesis in algae
""")
CODE = phrases("""
    Write a Go function that {x}, with a table-driven test.;
    Write a Rust function that {x}, returning a Result with an error type of its own.;
    Write a TypeScript class that {x}, with types for all inputs.;
    Write a C++ class template that {x}, and a short main that uses it.;
    Write a Java method that {x}, with Javadoc and a JUnit test.;
    Write a Kotlin extension function that {x}, and show how it is called.;
    Write a bash script that {x}, with checks of its arguments.;
    Write a C# method that {x}, using LINQ where it helps.;
    Write a Swift struct that {x}, with an example.;
    Write an SQL schema and queries for a program that {x}.
""")
CODE_THAT = phrases("""
    reverses the words of a sentence; counts lines by their first letter; merges sorted lists;
    reads a CSV file of sales and sums them by month; keeps the ten largest values of a stream;
    removes duplicate records by key; validates an e-mail address; converts temperatures;
    finds the longest common prefix; rotates log files; retries a failed request with a delay;
    caches results for five minutes; parses key=value lines; schedules reminders by time;
    compares two directories; renders a text table; computes a moving average;
    splits a bill among friends; tracks an inventory with low-stock alerts; draws a bar chart;
    walks a tree in breadth-first order; detects cycles in a graph; encodes text in base64;
    limits calls to three a second; formats file sizes; groups people by age;
    checks whether brackets balance; simulates a dice game; pads numbers with zeros;
    translates Roman numerals; stores a queue with a fixed size; masks credit card numbers;
    sorts versions such as 1.10.2; counts words in parallel; finds gaps in a list of dates;
    transposes a matrix; matches wildcards; generates invoices; parses ISO durations;
    resolves relative paths; counts visitors by country; assigns seats; ranks players by score;
    checks a Sudoku row; plans a delivery route; converts JSON to a flat map; finds anagrams;
    computes compound interest; normalises phone numbers; measures the time of a function;
    truncates long titles; builds a linked list; searches a sorted array; draws a calendar month;
    estimates reading time; undoes the last command; books meeting rooms; updates a leaderboard;
    archives old files; averages sensor readings
""")
GERMAN = phrases("""
    Erkläre in einfachen Worten das Stichwort {x}.; Was sollte man zum Thema {x} wissen?;
    Schreibe einen kurzen Absatz zum Thema {x}.; Nenne Vorteile und Nachteile. Thema: {x};
    Nenne fünf Tipps zum Thema {x}.; Schreibe ein Gespräch zwischen zwei Nachbarn. Thema: {x};
    Was hat sich in den letzten Jahren verändert? Thema: {x}; Für wen ist das Thema {x} wichtig?;
    Schreibe eine kurze Geschichte mit dem Titel {x}.; Welche Fragen werden zu {x} oft gestellt?
""")
GERMAN_OF = phrases("""
    Radfahren in der Stadt; Mülltrennung; Brotbacken; Wochenmarkt; Feuerwehr; Homeoffice;
    Obstgarten; Kehrwoche; Wandern; Straßenbahn; Adventskranz; Schrebergarten; Energiewende;
    Sportverein; Volkshochschule; Pfandflaschen; Kindergarten; Krankenversicherung; Fahrkarten;
    Bücherei; Mietvertrag; Ehrenamt; Berufsschule; Stromzähler; Nachtruhe; Schwimmbad;
    Waldspaziergang; Ostsee; Oktoberfest; Käsekuchen; Steuererklärung; Deutschlandticket;
    Tierarzt; Landwirtschaft; Handwerk; Flohmarkt; Apotheke; Klavierunterricht; Winterdienst;
    Wärmepumpe; Fernsehen; Dialekte; Jugendherberge; Tempolimit; Datenschutz; Bäckerei;
    Grundgesetz; Elternabend; Autobahn; Hochwasser; Weinbau; Bahnverspätung; Sparbuch;
    Nussknacker; Nordsee; Kleingeld; Hausarzt; Blaskapelle; Freibad; Kompost
""")
SUPPORT = phrases("""
    A customer writes: "{x}" Write the reply of our support team.;
    Summarise this ticket in one sentence, then list the next steps: "{x}";
    Turn this complaint into JSON with the keys product, problem, urgency, sentiment: "{x}";
    Write an apology for this message and offer a solution: "{x}";
    Ask the customer three questions that help to solve this: "{x}";
    Write an internal note for the second-line team about this message: "{x}";
    Write a short text message that answers this: "{x}";
    Write an FAQ entry for people with this problem: "{x}";
    Explain to a new colleague how to handle this request: "{x}";
    Write a polite refusal to this message, and say why: "{x}"
""")
SUPPORT_SAYS = phrases("""
    My blender stopped after two days.; The parcel shows as delivered, but nothing is here.;
    I was charged twice for one order.; The app logs me out every hour.; Can I change my address?;
    The shoes are two sizes too small.; My voucher code is not accepted.; The sofa has a scratch.;
    I want my money back for the cancelled concert.; The router loses the connection at night.;
    How do I reset the thermostat?; Your invoice has the wrong name.; The lamp flickers.;
    I cannot find the serial number.; The subscription renewed without a notice.;
    Two plates arrived broken.; The e-book does not open on my tablet.; My seat was double booked.;
    The printer says the cartridge is empty, but it is new.; I forgot my password and my e-mail.;
    The delivery man was rude.; When will the blue coat be back in stock?; The zip is stuck.;
    My gift card shows a balance of zero.; The coffee machine leaks.; I ordered the wrong colour.;
    The hotel had no heating.; Your newsletter keeps coming.; The battery drains in an hour.;
    The manual is in a language that I do not read.; My refund is three weeks late.;
    The game crashes at level nine.; The tracking number does not exist.; The chair wobbles.;
    I need a receipt for my tax office.; The camera does not focus.; My account was locked.;
    The wrong meal was delivered twice.; The watch runs ten minutes fast.; The paint peels off.;
    The update deleted my photos.; My bike came without pedals.; The call centre hung up on me.;
    I would like to upgrade my plan.; The jacket lost its colour in the wash.; The vase is missing.;
    Your website shows another price than the shop.; The headphones hurt after an hour.;
    The smoke detector beeps without reason.; The tent poles do not fit.; I moved abroad.;
    The charger gets very hot.; My name is misspelled on the ticket.; The scale shows wrong values.;
    The mattress smells.; The alarm rings at the wrong time.; The toy has sharp edges.;
    The flowers were withered.; The car seat does not click in.; The kettle tripped the fuse.
""")
WAYS = {
    "code": phrases("""
        Explain each step in a comment.; Keep it short and readable.; Think of empty input, too.;
        Say first how you would go about it.; Then name one way to make it faster.
    """),
    "support": phrases("""
        Be brief.; Be warm, but promise nothing.; Our shop is closed until Monday: take that into
        account.; The customer is not a native speaker, so use plain words.; Say first what you
        know, then what you do not know.
    """),
    "german": phrases("""
        Schreibe höchstens acht Sätze.; Schreibe für Kinder.; Beginne mit einem Beispiel.;
        Bleibe sachlich.; Sage am Ende, was man selbst tun kann.
    """),
}
KINDS = {
    "science": (SCIENCE, SCIENCE_OF),
    "code": (CODE, CODE_THAT),
    "german": (GERMAN, GERMAN_OF),
    "support": (SUPPORT, SUPPORT_SAYS),
}


def stream(kind: str) -> list[str]:
    """All requests of a kind, in an order of its own."""
    wordings, subjects = KINDS[kind]
    found = [w.replace("{x}", s) for w, s in product(wordings, subjects)]
    assert len(set(found)) == COUNT, (kind, len(set(found)))
    Random(kind).shuffle(found)
    return found


def main() -> None:
    """Write all streams."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    streams = {kind: stream(kind) for kind in KINDS}
    reported = [kind for kind in KINDS if kind != "science"]
    parts = range(COUNT // CHANGE)
    streams["mixed"] = [
        prompt
        for part in parts
        for prompt in streams[reported[part % 3]][part // 3 * CHANGE :][:CHANGE]
    ]
    for kind, ways in WAYS.items():
        streams[f"{kind}-long"] = [f"{p} {w}" for p, w in product(streams[kind], ways)]
        Random(f"{kind}-long").shuffle(streams[f"{kind}-long"])
    for name, prompts in streams.items():
        kind = name.removesuffix("-long")
        lines = [json.dumps({"prompt": p, "kind": kind}, ensure_ascii=False) for p in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
