"""The text the duckling learns: questions whose worked answers can be checked true or false.

Everything is drawn from a seed. The working is local to digits: each number written follows from a
few digits close by (one column of a sum, one step of a long division), because a model this small
learns a table of small facts quickly and a leap of arithmetic never.
"""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

PRIMES = [n for n in range(2, 1000) if all(n % p for p in range(2, int(n**0.5) + 1))]
COMPOSITES = [n for n in range(4, 1000) if n not in set(PRIMES)]
HARD_COMPOSITES = [n for n in COMPOSITES if n % 2 and n % 3 and n % 5]
# Questions about these numbers (is it prime, what remains of it) are never trained on.
HELD_OUT = frozenset(
    random.Random("held out").sample(PRIMES[6:], 42)
    + random.Random("held out").sample([n for n in COMPOSITES if n > 20], 42)
)


@dataclass(frozen=True)
class Question:
    """A question, its worked answer, and the final answer (what follows `Answer:`) if any."""

    ask: str
    work: str
    final: str | None


def is_true(question: Question, text: str) -> bool:
    """Whether the last `Answer:` line of `text` is the true one, word for word."""
    found = re.findall(r"Answer: (.*)", text)
    return bool(found) and found[-1].strip() == question.final


def divide(n: int, d: int) -> tuple[str, int]:
    """Long division of n < 1000 by d, two digits then the third: `39-35=4 41-35=6`, remainder."""
    high, low = divmod(n, 10)
    carried = high % d * 10 + low
    rest = carried % d
    return f"{high}-{high - high % d}={high % d} {carried}-{carried - rest}={rest}", rest


PRIME_ASKS = [
    "Is {} prime?",
    "Is {} prime?",
    "Is {} a prime number?",
    "Is the number {} prime?",
    "is {} prime",
]


def prime(n: int, rng: random.Random) -> Question:
    """Trial division by the primes up to the square root; 2 and 5 by last digit, 3 by sum."""
    ask = rng.choice(PRIME_ASKS).format(n)
    tries = [p for p in PRIMES if p * p <= n]
    beyond = PRIMES[len(tries)]
    last, digits = n % 10, [int(c) for c in str(n)]
    divisor = None
    if tries:
        lines = [f"{beyond}*{beyond}={beyond * beyond}, so try up to {tries[-1]}."]
    else:
        lines = [f"{beyond}*{beyond}={beyond * beyond}, so nothing to try."]
    ends = [p for p in tries if p in (2, 5)]
    if ends:
        lines.append(f"{' '.join(map(str, ends))}: ends in {last}")
        divisor = next((p for p in ends if last % p == 0), None)
    if divisor is None and 3 in tries:
        lines.append(f"3: {'+'.join(map(str, digits))}={sum(digits)}")
        divisor = None if n % 3 else 3
    for p in tries:
        if divisor is None and p > 5:
            steps, rest = divide(n, p)
            lines.append(f"{p}: {steps}")
            divisor = None if rest else p
    final = f"yes, {n} is prime." if divisor is None else f"no, {divisor} divides {n}."
    return Question(ask, "\n".join([*lines, f"Answer: {final}"]), final)


def remainder(n: int, d: int, rng: random.Random) -> Question:
    ask = rng.choice(["What is the remainder of {} divided by {}?", "What is {} mod {}?"])
    steps, rest = divide(n, d)
    return Question(ask.format(n, d), f"{d}: {steps}\nAnswer: {rest}.", f"{rest}.")


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """The decimal columns of two numbers, lowest first."""
    width = max(len(str(a)), len(str(b)))
    return [(a // 10**i % 10, b // 10**i % 10) for i in range(width)]


def arithmetic(ask: str, lines: list[str], result: int, rng: random.Random) -> Question:
    if rng.random() < 0.3:
        ask = re.sub(r"([-+*])", r" \1 ", ask)
    ask = rng.choice(["What is {}?", "{}=?", "{}", "Compute {}.", "what is {}"]).format(ask)
    return Question(ask, f"{' '.join(lines)}\nAnswer: {result}.", f"{result}.")


def add(a: int, b: int, rng: random.Random) -> Question:
    carry, lines = 0, []
    for i, (x, y) in enumerate(columns(a, b)):
        lines.append(f"{x}+{y}+{carry}={x + y + carry}" if i else f"{x}+{y}={x + y}")
        carry = (x + y + carry) // 10
    return arithmetic(f"{a}+{b}", lines, a + b, rng)


def subtract(a: int, b: int, rng: random.Random) -> Question:
    """Column by column; ten is lent to a column that is too small: `13-8=5 12-8-1=3`."""
    borrow, lines = 0, []
    for i, (x, y) in enumerate(columns(a, b)):
        lent = 10 if x < y + borrow else 0
        value = x + lent - y - borrow
        lines.append(f"{x + lent}-{y}-{borrow}={value}" if i else f"{x + lent}-{y}={value}")
        borrow = lent // 10
    return arithmetic(f"{a}-{b}", lines, a - b, rng)


def multiply(a: int, b: int, rng: random.Random) -> Question:
    """By one digit: `7*6=42 4*6=24+4=28`."""
    carry, lines = 0, []
    for i, c in enumerate(reversed(str(a))):
        product = int(c) * b
        lines.append(f"{c}*{b}={product}" + (f"+{carry}={product + carry}" if i else ""))
        carry = (product + carry) // 10
    return arithmetic(f"{a}*{b}", lines, a * b, rng)


TALK = [
    (
        ["Hello!", "Hi!", "Hello there.", "Hey duck!", "Good morning."],
        [
            "Quack! I am duckling, a very small language model. Ask me whether a number is prime.",
            "Hello! I am duckling. 🦆 Ask me a small sum, or whether a number is prime.",
        ],
    ),
    (
        ["Who are you?", "What are you?", "What is your name?"],
        [
            "I am duckling, a small mixture-of-experts model. My experts live on ducks, and the "
            "ducks add up their answers. 🦆"
        ],
    ),
    (
        ["What is a duck?", "Tell me about ducks.", "What do ducks do?"],
        [
            "A duck is a water bird with a broad bill and webbed feet. It swims, dives for food "
            "and says quack.",
            "A duck is a bird that likes water. Here, a duck is also a machine that holds a slice "
            "of every expert and answers when the host asks.",
        ],
    ),
    (
        ["What can you do?", "Help", "How can you help me?", "What do you know?"],
        [
            "I can tell whether a number below 1,000 is prime, add and subtract numbers below "
            "1,000, multiply by one digit and find remainders. I show my working."
        ],
    ),
    (
        ["What is a prime number?", "When is a number prime?"],
        [
            "A prime number is greater than 1 and has no divisors but 1 and itself. To test one, "
            "try every prime up to its square root."
        ],
    ),
    (
        ["What is an expert?", "What is a mixture of experts?"],
        [
            "A mixture of experts is a model with many small networks. A router picks a few "
            "experts for every token, so most of the model rests while a few work."
        ],
    ),
    (
        ["Thank you!", "Thanks.", "Great!", "Well done."],
        ["You are welcome! Quack.", "It was a pleasure. Ask me another one."],
    ),
    (["Is 1 prime?", "Is 1 a prime number?"], ["No. A prime number is greater than 1."]),
    (
        [
            "What is the capital of France?",
            "Tell me a joke.",
            "Write a poem.",
            "What time is it?",
            "How is the weather?",
            "Who won the game?",
            "Translate this into German.",
            "Why is the sky blue?",
        ],
        [
            "I am too small to know that. Ask me whether a number below 1,000 is prime, or about "
            "ducks."
        ],
    ),
    (["Goodbye!", "Bye.", "See you later."], ["Goodbye! May your pond be calm. 🦆", "Bye! Quack."]),
]
PLAIN = [
    "The duck swims on the pond. The pond is calm, and the sun is warm.",
    "Once there was a duckling who liked to count. It counted the reeds, the frogs and the stars.",
    "Many ducks together carry what one alone could not. Each holds a slice, and the sum is exact.",
    "A host asks and the ducks answer. Every duck starts at once, and the host adds up what they "
    "say.",
    "The little duck was slow, but the flock was fast, so the whole flock waited for the little "
    "duck.",
    "In the morning the ducks look for food. At noon they sleep. In the evening they count the "
    "stars.",
    "Numbers with no divisors but 1 and themselves are prime. The first are 2, 3, 5, 7, 11 and 13.",
]


def talk(rng: random.Random) -> Question:
    asks, answers = rng.choice(TALK)
    return Question(rng.choice(asks), rng.choice(answers), None)


def number(rng: random.Random) -> int:
    """Below 1,000, and one in four below 100: short numbers need practice as well."""
    return rng.randrange(1, 100) if rng.random() < 0.25 else rng.randrange(100, 1000)


def is_held_out(kind: str, a: int, b: int) -> bool:
    """One in ten pairs, by a checksum: a question is held out in every wording and order."""
    return zlib.crc32(f"{kind} {min(a, b)} {max(a, b)}".encode()) % 10 == 0


def draw(kind: str, rng: random.Random, *, held_out: bool) -> Question:
    """One question of the kind, from the held-out ones or from all others."""
    if kind == "prime":
        # Half are primes. In training half of the composites have no divisor below 7: chance would
        # show a long division that comes out even too rarely.
        hard = not held_out and rng.random() < 0.5
        numbers = PRIMES if rng.random() < 0.5 else HARD_COMPOSITES if hard else COMPOSITES
        while ((n := rng.choice(numbers)) in HELD_OUT) != held_out:
            pass
        return prime(n, rng)
    if kind == "remainder":
        while ((n := rng.randrange(10, 1000)) in HELD_OUT) != held_out:
            pass
        return remainder(n, rng.randrange(2, 14), rng)
    works: dict[str, Callable[[int, int, random.Random], Question]] = {
        "add": add,
        "subtract": subtract,
        "multiply": multiply,
    }
    while True:
        a, b = number(rng), rng.randrange(2, 10) if kind == "multiply" else number(rng)
        if kind == "subtract":
            a, b = max(a, b), min(a, b)
        if is_held_out(kind, a, b) == held_out:
            return works[kind](a, b, rng)


# Share of the training documents by kind. Trial divisions, the longest, have the larger share in
# the first steps; after that every kind of arithmetic gets enough tokens to be learnt.
FIRST_SHARES = {
    "prime": 0.45,
    "remainder": 0.15,
    "add": 0.11,
    "subtract": 0.11,
    "multiply": 0.11,
    "talk": 0.07,
}
SHARES = {
    "prime": 0.28,
    "remainder": 0.18,
    "add": 0.16,
    "subtract": 0.16,
    "multiply": 0.16,
    "talk": 0.06,
}


def train_question(rng: random.Random, shares: dict[str, float]) -> Question:
    """A question to train on; `shares` says how often each kind comes up."""
    (kind,) = rng.choices(list(shares), list(shares.values()))
    return talk(rng) if kind == "talk" else draw(kind, rng, held_out=False)


def held_out_questions(count: int, seed: int) -> list[Question]:
    """Distinct held-out questions: two in six about primes, one of each other kind."""
    rng = random.Random(seed)
    kinds = ["prime", "prime", "remainder", "add", "subtract", "multiply"]
    found: dict[str, Question] = {}
    turn = 0
    while len(found) < count:
        question = draw(kinds[turn % len(kinds)], rng, held_out=True)
        if question.work not in {q.work for q in found.values()}:
            found[question.ask] = question
            turn += 1
    return list(found.values())
