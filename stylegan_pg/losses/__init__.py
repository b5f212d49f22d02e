"""Losses of G and D: objectives, which are functions of D's scores, and regularisation terms."""

from stylegan_pg.losses.objectives import OBJECTIVES, Objective, objective_of, per_image, scores_of
from stylegan_pg.losses.terms import TERMS, DInputs, GInputs, Term, squared_norms

__all__ = [
    "OBJECTIVES",
    "TERMS",
    "DInputs",
    "GInputs",
    "Objective",
    "Term",
    "objective_of",
    "per_image",
    "scores_of",
    "squared_norms",
]
