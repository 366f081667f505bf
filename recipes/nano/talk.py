"""A little small talk, so that a model that only ever saw problems does not meet a greeting with a sum."""

from __future__ import annotations

from random import Random

SHARE = 0.004
"""Documents of small talk for each problem."""

_ABLE = "I can add, multiply, compare, sort, count, tell dates and follow small stories."
_TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("Hello", "Hi", "Hey", "Good morning", "Hello there", "Hi!", "Hello!"), "a greeting", f"Hello! {_ABLE}"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "a question about me",
        "I am nano, a very small model that EdgeR1 trained on problems made by code.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help", "What should I ask you?"),
        "a question about me",
        f"{_ABLE} Ask me one of these.",
    ),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot."), "thanks", "You are welcome."),
    (("Bye", "Goodbye", "See you", "Good night"), "a farewell", "Goodbye!"),
    (("How are you?", "How are you today?", "How do you do?"), "a greeting", "I am ready for a problem."),
)


def turn(rng: Random) -> list[dict[str, str]]:
    """Return one exchange as messages."""
    openings, thought, answer = rng.choice(_TALK)
    return [
        {"role": "user", "content": rng.choice(openings)},
        {"role": "assistant", "content": f"<think>\nthis is {thought}\n</think>\n\n{answer}"},
    ]
