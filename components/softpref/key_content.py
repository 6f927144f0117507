"""The key content of a text by RAKE, and the text without some of it. Deterministic, and knows no model.

RAKE (Rose, Engel, Cramer and Cowley 2010): candidate phrases are the longest runs of words between
punctuation, line ends and stop words. A word scores its degree, the words of all phrases that it stands in,
over how often it occurs; a phrase scores the sum of its words. Stop words are those of one language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from fractions import Fraction

from softpref.errors import ConfigError
from softpref.records.dataset import Text

# what carries grammar rather than content: articles, pronouns, prepositions, conjunctions, auxiliaries,
# adverbs of degree, and their contractions
_ENGLISH = """
a about above across after again against all almost along already also although always am among an and
another any anybody anyone anything are around as at away be because been before behind being below beneath
beside besides between beyond both but by can cannot could despite did do does doing done down during each
either else enough even ever every everybody everyone everything except few for from further had has have
having he hence her here hers herself him himself his how however i if in indeed inside instead into is it
its itself just least less lest like many may maybe me might mine more moreover most much must my myself
near neither never nevertheless next no nobody none nor not nothing now of off often on once one only onto
or other others otherwise ought our ours ourselves out outside over own per perhaps quite rather really same
shall she should since so some somebody someone something sometimes somewhat still such than that the their
theirs them themselves then there thereby therefore these they this those though through throughout thus
till to together too toward towards under unless until up upon us very via was we well were what whatever
when whenever where whereas wherever whether which whichever while who whoever whom whose why will with
within without would yet you your yours yourself yourselves
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't
shouldn't wasn't weren't won't wouldn't he'd he'll he's here's how's i'd i'll i'm i've it'd it'll it's let's
she'd she'll she's that'd that'll that's there's they'd they'll they're they've we'd we'll we're we've what's
when's where's who'd who'll who's why's you'd you'll you're you've
"""
STOP_WORDS = {"en": frozenset(_ENGLISH.split())}

_WORD = re.compile(r"[^\W_]+(?:['’_-][^\W_]+)*")
_WITHIN = re.compile(r"[ \t\u00a0]+")  # what may stand between two words of a phrase


def check_language(language: str) -> None:
    """Refuse a language without stop words: every word of its texts would be key content.

    Raises:
        ConfigError: names those that there are.
    """
    if language not in STOP_WORDS:
        raise ConfigError(
            f"degree_language must be {' or '.join(sorted(STOP_WORDS))}, got {language!r}: key content is "
            "found by a language's stop words, and there is no list of them for another"
        )


def key_phrases(text: str, language: str = "en") -> list[str]:
    """The distinct candidate phrases of a text, in lower case: highest score first, then as they occur."""
    phrases = [[_name(word) for word in run] for run in _candidates(text, language)]
    frequency = Counter(word for phrase in phrases for word in phrase)
    degree: Counter[str] = Counter()
    for phrase in phrases:
        for word in phrase:
            degree[word] += len(phrase)
    # exact, for phrases of equal score keep their order
    scores = {
        " ".join(phrase): sum((Fraction(degree[word], frequency[word]) for word in phrase), Fraction())
        for phrase in phrases
    }
    return sorted(scores, key=lambda phrase: -scores[phrase])


def without(text: str, phrases: Collection[str], language: str = "en") -> str:
    """The text without some of its candidate phrases, wherever they occur; spaces that meet become one."""
    kept, end = "", 0
    for run in _candidates(text, language):
        if " ".join(map(_name, run)) not in phrases:
            continue
        before, behind = kept + text[end : run[0].start()], run[-1].end()
        kept, end = before.rstrip(" "), behind
        while text.startswith(" ", end):
            end += 1
        if len(kept) < len(before) or end > behind:
            kept += " "
    return kept + text[end:]


def texts_by_level(completion: Text, levels: int, language: str = "en") -> list[Text]:
    """A completion at levels 1 … `levels` − 1: level k lacks the highest `⌈k/(levels − 1) · P⌉` of P phrases.

    Args:
        completion: text or messages; the phrases are those of all its messages.

    Returns:
        None of a completion with fewer than `levels` − 1 phrases: two levels would be one text.
    """
    contents = [completion] if isinstance(completion, str) else [one["content"] for one in completion]
    phrases = key_phrases("\n".join(contents), language)
    if len(phrases) < levels - 1:
        return []
    texts: list[Text] = []
    for level in range(1, levels):
        gone = frozenset(phrases[: -(-level * len(phrases) // (levels - 1))])
        left = [without(content, gone, language) for content in contents]
        if isinstance(completion, str):
            texts += left
        else:
            texts.append([{**one, "content": text} for one, text in zip(completion, left, strict=True)])
    return texts


def _name(word: re.Match[str]) -> str:
    return word[0].lower().replace("’", "'")


def _candidates(text: str, language: str) -> list[list[re.Match[str]]]:
    """The words of each candidate phrase, in order, with their places."""
    stop_words = STOP_WORDS[language]
    runs: list[list[re.Match[str]]] = []
    end = -1  # of the word before, where it belongs to a phrase
    for word in _WORD.finditer(text):
        if _name(word) in stop_words:
            end = -1
            continue
        if end >= 0 and _WITHIN.fullmatch(text, end, word.start()):
            runs[-1].append(word)
        else:
            runs.append([word])
        end = word.end()
    return runs
