"""Convertible: a module that a Recipe can be applied to."""

from __future__ import annotations

from ..errors import check_type, check_value
from ..recipe import CACHES, Recipe


class Convertible:
    """A module whose GEMMs run in FP8 by ``recipe``, or in high precision where that is None.

    :func:`fastfp8.nn.convert` finds such modules and calls :meth:`set_recipe`.
    """

    recipe: Recipe | None = None
    cache: str = "e4m3"
    """In what the input is kept for backward: see :class:`fastfp8.Recipe`."""

    def set_recipe(self, recipe: Recipe | None, cache: str | None = None) -> None:
        """Compute by ``recipe`` from now on; ``cache`` None takes ``recipe.cached``.

        Raises:
            TypeError: ``recipe`` is neither a Recipe nor None.
            ValueError: ``cache`` is another than the three, or the module cannot compute by this recipe. It then stays
                as it is.
        """
        op = f"nn.{type(self).__name__}"
        check_type(recipe, (Recipe, type(None)), op, "recipe", "a fastfp8.Recipe or None")
        if cache is None:
            cache = self.cache if recipe is None else recipe.cached
        check_value(cache in CACHES, op, "cache", " or ".join(map(repr, CACHES)), cache)
        self.recipe, self.cache = recipe, cache

    def describe(self) -> str:
        """What a Conversion tells of it."""
        return f"{type(self).__name__}, input kept as {self.cache}"
