"""Problems of days, dates and clocks. Years are never leap years unless the question says so."""

from __future__ import annotations

from random import Random

from recipes.nano.problems import Problem, listed

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
)


def weekday(rng: Random) -> Problem:
    """The day of the week some days on or back."""
    start, days, on = rng.randrange(7), rng.randrange(1, 100), rng.random() < 0.7
    rest = days % 7
    sign = 1 if on else -1
    walk = [DAYS[(start + sign * i) % 7] for i in range(rest + 1)]
    steps = [f"{days} = {days // 7} * 7 + {rest}"] if days >= 7 else []
    steps.append(f"{walk[0]} {'+' if on else '-'} {rest}: {listed(walk[1:] or walk)}")
    today = DAYS[start]
    question = rng.choice(
        (
            f"Today is {today}. What day is it in {days} days?",
            f"It is {today}. Which day of the week comes {days} days later?",
        )
        if on
        else (
            f"Today is {today}. What day was it {days} days ago?",
            f"It is {today}. Which day of the week was {days} days earlier?",
        )
    )
    return Problem("weekday", f"{today} {sign * days}", question, tuple(steps), walk[-1])


def date(rng: Random) -> Problem:
    """The date some days after another, within a year, or the days between two dates."""
    month = rng.randrange(12)
    name, length = MONTHS[month]
    day = rng.randrange(1, length + 1)
    if rng.random() < 0.6:
        days = rng.randrange(1, 61)
        steps, total, at = [f"{day} + {days} = {day + days}"], day + days, month
        while total > MONTHS[at][1]:
            have = MONTHS[at][1]
            steps.append(f"{MONTHS[at][0]} has {have} days, {total} - {have} = {total - have}")
            total -= have
            at = (at + 1) % 12
        answer = f"{MONTHS[at][0]} {total}"
        steps.append(answer)
        question = rng.choice(
            (
                f"What date is {days} days after {name} {day}?",
                f"Today is {name} {day}. What is the date in {days} days?",
            )
        )
        return Problem("date", f"{month} {day} + {days}", question, tuple(steps), answer)
    later = (month + rng.randrange(0, 3)) % 12
    end = rng.randrange(1, MONTHS[later][1] + 1) if later != month else rng.randrange(day, length + 1)
    if later == month:
        steps, total = [f"{end} - {day} = {end - day}"], end - day
    else:
        total = length - day
        steps, at = [f"{name} has {length} days, {length} - {day} = {total}"], (month + 1) % 12
        while at != later:
            steps.append(
                f"{MONTHS[at][0]} has {MONTHS[at][1]} days, {total} + {MONTHS[at][1]} = {total + MONTHS[at][1]}"
            )
            total += MONTHS[at][1]
            at = (at + 1) % 12
        steps.append(f"{total} + {end} = {total + end}")
        total += end
    until = f"{MONTHS[later][0]} {end}"
    question = rng.choice(
        (
            f"How many days are there from {name} {day} to {until}?",
            f"It is {name} {day}. How many days is it until {until}?",
        )
    )
    return Problem("date", f"{month} {day} to {later} {end}", question, tuple(steps), str(total))


def clock(rng: Random) -> Problem:
    """The time some minutes later, or how long something took; clocks of 24 hours."""
    hour, minute = rng.randrange(24), rng.randrange(0, 60, rng.choice((1, 5, 5)))
    took = rng.randrange(5, 180, rng.choice((1, 5, 5)))
    hours, minutes = divmod(took, 60)
    end_hour, end_minute = divmod(hour * 60 + minute + took, 60)
    end_hour %= 24
    start, end = f"{hour}:{minute:02}", f"{end_hour}:{end_minute:02}"
    if rng.random() < 0.6:
        steps = [f"{took} minutes = {hours} hours {minutes} minutes"] if hours else []
        total = minute + minutes
        steps.append(f"{minute} + {minutes} = {total}")
        later = hour + hours
        if hours:
            steps.append(f"{hour} + {hours} = {later}")
        if total >= 60:
            steps.append(f"{total} - 60 = {total - 60}, {later} + 1 = {later + 1}")
            later += 1
        if later >= 24:
            steps.append(f"{later} - 24 = {later - 24}")
        question = rng.choice(
            (f"It is {start}. What time is it in {took} minutes?", f"What time is {took} minutes after {start}?")
        )
        return Problem("clock", f"{start} + {took}", question, (*steps, end), end)
    to_hour = (60 - minute) % 60
    steps, at = [], hour
    if to_hour and to_hour <= took:
        at = (hour + 1) % 24
        steps.append(f"{start} to {at}:00: {to_hour}")
        rest = took - to_hour
    else:
        rest, to_hour = took, 0
    full = 0
    while rest - full >= 60:
        full += 60
    if full:
        steps.append(
            f"{at}:{0 if to_hour else minute:02} to {(at + full // 60) % 24}:{0 if to_hour else minute:02}: {full}"
        )
    if rest - full:
        steps.append(f"{(at + full // 60) % 24}:{0 if to_hour else minute:02} to {end}: {rest - full}")
    parts = [p for p in (to_hour, full, rest - full) if p]
    if len(parts) > 1:
        steps.append(f"{' + '.join(map(str, parts))} = {took}")
    question = rng.choice(
        (
            f"How many minutes are there from {start} to {end}?",
            f"It starts at {start} and ends at {end}. How many minutes?",
        )
    )
    return Problem("clock", f"{start} to {end}", question, tuple(steps), str(took))
