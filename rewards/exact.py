"""An answer that has to be there letter by letter."""

from typing import Any

from rewards.verdict import NO_ANSWER, Item, Verdict, needed


class ExactGrader:
    """The whole text equals the item's answer, white space around both aside."""

    def grade(self, item: Item, text: str) -> Verdict:
        """Whether they are equal."""
        said = text.strip()
        if not said:
            return NO_ANSWER
        return Verdict(said == needed(item, "answer", "exact").strip(), said)

    def check(self, item: Item) -> None:
        """Raise ValueError unless the item has an answer."""
        needed(item, "answer", "exact")

    def fingerprint(self) -> dict[str, Any]:
        """Its name says everything."""
        return {"grader": "exact"}
