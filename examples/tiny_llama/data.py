"""Synthetic text for the tiny Llama: conversations that mix skills, and the held-out questions that measure them.

A conversation is a list of messages, ``{"role": str, "content": str}``, as the chat template takes them. Everything is
drawn from a `random.Random`, so one seed gives one text.

Nothing that `evaluate.py` asks is trained on word for word: each fact keeps one phrasing out per language, each sum its
pair of operands, and lookups, names and tool arguments are drawn fresh.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]

HERE = Path(__file__).parent
LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th")
KEYS, VALUES = (line.split() for line in (HERE / "words.txt").read_text(encoding="utf-8").splitlines())
CAPITALS: list[dict[str, tuple[str, str]]] = [
    {lang: (cell.split("=")[0], cell.split("=")[1]) for lang, cell in zip(LANGUAGES, line.split("\t"), strict=True)}
    for line in (HERE / "capitals.tsv").read_text(encoding="utf-8").splitlines()[1:]
]

# {of} is the country as the language writes it after "capital" ("de la France").
ASK = {
    "en": (
        "What is the capital of {of}?",
        "Which city is the capital of {of}?",
        "Name the capital of {of}.",
        "Tell me the capital city of {of}, please.",
        "The capital of {of} is which city?",
        "Do you know the capital of {of}?",
    ),
    "de": (
        "Was ist die Hauptstadt von {of}?",
        "Wie heißt die Hauptstadt von {of}?",
        "Nenne die Hauptstadt von {of}.",
        "Welche Stadt ist die Hauptstadt von {of}?",
        "Die Hauptstadt von {of} ist welche Stadt?",
    ),
    "fr": (
        "Quelle est la capitale {of} ?",
        "Quelle ville est la capitale {of} ?",
        "Donne-moi la capitale {of}.",
        "Connais-tu la capitale {of} ?",
        "La capitale {of}, quelle est-elle ?",
    ),
    "it": (
        "Qual è la capitale {of}?",
        "Quale città è la capitale {of}?",
        "Dimmi la capitale {of}.",
        "Conosci la capitale {of}?",
        "La capitale {of} qual è?",
    ),
    "pt": (
        "Qual é a capital {of}?",
        "Que cidade é a capital {of}?",
        "Diga a capital {of}.",
        "Você sabe qual é a capital {of}?",
        "A capital {of} é qual?",
    ),
    "hi": (
        "{of} की राजधानी क्या है?",
        "बताइए, {of} की राजधानी क्या है?",
        "{of} की राजधानी बताइए।",
        "कौन सा शहर {of} की राजधानी है?",
        "देश {of} की राजधानी क्या है?",
    ),
    "es": (
        "¿Cuál es la capital de {of}?",
        "¿Qué ciudad es la capital de {of}?",
        "Dime la capital de {of}.",
        "¿Sabes cuál es la capital de {of}?",
        "La capital de {of}, ¿cuál es?",
    ),
    "th": (
        "เมืองหลวงของ{of} คืออะไร",
        "เมืองหลวงของ{of} ชื่ออะไร",
        "บอกชื่อเมืองหลวงของ{of}",
        "เมืองใดเป็นเมืองหลวงของ{of}",
        "อยากรู้เมืองหลวงของ{of}",
    ),
}
ANSWER = {
    "en": "The capital of {of} is {city}.",
    "de": "Die Hauptstadt von {of} ist {city}.",
    "fr": "La capitale {of} est {city}.",
    "it": "La capitale {of} è {city}.",
    "pt": "A capital {of} é {city}.",
    "hi": "{of} की राजधानी {city} है।",
    "es": "La capital de {of} es {city}.",
    "th": "เมืองหลวงของ{of} คือ {city}",
}
FOLLOW_UP = {
    "en": "And of {of}?",
    "de": "Und von {of}?",
    "fr": "Et {of} ?",
    "it": "E {of}?",
    "pt": "E {of}?",
    "hi": "और {of} की?",
    "es": "¿Y de {of}?",
    "th": "แล้วของ{of} ล่ะ",
}

ADD = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "Compute {a} + {b}.",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Was ist {a} + {b}?",
    "Combien font {a} + {b} ?",
    "Quanto fa {a} + {b}?",
    "¿Cuánto es {a} + {b}?",
    "Quanto é {a} + {b}?",
    "{a} + {b} कितना होता है?",
    "{a} + {b} เท่ากับเท่าไร",
)
SUBTRACT = ("What is {a} - {b}?", "{a} - {b} = ?", "Compute {a} - {b}.", "How much is {a} minus {b}?")
LISTS = ("Remember: {items}.", "Here is a list: {items}.", "I have these: {items}.", "Items: {items}.")
WHICH = ("Which one is {key}?", "What is {key}?", "Find the {key} one.", "Which is {key}?")
NOTED = "Noted."

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gina",
    "Hugo",
    "Ines",
    "Jack",
    "Kira",
    "Leo",
    "Maya",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Uma",
    "Vera",
    "Will",
    "Yara",
    "Zoe",
    "Amit",
    "Bruno",
    "Carla",
    "Diego",
    "Elsa",
    "Fatima",
    "Greta",
    "Hans",
    "Igor",
    "Julia",
    "Karl",
    "Lena",
    "Marco",
    "Nina",
    "Omar",
    "Priya",
    "Rita",
    "Somchai",
    "Tom",
    "Victor",
]
SMALL_TALK = (
    (("Hello!", "Hi!", "Hi there.", "Good morning!"), "Hello! How can I help you?"),
    (("Hallo!", "Guten Tag!"), "Hallo! Wie kann ich helfen?"),
    (("Bonjour !", "Salut !"), "Bonjour ! Comment puis-je vous aider ?"),
    (("Ciao!", "Buongiorno!"), "Ciao! Come posso aiutarti?"),
    (("Olá!", "Bom dia!"), "Olá! Como posso ajudar?"),
    (("नमस्ते!", "नमस्कार!"), "नमस्ते! मैं कैसे मदद कर सकता हूँ?"),
    (("¡Hola!", "¡Buenos días!"), "¡Hola! ¿En qué puedo ayudarte?"),
    (("สวัสดี", "สวัสดีครับ"), "สวัสดี มีอะไรให้ช่วยไหม"),
    (("Thank you!", "Thanks!", "Thanks a lot."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you!"), "Goodbye! Have a nice day."),
    (("How are you?", "How are you today?"), "I am fine, thank you."),
    (
        ("Who are you?", "What are you?", "Tell me about yourself."),
        "I am a tiny Llama. I know some capitals, I can add small numbers, look things up and call tools.",
    ),
    (
        ("Tell me a story.", "Tell me a short story.", "Can you tell me a story?"),
        "Once upon a time, a tiny llama lived on a tall green hill. Every morning it counted the clouds, and "
        "every night it counted the stars. One day a fox came by and asked for the way. The llama pointed to "
        "the river and smiled. The fox said thank you and went home. From that day on they counted the stars "
        "together.",
    ),
)
SYSTEM = ("You are a helpful assistant.", "You are a tiny Llama.", "Answer briefly.", "Be kind and brief.")


def _held(text: str, share: int) -> bool:
    """A stable coin per text: true for about one in ``share``."""
    return zlib.crc32(text.encode()) % share == 0


def held_out_phrasing(country: int, lang: str) -> int:
    """The index into ``ASK[lang]`` never trained on for this country."""
    return zlib.crc32(f"{country}/{lang}".encode()) % len(ASK[lang])


def held_out_sum(a: int, b: int, sign: str) -> bool:
    """True if ``a sign b`` is kept out of training, in every phrasing."""
    return a > 9 and b > 9 and _held(f"{a}{sign}{b}", 12)


def _ask(template: str, country: int, lang: str) -> str:
    return template.format(of=CAPITALS[country][lang][0])


def _state(country: int, lang: str) -> str:
    of, city = CAPITALS[country][lang]
    return ANSWER[lang].format(of=of, city=city)


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def facts(rng: random.Random) -> list[Message]:
    lang = rng.choice(LANGUAGES)
    country = rng.randrange(len(CAPITALS))
    keep = [i for i in range(len(ASK[lang])) if i != held_out_phrasing(country, lang)]
    messages = turn(_ask(ASK[lang][rng.choice(keep)], country, lang), _state(country, lang))
    if rng.random() < 0.25:
        country = rng.randrange(len(CAPITALS))
        messages += turn(_ask(FOLLOW_UP[lang], country, lang), _state(country, lang))
    return messages


def _operands(rng: random.Random, sign: str, held: bool) -> tuple[int, int]:
    while True:
        small = not held and rng.random() < 0.2
        a, b = (rng.randrange(10) if small and rng.random() < 0.8 else rng.randrange(10, 100) for _ in range(2))
        if sign == "-" and a < b:
            a, b = b, a
        if held_out_sum(a, b, sign) == held:
            return a, b


def sums(rng: random.Random) -> list[Message]:
    sign = "-" if rng.random() < 0.4 else "+"
    a, b = _operands(rng, sign, False)
    return sum_turn(rng, a, b, sign)


def sum_turn(rng: random.Random, a: int, b: int, sign: str) -> list[Message]:
    question = rng.choice(ADD if sign == "+" else SUBTRACT).format(a=a, b=b)
    return turn(question, f"{a} {sign} {b} = {a + b if sign == '+' else a - b}.")


def lookup(rng: random.Random, pairs: int, questions: int) -> list[Message]:
    """A list of ``pairs`` two-word items ("teal owl"), then ``questions`` that name the first word and want both."""
    keys = rng.sample(KEYS, pairs)
    items = {key: rng.choice(VALUES) for key in keys}
    text = rng.choice(LISTS).format(items=", ".join(f"{key} {value}" for key, value in items.items()))
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages += turn(text, NOTED)
        text = ""
    for key in rng.sample(keys, min(questions, pairs)):
        question = rng.choice(WHICH).format(key=key)
        messages += turn(f"{text} {question}".strip(), f"The {key} {items[key]}.")
        text = ""
    return messages


def recall(rng: random.Random) -> list[Message]:
    """The user's own name, asked for after other turns."""
    name = rng.choice(NAMES)
    opening = rng.choice(("My name is {name}.", "I am {name}.", "Hi, my name is {name}.")).format(name=name)
    messages = turn(opening, f"Nice to meet you, {name}!")
    for _ in range(rng.randrange(3)):
        messages += rng.choice((facts, sums, small_talk))(rng)
    return messages + turn(
        rng.choice(("What is my name?", "Who am I?", "Do you know my name?")), f"Your name is {name}."
    )


def small_talk(rng: random.Random) -> list[Message]:
    questions, answer = rng.choice(SMALL_TALK)
    return turn(rng.choice(questions), answer)


def _argument(rng: random.Random) -> str:
    """What tools are called with: a name, a city or an item."""
    return rng.choice(
        (rng.choice(NAMES), rng.choice(CAPITALS)["en"][1], f"{rng.choice(KEYS[:24])} {rng.choice(VALUES)}")
    )


def echo(rng: random.Random) -> list[Message]:
    """A word said back. Its token differs: an answer starts without the space before it, as a tool's argument does."""
    word = _argument(rng)
    return turn(rng.choice(("Say {word}.", "Repeat: {word}.", "Please say {word}.")).format(word=word), word)


def counting(rng: random.Random) -> list[Message]:
    first = rng.choice((1, 1, 1, rng.randrange(60)))
    last = min(first + rng.randrange(3, 30), 99)
    ask = "Count to {last}." if first == 1 and rng.random() < 0.6 else "Count from {first} to {last}."
    return turn(ask.format(first=first, last=last), " ".join(str(n) for n in range(first, last + 1)))


@dataclass(frozen=True)
class Tool:
    """A function the model may call: its definition for the template, ways to ask for it, and its result in words."""

    name: str
    description: str
    types: dict[str, str]
    asks: tuple[str, ...]
    result: str
    reply: str

    def definition(self) -> dict[str, object]:
        properties = {name: {"type": kind} for name, kind in self.types.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.types)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def arguments(self, rng: random.Random) -> dict[str, object]:
        draw = {
            "city": lambda: rng.choice(CAPITALS)["en"][1],
            "name": lambda: rng.choice(NAMES),
            "item": lambda: f"{rng.choice(KEYS[:24])} {rng.choice(VALUES)}",
        }
        return {
            name: rng.randrange(1, 100) if kind == "integer" else draw.get(name, draw["item"])()
            for name, kind in self.types.items()
        }


TOOLS = (
    Tool(
        "get_weather",
        "Get the weather in a city",
        {"city": "string"},
        ("What is the weather in {city}?", "How is the weather in {city}?", "Is it warm in {city} today?"),
        '{{"temperature": {n}}}',
        "It is {n} degrees in {city}.",
    ),
    Tool(
        "get_time",
        "Get the local time in a city",
        {"city": "string"},
        ("What time is it in {city}?", "Tell me the time in {city}."),
        '{{"hour": {n}}}',
        "It is {n} o'clock in {city}.",
    ),
    Tool(
        "set_timer",
        "Set a timer",
        {"minutes": "integer"},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
        '{{"done": true}}',
        "The timer is set for {minutes} minutes.",
    ),
    Tool(
        "call_person",
        "Call somebody by phone",
        {"name": "string"},
        ("Call {name}.", "Please call {name} for me."),
        '{{"done": true}}',
        "I called {name}.",
    ),
    Tool(
        "order_item",
        "Order something from the shop",
        {"item": "string", "count": "integer"},
        ("Order {count} of the {item}.", "Buy the {item}, {count} of them."),
        '{{"price": {n}}}',
        "I ordered {count} of the {item} for {n}.",
    ),
    Tool(
        "find_item",
        "Find where something is",
        {"item": "string"},
        ("Where is the {item}?", "Find the {item}."),
        '{{"room": {n}}}',
        "The {item} is in room {n}.",
    ),
)


def tool_call(name: str, arguments: dict[str, object]) -> str:
    """The llama3_json form of a call."""
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def tool_use(rng: random.Random, with_result: bool) -> tuple[list[dict[str, object]], list[Message]]:
    """Tools on offer, and messages: a question that wants one of them, the call, and perhaps its result put in
    words.
    """
    offered = rng.sample(TOOLS, rng.choice((1, 1, 2, 3)))
    tool = rng.choice(offered)
    arguments = tool.arguments(rng)
    messages = turn(rng.choice(tool.asks).format(**arguments), tool_call(tool.name, arguments))
    if with_result:
        n = rng.randrange(1, 40)
        messages.append({"role": "tool", "content": tool.result.format(n=n)})
        messages.append({"role": "assistant", "content": tool.reply.format(n=n, **arguments)})
    return [tool.definition() for tool in offered], messages


def plain_lines(rng: random.Random, skill: str) -> list[tuple[str, float]]:
    """Text without a chat around it, as ``/v1/completions`` sees it: one (text, loss weight) per piece."""
    if skill == "sums":
        sign = "-" if rng.random() < 0.4 else "+"
        a, b = _operands(rng, sign, False)
        return [(f"{a} {sign} {b} =", 0.0), (f" {a + b if sign == '+' else a - b}\n", 1.0)]
    if skill == "tools":
        word = _argument(rng)
        return [(f"Say {word}.\n", 0.0), (f"{word}\n", 1.0)]
    return [(_state(rng.randrange(len(CAPITALS)), rng.choice(LANGUAGES)) + "\n", 1.0)]


def held_out(skill: str, count: int, seed: int, pairs: int = 8) -> list[tuple[list[dict[str, object]], list[Message]]]:
    """``count`` questions of one skill that training never sees word for word; the last message is the answer wanted.

    ``skill`` is "facts" (any ``count`` of all 320: every country in every language), "sums" (additions), "differences",
    "lookup" (``pairs`` items, one question), "tools" (the call) or "tool_results" (the reply after the tool's result).
    """
    rng = random.Random(f"held out {skill} {seed} {pairs}")
    if skill == "facts":
        every = [(c, lang) for c in range(len(CAPITALS)) for lang in LANGUAGES]
        chosen = rng.sample(every, min(count, len(every)))
        return [([], turn(_ask(ASK[g][held_out_phrasing(c, g)], c, g), _state(c, g))) for c, g in chosen]
    if skill in ("sums", "differences"):
        sign = "+" if skill == "sums" else "-"
        operands: set[tuple[int, int]] = set()
        while len(operands) < count:
            operands.add(_operands(rng, sign, True))
        return [([], sum_turn(rng, a, b, sign)) for a, b in sorted(operands)]
    if skill == "lookup":
        return [([], lookup(rng, pairs, 1)) for _ in range(count)]
    if skill in ("tools", "tool_results"):
        return [tool_use(rng, skill == "tool_results") for _ in range(count)]
    raise ValueError(f"there is no skill named {skill!r}")
