"""The storyteller: short stories in natural language, too many to enumerate, of a known reward.

A prompt begins a story; a story goes on for two to six sentences, so that completions differ in length as
those of real data do. The experts' reward is read off the text alone. Preferences follow Bradley-Terry,
rankings Plackett-Luce. What a trained model should do is therefore known here too, by importance sampling
from its reference. Holds the world alone: no files, no splits, no training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from softpref.data.story_world import judgement
from softpref.rewards import TextReward

REWARD = TextReward(
    warmth={
        **dict.fromkeys(("hugged", "kind", "thanked", "gentle", "loved", "together", "helped"), 1.2),
        **dict.fromkeys(("smiled", "laughed", "happy", "shared", "friends", "warm", "sang", "proud"), 0.8),
        **dict.fromkeys(("sunny", "pretty", "soft", "danced", "brave", "sweet"), 0.4),
        **dict.fromkeys(("rainy", "old", "tired", "quiet", "lost", "dark"), -0.4),
        **dict.fromkeys(("cried", "sad", "afraid", "cold", "broke", "alone", "lonely", "fell"), -0.8),
        **dict.fromkeys(("angry", "shouted", "mean", "stole", "hurt", "lied", "hated"), -1.2),
    },
    ease=0.3,
    grade=2.0,
)
"""What experts like: warm words, and words that are easy to read."""

_ANIMALS = {  # and where each lives
    "bear": "in the woods",
    "fox": "under an old tree",
    "rabbit": "behind the hill",
    "mouse": "in a tiny house",
    "owl": "in a tall tree",
    "duck": "by the pond",
    "frog": "near the river",
    "hedgehog": "under the leaves",
    "squirrel": "in the park",
    "goat": "on the mountain",
    "cat": "in the village",
    "dog": "on a farm",
}
_NAMES = ("Lily", "Tom", "Mia", "Ben", "Anna", "Max", "Lucy", "Sam", "Ella", "Tim", "Rosie", "Leo")
_HERS = {"Lily", "Mia", "Anna", "Lucy", "Ella", "Rosie"}
_TRAITS = ("little", "big", "young", "clever", "shy", "funny")
# How a story goes on: each sentence is one of these forms, more frequent ones first, and a slot in braces one
# of its words. `name` is the prompt's; `she`, `her` and `helper` hold for the whole story.
_SENTENCES: dict[str, tuple[str, ...]] = {
    "began": (
        "{She} liked to {play} {where}.",
        "One {weather} day {she} came out to {play} {where}.",
        "{Name} was very {mood} that day.",
        "Every {time} {she} walked {where}.",
        "One day {she} wanted to {play} with {her} {helper}.",
        "The day was {weather}, and {name} felt {mood}.",
    ),
    "found": (
        "{She} found a {look} {thing} {where}.",
        "There {she} saw a {look} {thing} and a {look} {thing}.",
        "Then {her} {look} {thing} {accident}.",
        "A {look} {helper} came and {deed}.",
        "{She} looked for {her} {thing} but it was {missing}.",
        "Suddenly {she} heard a {sound} sound {where}.",
    ),
    "met": (
        "The {helper} {deed}.",
        "{Name} {felt} and {felt}.",
        "The {helper} was {mood}, so {name} {deed}.",
        '"{Said}," said {name}.',
        '"{Said}," said the {helper}.',
        "{She} {felt} because the {thing} {accident}.",
        "Then {name} {deed} and the {helper} {felt}.",
    ),
    "ended": (
        "{Name} went home and {felt}.",
        "They {together}.",
        "At last {she} {felt}.",
        "From that day on they {together}.",
        "{Name} never saw the {helper} again.",
        "And the {helper} {felt} too.",
        "That night {she} slept {how}.",
    ),
}
_WORDS: dict[str, tuple[str, ...]] = {
    "play": ("play", "run", "jump", "swim", "sing", "draw", "dig", "dance", "read a book", "fly a kite"),
    "where": (
        "in the garden",
        "by the pond",
        "in the big park",
        "in the forest",
        "near the old bridge",
        "on the beach",
        "behind the house",
        "at the market",
        "on the dark hill",
    ),
    "weather": ("sunny", "rainy", "cold", "warm", "windy", "dark", "quiet"),
    "mood": ("happy", "sad", "tired", "proud", "afraid", "brave", "angry", "lonely", "kind", "hungry"),
    "time": ("morning", "evening", "day", "afternoon", "Sunday"),
    "look": ("red", "small", "pretty", "old", "soft", "strange", "shiny", "mean", "sweet", "beautiful"),
    "thing": ("ball", "hat", "flower", "boat", "apple", "stone", "kite", "cake", "box", "umbrella"),
    "accident": ("fell into the water", "broke", "was lost", "flew away", "rolled down the hill", "got wet"),
    "deed": (
        "helped {her}",
        "laughed at {her}",
        "shared a sweet cake",
        "shouted at everybody",
        "stole the {thing}",
        "hugged {her}",
        "gave {her} a {look} {thing}",
        "danced",
        "lied about it",
        "sang a quiet song",
        "ran away",
        "hurt {her} foot",
    ),
    "missing": ("gone", "lost", "under a {thing}", "in the dark", "not there"),
    "sound": ("loud", "soft", "strange", "sweet", "quiet", "terrible"),
    "felt": (
        "smiled",
        "cried",
        "laughed",
        "was happy",
        "was sad",
        "felt alone",
        "thanked everyone",
        "was angry",
        "felt proud",
        "hated it",
        "said nothing",
        "loved it",
    ),
    "said": (
        "thank you",
        "let us be friends",
        "go away",
        "that is mine",
        "you are so kind",
        "I am afraid",
        "please help me",
        "I hurt my leg",
        "what a wonderful surprise",
        "look over there",
    ),
    "together": (
        "were friends for ever",
        "played together {where}",
        "did not talk again",
        "shared the {thing}",
        "walked home alone",
        "helped each other every day",
        "built an extraordinary {thing}",
    ),
    "how": ("well", "alone", "in a warm bed", "in the cold", "with a gentle smile", "like a stone"),
}
_MIDDLE = (0.1, 0.3, 0.3, 0.2, 0.1)  # how often a story has 0, 1, 2, 3, 4 sentences between first and last
_FALLING = 0.85  # each form or word of a list is so much rarer than the one before it
_SLOT = re.compile(r"\{(\w+)\}")


class Storyteller:
    """Prompts, and draws of preferences and demonstrations in natural language."""

    def __init__(self) -> None:
        self._subjects = {
            f"Once upon a time a {trait} {animal} called {name} lived {home}.": (name, animal, home)
            for trait in _TRAITS
            for animal, home in _ANIMALS.items()
            for name in _NAMES
        }
        self._cumulative = {
            size: np.cumsum(_FALLING ** np.arange(size)) / np.sum(_FALLING ** np.arange(size))
            for size in range(1, 16)
        }

    @property
    def prompts(self) -> list[str]:
        """All prompts, one for each trait, animal and name."""
        return list(self._subjects)

    def story(self, prompt: str, random: np.random.Generator) -> str:
        """Draw one completion of `prompt`, as writers write; it begins with a space."""
        name, animal, _ = self._subjects[prompt]
        she, her = ("she", "her") if name in _HERS else ("he", "his")
        fixed = {"name": name, "she": she, "her": her, "helper": self._one([*_ANIMALS], random, animal)}
        middle = int(np.searchsorted(np.cumsum(_MIDDLE), random.random()))
        kinds = ["began", *("found" if i % 2 == 0 else "met" for i in range(middle)), "ended"]
        return "".join(f" {self._fill(self._one(_SENTENCES[kind], random), fixed, random)}" for kind in kinds)

    def preferences(self, rows: int, seed: int, votes: int = 1) -> Iterator[dict]:
        """Draw pairs of stories, judged by experts; arguments and rows as `StoryWorld.preferences`."""
        random = np.random.default_rng(seed)
        for _ in range(rows):
            prompt, (a, b) = self._candidates(2, random)
            row = {"prompt": prompt, "completion_a": a, "completion_b": b}
            yield {**row, **judgement(REWARD(a) - REWARD(b), votes, random)}

    def rankings(self, rows: int, seed: int, size: int, *, only_best: bool = False) -> Iterator[dict]:
        """Draw sets of stories, ordered by one expert; arguments and rows as `StoryWorld.rankings`."""
        random = np.random.default_rng(seed)
        for _ in range(rows):
            prompt, stories = self._candidates(size, random)
            liked = np.array([REWARD(story) for story in stories]) + random.gumbel(size=size)
            ranked = np.argsort(-liked).tolist()
            if only_best:
                ranked = [ranked[0], *(place for place in range(size) if place != ranked[0])]
            row = {"prompt": prompt, "completions": [stories[place] for place in ranked]}
            yield {**row, "best": 0} if only_best else row

    def demonstrations(self, rows: int, seed: int) -> Iterator[dict]:
        """Draw stories as writers write them, as SFT data: `prompt` and `completion`."""
        random = np.random.default_rng(seed)
        for _ in range(rows):
            prompt = self.prompts[random.integers(len(self._subjects))]
            yield {"prompt": prompt, "completion": self.story(prompt, random)}

    def _candidates(self, count: int, random: np.random.Generator) -> tuple[str, list[str]]:
        """A prompt drawn uniformly, and distinct stories of it."""
        prompt = self.prompts[random.integers(len(self._subjects))]
        stories: dict[str, None] = {}
        while len(stories) < count:
            stories[self.story(prompt, random)] = None
        return prompt, list(stories)

    def _one(self, options: Sequence[str], random: np.random.Generator, but: str = "") -> str:
        while (
            option := options[int(np.searchsorted(self._cumulative[len(options)], random.random()))]
        ) == but:
            pass
        return option

    def _fill(self, text: str, fixed: Mapping[str, str], random: np.random.Generator) -> str:
        """Put words into the slots of `text`; a slot with a capital gives its word one."""

        def word(match: re.Match[str]) -> str:
            slot = match[1].lower()
            found = (
                fixed[slot] if slot in fixed else self._fill(self._one(_WORDS[slot], random), fixed, random)
            )
            return found[:1].upper() + found[1:] if match[1] != slot else found

        return _SLOT.sub(word, text)
