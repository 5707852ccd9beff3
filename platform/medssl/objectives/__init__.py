"""Pretraining objectives, one file per method. A new method is one file and one line in each of the two places here."""

from __future__ import annotations

from medssl.objectives.barlow_twins import BarlowTwins, BarlowTwinsParams, barlow_twins_loss

ObjectiveParams = BarlowTwinsParams  # a discriminated union on `name` once there are two

METHODS = {"barlow_twins": BarlowTwins}

__all__ = ["METHODS", "BarlowTwins", "BarlowTwinsParams", "ObjectiveParams", "barlow_twins_loss"]
