"""The stages: each turns its part of the recipe and its inputs into one artifact."""
