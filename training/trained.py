"""What a probe has seen, as far as its card and the files at hand tell: rows and files that no figure may be of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from monitor.errors import ConfigInvalid
from probes_store.card import Card
from training.data import OWN, Part, Row, same_text
from training.load import is_hub, stem
from training.recipe import Recipe, gather

_SEEN: tuple[Part, ...] = ("fit", "calibrate")


@dataclass(frozen=True, slots=True)
class Trained:
    """recipe: of the card, None if it has none; parts: its rows, all empty if they can't be told; missing: why not

    files: names of the card's files, without folders and endings
    """

    recipe: Recipe | None
    parts: dict[Part, list[Row]]
    files: frozenset[str]
    missing: str = ""

    @classmethod
    def of(cls, card: Card, folder: Path) -> Trained:
        """folder: where the recipe's files lie. raises: ConfigInvalid if one is not the file that the card names"""
        files = frozenset(stem(f.file) for f in card.data)
        parts: dict[Part, list[Row]] = {"fit": [], "calibrate": [], "test": []}
        recipe = recipe_of(card)
        if recipe is None:
            return cls(None, parts, files, "its card has no recipe")
        try:
            parts, found = gather(recipe, folder)
        except ConfigInvalid as error:
            return cls(recipe, parts, files, str(error))
        known = {(f.file, f.sha256) for f in card.data}
        for file in found:
            if (file.file, file.sha256) not in known:
                raise ConfigInvalid(f"{file.file} in {str(folder)!r} is not the file that the probe was trained on")
        return cls(recipe, parts, files)

    @property
    def texts(self) -> set[str]:
        """As `same_text` writes them."""
        return {same_text(r.text) for part in _SEEN for r in self.parts[part]}

    @property
    def answers(self) -> set[str]:
        """Identities of what was judged by its answer."""
        return {r.identity for part in _SEEN for r in self.parts[part] if r.answer}


def recipe_of(card: Card) -> Recipe | None:
    try:
        return Recipe.model_validate(card.fit.get("recipe"))
    except ValidationError:
        return None


def seen_files(card: Card) -> set[str]:
    """sha256 of the files that were fitted or calibrated on, a part of them or all; those of an older card, which does
    not say, too."""
    return {file.sha256 for file in card.data if not file.used or any(file.used.get(part) for part in _SEEN)}


def beyond_recipe(card: Card) -> set[str]:
    """sha256 of the files that were fitted on beside the recipe's, as `midstream retrain` does: their rows are in no
    part."""
    recipe = recipe_of(card)
    own = [str(OWN.get(s.file, s.file)) for s in recipe.sources] if recipe is not None else []
    names = {file if is_hub(file) else Path(file).name for file in own}
    found = set()
    for file in card.data:
        if file.file in names:
            names.remove(file.file)  # the recipe's come first; another one of this name is not the recipe's
        elif not file.used or file.used.get("fit"):
            found.add(file.sha256)
    return found
